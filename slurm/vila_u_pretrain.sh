#!/usr/bin/env bash
#SBATCH --job-name=vila-u-pretrain
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
# VILA-U's unified pretraining: projector, decoder and depth transformer train on pictures to read and to draw.
#
#   DATA="0.1 data/captions 0.2 data/mmc4 0.7 data/drawings" TOWER=models/vila-u-7b-256/vision_tower \
#   LOAD=models/Llama-2-7b-hf SAVE=runs/vila-u sbatch slurm/vila_u_pretrain.sh
#
# The datasets have codes of TOWER (slurm/tokenize_images.sh). RECIPE defaults to examples/vila_u_7b/pretrain.yaml.
# LAYOUT is an optional second YAML file that overrides it. Flags after the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
stage_folders=(TOWER --vision-tokenizer "the folder of the vision tower that made the codes of the datasets")
train_stage examples/vila_u_7b/pretrain.yaml "the language model to start from, a Hugging Face folder such as Llama 2 7B" "$@"
