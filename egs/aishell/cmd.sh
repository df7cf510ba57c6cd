# shellcheck shell=bash
# How the commands of this recipe are run: on this machine, array tasks side by side.
. "$(dirname "${BASH_SOURCE[0]}")/../../local/run_cmd.sh"

# Tasks at the same time; empty: the number of cores.  Several GPU tasks on one GPU: set it to 1.
export cmd_max_jobs=${cmd_max_jobs:-}
