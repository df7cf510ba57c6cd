# shellcheck shell=bash disable=SC2034
# Where the commands of this recipe run, and what Slurm jobs ask for: options of local/submit.py (docs/cluster.md).
# What is set already counts more: cmd_backend=slurm ./run_mvq.sh ...

: "${cmd_backend:=local}" # local: on this machine; slurm: as jobs
: "${cmd_cpu:=--cpus 4 --mem 16G --time 12:00:00}"
: "${cmd_gpu:=--gpus 1 --cpus 4 --mem 32G --time 12:00:00}"
: "${cmd_train:=--nodes 1 --gpus 1 --cpus 8 --mem 64G --time 24:00:00}"
