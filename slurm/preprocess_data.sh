#!/usr/bin/env bash
#SBATCH --job-name=eve-preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log
#
# Preprocessing as a Slurm array, one task for each file of INPUT that has no dataset in OUT yet. Run it with bash; it
# calls sbatch itself:
#
#   INPUT=captions IMAGES=photos TOKENIZER=models/vicuna-7b-v1.5/tokenizer.model OUT=data/captions \
#   bash slurm/preprocess_data.sh --template plain
#
# Files are the .json of INPUT sorted by name, then the .jsonl, .ndjson, .csv, .tar and .parquet files. .tar and .parquet
# contain the images and need no IMAGES. If tasks fail, run the same command again: it submits only files that have no
# dataset yet. It prints the sbatch command, to which you can add options (sbatch --array=3 --cpus-per-task=8 ...).
#
# Tasks that decode with DALI ask for a GPU (PREPROCESS_GPUS in slurm/cluster.env):
#   ... bash slurm/preprocess_data.sh --template plain --image-storage jpeg --image-decoder dali
#
# Merge the datasets into one, without copying:
#   .venv/bin/python tools/merge_datasets.py --output-prefix data/all data/captions/*_dataset.json;  DATA=data/all sbatch ...
set -euo pipefail
submits_itself='' # set if this is not a task of an array: called by hand, in the root of the checkout
if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    submits_itself=1 SLURM_SUBMIT_DIR=$PWD
    [[ -f slurm/launch.sh ]] || { echo "error: $PWD is no checkout: cd to its root first" >&2 && exit 2; }
fi
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"
need_folder INPUT "the folder of .json, .jsonl, .ndjson, .csv, .tar and .parquet files to preprocess"
need_file TOKENIZER "the language model's tokenizer.model"
need OUT "the folder for the datasets"

[[ ! -d $TOKENIZER ]] || die "TOKENIZER=$TOKENIZER: is a folder; name the file in it, such as $TOKENIZER/tokenizer.model"
[[ ! $OUT -ef $INPUT ]] || die "OUT=$OUT: is INPUT; the datasets need a folder of their own"
[[ $OUT != *[[:space:]]* ]] || die "OUT=$OUT: DATA cannot name datasets in it, as spaces stand between its prefixes; choose another"

# Each task lists all files: adding or renaming one changes which file a task gets.
shopt -s nullglob nocaseglob
LC_ALL=C # the same sort order in all tasks
files=() pictures_apart=''
for file in "$INPUT"/*.json "$INPUT"/*.jsonl "$INPUT"/*.ndjson "$INPUT"/*.csv "$INPUT"/*.tar "$INPUT"/*.parquet; do
    case ${file,,} in
        # img2dataset writes two files beside a shard: a table of its rows without pictures, and counts.
        *.parquet) [[ ! -e ${file%.*}.tar ]] || continue ;;
        *_stats.json) [[ ! -e ${file%_*}.tar && ! -e ${file%_*}.parquet ]] || continue ;;
        # So do tools/curate.py and tools/prepare_data.py beside their shards.
        */stage.json | */prepared.json | */skipped.jsonl)
            shards=("$INPUT"/*.parquet)
            ((!${#shards[@]})) || continue
            ;;
    esac
    case ${file,,} in
        *.tar | *.parquet) ;;
        *) pictures_apart=1 ;;
    esac
    files+=("$file")
done
if ((!${#files[@]})); then
    videos=("$INPUT"/*.mp4 "$INPUT"/*.webm "$INPUT"/*.mkv "$INPUT"/*.mov "$INPUT"/*.avi)
    ((!${#videos[@]})) \
        || die "INPUT=$INPUT: holds videos, which are rows of one dataset: tools/preprocess_data.py --input '$INPUT/*.${videos[0]##*.}'"
    die "INPUT=$INPUT: holds no .json, .jsonl, .ndjson, .csv, .tar or .parquet file"
fi
[[ " $* " != *" --overwrite "* ]] \
    || die "--overwrite: tasks are only started for files without a dataset; to make them again, choose another OUT"
if [[ -n $pictures_apart || -n ${IMAGES:-} ]]; then
    need_folder IMAGES "the folder that the names of images are relative to"
fi
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
decodes_with_dali=''
[[ ! " $* " =~ " --image-decoder"[\ =]"dali " ]] || decodes_with_dali=1

if [[ -n $submits_itself ]]; then
    missing=()
    for number in "${!files[@]}"; do
        [[ -e ${prefixes[number]}_dataset.json ]] || missing+=("$number")
    done
    if ((${#missing[@]} == 0)); then
        echo "== all ${#files[@]} files in $INPUT have a dataset in $OUT; to make one of them:" \
            "$PYTHON tools/merge_datasets.py --output-prefix data/all ${OUT%/}/*_dataset.json"
        exit 0
    fi
    tasks=$(IFS=, && echo "${missing[*]}")
    ((${#missing[@]} < ${#files[@]})) || tasks=0-$((${#files[@]} - 1))
    command=(sbatch "--array=$tasks")
    gpus=${PREPROCESS_GPUS:-1}
    [[ -z $decodes_with_dali || $gpus == 0 ]] || command+=("--gpus-per-node=$gpus")
    command+=(slurm/preprocess_data.sh "$@")
    shown=$(printf ' %q' "${command[@]}")
    echo "== ${#missing[@]} of ${#files[@]} files in $INPUT have no dataset in $OUT yet:${shown//\\,/,}"
    command -v sbatch > /dev/null || die "sbatch is not there: call this where jobs are submitted"
    exec "${command[@]}"
fi

((SLURM_ARRAY_TASK_ID < ${#files[@]})) \
    || die "task $SLURM_ARRAY_TASK_ID: there are ${#files[@]} files in $INPUT, the last of which is task $((${#files[@]} - 1))"
file=${files[SLURM_ARRAY_TASK_ID]} prefix=${prefixes[SLURM_ARRAY_TASK_ID]}
if [[ -e ${prefix}_dataset.json ]]; then
    echo "== ${prefix}_dataset.json is there already: nothing to do"
    exit 0
fi
mkdir -p "$OUT"
echo "== job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID: $file -> $prefix, $(date -Is)"
if [[ -n $decodes_with_dali ]]; then
    if ((${SLURM_GPUS_ON_NODE:-0})); then
        echo "== GPUs of this task, for DALI: $SLURM_GPUS_ON_NODE"
    else
        echo "warning: this task has no GPU, so DALI decodes on the CPU (PREPROCESS_GPUS in slurm/cluster.env asks for a GPU)"
    fi
fi
srun_step "$PYTHON" tools/preprocess_data.py --input "$file" ${IMAGES:+--image-root "$IMAGES"} --tokenizer-model "$TOKENIZER" \
    --output-prefix "$prefix" --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
