#!/usr/bin/env bash
# From an autoregressive teacher to fast Mask-CTC students: knowledge transfer and distillation.
#
# Started by egs/*/run_nar.sh.  Trains one teacher a seed, makes its labels, trains one student for every word of
# --systems and every seed, decodes dev and test, and prints one table.  Run the same line again to go on where it
# stopped.  Students: scratch (size of the teacher, no help), transfer (starts from the teacher's encoder and CTC head),
# transfer-frame, transfer-sequence, transfer-both (with distillation at that level), small (about a ninth of the
# parameters), small-frame, small-sequence, small-both, teacher-small (a small autoregressive recogniser).
set -euo pipefail

recipe=                    # Folder of the recipe (egs/librispeech or egs/aishell), set by its run_nar.sh
corpus=demo                # Corpus that prepare.sh knows
corpus_dir=                # Folder of a corpus that is on disk already
parts=                     # Parts to prepare, with commas; empty: all of the corpus
partial=false              # Accept parts that hold less than was published
train_parts=               # Parts to train on, with commas; empty: the corpus's own
valid_parts=               # Parts to validate and choose on
test_parts=                # Parts to decode, with commas
data_dir=                  # Prepared data; empty: data/CORPUS
exp_dir=                   # Experiments; empty: exp/CORPUS-nar
systems=                   # Students, with spaces; empty: all but teacher-small, four of them for the demo; teacher: none
seeds=42                   # Seeds, with spaces: one teacher, and one training of each system, a seed
teacher_exp_dir=           # A trained teacher (train.py --system nar --attention-decoder ar); empty: train one a seed
num_shards=4               # Shards of each label set: tasks of the extraction
labels_args=               # More options of extract_labels.py, in one string
token_kind=                # Tokens: bpe, char or pinyin; empty: prepare.sh's own
vocab_size=                # BPE tokens; empty: prepare.sh's own
speed_perturb=             # Speed copies of the training parts; empty: prepare.sh's own
config=                    # Options of all trainings in YAML, NAME.yaml; empty: conf/nar_CORPUS.yaml or conf/nar.yaml
prepare_args=              # More options of prepare.sh, in one string
train_args=                # More options of train.py, in one string
num_gpus=                  # GPUs of a training on each node; empty: those of cmd.sh with Slurm, no torchrun here
decoding_methods="ctc_greedy_search mask_predict nar_beam_search"  # Searches of students, with spaces
teacher_methods="ctc_greedy_search joint_beam_search"  # Searches of teachers
beam_size=5                # Hypotheses of nar_beam_search
teacher_beam_size=10       # Hypotheses of joint_beam_search
passes=10                  # Passes of the masked decoder
mask_threshold=            # CTC tokens with a lower probability are masked; empty: 0.99, or 0.5 for the demo
decode_args="--avg 3"      # More options of decode.py, in one string
extract_jobs=              # Shards extracted at the same time; empty: 1, or nj for the demo
nj=2                       # Processes of data preparation, threads of decoding on a CPU
short=false                # A few utterances and epochs, to see that everything runs

# shellcheck source=local/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
parse_options "$@"
while [[ $teacher_exp_dir == ?*/ ]]; do teacher_exp_dir=${teacher_exp_dir%/}; done
exp_tag=-nar
# shellcheck source=local/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

if [[ -z $config ]]; then
  config=conf/nar.yaml
  [[ ! -f conf/nar_$corpus.yaml ]] || config=conf/nar_$corpus.yaml
fi
if [[ -z $systems ]]; then
  systems="scratch transfer transfer-frame transfer-sequence transfer-both small small-frame small-sequence small-both"
  [[ $corpus != demo ]] || systems="scratch transfer-both small small-both"
  [[ $short == false ]] || systems="scratch transfer-both small-both"
fi
[[ $short == false ]] || train_args="--num-epochs 3 $train_args"
if [[ $corpus == demo ]]; then
  : "${mask_threshold:=0.5}" # minutes of speech teach CTC more than the masked decoder: it repairs what CTC doubts
fi
: "${mask_threshold:=0.99}"
[[ $recipe != *librispeech || $corpus != librispeech ]] || : "${vocab_size:=5000}" # as in the recipes that conf/nar.yaml follows

system_dir() { # system_dir SYSTEM SEED: the exp_dir of a training
  if [[ $1 == teacher && -n $teacher_exp_dir ]]; then
    echo "$teacher_exp_dir"
  else
    echo "$exp_dir/$1-seed$2"
  fi
}

# configs_of SYSTEM: sets configs, the option files of a system; of two that name an option the later one counts.
# Beside NAME.yaml of --config lie NAME_teacher.yaml and NAME_small.yaml, NAME_transfer.yaml where transferred students
# differ in more than their start, and NAME_frame.yaml and its like; where those are missing, they are the recipe's.
configs_of() {
  local layer layers=() file
  case $1 in
    teacher) layers=(teacher) ;;
    teacher-small) layers=(small teacher) ;;
    scratch) ;;
    transfer | small) layers=("$1") ;;
    transfer-frame) layers=(transfer frame) ;;
    transfer-sequence) layers=(transfer sequence) ;;
    transfer-both) layers=(transfer frame sequence) ;;
    small-frame) layers=(small small_frame) ;;
    small-sequence) layers=(small small_sequence) ;;
    small-both) layers=(small small_frame small_sequence) ;;
    *) fail 2 "--systems names $1; there are scratch, transfer, small, the last two also with -frame, -sequence or -both \
behind them, and teacher-small" ;;
  esac
  configs=("$config")
  for layer in "${layers[@]}"; do
    file=${config%.yaml}_$layer.yaml
    case $layer in
      transfer) [[ -f $file ]] || continue ;;
      *frame | *sequence) [[ -f $file ]] || file=conf/nar_$layer.yaml ;;
    esac
    configs+=("$file")
  done
}

for system in $systems; do # a wrong word is told before a teacher is trained
  configs_of "$system"
done
systems=$(for system in $systems; do [[ $system == teacher ]] || echo "$system"; done) # it has its row anyhow

label_kinds() { # label_kinds SYSTEM: the kinds of labels that its training reads
  case $1 in
    *-frame) echo ctc_posteriors token_posteriors ;;
    *-sequence) echo nbest ;;
    *-both) echo ctc_posteriors token_posteriors nbest ;;
  esac
}

label_dirs() { # label_dirs SEED KIND ...: the label sets of the seed's teacher, with commas
  local teacher name
  teacher=$(system_dir teacher "$1")
  name=${teacher##*/}
  shift
  # Every exp_dir of ours may have a teacher-seed42.
  [[ $teacher == "$exp_dir"/* ]] || name=$(basename -- "$(dirname -- "$teacher")")-$name
  (($# == 0)) || commas "${@/#/$exp_dir/labels/${name//,/-}-}"
}

train_one() { # train_one SYSTEM SEED
  local dir configs teacher labels kinds lang options=() inputs=()
  dir=$(system_dir "$1" "$2") teacher=$(system_dir teacher "$2") lang=$(lang_dir)
  configs_of "$1"
  read -r -a kinds <<< "$(label_kinds "$1")"
  labels=$(label_dirs "$2" "${kinds[@]}")
  if [[ $1 == transfer* ]]; then
    options+=(--init-from "$teacher" "--init-modules=encoder,ctc")
    inputs+=("$teacher/train_summary.json")
  fi
  if [[ -n $labels ]]; then
    options+=(--label-dir "$labels")
    IFS=, read -r -a kinds <<< "$labels"
    inputs+=("${kinds[@]}")
  fi
  # No --code: an edited line of the library does not throw a week of training away.
  begin --name "$1-seed$2" --option train_args train_parts valid_parts "options=${options[*]}" \
    --input "${configs[@]}" "${train_cuts[@]}" "$lang/tokenizer.json" "${inputs[@]}" \
    --output "$dir"/{train_summary.json,'*.pt','tokenizer/*'} || return 0
  train_in "$dir" "${configs[@]/#/--config=}" --system nar --seed "$2" --lang-dir "$lang" "${options[@]}"
  finish
}

stage_0_data() { # Prepare the corpus (its stages have markers of their own)
  prepare_data
}

stage_1_teacher() { # Train the autoregressive teachers
  local seed
  [[ -z $teacher_exp_dir ]] || return 0
  read -r -a seed <<< "$seeds"
  side_by_side "$in_turn" train_one "${seed[@]/#/teacher }"
}

stage_2_labels() { # Extract and verify the labels that the students need
  local seed system kinds teacher dirs outputs
  kinds=$(for system in $systems; do label_kinds "$system"; done | tr ' ' '\n' | sort -u | tr '\n' ' ')
  read -r -a kinds <<< "$kinds"
  ((${#kinds[@]})) || return 0
  for seed in $seeds; do
    teacher=$(system_dir teacher "$seed")
    IFS=, read -r -a dirs <<< "$(label_dirs "$seed" "${kinds[@]}")"
    mapfile -t outputs < <(label_files "${dirs[@]}")
    begin --name "${teacher//,/-}" --option "kinds=${kinds[*]}" labels_args num_shards \
      --input "${train_cuts[@]}" "$teacher/train_summary.json" --output "${outputs[@]}" \
      --code 'icefall_kd/labels/*.py' icefall_kd/teachers/recogniser.py || continue
    # shellcheck disable=SC2086
    extract_and_verify "$(commas "${dirs[@]}")" --kind "$(commas "${kinds[@]}")" --teacher "$teacher" $labels_args
    finish
  done
}

stage_3_train() { # Train every student
  local system seed calls=()
  for seed in $seeds; do
    for system in $systems; do
      calls+=("$system $seed")
    done
  done
  side_by_side "$in_turn" train_one "${calls[@]}"
}

decode_one() { # decode_one SYSTEM SEED METHOD: all test parts
  local dir options=()
  dir=$(system_dir "$1" "$2")
  case $3 in
    joint_beam_search) options=(--beam-size "$teacher_beam_size") ;;
    mask_predict) options=(--passes "$passes" --mask-threshold "$mask_threshold") ;;
    nar_beam_search) options=(--beam-size "$beam_size" --passes "$passes" --mask-threshold "$mask_threshold") ;;
  esac
  decode_step "$1-seed$2-$3" "$dir" "$3" "${options[@]}"
}

stage_4_decode() { # Decode and score
  local system seed method methods calls=()
  for seed in $seeds; do
    for system in teacher $systems; do
      [[ $system != teacher || -z $teacher_exp_dir || $seed == "${seeds%% *}" ]] || continue
      methods=$decoding_methods
      [[ $system != teacher* ]] || methods=$teacher_methods
      for method in $methods; do
        calls+=("$system $seed $method")
      done
    done
  done
  side_by_side "$in_turn" decode_one "${calls[@]}"
}

stage_5_results() { # Print the table of results
  local system seed dirs=()
  for system in teacher $systems; do
    for seed in $seeds; do
      [[ $system != teacher || -z $teacher_exp_dir || $seed == "${seeds%% *}" ]] || continue
      dirs+=("$(system_dir "$system" "$seed")")
    done
  done
  python3 ../../local/results.py --exp-dirs "$(commas "${dirs[@]}")" --table nar --out "$exp_dir/results.md"
}

run_stages
