#!/usr/bin/env bash
# One set of weights for whole utterances and, pruned, for streams: on LibriSpeech, Mini LibriSpeech, the demo corpus, or any
# folder with *.trans.txt (--corpus trans).
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_dualmode.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
