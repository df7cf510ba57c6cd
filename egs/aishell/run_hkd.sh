#!/usr/bin/env bash
# From a language model to a CIF recogniser on AISHELL-1, or on the Mandarin demo corpus.
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_hkd.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
