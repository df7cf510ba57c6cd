#!/usr/bin/env bash
# One set of weights for whole utterances and, pruned, for streams: on AISHELL-1, or on the Mandarin demo corpus.
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_dualmode.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
