#!/usr/bin/env bash
#SBATCH --job-name=vila-u-sft
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
# VILA-U's supervised fine-tuning: projector, decoder and depth transformer train on conversations and pictures to draw.
#
#   DATA="0.8 data/instructions 0.2 data/drawings" TOWER=models/vila-u-7b-256/vision_tower \
#   LOAD=runs/vila-u SAVE=runs/vila-u-sft sbatch slurm/vila_u_sft.sh
#
# The datasets have codes of TOWER (slurm/tokenize_images.sh). RECIPE defaults to examples/vila_u_7b/sft.yaml. LAYOUT is
# an optional second YAML file that overrides it. Flags after the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
stage_folders=(TOWER --vision-tokenizer "the folder of the vision tower that made the codes of the datasets")
train_stage examples/vila_u_7b/sft.yaml "the folder of the pretraining, whose weights it starts from" "$@"
