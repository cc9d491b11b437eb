#!/usr/bin/env bash
#SBATCH --job-name=eve-stage2
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=72:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# Stage 2, generative pretraining: everything trains on captions.
#
#   DATA=data/captions33m TEACHER=models/clip-vit-large-patch14-336 \
#   LOAD=runs/stage1 SAVE=runs/stage2 sbatch slurm/pretrain_stage2.sh
#
# RECIPE is examples/eve_7b/stage2.yaml unless it is set; LAYOUT, a second file, overrides it (such as
# examples/eve_7b/layouts/h100.yaml), and flags behind the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
stage_folders=(TEACHER --teacher-model "the folder of the teacher, CLIP ViT-L/14-336")
train_stage examples/eve_7b/stage2.yaml "the folder of stage 1, whose weights it starts from" "$@"
