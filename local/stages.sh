# shellcheck shell=bash
# The stage engine of every prepare.sh and run_*.sh.  A script looks like this:
#
#   #!/usr/bin/env bash
#   # One paragraph that --help prints.
#   set -euo pipefail
#   cd "$(dirname "${BASH_SOURCE[0]}")"
#
#   layer=4              # Teacher layer.           An option is a line `name=default  # description`
#   short=false          # Fewer utterances.        above `parse_options`; on the command line it is
#                                                   --name value or --name=value ('-' equals '_');
#   . ./path.sh                                     a bare --short sets a true/false option to true.
#   . ../../local/stages.sh
#   parse_options "$@"
#   marker_dir=data/.done                           # where the markers of finished stages lie
#
#   stage_3_labels() {  # Extract the teacher's labels.         (the description --help shows)
#     begin --option layer short --input data/cuts.jsonl.gz --output data/labels/label_set.json \
#       --code 'icefall_kd/labels/*.py' || return 0
#     python3 ../../local/extract_labels.py --layer "$layer" ...
#   }
#
#   run_stages
#
# Options of every script: --stage N --stop-stage M --skip-stages "2 4" --force --help.
#
# `begin` returns 1 when the stage is done already.  Its words:
#   --option NAME ... or NAME=VALUE ...   options that the result depends on (NAME: a shell variable)
#   --input PATH ...                      files and folders read; content decides, not time stamps (folders above
#                                         256 MiB, as whole corpora: names, sizes and time stamps; folders
#                                         called log below them do not count)
#   --output PATH ...                     what must exist when the stage ends, and to skip it later; a file of it (in
#                                         it, for a folder) that has become shorter runs the stage again.  With a *
#                                         in its last part: those that match when it ends, which may be removed later
#   --code GLOB ...                       source files, relative to the repository
#   --name NAME                           marker of one step of a stage (see below)
# The text of the stage function, and of the function that calls begin, counts as code too.  A changed option, input
# or source file runs the stage again, and the log says which one changed, from what to what.  A killed stage has no
# marker, so it runs again.
#
# Several steps in one stage, each with a marker of its own:
#   for kd in none mvq; do
#     if begin --name "$kd" --option kd --output "exp/$kd/results.json"; then
#       ./train.py --kd "$kd"
#       finish
#     fi
#   done
#
# A command that computes is started by `run_cmd KIND [OPTION ...] -- COMMAND ...`, so that cmd.sh decides where; the
# options are those of local/submit.py.  Of an array in a step that did not finish, only what is missing runs again.
#
# Exit codes: 0 fine, 2 wrong usage, 4 a missing input or output, else that of the failed command.

# Since bash 5.2 an & in what replaces a pattern, as in a folder's name, stands for what was matched.
shopt -u patsub_replacement 2> /dev/null || true

stage=0           # first stage
stop_stage=1000   # last stage
skip_stages=""    # stages to leave out
force=false       # run the chosen stages though they are done

_stages_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_stages_marker="$_stages_repo/local/stage_marker.py"
# The script's own text tells its options and stages.  Its name may be relative to the folder it was started in,
# which it may have left since.
for _stages_script in "${BASH_SOURCE[1]:-$0}" "${OLDPWD:-.}/${BASH_SOURCE[1]:-$0}" "./${BASH_SOURCE[1]##*/}"; do
  ! grep -qs '^parse_options' "$_stages_script" || break
done
_stages_script=$(cd "$(dirname "$_stages_script")" && pwd)/${_stages_script##*/}
_stages_current=""    # name of the running stage
_stages_open=""       # marker of the begun step
_stages_started=0

log() {
  printf '%s (%s) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "${_stages_script##*/}" "$*" >&2
}

fail() {  # fail EXIT_CODE MESSAGE
  log "error: $2"
  exit "$1"
}

short_name() { # short_name PATH_OR_HUB_ID: its last two parts as one word; many a hub's user has a bert-base
  local folder
  folder=$(basename -- "$(dirname -- "$1")")
  [[ $folder == [./]* ]] && folder="" || folder+=-
  folder+=${1##*/}
  echo "${folder//[:,]/-}"
}

# -I: neither the current folder nor PYTHON* variables can change what the marker tool imports; -S: start faster.
_stages_python() {
  "${PYTHON:-python3}" -I -S "$_stages_marker" "$@"
}

# Print "name<TAB>description" of every option that the script declares above parse_options.
_stages_options() {
  local line
  while IFS= read -r line; do
    [[ $line =~ ^parse_options ]] && break
    if [[ $line =~ ^([a-z][a-z0-9_]*)=.*[[:space:]]#[[:space:]]+(.+)$ ]]; then
      printf '%s\t%s\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    fi
  done < "$_stages_script"
}

# Print "number<TAB>name<TAB>description" of every stage function, in the order of numbers.
_stages_list() {
  local line
  while IFS= read -r line; do
    if [[ $line =~ ^stage_([0-9]+)_([a-z0-9_]+)\(\)[[:space:]]*\{([[:space:]]*#[[:space:]]*(.*))?$ ]]; then
      printf '%d\t%s\t%s\n' "$((10#${BASH_REMATCH[1]}))" "${BASH_REMATCH[1]}_${BASH_REMATCH[2]}" "${BASH_REMATCH[4]}"
    fi
  done < "$_stages_script" | sort -n
}

_stages_help() {
  local name description number line file
  printf 'Usage: %s [--option value ...]\n\n' "${_stages_script##*/}"
  # The comment at the head of the script; before it, of the recipe's own one that started it with --recipe DIR.
  for file in ${recipe:+"$recipe/${_stages_script##*/}"} "$_stages_script"; do
    while IFS= read -r line; do
      [[ $line =~ ^#! ]] && continue
      [[ $line =~ ^# ]] || break
      line=${line#\#}
      printf '%s\n' "${line# }"
    done < "$file"
    printf '\n'
  done
  printf 'Options:\n'
  while IFS=$'\t' read -r name description; do
    printf "  --%-20s %s (default: '%s')\n" "${name//_/-}" "$description" "${!name}"
  done < <(_stages_options)
  printf '\nStages:\n'
  while IFS=$'\t' read -r number name description; do
    name=${name#*_}
    printf '  %3d  %-18s %s\n' "$number" "${name//_/-}" "$description"
  done < <(_stages_list)
  printf '\nControl:\n'
  printf '  --%-20s %s\n' 'stage N' 'first stage to run (default: all)' 'stop-stage M' 'last stage to run' \
    'skip-stages "N M"' 'stages to leave out' 'force' 'run the chosen stages though they are done' 'help' 'this text'
}

# Set the script's option variables from the command line.
parse_options() {
  local names name flag value help=false
  names=$(_stages_options | cut -f 1)
  names+=$'\nstage\nstop_stage\nskip_stages\nforce\nhelp'
  while (($#)); do
    flag=$1
    shift
    [[ $flag == -h ]] && flag=--help
    [[ $flag == --?* ]] || fail 2 "unexpected argument '$flag'; options are written --name value"
    name=${flag%%=*}
    name=${name#--}
    name=${name//-/_}
    if ! grep -qxF -e "$name" <<< "$names"; then
      # shellcheck disable=SC2086
      value=$(_stages_python closest "$name" $names)
      fail 2 "unknown option --${name//_/-}${value:+; did you mean --${value//_/-}?}"
    fi
    if [[ $flag == *=* ]]; then
      value=${flag#*=}
    elif [[ ${!name} == true || ${!name} == false ]] && [[ $# -eq 0 || $1 == --* ]]; then
      value=true
    elif (($#)); then
      value=$1
      shift
    else
      fail 2 "--${name//_/-} needs a value"
    fi
    if [[ ${!name} == true || ${!name} == false ]] && [[ $value != true && $value != false ]]; then
      fail 2 "--${name//_/-} is '$value'; it must be true or false"
    fi
    printf -v "$name" '%s' "$value"
  done
  if [[ $help == true ]]; then
    _stages_help
    exit 0
  fi
  for name in stage stop_stage; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail 2 "--${name//_/-} is '${!name}'; it must be a number"
  done
}

# Return 0 when the current stage (or its step --name) must run, 1 when it is done.
begin() {
  local arguments=() kind="" word name="" reasons rc=0
  [[ -n ${marker_dir:-} ]] || fail 2 "marker_dir is not set; it names the folder of the markers"
  [[ -n $_stages_current ]] || fail 2 "begin was called outside of a stage"
  [[ -z $_stages_open ]] || fail 2 "begin was called again before finish of $_stages_step"
  for word in "$@"; do
    case $word in
      --*) kind=$word ;;
    esac
    if [[ $kind == --name ]]; then
      [[ $word == --name ]] || name=$word
    elif [[ $kind == --option && $word != --* && $word != *=* ]]; then
      arguments+=("$word=${!word}")
    else
      arguments+=("$word")
    fi
  done
  [[ $force == true ]] && arguments+=(--force)
  arguments+=(--text)
  for word in "stage_$_stages_current" "${FUNCNAME[1]}"; do  # the same name twice counts once
    arguments+=("${_stages_script##*/}:$word=$(declare -f "$word")")
  done
  _stages_open="$marker_dir/$_stages_current${name:+.${name//\//_}}"
  _stages_step="stage ${_stages_current/_/ }${name:+ [$name]}"
  _stages_started=$SECONDS
  reasons=$(_stages_python check "$_stages_open" "${arguments[@]}") || rc=$?
  case $rc in
    0)
      log "$_stages_step: done before, skipped"
      _stages_open=""
      return 1
      ;;
    10)
      while IFS= read -r word; do
        log "$_stages_step: runs, $word"
      done <<< "$reasons"
      ;;
    *) exit "$rc" ;;
  esac
}

# Mark the begun step as done; called by itself at the end of a stage.
finish() {
  [[ -n $_stages_open ]] || return 0
  _stages_python finish "$_stages_open" "$((SECONDS - _stages_started))" || exit $?
  _stages_open=""
  log "$_stages_step: done in $((SECONDS - _stages_started)) s"
}

# run_cmd KIND [OPTION ...] -- COMMAND ...: run a command or an array of tasks where cmd_backend says; KIND is cpu, gpu or
# train: the resources cmd_KIND that a Slurm job asks for.
run_cmd() {
  local kind=cmd_$1 words=()
  if [[ ${cmd_backend:-local} == slurm ]]; then
    read -r -a words <<< "${!kind:-}"
    local step=${_stages_open:-${_stages_current:-job}}
    words+=(--name "${step##*/}" --log-dir "${marker_dir%/.done}/log")
  fi
  [[ -z $_stages_open ]] || words+=(--state "$_stages_open.tasks")
  "${PYTHON:-python3}" -I -S "$_stages_repo/local/submit.py" --backend "${cmd_backend:-local}" "${words[@]}" "${@:2}"
}

# What a step's tasks left is of no use: all of them run again next time.
forget_tasks() {
  rm -rf "${_stages_open:?no step was begun}.tasks"
}

_stages_on_exit() {
  local code=$?
  if ((code)) && [[ -n $_stages_current ]]; then
    log "stage ${_stages_current/_/ } failed with exit code $code; correct the cause and run the same line again"
  fi
}

# Run the chosen stages in the order of their numbers.
run_stages() {
  local number name description stages
  stages=$(_stages_list)
  [[ -n $stages ]] || fail 2 "there is no function stage_N_name in ${_stages_script##*/}"
  ((stage <= stop_stage)) || fail 2 "--stage $stage comes after --stop-stage $stop_stage"
  trap _stages_on_exit EXIT
  trap 'exit 130' INT  # so that Ctrl-C leaves through the line above, too
  # The list comes through descriptor 9, so that a command of a stage which reads stdin cannot swallow it.
  while IFS=$'\t' read -r number name description <&9; do
    if ((number < stage || number > stop_stage)) || [[ " $skip_stages " == *" $number "* ]]; then
      continue
    fi
    _stages_current=$name
    "stage_$name" 9<&-
    finish
    _stages_current=""
  done 9<<< "$stages"
}
