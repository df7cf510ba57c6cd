#!/usr/bin/env bash
# MVQ-KD: a teacher's embeddings become codebook indexes, and a small transducer learns to predict them.
#
# Started by egs/*/run_mvq.sh.  Trains one student for every word of --systems and every seed of --seeds,
# decodes dev and test, and prints one table.  Run the same line again to go on where it stopped.
set -euo pipefail

recipe=                    # Folder of the recipe (egs/librispeech or egs/aishell), set by its run_mvq.sh
corpus=demo                # Corpus that prepare.sh knows
corpus_dir=                # Folder of a corpus that is on disk already
parts=                     # Parts to prepare, with commas; empty: all of the corpus
partial=false              # Accept parts that hold less than was published
train_parts=               # Parts to train on, with commas; empty: the corpus's own
valid_parts=               # Parts to validate and choose on
test_parts=                # Parts to decode, with commas
data_dir=                  # Prepared data; empty: data/CORPUS
exp_dir=                   # Experiments; empty: exp/CORPUS
systems="none mvq"         # Students: none, mvq, l1, l2
seeds=42                   # Seeds, with spaces: one training of each system a seed
streaming=false            # Students that hear chunk by chunk
decode_chunks="8 16"       # Streaming: chunk sizes to decode with, in encoder frames of 40 ms, with spaces
left_context_frames=64     # Streaming: encoder frames before the chunk that decoding sees
teacher=whisper-tiny.en    # Hub id, folder, state dict, exp_dir, FILE.py:CLASS, whisper-tiny.en or whisper-base
layer=-1                   # Teacher block, from 1; -1: the last; several as 6,12: a quantizer and label set each
normalize_embeddings=false # LayerNorm of the embeddings before the quantizer
num_codebooks=8            # Bytes a teacher frame
phase1_steps=10000         # Quantizer steps with 2N codebooks of 16 entries
phase2_steps=10000         # Quantizer steps with N codebooks of 256 entries
quantizer_utts=1000        # Utterances that the quantizer is trained on
num_shards=4               # Shards of the label set: tasks of the extraction
token_kind=                # Tokens: bpe, char or pinyin; empty: prepare.sh's own
vocab_size=                # BPE tokens; empty: prepare.sh's own
speed_perturb=             # Speed copies of the training parts; empty: prepare.sh's own
config=                    # Training options in YAML; empty: conf/mvq_CORPUS.yaml or conf/mvq.yaml
prepare_args=              # More options of prepare.sh, in one string
train_args=                # More options of train.py, in one string
num_gpus=                  # GPUs of a training on each node; empty: those of cmd.sh with Slurm, no torchrun here
decoding_methods="greedy_search modified_beam_search"  # Searches, with spaces
decode_args="--avg 3"      # More options of decode.py, in one string
extract_jobs=              # Shards extracted at the same time; empty: 1, or nj for the demo
nj=2                       # Processes of data preparation, threads of quantizer and decoding on a CPU
short=false                # A few utterances and steps, to see that everything runs

# shellcheck source=local/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
parse_options "$@"
exp_tag=""
# shellcheck source=local/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

if [[ -z $config ]]; then
  config=conf/mvq.yaml
  [[ ! -f conf/mvq_$corpus.yaml ]] || config=conf/mvq_$corpus.yaml
fi
if [[ $corpus == demo ]]; then # sized for two cores and twenty minutes
  [[ $phase1_steps != 10000 ]] || phase1_steps=100
  [[ $phase2_steps != 10000 ]] || phase2_steps=300
  [[ $quantizer_utts != 1000 ]] || quantizer_utts=200
fi
if [[ $short == true ]]; then
  phase1_steps=30 phase2_steps=20 quantizer_utts=20
  train_args="$train_args --num-epochs 3"
fi
student_tag="" chunk_sizes=(-1)
if [[ $streaming == true ]]; then
  student_tag=-streaming
  read -r -a chunk_sizes <<< "$decode_chunks"
  train_args="--streaming true $train_args"
fi

while [[ $teacher == ?*/ ]]; do teacher=${teacher%/}; done
teacher_name=$(short_name "$teacher") # of quantizer and labels
IFS=, read -r -a layers <<< "$layer"
reports=() quantizers=() codes_dirs=() embeddings_dirs=() # one for each layer
for one_layer in "${layers[@]}"; do
  teacher_tag=$teacher_name-layer${one_layer/-1/last}
  [[ $normalize_embeddings == false ]] || teacher_tag+=-normalized
  reports+=("$exp_dir/teacher-$teacher_tag.json")
  quantizers+=("$exp_dir/quantizer-$teacher_tag-q$num_codebooks/quantizer.safetensors")
  codes_dirs+=("$exp_dir/labels/$teacher_tag-q$num_codebooks")
  embeddings_dirs+=("$exp_dir/labels/$teacher_tag-embeddings")
done
teacher_options=(--teacher "$teacher" --normalize-embeddings "$normalize_embeddings")
# What the teacher is: folders and files count by content, a name by the SHA-256 that is pinned or stored with labels.
teacher_files=()
teacher_file=$teacher
[[ $teacher != *.py:* ]] || teacher_file=${teacher%:*}
for file in "$teacher_file" "${teacher_file%.*}.json"; do # the second: options of a state dict
  [[ ! -e $file ]] || teacher_files+=("$file")
done

wants() { # wants KIND: does one of the systems need labels of this kind
  case $1 in
    codebook_indexes) [[ " $systems " == *" mvq "* ]] ;;
    embeddings) [[ " $systems " == *" l1 "* || " $systems " == *" l2 "* ]] ;;
  esac
}

stage_0_data() { # Prepare the corpus (its stages have markers of their own)
  prepare_data
}

stage_1_teacher() { # Check the teacher on a few utterances
  local i
  wants codebook_indexes || wants embeddings || return 0
  for i in "${!layers[@]}"; do
    begin --name "layer${layers[i]}" --option teacher "layer=${layers[i]}" normalize_embeddings \
      --input "${train_cuts[@]}" "${teacher_files[@]}" --output "${reports[i]}" \
      --code 'icefall_kd/teachers/*.py' || continue
    OMP_NUM_THREADS=$nj run_cmd gpu -- python3 ../../local/check_teacher.py --cuts "${train_cuts[0]}" --out "${reports[i]}" \
      --layer "${layers[i]}" "${teacher_options[@]}"
    finish
  done
}

stage_2_quantizer() { # Train the quantizer of each layer and report on it
  local i
  wants codebook_indexes || return 0
  for i in "${!layers[@]}"; do
    begin --name "layer${layers[i]}" --option teacher "layer=${layers[i]}" normalize_embeddings num_codebooks \
      phase1_steps phase2_steps quantizer_utts --input "${train_cuts[@]}" "${teacher_files[@]}" \
      --output "${quantizers[i]}" "${quantizers[i]%.safetensors}.*" --code 'icefall_kd/quantization/*.py' 'icefall_kd/quantization/csrc/*.cpp' \
      'icefall_kd/teachers/*.py' || continue
    OMP_NUM_THREADS=$nj run_cmd gpu -- python3 ../../local/train_quantizer.py --cuts "$cuts_list" --out "${quantizers[i]}" \
      --num-codebooks "$num_codebooks" --phase1-steps "$phase1_steps" --phase2-steps "$phase2_steps" \
      --quantizer-utts "$quantizer_utts" --layer "${layers[i]}" "${teacher_options[@]}"
    finish
  done
}

extract() { # extract KIND DIR ...: all shards of the label sets of all layers, then a check of every byte
  local label_kind=$1 inputs=("${train_cuts[@]}" "${teacher_files[@]}") with_quantizers=() outputs
  shift
  mapfile -t outputs < <(label_files "$@")
  if [[ $label_kind == codebook_indexes ]]; then
    inputs+=("${quantizers[@]}")
    with_quantizers=(--quantizer "$(commas "${quantizers[@]}")")
  fi
  begin --name "$label_kind" --option teacher layer normalize_embeddings num_shards --input "${inputs[@]}" \
    --output "${outputs[@]}" --code 'icefall_kd/labels/*.py' 'icefall_kd/teachers/*.py' || return 0
  extract_and_verify "$(commas "$@")" --kind "$label_kind" --layer "$layer" "${teacher_options[@]}" \
    "${with_quantizers[@]}"
  finish
}

stage_3_labels() { # Extract and verify the teacher's labels
  if wants codebook_indexes; then
    extract codebook_indexes "${codes_dirs[@]}"
  fi
  if wants embeddings; then
    extract embeddings "${embeddings_dirs[@]}"
  fi
}

student_dir() { # student_dir SYSTEM SEED: the exp_dir of a student
  echo "$exp_dir/$1$student_tag-seed$2"
}

train_one() { # train_one SYSTEM SEED
  local dir labels=() label_dirs=() lang
  dir=$(student_dir "$1" "$2") lang=$(lang_dir)
  case $1 in
    mvq) label_dirs=("${codes_dirs[@]}") ;;
    l1 | l2) label_dirs=("${embeddings_dirs[@]}") ;;
  esac
  [[ $1 == none ]] || labels=(--label-dir "$(commas "${label_dirs[@]}")")
  # No --code: an edited line of the library does not throw a week of training away.
  begin --name "$1$student_tag-seed$2" --option train_args train_parts valid_parts --input "$config" \
    "${train_cuts[@]}" "$lang/tokenizer.json" "${label_dirs[@]}" \
    --output "$dir"/{train_summary.json,'*.pt','tokenizer/*'} || return 0
  train_in "$dir" --config "$config" --kd "$1" --seed "$2" --lang-dir "$lang" "${labels[@]}"
  finish
}

stage_4_train() { # Train every student
  local system seed calls=()
  for seed in $seeds; do
    for system in $systems; do
      calls+=("$system $seed")
    done
  done
  side_by_side "$in_turn" train_one "${calls[@]}"
}

decode_one() { # decode_one SYSTEM SEED METHOD CHUNK: all test parts; a CHUNK of -1: whole utterances
  local dir name=$1$student_tag-seed$2-$3 words=()
  dir=$(student_dir "$1" "$2")
  if [[ $streaming == true ]]; then
    name+=-chunk$4-left$left_context_frames
    words=(--decode-chunk-size "$4")
    (($4 < 0)) || words+=(--left-context-frames "$left_context_frames" --chunk-by-chunk true)
  fi
  decode_step "$name" "$dir" "$3" "${words[@]}"
}

stage_5_decode() { # Decode and score
  local system seed method chunk calls=()
  for seed in $seeds; do
    for system in $systems; do
      for method in $decoding_methods; do
        for chunk in "${chunk_sizes[@]}"; do
          calls+=("$system $seed $method $chunk")
        done
      done
    done
  done
  side_by_side "$in_turn" decode_one "${calls[@]}"
}

stage_6_results() { # Print the table of results
  local system seed dirs=()
  for seed in $seeds; do
    for system in $systems; do
      dirs+=("$(student_dir "$system" "$seed")")
    done
  done
  python3 ../../local/results.py --exp-dirs "$(IFS=,; echo "${dirs[*]}")" --table demo \
    --out "$exp_dir/results$student_tag.md"
}

run_stages
