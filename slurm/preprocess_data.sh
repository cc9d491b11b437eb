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
# the order of their names, then the .jsonl files. What is there already is not made again, so a task that failed is
# submitted by itself (--array=3), or all of them once more.
#
#   INPUT=captions IMAGES=photos TOKENIZER=models/vicuna-7b-v1.5/tokenizer.model OUT=data/captions \
#   sbatch --array=0-99 slurm/preprocess_data.sh --template plain
#
# Training reads the parts as one:  parts=(data/captions/*_dataset.json); DATA="${parts[*]%_dataset.json}" ... sbatch ...
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?this is a batch script: use sbatch}/slurm/launch.sh"
need_file INPUT "the folder of .json and .jsonl files to preprocess"
need_file IMAGES "the folder that the names of images are relative to"
need_file TOKENIZER "the language model's tokenizer.model"
need OUT "the folder for the datasets"
[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "this script is an array, a task for each file of INPUT: sbatch --array=0-99 ..."

[[ ! $OUT -ef $INPUT ]] || die "OUT=$OUT: is INPUT; the datasets need a folder of their own"
shopt -s nullglob
LC_ALL=C # one order of names for all tasks
files=("$INPUT"/*.json "$INPUT"/*.jsonl)
((SLURM_ARRAY_TASK_ID < ${#files[@]})) \
    || die "task $SLURM_ARRAY_TASK_ID: there are ${#files[@]} files in $INPUT, so --array=0-$((${#files[@]} - 1))"
file=${files[SLURM_ARRAY_TASK_ID]}
name=$(basename "${file%.*}")
[[ ! (-e $INPUT/$name.json && -e $INPUT/$name.jsonl) ]] \
    || die "$INPUT holds both $name.json and $name.jsonl, which would make one dataset; rename one of them"
prefix=$OUT/$name
if [[ -e ${prefix}_dataset.json ]]; then
    echo "== ${prefix}_dataset.json is there already: nothing to do"
    exit 0
fi
mkdir -p "$OUT"
echo "== job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID: $file -> $prefix, $(date -Is)"
srun_step "$PYTHON" tools/preprocess_data.py --input "$file" --image-root "$IMAGES" --tokenizer-model "$TOKENIZER" \
    --output-prefix "$prefix" --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
