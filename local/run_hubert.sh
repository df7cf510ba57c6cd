#!/usr/bin/env bash
# HuBERT distilled for recognition: a teacher, students that learn its states and clusters, all of them fine-tuned with CTC.
#
# Started by egs/*/run_hubert.sh.  Pre-trains a teacher on the corpus's audio (or takes the one of --teacher), distils one
# student for every word of --systems, fine-tunes it with the transcripts of --hours for every seed, decodes dev and
# test, and prints one table.  Run the same line again to go on where it stopped.  Systems: teacher (fine-tuned itself);
# scratch and fbank-scratch (the deep student, no teacher); deep-reg, deep-disc, deep-both, wide-reg, wide-disc, wide-both (12
# thin or 2 wide layers behind convolutions; teacher states, cluster posterior, or both); deep-type1, deep-type2, deep-type3
# (deep-both by the form of its cluster logits); fbank-one, fbank-two, fbank-both (the deep student hears log-mel features:
# states in one stage, in two, in two and with clusters); distilhubert, fithubert.
set -euo pipefail

recipe=                    # Folder of the recipe (egs/librispeech or egs/aishell), set by its run_hubert.sh
corpus=demo                # Corpus that prepare.sh knows
corpus_dir=                # Folder of a corpus that is on disk already
parts=                     # Parts to prepare, with commas; empty: all of the corpus
partial=false              # Accept parts that hold less than was published
train_parts=               # Parts to train on, with commas; empty: the corpus's own
valid_parts=               # Parts to validate and choose on
test_parts=                # Parts to decode, with commas
data_dir=                  # Prepared data; empty: data/CORPUS
exp_dir=                   # Experiments; empty: exp/CORPUS-hubert
audio_dir=                 # Folder of ssl1, distil-SYSTEM, cmvn.safetensors that are trained already; empty: train them
systems=                   # Rows, with spaces; empty: three for the demo, else all that the teacher serves but the types and -disc
hours=                     # Transcripts of fine-tuning, with spaces: 10min, 1h and the like, or all; empty: all for the demo, else 1h 10h 100h
hours_part=                # Part that these are chosen from; empty: the first of --train-parts
seeds=42                   # Seeds of fine-tuning, with spaces
teacher=                   # Hub id, exp_dir or state dict of a HuBERT; own: pre-train one; empty: own for the demo, else HuBERT Base of the hub
teacher_seed=42            # Seed of k-means, pre-training, distillation and the choice of hours, which all seeds share
num_clusters=              # Clusters of each pre-training, with spaces: the first learns those of MFCC, each later one those of its forerunner; empty: 100 500, or 50 for the demo
cluster_layer=             # Layer whose states are clustered from the second pre-training on; empty: 6, or 3 for the demo
kmeans_utts=               # Utterances that k-means hears; empty: a tenth of LibriSpeech, or all of the demo
ssl_parts=                 # Parts (or paths of cut sets) to pre-train and distil on, with commas; empty: --train-parts
ssl_valid_parts=           # Parts to validate these on; empty: --valid-parts
crop_duration=15.6         # Longer utterances are cut into equal pieces of at most so many seconds, for pre-training and distillation
frontend_steps=0.2         # First stage of fbank-two and fbank-both: steps, or their share
states=online              # Teacher states of distillation: online; stored (fp16 on disk); mvq (codes of a quantizer a layer: our extension of the paper)
num_codebooks=8            # mvq: bytes a frame and layer
phase1_steps=              # mvq: quantizer steps with 2N codebooks of 16 entries; empty: 10000, or 100 for the demo
phase2_steps=              # mvq: quantizer steps with N codebooks of 256 entries; empty: 10000, or 300 for the demo
quantizer_utts=            # mvq: utterances that quantizers are trained on; empty: 1000, or 200 for the demo
token_kind=char            # Tokens: bpe, char or pinyin
vocab_size=                # BPE tokens; empty: prepare.sh's own
speed_perturb=false        # Speed copies of the training parts
config=                    # Options of all trainings in YAML, NAME.yaml; empty: conf/hubert_CORPUS.yaml or hubert.yaml
prepare_args=              # More options of prepare.sh, in one string
train_args=                # More options of train.py, in one string
ssl_args=                  # More options of pre-training, behind those
distil_args=               # More options of distillation
tune_args=                 # More options of fine-tuning
num_gpus=                  # GPUs of a training on each node; empty: those of cmd.sh with Slurm, no torchrun here
num_shards=                # Shards of each label set: tasks of the extraction; empty: 8, or nj for the demo
extract_jobs=              # Shards extracted at the same time; empty: 1, or nj for the demo
train_jobs=                # Trainings at the same time; empty: 1, or nj for the demo
decoding_methods=ctc_greedy_search  # Searches, with spaces
similarity=                # Compare the layers of students, before and after fine-tuning, with the teacher's; empty: not for the demo
decode_args=               # More options of decode.py, in one string; empty: --avg 3, or --avg 1 with --short
nj=2                       # Processes of data preparation, threads of decoding on a CPU
short=false                # A few utterances and epochs, to see that everything runs

# shellcheck source=local/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
parse_options "$@"
while [[ $teacher == ?*/ ]]; do teacher=${teacher%/}; done
while [[ $audio_dir == ?*/ ]]; do audio_dir=${audio_dir%/}; done
exp_tag=-hubert
# shellcheck source=local/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

if [[ -z $config ]]; then
  config=conf/hubert.yaml
  [[ ! -f conf/hubert_$corpus.yaml ]] || config=conf/hubert_$corpus.yaml
fi
if [[ $short == true ]]; then
  : "${systems:=deep-both fbank-both}" "${decode_args:=--avg 1}"
  train_args="--num-epochs 2 $train_args"
  : "${phase1_steps:=30}" "${phase2_steps:=20}" "${quantizer_utts:=20}"
fi
if [[ $corpus == demo ]]; then
  : "${systems:=fbank-scratch fbank-two fbank-both}" "${hours:=all}" "${teacher:=own}"
  : "${num_clusters:=50}" "${cluster_layer:=3}" "${kmeans_utts:=1000}" "${num_shards:=$nj}" "${similarity:=false}"
  : "${phase1_steps:=100}" "${phase2_steps:=300}" "${quantizer_utts:=200}"
fi
: "${phase1_steps:=10000}" "${phase2_steps:=10000}" "${quantizer_utts:=1000}"
: "${hours:=1h 10h 100h}" "${num_clusters:=100 500}" "${cluster_layer:=6}" "${kmeans_utts:=28000}" "${num_shards:=8}"
: "${decode_args:=--avg 3}" "${similarity:=true}" "${ssl_parts:=$train_parts}" "${hours_part:=${train_parts%%,*}}" "${ssl_valid_parts:=$valid_parts}"
case $recipe in
  *aishell) : "${teacher:=TencentGameMate/chinese-hubert-base}" ;;
  *) : "${teacher:=facebook/hubert-base-ls960}" ;;
esac
# What students can learn: folders of the hub hold no clusters, and only our own trainings can be fine-tuned here.
ours=false clusters_known=false
[[ $teacher != own && ! -f $teacher/train_summary.json ]] || ours=true clusters_known=true
[[ ! -f $teacher ]] || clusters_known=true
if [[ -z $systems ]]; then
  systems="scratch deep-reg wide-reg fbank-scratch fbank-one fbank-two distilhubert fithubert"
  [[ $clusters_known == false ]] || systems+=" deep-both wide-both fbank-both"
  [[ $ours == false ]] || systems+=" teacher"
fi
read -r -a clusters <<< "$num_clusters"
iterations=${#clusters[@]}
audio_exp=${audio_dir:-$exp_dir} # where what is trained without transcripts lies
cmvn=$audio_exp/cmvn.safetensors
tag="" # at the names of students that learn from stored states
case $states in
  online) ;;
  stored | mvq) tag=-$states ;;
  *) fail 2 "--states is $states; teacher states are online, stored or mvq" ;;
esac

# options_of SYSTEM: sets files, the option files beside NAME.yaml (NAME_deep.yaml and its like) of all its trainings;
# distil_files, more of its distillation; distil, options of that; from: teacher, distil, or nothing: where fine-tuning starts.
options_of() {
  from=distil distil_files=(distil) distil=()
  case $1 in
    teacher) files=(base) from=teacher ;;
    scratch) files=(deep) from="" ;;
    fbank-scratch) files=(deep fbank) from="" ;;
    deep-reg | deep-disc | deep-both | deep-type[123]) files=(deep) distil_files+=(deep_distil) ;;
    wide-reg | wide-disc | wide-both) files=(wide) distil_files+=(wide_distil) ;;
    fbank-one | fbank-two | fbank-both) files=(deep fbank) distil_files+=(fbank_distil) ;;
    distilhubert | fithubert) files=("$1") distil_files+=("$1_distil") ;;
    *) fail 2 "--systems names $1; there are teacher, scratch, fbank-scratch, deep-reg, deep-disc, deep-both, deep-type1 to \
deep-type3, wide-reg, wide-disc, wide-both, fbank-one, fbank-two, fbank-both, distilhubert and fithubert" ;;
  esac
  case $1 in
    *-disc) distil=(--rec-scale 0 --cos-scale 0) ;;
    *-type*) distil=(--disc-type "${1#*-}") ;;
    *-both) ;;
    *) distil=(--disc-scale 0) ;;
  esac
  case $1 in
    fbank-one) distil+=(--frontend-steps 0) ;;
    fbank-two | fbank-both) distil+=(--frontend-steps "$frontend_steps") ;;
  esac
  [[ " ${files[*]} " != *" fbank "* ]] || distil+=(--cmvn "$cmvn")
}

conf_files() { # conf_files LAYER ...: sets configs, NAME.yaml and its layers; where one is missing, it is the recipe's
  local layer file
  configs=("$config")
  for layer; do
    file=${config%.yaml}_$layer.yaml
    [[ -f $file ]] || file=conf/hubert_$layer.yaml
    configs+=("$file")
  done
}

ssl_dir() { # ssl_dir ITERATION: the exp_dir of a pre-training
  echo "$audio_exp/ssl$1"
}

teacher_dir() { # what students learn from
  if [[ $teacher == own ]]; then ssl_dir "$iterations"; else echo "$teacher"; fi
}

name_of() { # name_of SYSTEM: in names of folders and markers
  case $1 in
    teacher | scratch | fbank-scratch) echo "$1" ;;
    *) echo "$1$tag" ;;
  esac
}

distil_dir() { # distil_dir SYSTEM: the exp_dir of a student
  echo "$audio_exp/distil-$(name_of "$1")"
}

system_dir() { # system_dir SYSTEM HOURS SEED: the exp_dir of a fine-tuning
  echo "$exp_dir/$(name_of "$1")-$2-seed$3"
}

[[ -f $config ]] || fail 2 "--config $config is no file (relative paths are relative to $PWD)"
students=() # systems that are distilled
for system in $systems; do # a wrong word is told before anything runs
  options_of "$system"
  [[ $from != distil ]] || students+=("$system")
  [[ $from != teacher || $ours == true ]] || fail 2 "--systems names teacher, but only trainings of this project are fine-tuned: \
--teacher own, or an exp_dir"
  [[ $from != distil || $clusters_known == true || " ${distil[*]} " == *" --disc-scale 0 "* ]] ||
    fail 2 "--systems names $system, but $teacher is a folder of the hub, which holds no clusters: name fairseq's state dict, \
an exp_dir, or own"
  case $from in
    distil) trained=distil-$system$tag/train_summary.json ;;
    teacher) trained=ssl$iterations/train_summary.json ;;
    *) trained="" ;;
  esac
  [[ -z $audio_dir || -z $trained || $teacher != own && $from == teacher || -e $audio_dir/$trained ]] ||
    fail 2 "--systems names $system, but --audio-dir $audio_dir has no $trained"
done
for amount in $hours; do
  [[ $amount =~ ^([0-9.]+(s|min|h)|all)$ ]] || fail 2 "--hours names $amount; an amount is written 90s, 10min, 1h, or all"
done
needs_teacher=false
[[ ${#students[@]} == 0 && " $systems " != *" teacher "* ]] || needs_teacher=true

# What the teacher is: folders and files count by content, a name by what is pinned of it.
teacher_files=()
if [[ $teacher == own ]]; then
  teacher_files=("$(teacher_dir)/train_summary.json")
elif [[ -e $teacher ]]; then
  teacher_files=("$teacher")
fi

cuts_of() { # cuts_of PARTS: sets cuts, the cut sets of parts that are names or paths
  local part parts
  cuts=()
  IFS=, read -r -a parts <<< "$1"
  for part in "${parts[@]}"; do
    [[ $part == *.jsonl || $part == *.gz ]] || part=$data_dir/$kind/cuts_$part.jsonl.gz
    cuts+=("$part")
  done
}

audio_training() { # audio_training NAME DIR INPUT ... -- OPTION ...: a training without transcripts, on --ssl-parts
  local name=$1 dir=$2 inputs=() train_parts=$ssl_parts valid_parts=$ssl_valid_parts cuts
  shift 2
  while [[ $1 != -- ]]; do
    inputs+=("$1")
    shift
  done
  shift
  cuts_of "$ssl_parts"
  set -- --crop-duration "$crop_duration" "$@"
  # No --code: an edited line of the library does not throw a week of training away.
  begin --name "$name" --option train_args train_parts valid_parts teacher_seed "options=$*" \
    --input "${configs[@]}" "${cuts[@]}" "${inputs[@]}" \
    --output "$dir"/{train_summary.json,'*.pt','tokenizer/*'} || return 0
  train_in "$dir" "${configs[@]/#/--config=}" --system hubert --seed "$teacher_seed" "$@"
  finish
}

pretrain_one() { # pretrain_one ITERATION: k-means, labels, masked prediction
  local dir labels kmeans cuts cuts_list train_cuts configs words outputs source=() train_args="$train_args $ssl_args"
  local pieces=$crop_duration
  dir=$(ssl_dir "$1") kmeans=$audio_exp/kmeans$1/kmeans.safetensors labels=$audio_exp/labels/clusters$1
  cuts_of "$ssl_parts,$ssl_valid_parts" # validation, too, needs labels: there is no other loss
  train_cuts=("${cuts[@]}") cuts_list=$(commas "${cuts[@]}")
  cuts_of "$ssl_parts"
  words=(--teacher mfcc)
  if (($1 > 1)); then
    words=(--teacher "$(ssl_dir $(($1 - 1)))" --layer "$cluster_layer")
    source=("$(ssl_dir $(($1 - 1)))/train_summary.json")
  fi
  if begin --name "kmeans$1" --option kmeans_utts teacher_seed "clusters=${clusters[$1 - 1]}" "words=${words[*]}" \
    --input "${cuts[@]}" "${source[@]}" --output "$kmeans" --code 'icefall_kd/teachers/*.py'; then
    OMP_NUM_THREADS=$nj run_cmd gpu -- python3 ../../local/train_kmeans.py --cuts "$(commas "${cuts[@]}")" --out "$kmeans" \
      "${words[@]}" --num-clusters "${clusters[$1 - 1]}" --kmeans-utts "$kmeans_utts" --kmeans-seed "$teacher_seed"
    finish
  fi
  mapfile -t outputs < <(label_files "$labels")
  if begin --name "labels$1" --option num_shards crop_duration "words=${words[*]}" --input "${train_cuts[@]}" "$kmeans" \
    --output "${outputs[@]}" --code 'icefall_kd/labels/*.py' 'icefall_kd/teachers/*.py'; then
    extract_and_verify "$labels" --kind clusters --quantizer "$kmeans" "${words[@]}"
    finish
  fi
  conf_files base ssl
  audio_training "ssl$1" "$dir" "$labels/label_set.json" -- --objective ssl --label-dir "$labels"
}

student_options() { # student_options SYSTEM: sets configs, inputs and words of its distillation
  options_of "$1"
  conf_files "${files[@]}" "${distil_files[@]}"
  inputs=("${teacher_files[@]}")
  [[ " ${files[*]} " != *" fbank "* ]] || inputs+=("$cmvn")
  words=(--objective distil --teacher "$(teacher_dir)" "${distil[@]}")
}

layers_file() { # layers_file SYSTEM: the list of the teacher layers that it compares with, 0,4,12
  echo "$audio_exp/labels/layers-$1.txt"
}

find_layers() { # find_layers SYSTEM
  local from files distil_files distil configs inputs words train_args="$train_args $distil_args"
  student_options "$1"
  begin --name "layers-$1" --option train_args "options=${words[*]}" --input "${configs[@]}" "${inputs[@]}" \
    --output "$(layers_file "$1")" --code icefall_kd/systems/hubert_distil.py icefall_kd/models/hubert_heads.py || return 0
  # shellcheck disable=SC2086
  python3 ../../local/teacher_layers.py --out "$(layers_file "$1")" "${configs[@]/#/--config=}" --system hubert \
    "${words[@]}" $train_args
  finish
}

state_sets() { # state_sets LAYER,...: sets layers, and the label set (label_dirs) and quantizer (mvq) of each
  local layer name
  name=$(short_name "$(teacher_dir)")
  IFS=, read -r -a layers <<< "$1"
  label_dirs=() quantizers=()
  for layer in "${layers[@]}"; do
    if [[ $states == mvq ]]; then
      label_dirs+=("$audio_exp/labels/$name-layer$layer-q$num_codebooks")
      quantizers+=("$audio_exp/quantizers/$name-layer$layer-q$num_codebooks/quantizer.safetensors")
    else
      label_dirs+=("$audio_exp/labels/$name-layer$layer-states")
    fi
  done
}

store_states() { # label sets of all layers that students compare with, in one pass of the teacher
  local system found i layers label_dirs quantizers outputs cuts cuts_list train_cuts pieces=$crop_duration
  local words=(--teacher "$(teacher_dir)" --teacher-dtype float32) more=(--kind embeddings) # float32: as it runs online
  for system in "${students[@]}"; do
    find_layers "$system"
  done
  found=$(for system in "${students[@]}"; do tr , '\n' < "$(layers_file "$system")"; done | sort -nu | paste -sd ,)
  state_sets "$found"
  cuts_of "$ssl_parts"
  for i in "${!quantizers[@]}"; do
    begin --name "quantizer-layer${layers[i]}" --option num_codebooks phase1_steps phase2_steps quantizer_utts \
      teacher_seed "words=${words[*]}" --input "${cuts[@]}" "${teacher_files[@]}" --output "${quantizers[i]}" \
      --code 'icefall_kd/quantization/*.py' 'icefall_kd/quantization/csrc/*.cpp' 'icefall_kd/teachers/*.py' || continue
    OMP_NUM_THREADS=$nj python3 ../../local/train_quantizer.py --cuts "$(commas "${cuts[@]}")" --out "${quantizers[i]}" \
      --num-codebooks "$num_codebooks" --phase1-steps "$phase1_steps" --phase2-steps "$phase2_steps" \
      --quantizer-utts "$quantizer_utts" --quantizer-seed "$teacher_seed" --layer "${layers[i]}" "${words[@]}"
    finish
  done
  [[ $states != mvq ]] || more=(--kind codebook_indexes --quantizer "$(commas "${quantizers[@]}")")
  cuts_of "$ssl_parts,$ssl_valid_parts" # validation, too, needs states: there is no other loss
  train_cuts=("${cuts[@]}") cuts_list=$(commas "${cuts[@]}")
  # Other students may need other layers: each list has a marker, and sets that are there stay as they are.
  mapfile -t outputs < <(label_files "${label_dirs[@]}")
  begin --name "$states-layers-$found" --option num_shards crop_duration "words=${words[*]}" --input "${train_cuts[@]}" \
    "${teacher_files[@]}" "${quantizers[@]}" --output "${outputs[@]}" \
    --code 'icefall_kd/labels/*.py' 'icefall_kd/teachers/*.py' || return 0
  extract_and_verify "$(commas "${label_dirs[@]}")" --layer "$found" "${words[@]}" "${more[@]}"
  finish
}

distil_one() { # distil_one SYSTEM
  local from files distil_files distil configs inputs words train_args="$train_args $distil_args"
  local layers label_dirs quantizers
  student_options "$1"
  if [[ $states != online ]]; then
    state_sets "$(< "$(layers_file "$1")")"
    words+=(--teacher-labels stored --label-dir "$(commas "${label_dirs[@]}")")
    [[ $states != mvq ]] || words+=(--kd-quantizers "$(commas "${quantizers[@]}")")
    inputs+=("${label_dirs[@]/%//label_set.json}")
  fi
  audio_training "$(name_of "$1")" "$(distil_dir "$1")" "${inputs[@]}" -- "${words[@]}"
}

hours_file() { # hours_file HOURS: the cut set of so much
  echo "$data_dir/hours-seed$teacher_seed/cuts_${hours_part}_$1.jsonl.gz"
}

tune_one() { # tune_one SYSTEM HOURS SEED
  local dir lang from files distil_files distil layers configs cuts start=() inputs=()
  local train_args="$train_args $tune_args" train_parts=$train_parts
  [[ $2 == all ]] || train_parts=$(hours_file "$2")
  cuts_of "$train_parts"
  dir=$(system_dir "$1" "$2" "$3") lang=$(lang_dir)
  options_of "$1"
  layers=("${files[@]}" tuned)
  [[ ! -f ${config%.yaml}_tuned_$2.yaml ]] || layers+=("tuned_$2")
  case $from in
    teacher) layers+=(teacher) start=(--init-from "$(teacher_dir)") inputs=("${teacher_files[@]}") ;;
    distil) start=(--init-from "$(distil_dir "$1")") inputs=("$(distil_dir "$1")/train_summary.json") ;;
    *)
      layers+=(scratch)
      [[ $1 != fbank-* ]] || start=(--cmvn "$cmvn") inputs=("$cmvn")
      ;;
  esac
  conf_files "${layers[@]}"
  begin --name "$(name_of "$1")-$2-seed$3" --option train_args train_parts valid_parts "options=${start[*]}" \
    --input "${configs[@]}" "${cuts[@]}" "$lang/tokenizer.json" "${inputs[@]}" \
    --output "$dir"/{train_summary.json,'*.pt','tokenizer/*'} || return 0
  train_in "$dir" "${configs[@]/#/--config=}" --system hubert --seed "$3" --lang-dir "$lang" "${start[@]}"
  finish
}

stage_0_data() { # Prepare the corpus (its stages have markers of their own)
  prepare_data
}

stage_1_pretrain() { # Pre-train the teacher: k-means, labels and masked prediction, once or several times
  local iteration
  [[ $teacher == own && $needs_teacher == true && -z $audio_dir ]] || return 0
  for ((iteration = 1; iteration <= iterations; iteration++)); do
    pretrain_one "$iteration"
  done
}

stage_2_cmvn() { # Mean and deviation of log-mel features
  local cuts
  [[ " $systems " == *" fbank-"* && -z $audio_dir ]] || return 0
  cuts_of "$ssl_parts"
  begin --input "${cuts[@]}" --output "$cmvn" --code icefall_kd/data/features.py icefall_kd/data/cmvn.py || return 0
  run_cmd cpu -- python3 ../../local/compute_cmvn.py --manifest-dir "$data_dir/$kind" --parts "$ssl_parts" --out "$cmvn"
}

stage_3_distil() { # Store the teacher's states (--states stored, mvq), and distil every student
  [[ ${#students[@]} != 0 && -z $audio_dir ]] || return 0
  [[ $states == online ]] || store_states
  side_by_side "$train_jobs" distil_one "${students[@]}"
}

stage_4_hours() { # Choose the transcripts of fine-tuning
  local amount cuts some=() files=()
  for amount in $hours; do
    [[ $amount == all ]] || some+=("$amount")
  done
  ((${#some[@]})) || return 0
  cuts_of "$hours_part"
  for amount in "${some[@]}"; do
    files+=("$(hours_file "$amount")")
  done
  begin --name "$hours_part" --option teacher_seed "hours=${some[*]}" --input "${cuts[@]}" --output "${files[@]}" \
    --code icefall_kd/data/hours.py || return 0
  run_cmd cpu -- python3 ../../local/select_hours.py --manifest-dir "$data_dir/$kind" --part "$hours_part" \
    --hours "$(commas "${some[@]}")" --seed "$teacher_seed" --out-dir "${files[0]%/*}"
}

stage_5_tune() { # Fine-tune every system with each amount of transcripts
  local system amount seed calls=()
  for seed in $seeds; do
    for amount in $hours; do
      for system in $systems; do
        calls+=("$system $amount $seed")
      done
    done
  done
  side_by_side "$train_jobs" tune_one "${calls[@]}"
}

all_systems() { # all_systems COMMAND ...: the command with system, hours and seed behind it, for each fine-tuning
  local system amount seed
  for amount in $hours; do
    for system in $systems; do
      for seed in $seeds; do
        "$@" "$system" "$amount" "$seed"
      done
    done
  done
}

decode_one() { # decode_one METHOD SYSTEM HOURS SEED: all test parts
  decode_step "$(name_of "$2")-$3-seed$4-$1" "$(system_dir "${@:2}")" "$1"
}

stage_6_decode() { # Decode and score
  local method calls=() found
  for method in $decoding_methods; do
    mapfile -t found < <(all_systems echo "$method")
    calls+=("${found[@]}")
  done
  side_by_side "$in_turn" decode_one "${calls[@]}"
}

compare_layers() { # compare_layers NAME EXP_DIR: with those of the teacher, on the first part of --ssl-valid-parts
  local cuts out=$exp_dir/similarity/$1.json
  [[ $1 != fithubert* ]] || return 0 # half the teacher's frames
  cuts_of "${ssl_valid_parts%%,*}"
  begin --name "$1" --input "${cuts[@]}" "$2/train_summary.json" "${teacher_files[@]}" --output "$out" \
    --code icefall_kd/report/similarity.py || return 0
  OMP_NUM_THREADS=$nj run_cmd gpu -- python3 ../../local/similarity.py --student "$2" --teacher "$(teacher_dir)" \
    --cuts "$(commas "${cuts[@]}")" --out "$out"
  finish
}

compare_tuned() { # compare_tuned SYSTEM HOURS SEED
  local from files distil_files distil
  options_of "$1"
  [[ -z $from ]] || compare_layers "$(name_of "$1")-$2-seed$3" "$(system_dir "$@")"
}

stage_7_similarity() { # Compare layers of students with those of the teacher (--similarity true)
  local system
  [[ $similarity == true && $needs_teacher == true ]] || return 0
  for system in "${students[@]}"; do
    compare_layers "$(name_of "$system")" "$(distil_dir "$system")"
  done
  all_systems compare_tuned
}

stage_8_results() { # Print the table of results
  local dirs
  mapfile -t dirs < <(all_systems system_dir)
  python3 ../../local/results.py --exp-dirs "$(commas "${dirs[@]}")" --table hubert --out "$exp_dir/results$tag.md"
}

run_stages
