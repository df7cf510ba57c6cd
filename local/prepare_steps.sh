# shellcheck shell=bash
# shellcheck disable=SC2154  # the options are variables of the script that sources this
# The steps that every recipe's prepare.sh is made of.  Sourced by it, after local/stages.sh and parse_options.
# They read the script's options: corpus corpus_dir parts data_dir nj vocab_size token_kind speed_perturb features
# language check_audio max_reject_ratio max_utts partial musan_dir demo_options short.

_steps=../../local

# Fill in the options that depend on others; $1: language of the demo corpus.
prepare_defaults() {
  demo_language=$1
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
    [[ -n $max_utts ]] || max_utts=200
    [[ -n $demo_options ]] || demo_options="--train-speakers 16 --dev-speakers 4 --test-speakers 4"
  fi
  if [[ $token_kind == bpe ]]; then lang_dir=$data_dir/lang_bpe_$vocab_size; else lang_dir=$data_dir/lang_$token_kind; fi
  # shellcheck disable=SC2034  # read by stages.sh
  marker_dir=$data_dir/.done
  corpus_words=(--corpus "$corpus" --corpus-dir "$corpus_dir" --parts "${parts:-none}" --language "$language"
    --nj "$nj" --max-reject-ratio "$max_reject_ratio")
}

prepare_corpus() {
  if [[ $corpus == demo && $fetch == true ]]; then
    if begin --name synthesis --option corpus_dir demo_language demo_options --output "$corpus_dir/demo.json" \
      --code 'icefall_kd/data/demo*.py' local/prepare_demo.py; then
      # shellcheck disable=SC2086  # demo_options is a list of words
      python3 $_steps/prepare_demo.py --out-dir "$corpus_dir" --language "$demo_language" --nj "$nj" $demo_options
      finish
    fi
  elif [[ $fetch == true ]]; then
    # A marker of its own: what is downloaded is an input of the check below.
    if begin --name download --option corpus corpus_dir parts --output "$corpus_dir"; then
      mkdir -p "$corpus_dir"
      python3 $_steps/check_corpus.py "${corpus_words[@]}" --download true --partial "$partial"
      finish
    fi
  fi
  begin --option corpus corpus_dir parts language partial max_reject_ratio --input "$corpus_dir" \
    --output "$data_dir/checked.json" --code icefall_kd/data/corpora.py local/check_corpus.py || return 0
  python3 $_steps/check_corpus.py "${corpus_words[@]}" --partial "$partial" --out "$data_dir/checked.json"
}

prepare_manifests() {
  begin --option corpus corpus_dir parts language speed_perturb check_audio max_reject_ratio max_utts \
    --input "$corpus_dir" --output "$data_dir/corpus.json" "$data_dir/manifests" \
    --code icefall_kd/data/{manifests,prepare,recordings,corpora}.py icefall_kd/text/normalize.py \
    icefall_kd/labels/keys.py local/make_manifests.py || return 0
  python3 $_steps/make_manifests.py "${corpus_words[@]}" --data-dir "$data_dir" --speed-perturb "$speed_perturb" \
    --check-audio "$check_audio" --max-utts "${max_utts:-none}"
}

prepare_noise() {
  local fetch_noise=false
  [[ -n $musan_dir ]] || { musan_dir=download/musan && fetch_noise=true && mkdir -p "$musan_dir"; }
  begin --option musan_dir --input "$musan_dir" --output "$data_dir/manifests/cuts_musan.jsonl.gz" \
    --code icefall_kd/data/{recordings,manifests}.py local/make_noise.py || return 0
  python3 $_steps/make_noise.py --data-dir "$data_dir" --musan-dir "$musan_dir" --download "$fetch_noise"
}

prepare_features() {
  local words=()
  [[ $features == precomputed ]] || return 0
  begin --input "$data_dir/corpus.json" "$data_dir/manifests" --output "$data_dir/fbank/feature_extractor.json" \
    --code icefall_kd/data/{features,manifests}.py local/compute_features.py || return 0
  if [[ -f $data_dir/manifests/cuts_musan.jsonl.gz ]]; then
    words=(--parts "$(_prepared_parts),musan")
  fi
  python3 $_steps/compute_features.py --data-dir "$data_dir" --nj "$nj" "${words[@]}"
}

_prepared_parts() {
  local file name list=""
  for file in "$data_dir"/manifests/cuts_*.jsonl.gz; do
    name=${file##*/cuts_}
    name=${name%.jsonl.gz}
    [[ $name == musan ]] || list+=${list:+,}$name
  done
  printf '%s' "$list"
}

prepare_tokens() {
  begin --option token_kind vocab_size --input "$data_dir/corpus.json" --output "$lang_dir/tokenizer.json" \
    --code icefall_kd/text/tokenizer.py icefall_kd/data/prepare.py || return 0
  python3 $_steps/make_tokens.py --data-dir "$data_dir" --token-kind "$token_kind" --vocab-size "$vocab_size"
}

prepare_validation() {
  local cuts=$data_dir/manifests
  [[ $features == precomputed ]] && cuts=$data_dir/fbank
  begin --option features max_reject_ratio --input "$data_dir/corpus.json" "$cuts" "$lang_dir/tokenizer.json" \
    --output "$data_dir/validated_${lang_dir##*/}.json" \
    --code icefall_kd/data/{validate,filters}.py local/validate_data.py || return 0
  python3 $_steps/validate_data.py --data-dir "$data_dir" --lang-dir "$lang_dir" --features "$features" \
    --max-reject-ratio "$max_reject_ratio"
}
