#!/usr/bin/env bash
# The tests of tests/with_slurm on a Slurm of this machine alone: used by `make test-slurm`, safe to repeat.  Debian's
# packages are installed where they are missing, which needs root and apt; their own services are not started.
#
#   local/test_slurm.sh [ARGUMENT OF PYTEST ...]
#   local/test_slurm.sh --available   whether this machine has or can install what is needed; nothing is installed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(slurmctld slurmd slurm-client munge)

log() {
  printf '%s (make test-slurm) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}

missing=()
for program in slurmctld slurmd munged sbatch; do
  command -v "$program" > /dev/null || missing+=("$program")
done
if ((EUID)); then
  log "needs root, to start Slurm's daemons"
  exit 2
fi
if ((${#missing[@]})); then
  if ! command -v apt-get > /dev/null; then
    log "needs ${missing[*]}, and apt is not here to install them"
    exit 2
  fi
  # An update that reaches no server ends with 0, and old lists name packages that nobody delivers: only their files tell.
  if ! apt-get update -qq > /dev/null ||
    ! apt-get install -y -qq --no-install-recommends --download-only "${packages[@]}" > /dev/null; then
    log "needs ${missing[*]}, and apt cannot fetch ${packages[*]} (see above)"
    exit 2
  fi
fi
if [[ ${1-} == --available ]]; then
  exit 0
fi
if ((${#missing[@]})); then
  log "installing Debian's ${packages[*]}"
  # Exit code 101: nothing is started by the installation.
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi
ICEFALL_KD_TEST_SLURM=1 "${VENV:-.venv}/bin/python" -m pytest -q --timeout 7200 tests/with_slurm "$@" < /dev/null
