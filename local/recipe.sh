# shellcheck shell=bash disable=SC2030,SC2031,SC2034,SC2154
# What the run_*.sh of the systems have in common; sourced behind parse_options, whose options it reads.
#
# Goes to the folder of the recipe.  Sets what options left empty: data_dir, exp_dir (exp/CORPUS and the script's
# exp_tag), train_parts, valid_parts, test_parts, token_kind, extract_jobs, train_jobs; and marker_dir, kind (of features),
# train_cuts, test_cuts, cuts_list, in_turn (how many of what runs one after the other here wait for Slurm together).

[[ -n $recipe ]] || fail 2 "start egs/librispeech/${0##*/} or egs/aishell/${0##*/} instead"
cd "$recipe" || exit 2
# shellcheck disable=SC1091
. ./path.sh
# shellcheck disable=SC1091
. ./cmd.sh

[[ $short == false ]] || corpus_tag=$corpus-short
: "${corpus_tag:=$corpus}"
: "${data_dir:=data/$corpus_tag}" "${exp_dir:=exp/$corpus_tag$exp_tag}"
case $recipe:$corpus in
  *:trans | *:cuts) : "${train_parts:=train}" "${valid_parts:=dev}" "${test_parts:=dev}" ;;
  *librispeech:demo) : "${train_parts:=train-demo}" "${valid_parts:=dev-demo}" "${test_parts:=dev-demo,test-demo}" ;;
  *librispeech:mini) : "${train_parts:=train-clean-5}" "${valid_parts:=dev-clean-2}" "${test_parts:=dev-clean-2}" ;;
  *librispeech:*)
    : "${train_parts:=train-clean-100,train-clean-360,train-other-500}" "${valid_parts:=dev-clean,dev-other}"
    : "${test_parts:=dev-clean,dev-other,test-clean,test-other}"
    ;;
  *) : "${train_parts:=train}" "${valid_parts:=dev}" "${test_parts:=dev,test}" ;;
esac
in_turn=1
if [[ $cmd_backend == slurm ]]; then # how much runs at the same time is the cluster's to say
  in_turn=1000
  : "${extract_jobs:=$in_turn}" "${train_jobs:=$in_turn}"
fi
if [[ $corpus == demo ]]; then
  : "${extract_jobs:=$nj}" "${train_jobs:=$nj}"
  [[ $recipe != *librispeech || -n $token_kind ]] || token_kind=char
fi
: "${extract_jobs:=1}" "${train_jobs:=1}"

for name in data_dir exp_dir audio_dir; do
  [[ ${!name:-} != *,* ]] ||
    fail 2 "--${name//_/-} is ${!name}; commas stand between the files of a list: choose a folder without one in its name"
  [[ ! ${!name:-} =~ (^|[^[:alnum:]])JOB([^[:alnum:]]|$) ]] ||
    fail 2 "--${name//_/-} is ${!name}; the word JOB stands for the number of a task: choose a folder without it in its name"
done

marker_dir=$exp_dir/.done
kind=fbank
IFS=, read -r -a train_cuts <<< "$train_parts"
IFS=, read -r -a test_cuts <<< "$test_parts"
train_cuts=("${train_cuts[@]/#/$data_dir/$kind/cuts_}")
train_cuts=("${train_cuts[@]/%/.jsonl.gz}")
test_cuts=("${test_cuts[@]/#/$data_dir/$kind/cuts_}")
test_cuts=("${test_cuts[@]/%/.jsonl.gz}")

commas() { # commas WORD ...: the words with commas between them
  local IFS=,
  echo "$*"
}
cuts_list=$(commas "${train_cuts[@]}")

lang_dir() { # the tokenizer that the options name, or the one that there is
  local found=("$data_dir"/lang_*)
  case $token_kind:$vocab_size in
    char:* | pinyin:* | plm:*) found=("$data_dir/lang_$token_kind") ;;
    *:?*) found=("$data_dir/lang_bpe_$vocab_size") ;;
    bpe:) found=("$data_dir"/lang_bpe_*) ;;
  esac
  [[ ${#found[@]} == 1 && -d ${found[0]} ]] ||
    fail 2 "no single tokenizer among ${found[*]}; choose with --token-kind and --vocab-size"
  echo "${found[0]}"
}

prepare_data() { # the corpus; the stages of prepare.sh have markers of their own
  # shellcheck disable=SC2086
  ./prepare.sh --corpus "$corpus" --data-dir "$data_dir" --nj "$nj" --short "$short" --partial "$partial" \
    ${corpus_dir:+--corpus-dir "$corpus_dir"} ${parts:+--parts "$parts"} ${token_kind:+--token-kind "$token_kind"} \
    ${vocab_size:+--vocab-size "$vocab_size"} ${plm:+--plm "$plm"} \
    ${speed_perturb:+--speed-perturb "$speed_perturb"} $prepare_args
}

# extract_and_verify DIR,... OPTION ...: all shards of label sets, of utterances or pieces of $pieces seconds, then a check of
# every byte.
extract_and_verify() {
  local dirs dir
  IFS=, read -r -a dirs <<< "$1"
  run_cmd gpu --log "${dirs[0]}/log/extract.JOB.log" --array "0-$((num_shards - 1))%$extract_jobs" -- \
    python3 "../../local/${extractor:-extract_labels.py}" --cuts "$cuts_list" --label-dir "$1" --shard JOB \
    --num-shards "$num_shards" ${pieces:+--pieces "$pieces"} "${@:2}"
  run_cmd cpu -- python3 ../../local/label_sets.py verify "${dirs[@]}" || {
    local code=$?
    forget_tasks # what is damaged or missing was finished once
    return "$code"
  }
  for dir in "${dirs[@]}"; do
    run_cmd cpu -- python3 ../../local/label_sets.py join "$dir" --cuts "${train_cuts[@]}" ${pieces:+--pieces "$pieces"}
  done
}

label_files() { # label_files DIR ...: what extract_and_verify leaves in label sets, one a line
  local dir shard
  for dir in "$@"; do
    echo "$dir/label_set.json"
    for ((shard = 0; shard < num_shards; shard++)); do
      printf '%s/shard-%05d-of-%05d.safetensors\n' "$dir" "$shard" "$num_shards"
    done
  done
}

train_in() { # train_in EXP_DIR OPTION ...: start or resume a training; with --force, start afresh
  local dir=$1
  shift
  if [[ $force == true && -e $dir ]]; then # train.py would go on with it, or find it finished
    log "the training in $dir is moved to $dir.old"
    rm -rf "$dir.old"
    mv "$dir" "$dir.old"
  fi
  # shellcheck disable=SC2086
  run_cmd train --ranks ${num_gpus:+--gpus "$num_gpus"} --until "$dir/train_summary.json" -- \
    python3 ./train.py --exp-dir "$dir" --manifest-dir "$data_dir/$kind" --train-parts "$train_parts" \
    --valid-parts "$valid_parts" "$@" $train_args
}

part_without_results() { # part_without_results FOLDER: the first of the test parts that has none there
  local part parts
  IFS=, read -r -a parts <<< "$test_parts"
  for part in "${parts[@]}"; do
    if [[ -z $(find "$1" -name "results-$part-*.json" -print -quit 2> /dev/null) ]]; then
      echo "$part"
      return
    fi
  done
}

decode_step() { # decode_step NAME EXP_DIR METHOD OPTION ...: decode and score all test parts, unless that is done
  local name=$1 dir=$2 method=$3 array=() part tries=1
  shift 3
  begin --name "$name" --option decode_args test_parts "options=$*" --input "$dir/train_summary.json" \
    "${test_cuts[@]}" --output "$dir/$method" --code 'icefall_kd/decode/*.py' icefall_kd/scoring.py || return 0
  if [[ $cmd_backend == slurm ]]; then # a task for each part
    array=(--log "$dir/log/$name.JOB.log" --array "0-$((${#test_cuts[@]} - 1))")
    set -- --shard JOB --num-shards "${#test_cuts[@]}" "$@"
  fi
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=$nj run_cmd gpu "${array[@]}" -- ./decode.py --exp-dir "$dir" --manifest-dir "$data_dir/$kind" \
    --test-parts "$test_parts" --decoding-method "$method" "$@" $decode_args
  # A network file system may show up to a minute later what other nodes wrote.
  [[ $cmd_backend != slurm ]] || tries=10
  until part=$(part_without_results "$dir/$method") && [[ -z $part ]]; do
    if ((--tries == 0)); then
      forget_tasks # it was finished once, and its results were removed since
      fail 4 "there are no results of $part in $dir/$method; run the same line again"
    fi
    sleep 10
  done
  finish
}

side_by_side() ( # side_by_side NUMBER FUNCTION WORDS ...: the function with each of its words, so many at the same time
  at_once=$1 function=$2 running=0 code=0
  shift 2
  if ((at_once <= 1 || $# <= 1)); then
    for call; do
      # shellcheck disable=SC2086
      "$function" $call
    done
    exit
  fi
  set -m # each in a process group of its own, so that a signal reaches all of it
  trap 'end_calls 143' TERM
  trap 'end_calls 130' INT
  for call; do
    if ((running >= at_once)); then
      wait -n || code=$?
      running=$((running - 1))
    fi
    ((code == 0)) || break # the others may end, no more are started
    one_call < /dev/null > >(sed -u "s/^/[$call] /") 2> >(sed -u "s/^/[$call] /" >&2) &
    running=$((running + 1))
  done
  while ((running > 0)); do
    wait -n || code=$?
    running=$((running - 1))
  done
  exit "$code"
)

one_call() { # of side_by_side
  trap - TERM INT
  trap 'code=$?; ((code == 0)) || log "failed with exit code $code: $function $call"' EXIT
  # shellcheck disable=SC2086
  "$function" $call
}

end_calls() { # end_calls EXIT_CODE: of side_by_side; what runs gets the time to save
  jobs -p | xargs -r -I {} kill -TERM -- -{} 2> /dev/null || true
  wait || true
  exit "$1"
}
