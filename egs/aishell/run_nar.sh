#!/usr/bin/env bash
# Autoregressive teacher to Mask-CTC students on AISHELL-1, or on the Mandarin demo corpus.
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_nar.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
