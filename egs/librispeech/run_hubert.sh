#!/usr/bin/env bash
# HuBERT distilled for recognition: on LibriSpeech, Mini LibriSpeech, the demo corpus, or any
# folder with *.trans.txt (--corpus trans).
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_hubert.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
