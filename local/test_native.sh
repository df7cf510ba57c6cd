#!/usr/bin/env bash
# Build kaldifeat and fast_rnnt from PyPI's sources against the torch of the environment, and test with them: started by
# `make test-native`, safe to repeat; what is built is kept in .venv-native.  Needs cmake and g++, and minutes.
#
# Variables: NATIVE="fast_rnnt" (one of the two), NATIVE_JOBS=4 (compilers at the same time), NATIVE_DIR (folder).
# Both are older than this torch, hence C++20, a newer pybind11, cmake's policies of 3.5, and Python's headers by CPATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(realpath -s "${VENV:-.venv}/bin/python")
mkdir -p "${NATIVE_DIR:-.venv-native}"
dir=$(cd "${NATIVE_DIR:-.venv-native}" && pwd)
pybind=3.0.1
torch=$("$python" -c 'import torch; print(torch.__version__)')

log() {
  printf '%s (make test-native) %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}

unpack() { # unpack NAME VERSION: the sources of PyPI, in $dir/NAME-VERSION
  [[ ! -d $dir/$1-$2 ]] || return 0
  "$python" -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: -d "$dir" "$1==$2"
  mkdir -p "$dir/unpacking" && tar -xzf "$dir/$1-$2.tar.gz" -C "$dir/unpacking"
  mv "$dir/unpacking/$1-$2" "$dir/$1-$2"
}

build() { # build NAME VERSION: into $dir/lib-NAME
  local name=$1 version=$2 arguments marker
  marker=$dir/lib-$name/.built-$version-torch$torch
  [[ ! -e $marker ]] || return 0
  unpack pybind11 "$pybind"
  unpack "$name" "$version"
  rm -rf "$dir/lib-$name" "$dir/$name-$version/build"
  arguments="-DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_STANDARD=20 -DCMAKE_POLICY_VERSION_MINIMUM=3.5"
  arguments+=" -DFETCHCONTENT_SOURCE_DIR_PYBIND11=$dir/pybind11-$pybind -DPYTHON_EXECUTABLE=$python"
  log "building $name $version for torch $torch; the output goes to $dir/$name.log"
  (
    cd "$dir/$name-$version"
    CPATH=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    export CPATH
    export FT_CMAKE_ARGS="$arguments -DFT_BUILD_TESTS=OFF -DFT_WITH_CUDA=OFF" FT_MAKE_ARGS="-j${NATIVE_JOBS:-1}"
    export KALDIFEAT_CMAKE_ARGS=$arguments KALDIFEAT_MAKE_ARGS="-j${NATIVE_JOBS:-1}"
    nice "$python" setup.py build --build-lib "$dir/lib-$name"
  ) > "$dir/$name.log" 2>&1 || {
    tail -n 20 "$dir/$name.log" >&2
    log "error: $name does not build; see $dir/$name.log"
    exit 1
  }
  touch "$marker"
}

path=""
tests=()
for name in ${NATIVE:-fast_rnnt kaldifeat}; do
  case $name in
    fast_rnnt) build fast_rnnt 1.3 ;;
    kaldifeat) build kaldifeat 1.24 ;;
    *) log "error: NATIVE names $name; it knows fast_rnnt and kaldifeat" && exit 2 ;;
  esac
  path+=$dir/lib-$name:
  tests+=("tests/native/test_$name.py")
done
PYTHONPATH=$path. "$python" -m pytest -q "${tests[@]}"
