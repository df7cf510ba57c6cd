#!/usr/bin/env bash
# HuBERT distilled for recognition: on AISHELL-1, or on the Mandarin demo corpus.
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_hubert.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
