#!/usr/bin/env bash
# Make a virtual environment with ESPnet 202511: used by `make test-espnet`, safe to repeat.  Its searches are what ours
# are compared with; of ESPnet's requirements only what these import is installed.
# Times of both:  source .venv-espnet/bin/activate; benchmarks/nar_rtf.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV_ESPNET:-.venv-espnet}
torch=$(grep '^torch==' constraints.txt)

log() {
  printf '%s (make test-espnet) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}

find_project() { # the environment finds the project wherever it is used from
  printf '%s\n' "$PWD" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/icefall_kd.pth"
}

marker=$venv/.installed-$(cat constraints.txt tests/with_espnet/*.txt | sha256sum | cut -c 1-16)
if [[ -e $marker && -x $venv/bin/python ]]; then
  find_project
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
    log "Python 3.11 or newer is needed; found: $(python3 --version 2>&1 || true)." \
      "Name one: make test-espnet PYTHON=/path/to/python3.11"
    exit 2
  fi
  log "virtual environment $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
log "installing $torch and what the tests need"
"${pip[@]}" "$torch" -c constraints.txt
"${pip[@]}" -r tests/with_espnet/requirements.txt
log "installing ESPnet"
# --no-deps: ESPnet asks for fifty packages, some of which have no wheel for this Python; its searches need these.
"${pip[@]}" --no-deps -r tests/with_espnet/espnet.txt
"$venv/bin/python" -c 'import espnet2.asr.maskctc_model'
find_project
rm -f "$venv"/.installed-*
touch "$marker"
log "done"
