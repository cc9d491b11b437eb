#!/usr/bin/env bash
#SBATCH --job-name=vila-stage1
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
# VILA's stage 1, projector initialization: the projector trains; vision tower and decoder are frozen.
#
#   DATA=data/captions595k TOWER=models/clip-vit-large-patch14-336 \
#   LOAD=models/Llama-2-7b-hf SAVE=runs/vila1 sbatch slurm/vila_stage1.sh
#
# RECIPE defaults to examples/vila_7b/stage1.yaml; examples/vila15_8b has another. LAYOUT is an optional second YAML file
# that overrides it. Flags after the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
stage_folders=(TOWER --vision-tower "the folder of the vision tower, CLIP ViT-L/14-336")
train_stage examples/vila_7b/stage1.yaml "the language model to start from, a Hugging Face folder such as Llama 2 7B" "$@"
