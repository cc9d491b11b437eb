#!/usr/bin/env bash
#SBATCH --job-name=eve-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log
#
# Parquet shards from published downloads (tools/prepare_data.py), as a Slurm array with a task for each download. Run it
# with bash; it calls sbatch itself:
#
#   DOWNLOADS=downloads.txt bash slurm/prepare_data.sh
#
# DOWNLOADS is a file with the words of tools/prepare_data.py in each line; lines with # in front are comments. A large
# download is spread over tasks by a line for each of its folders:
#
#   laion --source downloads/laion --output prepared/laion
#   sa1b --source downloads/sa1b/000 --output prepared/sa1b_000
#   sa1b --source downloads/sa1b/001 --output prepared/sa1b_001
#
# If tasks fail, run the same command again: it submits the lines whose output is not complete (OUTPUT/prepared.json).
# Lines may be added at the end, not elsewhere, while tasks wait. The shards are then read by the first stage of
# slurm/curate.sh: filter --input 'prepared/*/*.parquet'. It prints the sbatch command, to which options can be added.
set -euo pipefail
submits_itself='' # set if this is not a task of an array: called by hand, in the root of the checkout
if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    submits_itself=1 SLURM_SUBMIT_DIR=$PWD
    [[ -f slurm/launch.sh ]] || { echo "error: $PWD is no checkout: cd to its root first" >&2 && exit 2; }
fi
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"
need_lines DOWNLOADS "a file with the words of tools/prepare_data.py in each line"
(($# == 0)) || die "$*: flags stand in the lines of DOWNLOADS=$DOWNLOADS"

# The folder that the line of `words` writes.
output() {
    local before='' word found=''
    for word in "${words[@]}"; do
        [[ $before != --output ]] || found=$word
        [[ $word != --output=* ]] || found=${word#*=}
        before=$word
    done
    [[ -n $found ]] || die "DOWNLOADS=$DOWNLOADS: has no --output: ${words[*]}"
    echo "$found"
}

if [[ -n $submits_itself ]]; then
    missing=()
    declare -A written=() # folder: the line that writes it
    for number in "${!lines[@]}"; do
        split_line "${lines[number]}"
        folder=$(output) || exit
        [[ -z ${written[$folder]:-} ]] || die "DOWNLOADS=$DOWNLOADS: two lines have --output $folder; give each its own folder"
        written[$folder]=${lines[number]}
        [[ -e $folder/prepared.json ]] || missing+=("$number")
    done
    if ((${#missing[@]} == 0)); then
        echo "== all ${#lines[@]} lines of $DOWNLOADS are prepared"
        exit 0
    fi
    tasks=$(IFS=, && echo "${missing[*]}")
    ((${#missing[@]} < ${#lines[@]})) || tasks=0-$((${#lines[@]} - 1))
    command=(sbatch "--array=$tasks" slurm/prepare_data.sh)
    echo "== ${#missing[@]} of ${#lines[@]} lines of $DOWNLOADS are not prepared yet: ${command[*]}"
    command -v sbatch > /dev/null || die "sbatch is not there: call this where jobs are submitted"
    exec "${command[@]}"
fi

((SLURM_ARRAY_TASK_ID < ${#lines[@]})) \
    || die "task $SLURM_ARRAY_TASK_ID: there are ${#lines[@]} lines in $DOWNLOADS, the last of which is task $((${#lines[@]} - 1))"
split_line "${lines[SLURM_ARRAY_TASK_ID]}"
echo "== job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID: ${words[*]}, $(date -Is)"
srun_step "$PYTHON" tools/prepare_data.py "${words[@]}" --workers "${SLURM_CPUS_PER_TASK:-1}"
