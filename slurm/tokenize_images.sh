#!/usr/bin/env bash
#SBATCH --job-name=eve-tokenize
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log
#
# Codes of the pictures of a dataset, as a Slurm array whose tasks share the work:
#
#   TOWER=models/tower DATA=data/captions sbatch slurm/tokenize_images.sh --dtype bfloat16 --micro-batch-size 64
#   TOWER=models/tower DATA=data/captions sbatch --array=0-31 slurm/tokenize_images.sh --output-prefix data/drawn --fit square
#
# All tasks run the same command; each takes pictures that no other has, and the last one puts the codes in place. If
# tasks fail, submit the same command again: it goes on with what is missing. Without GPUs: sbatch --gpus-per-node=0.
# Flags are those of tools/tokenize_images.py.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
need_folder TOWER "the folder of the tower"
need DATA "prefix of the dataset"
need_datasets DATA "$DATA"
echo "== job ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}: the codes of $DATA, $(date -Is)"
srun_step "$PYTHON" tools/tokenize_images.py --tower "$TOWER" --input "$DATA" "$@"
