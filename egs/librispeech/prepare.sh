#!/usr/bin/env bash
# Prepare a corpus for training: find or make it, cut sets, features, tokens, validation.
#
#   ./prepare.sh                                                  download and prepare 960 h
#   ./prepare.sh --corpus demo                                    a synthesised corpus, made in half a minute
#   ./prepare.sh --corpus-dir /corpora/LibriSpeech --parts train-clean-100,dev-clean,test-clean
#   ./prepare.sh --corpus trans --corpus-dir /my/recordings --data-dir data/mine
#
# Everything is written below --data-dir: manifests/ (cut sets), fbank/ (the same with features), lang_*/ (tokens),
# rejected/ (what was unfit, with reasons), corpus.json (counts, hours, fingerprint).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

corpus=librispeech    # corpus: librispeech, mini, demo, trans (audio with *.trans.txt files), cuts (lhotse cut sets)
corpus_dir=""         # folder of a corpus that is on disk already; empty: download/<corpus>, made or downloaded
parts=""              # parts to prepare, comma-separated; empty: all that the corpus has
data_dir=""           # folder of everything prepared; empty: data/<corpus>
nj=4                  # parallel jobs; clipped to the number of items
token_kind=bpe        # tokens: bpe, char
vocab_size=500        # tokens of bpe; clipped where the corpus is too small
speed_perturb=auto    # copies of the training parts at 0.9 and 1.1 of the speed: true, false; auto: not for demo and trans
features=precomputed  # precomputed, or on_the_fly: computed from audio in training
language=auto         # text normalisation: en, zh; auto: by the corpus, or the script of the transcripts
check_audio=full      # full: decode every recording once; header: believe the headers
max_reject_ratio=0.01 # share of a part's utterances that may be unfit
partial=false         # accept a corpus that holds less than was published
max_utts=""           # take only so many utterances of each part
musan=false           # prepare noise for augmentation, too
musan_dir=""          # folder of MUSAN; empty: download/musan, downloaded
demo_options=""       # options of local/prepare_demo.py
short=false           # a small demo corpus, or 200 utterances a part

. ./path.sh
. ../../local/stages.sh
parse_options "$@"
. ../../local/prepare_steps.sh
prepare_defaults en

stage_0_corpus() {  # Find, synthesise or download the corpus; compare counts and hours with the published ones.
  prepare_corpus
}

stage_1_manifests() {  # Cut sets: recordings checked, text normalised, speed copies of the training parts.
  prepare_manifests
}

stage_2_noise() {  # Cut set of noises (--musan true).
  [[ $musan == false ]] || prepare_noise
}

stage_3_features() {  # 80-bin log-mel features (--features precomputed).
  prepare_features
}

stage_4_tokens() {  # Tokenizer, trained on the training parts.
  prepare_tokens
}

stage_5_validation() {  # Check everything that training assumes.
  prepare_validation
}

run_stages
