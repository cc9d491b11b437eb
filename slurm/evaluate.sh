#!/usr/bin/env bash
#SBATCH --job-name=eve-evaluate
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log
#
# Answers the requests of evaluation tasks, as a Slurm array: each task opens the model and answers one shard.
#
#   MODEL=runs/stage3 STEP=5000 TASKS=eve_table DATA_ROOT=benchmarks ANSWERS=answers/stage3 sbatch slurm/evaluate.sh
#   ... sbatch --array=0-3 --gpus-per-node=2 slurm/evaluate.sh --tensor-model-parallel-size 2
#
# STEP is the iteration of a run's checkpoint; without it, the latest. If tasks fail, submit the same command again: it
# answers what is missing. Then score: slurm/evaluate_score.sh. Flags are those of tools/evaluate.py answer.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
need_folder MODEL "the folder of a run, or of an exported model"
need TASKS "tasks and groups, with commas between them (tools/evaluate.py list)"
need_folder DATA_ROOT "the folder of the benchmarks"
need ANSWERS "the folder for the answers of this model"

# A process for each rank of the layout that the flags ask for.
ranks=1 before=''
for word in "$@"; do
    [[ $word == --*=* ]] && before=${word%%=*} word=${word#*=}
    case $before in
        --tensor-model-parallel-size | --pipeline-model-parallel-size)
            [[ $word =~ ^[1-9][0-9]*$ ]] || die "$before $word: is no number of ranks"
            ranks=$((ranks * word))
            ;;
    esac
    before=$word
done
start=("$PYTHON")
((ranks == 1)) || start+=(-m torch.distributed.run --standalone --nproc-per-node "$ranks")
shard=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))/${SLURM_ARRAY_TASK_COUNT:-1}
echo "== job ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}, start $((${SLURM_RESTART_COUNT:-0} + 1)) of it:" \
    "shard $shard of $TASKS, $MODEL ${STEP:+at iteration $STEP}, $(date -Is)"
# torchrun exits with 1 whatever its ranks exit with; rank 0 writes its status here.
mkdir -p "$ANSWERS" || die "ANSWERS=$ANSWERS: the folder cannot be made"
export MEGATRON_EVE_STATUS_FILE=$ANSWERS/shard-${shard/\//-of-}.status
rm -f "$MEGATRON_EVE_STATUS_FILE"
status=0
srun_step "${start[@]}" tools/evaluate.py answer --model-path "$MODEL" ${STEP:+--ckpt-step "$STEP"} --tasks "$TASKS" \
    --data-root "$DATA_ROOT" ${DATA_CACHE:+--data-cache-path "$DATA_CACHE"} --answers "$ANSWERS" --shard "$shard" "$@" || status=$?
((status == 0)) || status=$(cat "$MEGATRON_EVE_STATUS_FILE" 2> /dev/null || echo "$status")
case $status in
    0) ;;
    3) echo "== more than 1 % of a task's requests have no answer (above); the score says it, too" ;;
    2) exit 2 ;; # a mistake, which another start does not mend
    *)
        if ((${SLURM_RESTART_COUNT:-0} + 1 >= MOST_STARTS)); then
            die "$MOST_STARTS starts ended with status $status; find out why (above), then submit the same command again"
        fi
        echo "== status $status; requeued, to answer what is missing"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # until Slurm ends this start of the job
        exit 1
        ;;
esac
