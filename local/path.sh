# shellcheck shell=bash
# Sourced by every recipe's path.sh: which Python, where the package is, how many threads.

_path_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The environment of `make env`, unless another one is active.
if [[ -z ${VIRTUAL_ENV:-} && -x $_path_repo/.venv/bin/python3 ]]; then
  export VIRTUAL_ENV=$_path_repo/.venv
  export PATH=$VIRTUAL_ENV/bin:$PATH
fi

export PYTHONPATH=$_path_repo${PYTHONPATH:+:$PYTHONPATH}
# Loader workers are processes: one thread each, or they fight for the cores.  Training sets its own number.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
