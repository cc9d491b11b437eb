#!/usr/bin/env bash
#SBATCH --job-name=vila-stage3
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
# VILA's stage 3, instruction tuning: projector and decoder train on conversations, with text alone in the blend.
#
#   DATA="0.7 data/instructions 0.3 data/text1m" LOAD=runs/vila2 SAVE=runs/vila3 sbatch slurm/vila_stage3.sh
#
# RECIPE defaults to examples/vila_7b/stage3.yaml; examples/vila15_8b has another. LAYOUT is an optional second YAML file
# that overrides it. Flags after the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
train_stage examples/vila_7b/stage3.yaml "the folder of stage 2, whose weights it starts from" "$@"
