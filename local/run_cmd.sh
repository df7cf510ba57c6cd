# shellcheck shell=bash
# run_cmd: run a command, or an array of tasks, with a log file for each.  Sourced by every recipe's cmd.sh.
#
#   run_cmd [--log FILE] [--array FIRST-LAST] [--max-jobs N] [--dry-run] -- COMMAND [ARGUMENT ...]
#
#   --log FILE          stdout and stderr go there (folders are made); without it they stay on the terminal
#   --array 0-7         one task for each number; the word JOB in FILE and COMMAND becomes the number
#   --max-jobs N        tasks that run at the same time (default: $cmd_max_jobs, else the number of cores)
#   --dry-run           print the commands instead of running them
#
# A failed task lets the running ones end, starts no more, names itself and its log, and run_cmd returns 1.

_run_cmd_error() {
  printf '%s (run_cmd) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}

run_cmd() (
  log_file="" array="" dry_run=false
  max_jobs=${cmd_max_jobs:-$(nproc 2> /dev/null || echo 1)}
  while (($#)); do
    case $1 in
      --log) log_file=${2:?--log needs a file} && shift 2 ;;
      --array) array=${2:?--array needs FIRST-LAST} && shift 2 ;;
      --max-jobs) max_jobs=${2:?--max-jobs needs a number} && shift 2 ;;
      --dry-run) dry_run=true && shift ;;
      --) shift && break ;;
      *)
        _run_cmd_error "unknown option '$1'; it takes --log, --array, --max-jobs, --dry-run, then -- and the command"
        exit 2
        ;;
    esac
  done
  first=0 last=0
  if [[ -n $array ]]; then
    if ! [[ $array =~ ^([0-9]+)-([0-9]+)$ ]] || ((BASH_REMATCH[1] > BASH_REMATCH[2])); then
      _run_cmd_error "--array is '$array'; it must be FIRST-LAST, as in 0-7"
      exit 2
    fi
    first=${BASH_REMATCH[1]} last=${BASH_REMATCH[2]}
    if [[ -n $log_file && $first != "$last" && $log_file != *JOB* ]]; then
      _run_cmd_error "--log is '$log_file'; with --array it must hold the word JOB"
      exit 2
    fi
  fi
  if ! [[ $max_jobs =~ ^[1-9][0-9]*$ ]] || ((!$#)); then
    _run_cmd_error "usage: --max-jobs N (at least 1), and a command after --"
    exit 2
  fi
  if [[ $dry_run == true ]]; then
    for ((job = first; job <= last; job++)); do
      printf '%q ' "${@//JOB/$job}"
      printf '%s\n' "${log_file:+> ${log_file//JOB/$job} 2>&1}"
    done
    exit 0
  fi

  failures=$(mktemp -d)
  # When this shell ends early its tasks end too.
  trap 'jobs -p | xargs -r kill 2> /dev/null || true; rm -rf "$failures"' EXIT
  trap 'exit 143' TERM
  trap 'exit 130' INT
  running=0
  for ((job = first; job <= last; job++)); do
    while ((running >= max_jobs)); do
      wait -n || true  # its outcome is in the folder of failures
      running=$((running - 1))
    done
    [[ -z $(ls -A "$failures") ]] || break
    _run_cmd_task "$failures/$job" "${log_file//JOB/$job}" "${@//JOB/$job}" &
    running=$((running + 1))
  done
  wait || true
  failed=0
  for ((job = first; job <= last; job++)); do
    [[ -e $failures/$job ]] || continue
    failed=1
    task=${array:+task $job of $array: }
    _run_cmd_error "failed with exit code $(cat "$failures/$job"): $task$(printf '%q ' "${@//JOB/$job}")"
    if [[ -n $log_file ]]; then
      _run_cmd_error "the last lines of its log ${log_file//JOB/$job}:"
      tail -n 20 "${log_file//JOB/$job}" >&2 || true
    fi
  done
  exit "$failed"
)

# _run_cmd_task FAILURE_FILE LOG COMMAND ...: leave the exit code in FAILURE_FILE unless it is 0.
_run_cmd_task() {
  local failure=$1 log_file=$2 code=0
  shift 2
  if [[ -n $log_file ]]; then
    mkdir -p "$(dirname "$log_file")" || exit 1
    # Killing this shell must reach the command, so it is a background job that is waited for.
    "$@" > "$log_file" 2>&1 < /dev/null &
  else
    "$@" < /dev/null &
  fi
  local pid=$!
  # shellcheck disable=SC2064
  trap "kill $pid 2> /dev/null" TERM INT
  wait "$pid" || code=$?
  ((code == 0)) || echo "$code" > "$failure"
}
