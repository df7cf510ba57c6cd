#!/usr/bin/env bash
# From a language model to a CIF recogniser on LibriSpeech, Mini LibriSpeech, the demo corpus, or any folder with
# *.trans.txt (--corpus trans).
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_hkd.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
