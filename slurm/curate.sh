#!/usr/bin/env bash
#SBATCH --job-name=eve-curate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log
#
# Stages of a curation (tools/curate.py) as Slurm arrays over the shards that are not finished yet. Run it with bash; it
# calls sbatch itself:
#
#   WORK=curated STAGES=stages.txt bash slurm/curate.sh                            several stages, one after the other
#   WORK=curated bash slurm/curate.sh filter --input 'prepared/*/*.parquet'        one stage
#
# STAGES is a file with a stage and its flags in each line, in the order of the stages; lines with # in front are comments:
#
#   filter --input 'prepared/*/*.parquet'
#   duplicates
#   features --tower models/siglip
#
# A stage starts once all shards of the one before it are finished. If a task fails, the stages after it are cancelled; run
# the same command again once the other tasks have ended: it submits the shards that are missing, and the stages after
# them. Logs are in WORK/slurm. After the stage build: INPUT=curated/build OUT=... bash slurm/preprocess_data.sh
#
# A task has 16 cores and 16 shards, each with a process on one of them. In the stages that run a model (features,
# caption) it has one shard and a GPU, which CURATE_GPUS in slurm/cluster.env describes; captions that a server writes
# (--base-url) need none. SHARDS_PER_TASK gives tasks another number of shards; it is raised where an array would
# be larger than the site allows (MaxArraySize). CURATE_OPTIONS are more options of sbatch, such as "--time=48:00:00 --mem=64G".
set -euo pipefail
submits_itself='' # set if this is not a task of an array: called by hand, in the root of the checkout
if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    submits_itself=1 SLURM_SUBMIT_DIR=$PWD
    [[ -f slurm/launch.sh ]] || { echo "error: $PWD is no checkout: cd to its root first" >&2 && exit 2; }
fi
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"
need WORK "the work folder of the curation"

runs_model() { # STAGE FLAGS...
    [[ $1 == features || ($1 == caption && " $*" != *" --base-url"*) ]]
}

uses_gpu() { # STAGE FLAGS...
    [[ ${CURATE_GPUS:-1} != 0 ]] && runs_model "$@"
}

if [[ -z $submits_itself ]]; then
    stage=$1 first=$((SLURM_ARRAY_TASK_ID * SHARDS_PER_TASK)) workers=${SLURM_CPUS_PER_TASK:-1}
    last=$((first + SHARDS_PER_TASK - 1))
    ((last <= LAST_SHARD)) || last=$LAST_SHARD
    runs_model "$@" && workers=1 # the process has the GPU, or all cores
    # The one process of these stages has all cores.
    case $stage in duplicates | centres | select) export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} ;; esac
    echo "== job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) of it: $stage, shards $first" \
        "to $last of $WORK, $(date -Is)"
    shift
    srun_step "$PYTHON" tools/curate.py "$stage" --work "$WORK" --shards "$first-$last" --workers "$workers" "$@"
    exit
fi

command -v sbatch > /dev/null || die "sbatch is not there: call this where jobs are submitted"
[[ ${SHARDS_PER_TASK:-1} =~ ^[1-9][0-9]*$ ]] || die "SHARDS_PER_TASK=$SHARDS_PER_TASK: is no number of shards"
read -r -a options <<< "${CURATE_OPTIONS:-}"
most_tasks=$(scontrol show config 2> /dev/null | awk '$1 == "MaxArraySize" { print $3 }') || most_tasks=''
# Jobs of this work folder that still wait or run have the same shards.
if [[ -s $WORK/slurm/jobs ]]; then
    left=$(squeue --noheader --format=%F --jobs="$(paste -sd , "$WORK/slurm/jobs")" 2> /dev/null | sort -nu | paste -sd ,) || left=''
    [[ -z $left ]] \
        || die "WORK=$WORK: jobs of an earlier call still wait or run ($left); call this again when they have ended, or scancel them"
fi

# Which shards of a stage are unfinished, in the form of --array, or "none".
list_unfinished() { # STAGE FLAGS...
    local told
    case " $* " in
        *" --work"* | *" --shards"* | *" --list-unfinished"*)
            die "$*: --work, --shards and --workers are given by this script; set WORK and SHARDS_PER_TASK instead" ;;
    esac
    told=$(run_once "$PYTHON" tools/curate.py "$1" --work "$WORK" "${@:2}" --list-unfinished) || {
        told=$(sed -n '/error: /,$p' <<< "$told" | grep -v '^srun: ')
        die "${told#error: }"
    }
    grep -Exm 1 'none|[0-9]+([,-][0-9]+)*' <<< "$told" || die "the unfinished shards of $1 could not be listed: $told"
}

previous='' # the job that the next stage waits for
submit_stage() { # UNFINISHED STAGE FLAGS...
    local unfinished=$1 most range task tasks=() numbers command
    shift
    local -x LAST_SHARD=${unfinished##*[,-]} SHARDS_PER_TASK=${SHARDS_PER_TASK:-}
    : "${SHARDS_PER_TASK:=$(uses_gpu "$@" && echo 1 || echo 16)}"
    most=$((LAST_SHARD / ${most_tasks:-1001} + 1))
    ((SHARDS_PER_TASK >= most)) || SHARDS_PER_TASK=$most
    for range in ${unfinished//,/ }; do
        for ((task = ${range%-*} / SHARDS_PER_TASK; task <= ${range#*-} / SHARDS_PER_TASK; task++)); do
            tasks[task]=$task
        done
    done
    numbers=$(IFS=, && echo "${tasks[*]}")
    ((${#tasks[@]} <= LAST_SHARD / SHARDS_PER_TASK)) || numbers=0-$((${#tasks[@]} - 1))
    command=(sbatch --parsable "--job-name=eve-curate-$1" "--array=$numbers" "--output=$WORK/slurm/%x-%A_%a.log")
    [[ -z $previous ]] || command+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
    ! uses_gpu "$@" || command+=("--gpus-per-node=${CURATE_GPUS:-1}")
    previous=$("${command[@]}" "${options[@]}" slurm/curate.sh "$@") || die "the stage $1 could not be submitted (above)"
    previous=${previous%%;*}
    echo "$previous" >> "$WORK/slurm/jobs"
    echo "== $1: job $previous, shards $unfinished in ${#tasks[@]} tasks of up to $SHARDS_PER_TASK"
}

# All stages are looked at before the first one is submitted.
if [[ -n ${STAGES:-} ]]; then
    need_lines STAGES "a file with a stage and its flags in each line"
    (($# == 0)) || die "$*: STAGES=$STAGES names the stages; leave one of both out"
elif (($#)); then
    lines=("$(printf '%q ' "$@")")
else
    die "no stage: name one, as in WORK=... bash slurm/curate.sh filter --input ..., or a file of stages, STAGES=stages.txt"
fi
unfinished=()
for line in "${lines[@]}"; do
    split_line "$line"
    found=$(list_unfinished "${words[@]}") || exit
    unfinished+=("$found")
done
mkdir -p "$WORK/slurm"
rm -f "$WORK/slurm/jobs"
for number in "${!lines[@]}"; do
    split_line "${lines[number]}"
    if [[ ${unfinished[number]} == none ]]; then
        echo "== ${words[0]}: finished"
    else
        submit_stage "${unfinished[number]}" "${words[@]}"
    fi
done
[[ -z $previous ]] || echo "== logs are in $WORK/slurm; once these jobs have ended, the same command submits what is missing"
