#!/usr/bin/env bash
#SBATCH --job-name=eve-stage3-hd
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# Stage 3 of the HD model: 1344 pixels, started from the 672-pixel weights of stage 2.
#
#   DATA=data/instructions1.8m TEACHER=models/clip-vit-large-patch14-336 \
#   LOAD=runs/stage2 SAVE=runs/stage3-hd sbatch slurm/finetune_stage3_hd.sh
#
# RECIPE is examples/eve_7b/stage3_hd.yaml unless it is set; LAYOUT, a second file, overrides it (such as
# examples/eve_7b/layouts/h100.yaml), and flags behind the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
stage_folders=(TEACHER --teacher-model "the folder of the teacher, CLIP ViT-L/14-336")
train_stage examples/eve_7b/stage3_hd.yaml "the folder of stage 2, whose weights it starts from" "$@"
