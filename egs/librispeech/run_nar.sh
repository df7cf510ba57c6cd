#!/usr/bin/env bash
# Autoregressive teacher to Mask-CTC students on LibriSpeech, Mini LibriSpeech, the demo corpus, or any folder with
# *.trans.txt (--corpus trans).
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_nar.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
