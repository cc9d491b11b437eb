#!/usr/bin/env bash
#SBATCH --job-name=eve-score
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# Scores the answers of slurm/evaluate.sh, on CPUs only. TASKS and DATA_ROOT are those of the answers:
#
#   TASKS=eve_table DATA_ROOT=benchmarks ANSWERS=answers/stage3 OUTPUT=results/stage3.json \
#   sbatch --dependency=afterok:JOB slurm/evaluate_score.sh
#
# Flags are those of tools/evaluate.py score, such as --evaluation-log runs/stage3/evaluation.jsonl.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
need TASKS "tasks and groups, with commas between them (tools/evaluate.py list)"
need_folder DATA_ROOT "the folder of the benchmarks"
need_folder ANSWERS "the folder of the answers"
need OUTPUT "the file for the scores, JSON"
srun_step "$PYTHON" tools/evaluate.py score --tasks "$TASKS" --data-root "$DATA_ROOT" \
    ${DATA_CACHE:+--data-cache-path "$DATA_CACHE"} --answers "$ANSWERS" --output "$OUTPUT" "$@"
