#!/usr/bin/env bash
#SBATCH --job-name=eve2-stage0
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# EVE v2's stage 0: the patch embedding learns from captions, the language model frozen and without experts.
#
#   DATA=data/captions10m LOAD=models/Qwen2.5-7B-Instruct SAVE=runs/eve2_stage0 sbatch slurm/eve2_stage0.sh
#
# RECIPE defaults to examples/eve2_7b/stage0.yaml. LAYOUT is an optional second YAML file that overrides it. Flags after the
# script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
train_stage examples/eve2_7b/stage0.yaml "the language model to start from, a Hugging Face folder such as Qwen2.5-7B-Instruct" "$@"
