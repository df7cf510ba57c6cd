#!/usr/bin/env bash
# MVQ-KD on AISHELL-1, or on the Mandarin demo corpus.
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/run_mvq.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" \
  --teacher whisper-base "$@"
