#!/usr/bin/env bash
# A training with four GPUs a node, without the rest of the recipe.  In the folder of the recipe, once ./prepare.sh is
# through:    sbatch slurm/train.sh, or on two nodes    sbatch --nodes=2 slurm/train.sh
# Two minutes before its time ends it saves, is requeued and goes on with the same losses.
#SBATCH --job-name=mvq-none
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/%x.log
set -euo pipefail

# shellcheck disable=SC1091
. ./path.sh
# shellcheck disable=SC1091
. ../../local/job.sh

exp_dir=exp/mvq-none
run_task --until "$exp_dir/train_summary.json" -- srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task=8 \
  python3 ./train.py --config conf/mvq.yaml --exp-dir "$exp_dir" --kd none --manifest-dir data/aishell/fbank \
  --lang-dir data/aishell/lang_char --train-parts train --valid-parts dev
