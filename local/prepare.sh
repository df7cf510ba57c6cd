#!/usr/bin/env bash
# Everything is written below --data-dir: manifests/ (cut sets), fbank/ (the same with features), lang_*/ (tokens),
# rejected/ (what was unfit, with reasons), corpus.json (counts, hours, fingerprint).  With --graphs true lang_*/ also
# gets the lexicon, the language model and the graphs of decoding with k2 (docs/graph_decoding.md).  Run the same line
# again to go on where it stopped.  Relative paths are relative to the recipe's folder.
#
# Started by egs/*/prepare.sh, which hold the defaults of their recipe.
set -euo pipefail

recipe=               # folder of the recipe, set by its prepare.sh
corpus=librispeech    # corpus: librispeech, mini, aishell, demo, trans (audio with *.trans.txt files), cuts (lhotse cut sets)
corpus_dir=""         # folder of a corpus that is on disk already; empty: download/<corpus>, made or downloaded
parts=""              # parts to prepare, comma-separated; empty: all that the corpus has
data_dir=""           # folder of everything prepared; empty: data/<corpus>
nj=4                  # parallel jobs; clipped to the number of items
token_kind=bpe        # tokens: bpe, char, pinyin (initials and finals with tone), plm (pieces of a language model)
vocab_size=500        # tokens of bpe; clipped where the corpus is too small
plm=minilm            # language model of plm tokens: hub id, folder or short name, of the BERT family
plm_min_count=1       # plm: pieces that occur less often in the training parts are spelled with shorter ones
speed_perturb=auto    # copies of the training parts at 0.9 and 1.1 of the speed: true, false; auto: not for demo, trans and cuts
features=precomputed  # precomputed, or on_the_fly: computed from audio in training
language=auto         # text normalisation: en, zh; auto: by the corpus, or the script of the transcripts
check_audio=full      # full: decode every recording once; header: believe the headers
max_reject_ratio=0.01 # share of a part's utterances that may be unfit
partial=false         # accept a corpus that holds less than was published
max_utts=""           # take only so many utterances of each part
musan=false           # prepare noise for augmentation, too
musan_dir=""          # folder of MUSAN; empty: download/musan, downloaded
graphs=false          # make the graphs of decoding with k2, too: L, G, LG, HLG
lexicon=""            # lexicon of the graphs (WORD token token ... a line, or WORD alone); empty: the words of the texts
lm_text=""            # text files, comma-separated, besides the training transcripts; a sentence a line
lm_order=3            # order of the n-gram model that is made of them
arpa=""               # n-gram model of the words in ARPA format; empty: made here
demo_language=en      # language of the demo corpus: en, zh
demo_options=""       # options of local/prepare_demo.py
short=false           # a small demo corpus, or 200 utterances a part

# shellcheck source=local/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
parse_options "$@"
[[ -n $recipe ]] || fail 2 "start egs/librispeech/prepare.sh or egs/aishell/prepare.sh instead"
cd "$recipe"
# shellcheck disable=SC1091
. ./path.sh
# shellcheck disable=SC1091
. ./cmd.sh

fetch=false
if [[ -z $corpus_dir ]]; then
  case $corpus in
    trans | cuts) fail 2 "--corpus $corpus needs --corpus-dir" ;;
  esac
  corpus_dir=download/$corpus
  fetch=true
  if [[ $short == true && $corpus == demo ]]; then corpus_dir+=_short; fi
fi
if [[ -z $data_dir ]]; then
  data_dir=data/$corpus
  if [[ $short == true ]]; then data_dir+=_short; fi
fi
if [[ $speed_perturb == auto ]]; then
  case $corpus in
    librispeech | mini | aishell) speed_perturb=true ;;
    *) speed_perturb=false ;;
  esac
fi
if [[ $short == true ]]; then
  : "${max_utts:=200}" "${demo_options:=--train-speakers 16 --dev-speakers 4 --test-speakers 4}"
fi
if [[ $token_kind == bpe ]]; then lang_dir=$data_dir/lang_bpe_$vocab_size; else lang_dir=$data_dir/lang_$token_kind; fi
marker_dir=$data_dir/.done
corpus_words=(--corpus "$corpus" --corpus-dir "$corpus_dir" --parts "${parts:-none}" --language "$language"
  --nj "$nj" --max-reject-ratio "$max_reject_ratio")

prepared_parts() { # the parts in manifests/, noise left out
  local file name list=""
  for file in "$data_dir"/manifests/cuts_*.jsonl.gz; do
    name=${file##*/cuts_}
    name=${name%.jsonl.gz}
    [[ $name == musan ]] || list+=${list:+,}$name
  done
  printf '%s' "$list"
}

stage_0_corpus() { # Find, synthesise or download the corpus; compare counts and hours with the published ones
  if [[ $corpus == demo && $fetch == true ]]; then
    if begin --name synthesis --option corpus_dir demo_language demo_options --output "$corpus_dir/demo.json" "$corpus_dir" \
      --code 'icefall_kd/data/demo*.py' local/prepare_demo.py; then
      # shellcheck disable=SC2086  # demo_options is a list of words
      run_cmd cpu --cpus "$nj" -- python3 ../../local/prepare_demo.py --out-dir "$corpus_dir" --language "$demo_language" --nj "$nj" $demo_options
      finish
    fi
  elif [[ $fetch == true ]]; then
    # A marker of its own: what is downloaded is an input of the check below.
    if begin --name download --option corpus corpus_dir parts --output "$corpus_dir"; then
      mkdir -p "$corpus_dir"
      python3 ../../local/check_corpus.py "${corpus_words[@]}" --download true --partial "$partial"
      finish
    fi
  fi
  begin --option corpus corpus_dir parts language partial max_reject_ratio --input "$corpus_dir" \
    --output "$data_dir/checked.json" --code icefall_kd/data/corpora.py local/check_corpus.py || return 0
  run_cmd cpu --cpus "$nj" -- python3 ../../local/check_corpus.py "${corpus_words[@]}" --partial "$partial" \
    --out "$data_dir/checked.json"
}

stage_1_manifests() { # Cut sets: recordings checked, text normalised, speed copies of the training parts
  begin --option corpus corpus_dir parts language speed_perturb check_audio max_reject_ratio max_utts \
    --input "$corpus_dir" --output "$data_dir/corpus.json" "$data_dir/manifests" \
    --code icefall_kd/data/{manifests,prepare,recordings,corpora}.py icefall_kd/text/normalize.py \
    icefall_kd/labels/keys.py local/make_manifests.py || return 0
  run_cmd cpu --cpus "$nj" -- python3 ../../local/make_manifests.py "${corpus_words[@]}" --data-dir "$data_dir" \
    --speed-perturb "$speed_perturb" --check-audio "$check_audio" --max-utts "${max_utts:-none}"
}

stage_2_noise() { # Cut set of noises (--musan true)
  local fetch_noise=false
  [[ $musan == true ]] || return 0
  [[ -n $musan_dir ]] || { musan_dir=download/musan && fetch_noise=true && mkdir -p "$musan_dir"; }
  begin --option musan_dir --input "$musan_dir" --output "$data_dir/manifests/cuts_musan.jsonl.gz" \
    --code icefall_kd/data/{recordings,manifests}.py local/make_noise.py || return 0
  python3 ../../local/make_noise.py --data-dir "$data_dir" --musan-dir "$musan_dir" --download "$fetch_noise"
}

stage_3_features() { # 80-bin log-mel features (--features precomputed)
  local words=()
  [[ $features == precomputed ]] || return 0
  begin --input "$data_dir/corpus.json" "$data_dir/manifests" --output "$data_dir/fbank/feature_extractor.json" "$data_dir/fbank" \
    --code icefall_kd/data/{features,manifests}.py local/compute_features.py || return 0
  if [[ -f $data_dir/manifests/cuts_musan.jsonl.gz ]]; then
    words=(--parts "$(prepared_parts),musan")
  fi
  # Here one process with a pool is the quickest; jobs are an array of one process each, and one that joins theirs.
  [[ ${cmd_backend:-local} == local ]] ||
    run_cmd cpu --cpus 1 --log "$data_dir/log/features.JOB.log" --array "0-$((nj - 1))%$nj" -- \
      python3 ../../local/compute_features.py --data-dir "$data_dir" --nj "$nj" --shard JOB "${words[@]}"
  run_cmd cpu --cpus 1 -- python3 ../../local/compute_features.py --data-dir "$data_dir" --nj "$nj" "${words[@]}"
}

stage_4_tokens() { # Tokenizer, trained on the training parts
  local options=()
  [[ $token_kind != plm ]] || options=(--plm "$plm" --plm-min-count "$plm_min_count")
  begin --option token_kind vocab_size ${options:+plm plm_min_count} --input "$data_dir/corpus.json" \
    --output "$lang_dir"/{tokenizer.json,tokens.txt,'bpe.*'} --code icefall_kd/text/{tokenizer,wordpiece}.py icefall_kd/data/prepare.py \
    || return 0
  run_cmd cpu -- python3 ../../local/make_tokens.py --data-dir "$data_dir" --token-kind "$token_kind" \
    --vocab-size "$vocab_size" "${options[@]}"
}

stage_5_validation() { # Check everything that training assumes
  local cuts=$data_dir/manifests
  [[ $features == on_the_fly ]] || cuts=$data_dir/fbank
  begin --option features max_reject_ratio --input "$data_dir/corpus.json" "$cuts" "$lang_dir/tokenizer.json" \
    --output "$data_dir/validated_${lang_dir##*/}.json" \
    --code icefall_kd/data/{validate,filters}.py local/validate_data.py || return 0
  run_cmd cpu -- python3 ../../local/validate_data.py --data-dir "$data_dir" --lang-dir "$lang_dir" --features "$features" \
    --max-reject-ratio "$max_reject_ratio"
}

stage_6_lexicon() { # Lexicon: words, and the tokens that spell them (--graphs true)
  local files=()
  [[ $graphs == true ]] || return 0
  IFS=, read -r -a files <<< "$lm_text"
  begin --option lexicon lm_text --input "$data_dir/corpus.json" "$lang_dir/tokenizer.json" \
    ${lexicon:+"$lexicon"} "${files[@]}" --output "$lang_dir/lexicon.txt" "$lang_dir/words.txt" "$lang_dir/lm_text.txt" \
    --code icefall_kd/text/{lexicon,tokenizer,normalize}.py icefall_kd/data/prepare.py local/make_lexicon.py || return 0
  run_cmd cpu -- python3 ../../local/make_lexicon.py --data-dir "$data_dir" --lang-dir "$lang_dir" \
    --lexicon "${lexicon:-none}" ${lm_text:+--text "$lm_text"}
}

stage_7_language_model() { # n-gram model of the words (--graphs true, unless --arpa names one)
  [[ $graphs == true && -z $arpa ]] || return 0
  begin --option lm_order --input "$lang_dir/lm_text.txt" --output "$lang_dir/lm.arpa" \
    --code icefall_kd/text/{ngram,corpus}.py local/make_ngram.py || return 0
  run_cmd cpu -- python3 ../../local/make_ngram.py --text "$lang_dir/lm_text.txt" --order "$lm_order" --out "$lang_dir/lm.arpa"
}

stage_8_graphs() { # L, G, LG and HLG; needs k2 (--graphs true)
  [[ $graphs == true ]] || return 0
  begin --input "$lang_dir"/{tokenizer.json,lexicon.txt,words.txt} "${arpa:-$lang_dir/lm.arpa}" \
    --output "$lang_dir"/{L,L_disambig,G,LG,HLG}.safetensors --code icefall_kd/text/{graphs,lexicon}.py || return 0
  run_cmd cpu -- python3 ../../local/make_graphs.py --lang-dir "$lang_dir" --arpa "${arpa:-$lang_dir/lm.arpa}"
}

run_stages
