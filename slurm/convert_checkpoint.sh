#!/usr/bin/env bash
#SBATCH --job-name=eve-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# Exports a run's last checkpoint to a folder in Hugging Face layout, on CPUs only:
#
#   LOAD=runs/stage3 SAVE=models/my-eve-7b TOKENIZER=models/vicuna-7b-v1.5 sbatch slurm/convert_checkpoint.sh --dtype bfloat16
#
# Flags are those of tools/convert_checkpoint.py export, such as --format transformers.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
need_file LOAD "the folder of a run"
need_file TOKENIZER "the folder that has the language model's tokenizer.model"
need SAVE "the folder to write"
srun_step "$PYTHON" tools/convert_checkpoint.py export --source "$LOAD" --target "$SAVE" --tokenizer "$TOKENIZER" "$@"
