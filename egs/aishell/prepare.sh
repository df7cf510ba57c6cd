#!/usr/bin/env bash
# Prepare a corpus for training: find or make it, cut sets, features, tokens, validation.
#
#   ./prepare.sh                                                  download and prepare AISHELL-1
#   ./prepare.sh --corpus demo --token-kind pinyin                a synthesised corpus
#   ./prepare.sh --corpus-dir /corpora/data_aishell --parts train,dev --token-kind pinyin
exec "$(dirname "${BASH_SOURCE[0]}")/../../local/prepare.sh" --recipe "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" \
  --corpus aishell --token-kind char --demo-language zh "$@"
