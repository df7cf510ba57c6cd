#!/usr/bin/env bash
# Make a virtual environment with k2: used by `make test-k2`, safe to repeat; 3.5 GB, about two minutes.
# k2 1.23.4, the last version on PyPI, needs torch 1.13.1; its wheel of the hash below is for Python 3.11 alone.
# Decoding over graphs runs there too:  source .venv-k2/bin/activate
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV_K2:-.venv-k2}

log() {
  printf '%s (make test-k2) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}

find_project() { # the environment finds the project wherever it is used from
  printf '%s\n' "$PWD" > "$venv/lib/python3.11/site-packages/icefall_kd.pth"
}

marker=$venv/.installed-$(cat tests/with_k2/requirements.txt tests/with_k2/k2.txt | sha256sum | cut -c 1-16)
if [[ -e $marker && -x $venv/bin/python ]]; then
  find_project
  exit 0
fi

is_311() {
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null
}

if [[ ! -x $venv/bin/python ]]; then
  python=""
  for candidate in ${PYTHON:-} python3.11 python3; do
    if command -v "$candidate" > /dev/null && is_311 "$candidate"; then
      python=$candidate
      break
    fi
  done
  if [[ -z $python ]]; then
    log "the pinned wheel of k2 1.23.4 is for Python 3.11; found: $(python3 --version 2>&1 || true)." \
      "Name one: make test-k2 PYTHON=/path/to/python3.11; for other Pythons see docs/graph_decoding.md"
    exit 2
  fi
  log "virtual environment $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
is_311 "$venv/bin/python" || {
  log "$venv has $("$venv/bin/python" --version), but the pinned wheel of k2 is for 3.11; move $venv away and try again"
  exit 2
}

# Nobody installs these two gigabytes twice: no cache holds them.
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir install --quiet)
log "installing torch 1.13.1 and what the tests need"
"${pip[@]}" -r tests/with_k2/requirements.txt
log "installing k2"
# --no-deps: k2 asks for graphviz, which only draws.
"${pip[@]}" --no-deps --require-hashes -r tests/with_k2/k2.txt
"$venv/bin/python" -c 'import k2'
find_project
rm -f "$venv"/.installed-*
touch "$marker"
log "done"
