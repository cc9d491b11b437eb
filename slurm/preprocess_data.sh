#!/usr/bin/env bash
#SBATCH --job-name=eve-preprocess
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log
#
# Preprocessing in parts: task K of the array makes a dataset of the K-th file of INPUT, counted from 0: the .json files in
# the order of their names, then the .jsonl, .ndjson, .csv and .tar files. Shards (.tar) need no IMAGES. The array must
# cover all files: each task of one that does not says which are left out, and its last task fails. What is there already
# is not made again, so a task that failed is submitted by itself (--array=3), or all of them once more.
#
#   INPUT=captions IMAGES=photos TOKENIZER=models/vicuna-7b-v1.5/tokenizer.model OUT=data/captions \
#   sbatch --array=0-99 slurm/preprocess_data.sh --template plain
#
# DALI decodes on a GPU where the task has one, which --gpus-per-node=1 asks for:
#   ... sbatch --array=0-99 --gpus-per-node=1 slurm/preprocess_data.sh --template plain --image-storage jpeg \
#       --image-decoder dali
#
# The parts become one dataset without copying them:
#   .venv/bin/python tools/merge_datasets.py --output-prefix data/all data/captions/*_dataset.json;  DATA=data/all sbatch ...
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
need_folder INPUT "the folder of .json, .jsonl, .ndjson, .csv and .tar files to preprocess"
need_file TOKENIZER "the language model's tokenizer.model"
need OUT "the folder for the datasets"
[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "this script is an array, a task for each file of INPUT: sbatch --array=0-99 ..."

[[ ! -d $TOKENIZER ]] || die "TOKENIZER=$TOKENIZER: is a folder; name the file in it, such as $TOKENIZER/tokenizer.model"
[[ ! $OUT -ef $INPUT ]] || die "OUT=$OUT: is INPUT; the datasets need a folder of their own"
[[ $OUT != *[[:space:]]* ]] || die "OUT=$OUT: DATA cannot name datasets in it, as spaces stand between its prefixes; choose another"

# All files are looked at by each task, before any work: renaming one changes which file a task gets.
shopt -s nullglob nocaseglob
LC_ALL=C # one order of names for all tasks
named=("$INPUT"/*.json "$INPUT"/*.jsonl "$INPUT"/*.ndjson "$INPUT"/*.csv) shards=("$INPUT"/*.tar)
files=("${named[@]}" "${shards[@]}")
((${#files[@]})) || die "INPUT=$INPUT: holds no .json, .jsonl, .ndjson, .csv or .tar file"
if ((${#named[@]})) || [[ -n ${IMAGES:-} ]]; then
    need_folder IMAGES "the folder that the names of images are relative to"
fi
last=$((${#files[@]} - 1))
declare -A made_of=() # prefix: its file
prefixes=()
for file in "${files[@]}"; do
    name=$(basename "${file%.*}")
    prefix=${OUT%/}/$name
    [[ $name != *[[:space:]]* ]] \
        || die "$file: DATA cannot name a dataset with a space in its name; rename the file, with '_' instead, say"
    [[ -z ${made_of[$prefix]:-} ]] \
        || die "$INPUT holds both $(basename "${made_of[$prefix]}") and $(basename "$file"), which would make one dataset; rename one of them"
    made_of[$prefix]=$file
    prefixes+=("$prefix")
done
((SLURM_ARRAY_TASK_ID <= last)) \
    || die "task $SLURM_ARRAY_TASK_ID: there are ${#files[@]} files in $INPUT, so --array=0-$last"

# Files that this array leaves out, and that no earlier one has made a dataset of.
first=${SLURM_ARRAY_TASK_MIN:-$SLURM_ARRAY_TASK_ID} final=${SLURM_ARRAY_TASK_MAX:-$SLURM_ARRAY_TASK_ID}
left_out=() warning=''
for number in "${!files[@]}"; do
    ((number >= first && number <= final)) || [[ -e ${prefixes[number]}_dataset.json ]] || left_out+=("$(basename "${files[number]}")")
done
if ((${#left_out[@]})); then
    warning="${#left_out[@]} of ${#files[@]} files in $INPUT have neither a task in this array nor a dataset yet (${left_out[0]} to"
    warning+=" ${left_out[-1]}): when this array has ended, submit it with --array=0-$last; what is there is not made again"
    echo "warning: $warning"
fi

# A range of tasks (0-15) was meant for all files, and must not end well without them; a single task, or a list, was chosen.
finish() {
    ((${#left_out[@]} && SLURM_ARRAY_TASK_ID == final && final > first && final - first + 1 == ${SLURM_ARRAY_TASK_COUNT:-0})) \
        || exit 0
    die "the file of this task is done, but $warning"
}

file=${files[SLURM_ARRAY_TASK_ID]} prefix=${prefixes[SLURM_ARRAY_TASK_ID]}
if [[ -e ${prefix}_dataset.json ]]; then
    echo "== ${prefix}_dataset.json is there already: nothing to do"
    finish
fi
mkdir -p "$OUT"
echo "== job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID: $file -> $prefix, $(date -Is)"
if [[ " $* " =~ " --image-decoder"[\ =]"dali " ]]; then
    if ((${SLURM_GPUS_ON_NODE:-0})); then
        echo "== GPUs of this task, for DALI: $SLURM_GPUS_ON_NODE"
    else
        echo "warning: this task has no GPU and DALI decodes on the CPU: submit it with sbatch --gpus-per-node=1"
    fi
fi
srun_step "$PYTHON" tools/preprocess_data.py --input "$file" ${IMAGES:+--image-root "$IMAGES"} --tokenizer-model "$TOKENIZER" \
    --output-prefix "$prefix" --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
finish
