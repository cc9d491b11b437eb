#!/usr/bin/env bash
#SBATCH --job-name=eve2-stage3
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
# EVE v2's stage 3: all weights, on instructions.
#
#   DATA=data/instructions7m LOAD=runs/eve2_stage2 SAVE=runs/eve2_stage3 sbatch slurm/eve2_stage3.sh
#
# RECIPE defaults to examples/eve2_7b/stage3.yaml. LAYOUT is an optional second YAML file that overrides it. Flags after the
# script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
train_stage examples/eve2_7b/stage3.yaml "the folder of stage 2, whose weights it starts from" "$@"
