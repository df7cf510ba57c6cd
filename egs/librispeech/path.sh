# shellcheck shell=bash
# Sourced by every script of this recipe.  Change here what this machine needs (modules, conda, CUDA).
. "$(dirname "${BASH_SOURCE[0]}")/../../local/path.sh"
