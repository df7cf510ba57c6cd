#!/usr/bin/env bash
# The tests of tests/with_slurm on a Slurm of this machine alone: used by `make test-slurm`, safe to repeat.  Debian's
# packages are installed where they are missing, which needs root and apt; their own services are not started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log() {
  printf '%s (make test-slurm) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}

missing=()
for program in slurmctld slurmd munged sbatch; do
  command -v "$program" > /dev/null || missing+=("$program")
done
if ((${#missing[@]} || EUID)); then
  if ((EUID)) || ! command -v apt-get > /dev/null; then
    log "needs root, to start Slurm's daemons, and apt where they are not installed (missing: ${missing[*]:-none})"
    exit 2
  fi
  log "installing Debian's slurmctld, slurmd and munge"
  # Exit code 101: nothing is started by the installation.
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
fi
ICEFALL_KD_TEST_SLURM=1 "${VENV:-.venv}/bin/python" -m pytest -q --timeout 7200 tests/with_slurm "$@" < /dev/null
