# shellcheck shell=bash
# Timed steps, for .ci/run and local/test_all.sh: all of them run, and any failure fails.
#
#   step NAME MINUTES COMMAND ...   MINUTES: what the step is meant to take at most on two cores; it is not stopped
#   end_steps                       print the summary, and leave with 1 when a step failed

_steps_summary=()
_steps_status=0
_steps_minutes=0

_steps_line() { # _steps_line NAME SECONDS MINUTES VERDICT
  local late=""
  (($2 <= 60 * $3)) || late=", over its time"
  printf '%-10s %5d s of %4d  %s%s' "$1" "$2" $((60 * $3)) "$4" "$late"
}

step() {
  local name=$1 minutes=$2 start=$SECONDS code=0 verdict=passed
  shift 2
  printf '\n=== %s: %s\n' "$name" "$*"
  "$@" || code=$?
  if ((code)); then
    verdict="FAILED with exit code $code"
    _steps_status=1
  fi
  _steps_minutes=$((_steps_minutes + minutes))
  _steps_summary+=("$(_steps_line "$name" $((SECONDS - start)) "$minutes" "$verdict")")
}

end_steps() {
  printf '\n=== summary\n'
  printf '%s\n' "${_steps_summary[@]}" "$(_steps_line all "$SECONDS" "$_steps_minutes" "")"
  exit "$_steps_status"
}
