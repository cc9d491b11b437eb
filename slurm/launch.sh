# shellcheck shell=bash
# The one launcher of all batch scripts, which source it: it finds the checkout, checks what a script was given, starts
# torchrun on every node, and sees to it that a job that is cut short goes on.
#
#   need DATA "prefix of the dataset"     stop unless the variable is set
#   need_file TOKENIZER "..."             and names something that exists
#   need_folder LOAD "..."                and names a folder
#   need_lines STAGES "..."               and names a file, whose lines, but for comments, become the array `lines`
#   split_line LINE                       the words of a line become the array `words`, with quotes as in a shell
#   srun_step COMMAND...                  run a command by srun, in the container if there is one
#   train RECIPE FLAGS...                 run megatron_eve.pretrain (or training_command) until it is done, across
#                                         requeues; LAYOUT, if it is set, names a second recipe that overrides the first
#   train_stage RECIPE MEANING FLAGS...   the same for a stage, from DATA and LOAD, which means MEANING, and from other
#                                         folders that the array stage_folders lists: variable, flag and meaning of each
#
# With EVALUATE=TASKS, train has each checkpoint at a multiple of EVALUATE_EVERY evaluated by jobs of their own
# (docs/operations.md, While a model trains).
#
# A script is one process on the first node of a job. Slurm sends it USR1 before the time limit (#SBATCH --signal); it
# passes that on to the ranks, which save a checkpoint and leave, and requeues the job. A job whose ranks fail is
# requeued too, until three starts in a row made no new checkpoint. Ranks that leave by themselves say in SAVE/outcome
# that the run is done, or why it is not and need not be started again: a mistake in flags, files or folders, say. Most
# mistakes are found before any rank starts, here and by megatron_eve.preflight; they too end the job and stay in SAVE/outcome.

readonly MOST_STARTS=3
stage_folders=() # see train_stage
training_command=megatron_eve.pretrain # what train runs

outcome_folder='' # SAVE, once it is known to be the folder of a run
die() {
    if [[ -n $outcome_folder ]] && ! others_run_in "$outcome_folder" && mkdir -p "$outcome_folder"; then
        printf '%s\n' "$*" > "$outcome_folder/outcome" || true # a full disk: the log has the sentence too
    fi
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Is a run of another job alive in the folder? Its lock (checkpoint/save_lock.py) is touched every half minute.
others_run_in() { # FOLDER
    [[ -n $(find "$1/lock" -mmin -2 2> /dev/null) ]] && ! grep -q "\"slurm_job_id\": \"$SLURM_JOB_ID\"" "$1/lock"
}

# Slurm runs a copy of the script from its spool folder, so the checkout is where sbatch was called.
[[ -n ${SLURM_JOB_ID:-}${submits_itself:-} ]] || die "this is a batch script: sbatch slurm/$(basename "$0"), in the root of the checkout"
CHECKOUT=$SLURM_SUBMIT_DIR
[[ -f $CHECKOUT/slurm/launch.sh ]] || die "sbatch was called in $CHECKOUT, which is no checkout: cd to its root first"
cd "$CHECKOUT" || die "cannot enter $CHECKOUT"
# shellcheck source=slurm/cluster.env
source "${CLUSTER_ENV:-slurm/cluster.env}"
if [[ -n $CONTAINER_IMAGE || ${#CONTAINER_COMMAND[@]} -gt 0 ]]; then
    : "${PYTHON:=python3}" # the image's; a virtual environment of the checkout links to a Python of the host
    export PYTHONNOUSERSITE=1 # nor does ~/.local of the host go before what the image holds
else
    : "${PYTHON:=$CHECKOUT/.venv/bin/python}"
    [[ -x $PYTHON ]] || die "PYTHON=$PYTHON is not there: make install-gpu, or name another in slurm/cluster.env"
fi

need() { # NAME MEANING
    [[ -n ${!1:-} ]] || die "$1 is not set: $2. Give it before sbatch, as in $1=... sbatch slurm/..."
}

need_file() { # NAME MEANING
    need "$1" "$2"
    [[ -e ${!1} ]] || die "$1=${!1}: ${!1} does not exist ($2)"
}

need_folder() { # NAME MEANING
    need_file "$1" "$2"
    [[ -d ${!1} ]] || die "$1=${!1}: is a file, not a folder ($2)"
}

need_lines() { # NAME MEANING
    need_file "$1" "$2"
    [[ ! -d ${!1} ]] || die "$1=${!1}: is a folder, not a file ($2)"
    mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "${!1}")
    ((${#lines[@]})) || die "$1=${!1}: has no line ($2)"
}

split_line() { # LINE
    local found
    found=$(xargs -n 1 printf '%s\n' <<< "$1" 2> /dev/null) || die "a quotation mark is missing: $1"
    mapfile -t words <<< "$found"
}

# Datasets, as --data-path takes them: prefixes, or weights and prefixes in turns.
need_datasets() { # NAME WORDS...
    local name=$1 prefix found=''
    shift
    for prefix in "$@"; do
        if [[ $prefix =~ ^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]]; then
            continue # a weight
        fi
        found=1
        [[ $prefix != *_dataset.json ]] \
            || die "$name: $prefix is a file of a dataset; name its prefix, ${prefix%_dataset.json}"
        [[ -f ${prefix}_dataset.json ]] \
            || die "$name: ${prefix}_dataset.json does not exist; name the prefix that tools/preprocess_data.py wrote, of a path" \
                "from $CHECKOUT or from /, without spaces"
    done
    [[ -n $found ]] || die "$name: names no dataset; give the prefix that tools/preprocess_data.py wrote"
}

# Datasets that a flag names among the flags of a script, if it is there: the words up to the next flag.
need_datasets_of() { # FLAG FLAGS...
    local flag=$1 word taken='' words=()
    shift
    for word in "$@"; do
        case $word in
            "$flag") taken=1 ;;
            "$flag"=*) words+=("${word#*=}") ;;
            --*) taken='' ;;
            *) [[ -z $taken ]] || words+=("$word") ;;
        esac
    done
    ((${#words[@]} == 0)) || need_datasets "$flag" "${words[@]}"
}

# A folder of weights, as --pretrained-checkpoint takes it: in the layout of Hugging Face, one that --save wrote, or a
# checkpoint in it. Of a folder whose tracker file was lost the newest checkpoint is taken.
need_weights() { # NAME MEANING
    need_folder "$1" "$2"
    local folder=${!1} iteration
    [[ ! -e $folder/config.json ]] || return 0
    if [[ ! -e $folder/latest_checkpointed_iteration.txt ]]; then
        [[ $(basename "$folder") =~ ^iter_[0-9]+$ || -n $(find "$folder/" -maxdepth 1 -regex '.*/iter_[0-9]+' -print -quit) ]] \
            || die "$1=$folder: holds neither a config.json nor a checkpoint (latest_checkpointed_iteration.txt, iter_...), so no" \
                "weights ($2); name a folder in the layout of Hugging Face, or one that --save wrote"
        return 0
    fi
    iteration=$(tr -d '[:space:]' < "$folder/latest_checkpointed_iteration.txt")
    [[ $iteration =~ ^[0-9]+$ ]] \
        || die "$folder/latest_checkpointed_iteration.txt: holds '$iteration', not an iteration; write the number of a whole" \
            "iter_ folder into it"
    iteration=$(printf 'iter_%07d' "$((10#$iteration))")
    [[ -d $folder/$iteration ]] \
        || die "$1=$folder: its latest_checkpointed_iteration.txt names $iteration, which is not there; put the number of an" \
            "older whole iter_ folder into it, or restore this one"
}

# A port that no other job of the head node has: from the job's id, or one of the next.
free_port() {
    local port=$((20000 + SLURM_JOB_ID % 20000))
    while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
        port=$((port + 1))
    done
    echo "$port"
}

latest_checkpoint() { # FOLDER
    cat "$1/latest_checkpointed_iteration.txt" 2> /dev/null || echo none
}

# Starts of this job in a row that began at the same checkpoint, this one included; kept in SAVE/starts. A new submission
# is another job, or one that Slurm has not started before, and begins anew.
count_start() { # FOLDER
    local latest count=0 known job
    latest=$(latest_checkpoint "$1")
    if ! read -r known count job 2> /dev/null < "$1/starts" || [[ $known != "$latest" || $job != "$SLURM_JOB_ID" ]] \
        || ((${SLURM_RESTART_COUNT:-0} == 0)); then
        count=0
    fi
    echo "$latest $((count + 1)) $SLURM_JOB_ID" > "$1/starts"
    echo "$((count + 1))"
}

# What holds for all that runs in a job. The code is the checkout's, whatever an image holds.
export PYTHONPATH=$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# srun does not take this over from sbatch by itself (since Slurm 22.05): ranks would share one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# pyxis neither mounts the checkout by itself nor starts in it.
container_options=()
[[ -z $CONTAINER_IMAGE ]] || container_options+=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$CHECKOUT"
    "--container-mounts=$CHECKOUT:$CHECKOUT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")

srun_step() { # COMMAND...; sees the node's number in PET_NODE_RANK, which is torchrun's name for it
    # Ranks hear USR1 and leave with a checkpoint. torchrun's agent must not: it would die of it.
    # shellcheck disable=SC2016 # expanded on each node
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container_options[@]}" \
        bash -c 'trap "" USR1; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' node "${CONTAINER_COMMAND[@]}" "$@" 2>&1
}

# Run a command once, where ranks would: on this node, in the container if there is one, which takes an srun.
run_once() { # COMMAND...
    if [[ -z $CONTAINER_IMAGE && ${#CONTAINER_COMMAND[@]} -eq 0 ]]; then
        "$@" 2>&1
    else
        srun --nodes=1 --ntasks=1 "${container_options[@]}" "${CONTAINER_COMMAND[@]}" "$@" 2>&1
    fi
}

# Find mistakes in flags, files and folders, and what fits into no memory, before any rank starts.
preflight() { # RANKS RANKS-A-NODE FLAGS...
    local ranks=$1 status=0 told
    local -x LOCAL_WORLD_SIZE=$2
    shift 2
    told=$(run_once "$PYTHON" -m megatron_eve.preflight --ranks "$ranks" "$@") || status=$?
    if ((status == 2)) && [[ $told == *"error: "* ]]; then
        told=$(sed -n '/^error: /,$p' <<< "$told" | grep -v '^srun: ')
        die "${told#error: }"
    fi
    [[ -z $told ]] || printf '%s\n' "$told"
    ((status == 0)) || echo "warning: what was given could not be looked at before the start (status $status); the ranks will do it"
}

need_save() {
    need SAVE "the folder for checkpoints"
    [[ $(basename "$SAVE") =~ ^[A-Za-z0-9._-]+$ ]] \
        || die "SAVE=$SAVE: the name of a run is made of letters, digits, '.', '_' and '-'"
    [[ ! -e $SAVE || -d $SAVE ]] || die "SAVE=$SAVE: is a file, not a folder for checkpoints"
    outcome_folder=$SAVE
}

# Evaluations while a model trains: the batch script, which runs beside the ranks and not in them, submits
# slurm/evaluate.sh and slurm/evaluate_score.sh for checkpoints as they become complete. What fails here is a warning.
need_evaluation() {
    : "${EVALUATE_EVERY:=5000}" "${EVALUATE_SHARDS:=1}"
    [[ $EVALUATE_EVERY =~ ^[1-9][0-9]*$ ]] || die "EVALUATE_EVERY=$EVALUATE_EVERY: is no number of iterations"
    [[ $EVALUATE_SHARDS =~ ^[1-9][0-9]*$ ]] || die "EVALUATE_SHARDS=$EVALUATE_SHARDS: is no number of shards"
    need_folder EVALUATE_DATA_ROOT "the folder of the benchmarks, --data-root of tools/evaluate.py"
}

watch_evaluations() {
    local leaving=''
    trap '' USR1
    trap 'leaving=1' TERM # not in the middle of a submission
    find "$SAVE/evaluation" -name jobs -empty -delete 2> /dev/null || true # of a start that was cut short: once more
    while [[ -z $leaving ]]; do
        submit_evaluations
        renew_leases
        sleep "${EVALUATE_POLL_SECONDS:-20}" &
        wait "$!" || kill "$!" 2> /dev/null || true
    done
}

# Submit evaluations of complete checkpoints that have none. SAVE/evaluation/iter_0005000/jobs holds the numbers of both jobs.
submit_evaluations() {
    local latest folder iteration place
    latest=$(latest_checkpoint "$SAVE")
    [[ $latest =~ ^[0-9]+$ ]] || return 0
    for folder in "$SAVE"/iter_*; do
        [[ $(basename "$folder") =~ ^iter_([0-9]+)$ ]] || continue
        iteration=$((10#${BASH_REMATCH[1]}))
        place=$SAVE/evaluation/$(basename "$folder")
        if ((iteration > latest || iteration % EVALUATE_EVERY)) || [[ -e $place/jobs ]]; then
            continue
        fi
        submit_evaluation "$folder" "$iteration" "$place" \
            || echo "warning: the evaluation of $folder could not be submitted whole; training goes on, and slurm/evaluate.sh" \
                "and slurm/evaluate_score.sh can be submitted by hand"
    done
}

submit_evaluation() { # CHECKPOINT ITERATION PLACE
    local folder=$1 iteration=$2 place=$3 array score board options flags
    local -x TASKS=$EVALUATE DATA_ROOT=$EVALUATE_DATA_ROOT MODEL=$SAVE STEP=$iteration ANSWERS=$place/answers \
        OUTPUT=$place/results.json
    mkdir -p "$place" && : > "$place/jobs" || return 1 # one attempt
    local lease=$folder/lease-slurm-$SLURM_JOB_ID.json # until the array has a number
    echo '{}' > "$lease" || return 1
    read -r -a options <<< "${EVALUATE_OPTIONS:-}"
    read -r -a flags <<< "${EVALUATE_FLAGS:-}"
    board=$(sed -n "s/^ *tensorboard_dir: *['\"]\{0,1\}\([^'\"]*\)['\"]\{0,1\}$/\1/p" "$folder/config.yaml")
    [[ -n $board && $board != null ]] || board=$SAVE/tensorboard
    array=$(sbatch_apart "--array=0-$((EVALUATE_SHARDS - 1))" "--output=$place/answer-%A_%a.log" "${options[@]}" \
        slurm/evaluate.sh "${flags[@]}") || { rm -f "$lease" && return 1; }
    mv "$lease" "$folder/lease-slurm-$array.json"
    echo "$array" > "$place/jobs"
    score=$(sbatch_apart "--dependency=afterok:$array" --kill-on-invalid-dep=yes "--output=$place/score-%j.log" \
        slurm/evaluate_score.sh --evaluation-log "$SAVE/evaluation.jsonl" --tensorboard-dir "$board/evaluation") || return 1
    echo "$array $score" > "$place/jobs"
    echo "== evaluation of iteration $iteration is submitted: $EVALUATE, jobs $array and $score"
}

# sbatch from inside a job, without what Slurm tells this job about itself; prints the number of the new job.
sbatch_apart() { # WORDS OF SBATCH...
    local name told
    told=$(
        for name in "${!SLURM_@}" "${!SRUN_@}"; do [[ $name == SLURM_CONF ]] || unset "$name"; done
        sbatch --parsable "$@" 2>&1
    ) || { echo "$told" >&2 && return 1; }
    told=$(tail -n 1 <<< "$told")
    echo "${told%%;*}"
}

# Checkpoints whose evaluation waits or runs keep their leases (megatron_eve/checkpoint/lease.py), and no others.
renew_leases() {
    local lease job listed status
    for lease in "$SAVE"/iter_*/lease-slurm-*.json; do
        [[ $lease =~ /lease-slurm-([0-9]+)\.json$ ]] || continue
        job=${BASH_REMATCH[1]} status=0
        listed=$(squeue --noheader --jobs "$job" 2>&1) || status=$?
        if [[ $job == "$SLURM_JOB_ID" || $listed == *"Invalid job id"* || ($status -eq 0 && -z $listed) ]]; then
            rm -f "$lease"
        else # it waits or runs, or Slurm gives no answer
            touch --no-create "$lease" || true
        fi
    done
}

train() { # RECIPE FLAGS...
    local recipes=("$1") head port ranks starts status=0 step
    shift
    need_save
    [[ ! -d ${recipes[0]} ]] || die "the recipe ${recipes[0]} is a folder; name a file in it"
    [[ -f ${recipes[0]} ]] || die "the recipe ${recipes[0]} does not exist in $CHECKOUT"
    if [[ -n ${LAYOUT:-} ]]; then
        [[ -f $LAYOUT ]] || die "the layout $LAYOUT does not exist in $CHECKOUT"
        recipes+=("$LAYOUT")
    fi
    [[ -z ${EVALUATE:-} ]] || need_evaluation
    local flags=(--config "${recipes[@]}" --save "$SAVE" --load "$SAVE" "$@")
    ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    preflight "$((SLURM_NNODES * ranks))" "$ranks" "${flags[@]}"
    mkdir -p "$SAVE" || die "SAVE=$SAVE: the folder cannot be made"

    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$(free_port)
    starts=$(count_start "$SAVE")

    export CUDA_DEVICE_MAX_CONNECTIONS=1 # kernels run in the order in which they overlap communication
    if [[ -n $NETWORK_INTERFACE ]]; then
        export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
    fi
    # Compilers' caches belong on a node's own disk: thousands of small files that ranks write at once.
    local cache=${TMPDIR:-/tmp}/megatron_eve-$SLURM_JOB_ID
    export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor

    local torchrun=("$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks"
        --master-addr "$head" --master-port "$port")
    local command=(-m "$training_command" "${flags[@]}")

    printf '%s\n' "" "== job $SLURM_JOB_ID ($SLURM_JOB_NAME), start $((${SLURM_RESTART_COUNT:-0} + 1)) of it, $(date -Is)" \
        "   nodes      $SLURM_NNODES x $ranks ranks: $SLURM_JOB_NODELIST" \
        "   rendezvous $head:$port" \
        "   checkout   $CHECKOUT ($(git describe --always --dirty 2> /dev/null || echo 'no git'))" \
        "   checkpoint $SAVE, latest: $(latest_checkpoint "$SAVE"), start $starts from there" \
        "   command    ${command[*]}"

    rm -f "$SAVE/outcome"
    local signalled='' outcome watcher=''
    trap 'signalled=1; echo "time is nearly up: the ranks are asked to save and leave"; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
    srun_step "${torchrun[@]}" "${command[@]}" &
    step=$!
    if [[ -n ${EVALUATE:-} ]]; then
        watch_evaluations &
        watcher=$!
    fi
    while true; do # wait returns early when a trap has run
        wait "$step" && status=0 || status=$?
        kill -0 "$step" 2> /dev/null || break
    done
    trap - USR1
    if [[ -n $watcher ]]; then
        kill "$watcher" 2> /dev/null || true
        wait "$watcher" 2> /dev/null || true
        submit_evaluations || true # of what was saved last
    fi

    outcome=$(cat "$SAVE/outcome" 2> /dev/null || true)
    if [[ $outcome == "done" ]]; then
        rm -f "$SAVE/starts"
        echo "== done: $SAVE is at iteration $(latest_checkpoint "$SAVE")"
        return 0
    fi
    # A step that no restart will make good, or somebody asked the run to leave (scancel --signal=USR1).
    [[ -n $signalled || -z $outcome ]] || die "$outcome"
    if ((starts >= MOST_STARTS)) && [[ $(latest_checkpoint "$SAVE") == $(cut -d ' ' -f 1 "$SAVE/starts") ]]; then
        die "$starts starts from checkpoint $(latest_checkpoint "$SAVE") ended without a new one; the job stops here. Find out" \
            "why (above), then submit it again"
    fi
    echo "== the ranks ended with status $status; requeued, to go on from checkpoint $(latest_checkpoint "$SAVE")"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until Slurm ends this start of the job
    exit 1
}

train_stage() { # RECIPE MEANING-OF-LOAD FLAGS...
    local recipe=${RECIPE:-$1} datasets
    need_save
    need DATA "prefixes of the datasets, with spaces between them (weights before each for a blend)"
    read -r -d '' -a datasets <<< "$DATA" || true # all lines; it returns 1 at the end
    need_datasets DATA "${datasets[@]}"
    need_weights LOAD "$2"
    shift 2
    local folder_flags=() i
    for ((i = 0; i < ${#stage_folders[@]}; i += 3)); do
        need_folder "${stage_folders[i]}" "${stage_folders[i + 2]}"
        folder_flags+=("${stage_folders[i + 1]}" "${!stage_folders[i]}")
    done
    need_datasets_of --data-path "$@"
    need_datasets_of --valid-data-path "$@"
    train "$recipe" --data-path "${datasets[@]}" --pretrained-checkpoint "$LOAD" "${folder_flags[@]}" "$@"
}
