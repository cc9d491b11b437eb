#!/usr/bin/env bash
#SBATCH --job-name=eve-stage1
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
# Stage 1, LLM-guided pre-alignment: the decoder is frozen; patch embedding, projector and aligning layer train.
#
#   DATA=data/captions16m TEACHER=models/clip-vit-large-patch14-336 \
#   LOAD=models/vicuna-7b-v1.5 SAVE=runs/stage1 sbatch slurm/pretrain_stage1.sh
#
# RECIPE is examples/eve_7b/stage1.yaml unless it is set; LAYOUT, a second file, overrides it (such as
# examples/eve_7b/layouts/h100.yaml), and flags behind the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
stage_folders=(TEACHER --teacher-model "the folder of the teacher, CLIP ViT-L/14-336")
train_stage examples/eve_7b/stage1.yaml "the language model to start from, a Hugging Face folder such as Vicuna 7B" "$@"
