# shellcheck shell=bash
# What a Slurm job does around its command; sourced by the scripts that local/submit.py writes and by egs/*/slurm.
#
#   run_task [--until FILE] [--left PATH] -- COMMAND ...
#
#   --until FILE   the command writes it when it is complete; if it was told to stop before, the job is requeued and
#                  the command started again, which goes on where it was.  A file of an earlier run says nothing of a
#                  command that was ended by a signal
#   --left PATH    leave PATH.done when the command is complete, or its exit code in PATH.failed
#
# SIGUSR1 comes before the end of the time limit (#SBATCH --signal=B:USR1@120) or by `scancel --batch --signal=USR1`.
# SIGTERM comes to all processes of a job that is preempted or cancelled: the first are requeued by Slurm itself.

_task_log() {
  printf '%s (job %s) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "${SLURM_JOB_ID:-none}" "$*" >&2
}

_task_is_wanted() { # is nobody ending this job
  local said _
  [[ -n ${SLURM_JOB_ID:-} ]] || return 1
  for _ in 1 2 3 4 5; do # the controller may be away just now
    if said=$(scontrol --oneliner show job "$SLURM_JOB_ID"); then
      [[ $said == *" JobState=RUNNING "* ]]
      return
    fi
    sleep 2
  done
  return 1
}

_file_state() { # of two equal ones, the file was not written in between
  stat --format='%i %s %Y %Z' -- "$1" 2> /dev/null || true
}

run_task() {
  local until="" left="" code=0 pid signals=0 seen=-1 again before="" complete=false
  while [[ $1 != -- ]]; do
    case $1 in
      --until) until=$2 ;;
      --left) left=$2 ;;
      *) _task_log "error: run_task has no option $1" && return 2 ;;
    esac
    shift 2
  done
  shift
  [[ -z $left ]] || rm -f "$left.failed"
  [[ -z $until ]] || before=$(_file_state "$until")
  _task_log "on $(hostname), start ${SLURM_RESTART_COUNT:-0}: $(printf '%q ' "$@")"
  "$@" < /dev/null &
  pid=$!
  # A training takes both for the same; srun passes on SIGUSR1, but SIGTERM makes it end its tasks at once.
  trap 'signals=$((signals + 1)); kill -USR1 "$pid" 2> /dev/null' USR1
  if [[ -z $until ]]; then
    trap 'signals=$((signals + 1)); kill -TERM "$pid" 2> /dev/null' TERM
  else
    trap 'signals=$((signals + 1)); kill -USR1 "$pid" 2> /dev/null' TERM
  fi
  while ((seen != signals)); do # a signal ends `wait` before the command has ended
    seen=$signals again=0
    wait "$pid" || again=$?
    # Of a command that ended together with the signal, bash may tell the end once, and then -1.
    ((again < 0)) || code=$again
  done
  if [[ -n $until && -e $until ]]; then
    if [[ $(_file_state "$until") != "$before" ]]; then
      complete=true
      ((again >= 0)) || code=0
    elif ((code == 0)); then
      complete=true # it was before, and nothing was left to do
    fi
  fi
  trap '' USR1 TERM
  if [[ -n $until && $complete == false ]] && ((code == 0 || signals)); then
    if ! _task_is_wanted; then
      _task_log "told to stop, and the job is being ended"
      return 143
    fi
    _task_log "told to stop; the job is requeued and goes on from what was saved"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    code=143
  elif ((code == 0)); then
    [[ -z $left ]] || echo 0 > "$left.done"
    return 0
  fi
  _task_log "failed with exit code $code"
  [[ -z $left ]] || echo "$code" > "$left.failed"
  return "$code"
}
