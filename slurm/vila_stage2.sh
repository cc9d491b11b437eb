#!/usr/bin/env bash
#SBATCH --job-name=vila-stage2
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
# VILA's stage 2, pre-training: projector and decoder train on interleaved documents and pairs.
#
#   DATA="0.5 data/mmc4 0.5 data/coyo" LOAD=runs/vila1 SAVE=runs/vila2 sbatch slurm/vila_stage2.sh
#
# RECIPE defaults to examples/vila_7b/stage2.yaml; examples/vila15_8b has another. LAYOUT is an optional second YAML file
# that overrides it. Flags after the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
train_stage examples/vila_7b/stage2.yaml "the folder of stage 1, whose weights it starts from" "$@"
