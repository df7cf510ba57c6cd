#!/usr/bin/env bash
# All tests, in steps that are timed: the folders of a step are the words of its line, and `unit` is all the others.
#
#   local/test_all.sh           every step
#   local/test_all.sh NAME ...  these steps; with -- PATH ... behind them: of one step, these paths alone
#
# Started by `make test-all`, `make test` (unit), `make test-recipes` and `make test-faults`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=local/steps.sh
. local/steps.sh

# name  minutes at most on two cores  folders below tests/
steps="
unit    10
recipes 25 recipes
faults  20 faults
"

wanted=()
while (($#)) && [[ $1 != -- ]]; do
  if ! grep -q "^$1 " <<< "$steps"; then
    echo "$0: no step is called '$1'; there are$(awk 'NF { printf " %s", $1 }' <<< "$steps")" >&2
    exit 2
  fi
  wanted+=("$1")
  shift
done
(($# == 0)) || shift
paths=("$@")

run() { # run NAME MINUTES PATH ...: the tests of these paths
  local name=$1 minutes=$2
  shift 2
  step "$name" "$minutes" "${VENV:-.venv}/bin/python" -m pytest -q -n "${TEST_JOBS:-2}" --dist loadfile "$@" < /dev/null
}

others=()
while read -r -a words; do
  others+=("${words[@]/#/--ignore=tests/}")
done < <(awk 'NF > 2 { $1 = $2 = ""; print }' <<< "$steps")
while read -r name minutes folders; do
  [[ -n $name ]] || continue
  [[ ${#wanted[@]} == 0 || " ${wanted[*]} " == *" $name "* ]] || continue
  read -r -a words <<< "$folders"
  if ((${#paths[@]})); then
    run "$name" "$minutes" "${paths[@]}"
  elif [[ -z $folders ]]; then
    run "$name" "$minutes" tests "${others[@]}"
  else
    run "$name" "$minutes" "${words[@]/#/tests/}"
  fi
done <<< "$steps"
end_steps
