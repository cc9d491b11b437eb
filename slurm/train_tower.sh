#!/usr/bin/env bash
#SBATCH --job-name=train-tower
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
# Training of a vision tower that makes codes of pictures, on pairs of a picture and a text (megatron_eve.train_tower).
#
#   DATA=data/pairs SIGLIP=models/siglip-large-patch16-256 PERCEPTUAL=models/vgg16.safetensors \
#   SAVE=runs/tower sbatch slurm/train_tower.sh
#
# LOAD, if it is set, is a tower whose weights the run starts from. RECIPE defaults to examples/vila_u_7b/tower.yaml. LAYOUT
# is an optional second YAML file that overrides it. Flags after the script's name override both.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
training_command=megatron_eve.train_tower
need_save
need DATA "prefixes of the datasets, with spaces between them (weights before each for a blend)"
read -r -d '' -a datasets <<< "$DATA" || true # all lines; it returns 1 at the end
need_datasets DATA "${datasets[@]}"
need_datasets_of --data-path "$@"
need_datasets_of --valid-data-path "$@"
need_folder SIGLIP "the folder of the SigLIP to start from, with its text side"
files=()
if [[ -n ${PERCEPTUAL:-} ]]; then
    need_file PERCEPTUAL "the weights of the perceptual loss"
    files+=(--perceptual-weights "$PERCEPTUAL")
fi
if [[ -n ${LOAD:-} ]]; then
    need_weights LOAD "a tower whose weights the run starts from"
    files+=(--pretrained-checkpoint "$LOAD")
fi
train "${RECIPE:-examples/vila_u_7b/tower.yaml}" --data-path "${datasets[@]}" --vision-tower "$SIGLIP" "${files[@]}" "$@"
