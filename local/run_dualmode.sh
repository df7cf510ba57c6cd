#!/usr/bin/env bash
# One set of weights for whole utterances and, pruned, for streams; with and without pre-training on audio alone.
#
# Started by egs/*/run_dualmode.sh.  Pre-trains the encoders that the words of --systems ask for, trains one recogniser for
# every word and every seed, decodes dev and test in each mode it has, and prints one table.  Run the same line again to
# go on where it stopped.  Systems: a1 full, a2 streaming, a3 sparse streaming, a4 both modes, a5 both modes, of which
# streaming is sparse; after pre-training of the full mode b1 as a1, b2 as a3, b3 as a5, after that of the sparse
# streaming mode b4 as a3; after pre-training of both modes c1 as a1, c2 as a5.
set -euo pipefail

recipe=                    # Folder of the recipe (egs/librispeech or egs/aishell), set by its run_dualmode.sh
corpus=demo                # Corpus that prepare.sh knows
corpus_dir=                # Folder of a corpus that is on disk already
parts=                     # Parts to prepare, with commas; empty: all of the corpus
partial=false              # Accept parts that hold less than was published
train_parts=               # Parts to train on, with commas; empty: the corpus's own
valid_parts=               # Parts to validate and choose on
test_parts=                # Parts to decode, with commas
data_dir=                  # Prepared data; empty: data/CORPUS
exp_dir=                   # Experiments; empty: exp/CORPUS-dualmode
systems=                   # Rows, with spaces; empty: all, a1 a3 a5 c2 for the demo, a5 c2 of that with --short
seeds=42                   # Seeds, with spaces: one training of each system a seed
sparsity=0.7               # Share of the encoder's blocks that sparse streams do without
ssl_dir=                   # Folder of ssl-full, ssl-streaming, ssl-dual that are trained already; empty: train them
ssl_seed=42                # Seed of the pre-trainings, which all seeds of a system share
ssl_parts=                 # Parts (or paths of cut sets) to pre-train on, with commas; empty: --train-parts
ssl_valid_parts=           # Parts to validate pre-training on; empty: --valid-parts
token_kind=                # Tokens: bpe, char or pinyin; empty: prepare.sh's own
vocab_size=                # BPE tokens; empty: prepare.sh's own
speed_perturb=             # Speed copies of the training parts; empty: prepare.sh's own
config=                    # Options of all trainings in YAML, NAME.yaml; empty: conf/dualmode_CORPUS.yaml or dualmode.yaml
ssl_config=                # What pre-training has in their place; empty: NAME_ssl.yaml, or conf/dualmode_ssl.yaml
prepare_args=              # More options of prepare.sh, in one string
train_args=                # More options of train.py, in one string
ssl_args=                  # More options of pre-training, behind those
dual_args="--dual-kd-scale 0.2 --dual-kd-warm-step 0.2"  # Options of trainings of both modes (not of pre-training)
num_gpus=                  # GPUs of a training on each node; empty: those of cmd.sh with Slurm, no torchrun here
train_jobs=                # Trainings at the same time; empty: 1, or nj for the demo
decoding_methods=          # Searches, with spaces; empty: greedy_search, or ctc_greedy_search for the demo
decode_chunks=             # Chunks of the streaming mode in frames of 40 ms, with spaces; empty: 8 16 32, or 16 with --short
diagnostics=false          # Decode the full mode without masked weights and the streaming mode with them, too
decode_args=               # More options of decode.py, in one string; empty: --avg 3, or --avg 1 with --short
nj=2                       # Processes of data preparation, threads of decoding on a CPU
short=false                # A few utterances and epochs, to see that everything runs

# shellcheck source=local/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
parse_options "$@"
while [[ $ssl_dir == ?*/ ]]; do ssl_dir=${ssl_dir%/}; done
exp_tag=-dualmode
# shellcheck source=local/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

if [[ -z $config ]]; then
  config=conf/dualmode.yaml
  [[ ! -f conf/dualmode_$corpus.yaml ]] || config=conf/dualmode_$corpus.yaml
fi
if [[ -z $ssl_config ]]; then
  ssl_config=${config%.yaml}_ssl.yaml
  [[ -f $ssl_config ]] || ssl_config=conf/dualmode_ssl.yaml
fi
if [[ $short == true ]]; then
  : "${systems:=a5 c2}" "${decode_chunks:=16}" "${decode_args:=--avg 1}"
  train_args="--num-epochs 3 $train_args" ssl_args="--num-epochs 2 $ssl_args"
fi
if [[ $corpus == demo ]]; then
  : "${systems:=a1 a3 a5 c2}" "${decoding_methods:=ctc_greedy_search}"
fi
: "${systems:=a1 a2 a3 a4 a5 b1 b2 b3 b4 c1 c2}" "${decode_chunks:=8 16 32}" "${decode_args:=--avg 3}"
: "${decoding_methods:=greedy_search}"
: "${ssl_parts:=$train_parts}" "${ssl_valid_parts:=$valid_parts}"

# options_of SYSTEM: sets arm (its pre-training; empty: none), modes, sparse, and options of train.py.
options_of() {
  case $1 in
    a?) arm="" ;;
    b[123]) arm=ssl-full ;;
    b4) arm=ssl-streaming ;;
    c?) arm=ssl-dual ;;
  esac
  sparse=true
  case $1 in
    a1 | b1 | c1) modes=full sparse=false ;;
    a2) modes=streaming sparse=false ;;
    a3 | b2 | b4) modes=streaming ;;
    a4) modes=dual sparse=false ;;
    a5 | b3 | c2) modes=dual ;;
    *) fail 2 "--systems names $1; there are a1 to a5, b1 to b4, c1 and c2" ;;
  esac
  options=(--modes "$modes")
  [[ $sparse == false ]] || options+=(--sparsity "$sparsity")
  if [[ $modes == dual ]]; then
    read -r -a words <<< "$dual_args"
    options+=("${words[@]}")
  fi
  [[ -z $arm ]] || options+=(--init-from "$(arm_dir "$arm")")
  # Masks that pre-training made are there from the beginning; others grow as in a training from scratch.
  case $1 in
    b4 | c2) options+=(--prune-begin-step 0 --prune-end-step 0) ;;
  esac
}

arm_dir() { # arm_dir ARM: the exp_dir of a pre-training
  echo "${ssl_dir:-$exp_dir}/$1"
}

system_dir() { # system_dir SYSTEM SEED: the exp_dir of a training
  echo "$exp_dir/$1-seed$2"
}

arms=()
for file in "$config" "$ssl_config"; do
  [[ -f $file ]] || fail 2 "$file of --config or --ssl-config is no file (relative paths are relative to $PWD)"
done
for system in $systems; do # a wrong word is told before anything runs
  options_of "$system"
  [[ -z $arm || " ${arms[*]} " == *" $arm "* ]] || arms+=("$arm")
  [[ -z $arm || -z $ssl_dir || -d $ssl_dir/$arm ]] || fail 2 "--systems names $system, but --ssl-dir $ssl_dir has no $arm"
done

cuts_of() { # cuts_of PARTS: sets cuts, the cut sets of parts that are names or paths
  local part parts
  cuts=()
  IFS=, read -r -a parts <<< "$1"
  for part in "${parts[@]}"; do
    [[ $part == *.jsonl || $part == *.gz ]] || part=$data_dir/$kind/cuts_$part.jsonl.gz
    cuts+=("$part")
  done
}

pretrain_one() { # pretrain_one ARM
  local dir cuts options=(--modes "${1#ssl-}") train_parts=$ssl_parts valid_parts=$ssl_valid_parts
  local train_args="$train_args $ssl_args"
  dir=$(arm_dir "$1")
  cuts_of "$ssl_parts"
  [[ $1 == ssl-full ]] || options+=(--sparsity "$sparsity")
  # No --code: an edited line of the library does not throw a week of training away.
  begin --name "$1" --option train_args train_parts valid_parts ssl_seed "options=${options[*]}" \
    --input "$config" "$ssl_config" "${cuts[@]}" \
    --output "$dir"/{train_summary.json,'*.pt','tokenizer/*'} || return 0
  train_in "$dir" --config="$config" --config="$ssl_config" --system dualmode --objective ssl --spec-aug false \
    --streaming true --convolution chunk --seed "$ssl_seed" "${options[@]}"
  finish
}

train_one() { # train_one SYSTEM SEED
  local arm modes sparse options dir lang tuned configs=("$config") inputs=()
  dir=$(system_dir "$1" "$2") lang=$(lang_dir) tuned=${config%.yaml}_tuned.yaml
  options_of "$1"
  if [[ -n $arm ]]; then
    inputs=("$(arm_dir "$arm")/train_summary.json")
    [[ ! -f $tuned ]] || configs+=("$tuned")
  fi
  begin --name "$1-seed$2" --option train_args train_parts valid_parts "options=${options[*]}" \
    --input "${configs[@]}" "${train_cuts[@]}" "$lang/tokenizer.json" "${inputs[@]}" \
    --output "$dir"/{train_summary.json,'*.pt','tokenizer/*'} || return 0
  train_in "$dir" "${configs[@]/#/--config=}" --system dualmode --streaming true --convolution chunk --seed "$2" \
    --lang-dir "$lang" "${options[@]}"
  finish
}

stage_0_data() { # Prepare the corpus (its stages have markers of their own)
  prepare_data
}

stage_1_pretrain() { # Train the encoders on audio alone that the systems start from
  [[ -n $ssl_dir ]] || side_by_side "$train_jobs" pretrain_one "${arms[@]}"
}

stage_2_train() { # Train every system
  local system seed calls=()
  for seed in $seeds; do
    for system in $systems; do
      calls+=("$system $seed")
    done
  done
  side_by_side "$train_jobs" train_one "${calls[@]}"
}

decode_one() { # decode_one SYSTEM SEED METHOD: all test parts in each mode
  local arm modes sparse options dir name=$1-seed$2-$3 chunk
  dir=$(system_dir "$1" "$2")
  options_of "$1"
  [[ $modes == streaming ]] || decode_step "$name-full" "$dir" "$3"
  [[ $modes != full ]] || return 0
  for chunk in $decode_chunks; do
    decode_step "$name-chunk$chunk" "$dir" "$3" --decode-chunk-size "$chunk"
    [[ $diagnostics:$sparse != true:true ]] ||
      decode_step "$name-chunk$chunk-dense" "$dir" "$3" --decode-chunk-size "$chunk" --sparse false
  done
  [[ $diagnostics:$sparse:$modes != true:true:dual ]] ||
    decode_step "$name-full-sparse" "$dir" "$3" --encoder-mode full --sparse true
}

stage_3_decode() { # Decode and score each mode
  local system seed method calls=()
  for seed in $seeds; do
    for system in $systems; do
      for method in $decoding_methods; do
        calls+=("$system $seed $method")
      done
    done
  done
  side_by_side "$in_turn" decode_one "${calls[@]}"
}

stage_4_results() { # Print the table of results
  local system seed dirs=()
  for system in $systems; do
    for seed in $seeds; do
      dirs+=("$(system_dir "$system" "$seed")")
    done
  done
  python3 ../../local/results.py --exp-dirs "$(commas "${dirs[@]}")" --table dualmode --out "$exp_dir/results.md"
}

run_stages
