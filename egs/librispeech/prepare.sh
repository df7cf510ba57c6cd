#!/usr/bin/env bash
# Prepare a corpus for training: find or make it, cut sets, features, tokens, validation.
#
#   ./prepare.sh                                                  download and prepare 960 h
#   ./prepare.sh --corpus demo                                    a synthesised corpus, made in half a minute
#   ./prepare.sh --corpus-dir /corpora/LibriSpeech --parts train-clean-100,dev-clean,test-clean
#   ./prepare.sh --corpus trans --corpus-dir /my/recordings --data-dir data/mine
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/prepare.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "$@"
