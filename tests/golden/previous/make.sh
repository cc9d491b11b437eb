#!/bin/sh
# Makes the files of this folder anew, with the code as it is; from the top of the repository:
#     PYTHON=.venv/bin/python sh tests/golden/previous/make.sh
set -eu
python=${PYTHON:-python}
here=tests/golden/previous
tokenizer=tests/golden/tokenize/tokenizer.model
# One thread a rank keeps the order of additions the same in every run.
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONPATH=.

pretrain() { # RANKS FLAGS...
    ranks=$1
    shift
    $python -m torch.distributed.run --standalone --nproc-per-node="$ranks" -m megatron_eve.pretrain \
        --config $here/recipe.yaml --data-path $here/data --tokenizer-model $tokenizer \
        --teacher-model tests/golden/_shared/openai/clip-mini-patch14-112 "$@"
}

resume() { # NAME RANKS FLAGS...
    name=$1
    shift
    pretrain "$@" --load $here/checkpoint --save $here/again
    mv $here/again/losses.jsonl "$here/losses_$name.jsonl"
    rm -r $here/again
}

rm -rf $here/checkpoint $here/published $here/transformers $here/data_* $here/again
$python tools/preprocess_data.py --input $here/rows.json --image-root tests/golden/mini224_mixed/proc \
    --tokenizer-model $tokenizer --output-prefix $here/data --template vicuna_v1 --image-size 224 --teacher-size 112 \
    --workers 1
pretrain 2 --pipeline-model-parallel-size 2 --exit-interval 3 --save $here/checkpoint
resume TP1 1
resume TP2+SP 2 --tensor-model-parallel-size 2 --sequence-parallel
resume PP2xVPP2 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1
$python tools/convert_checkpoint.py export --source $here/checkpoint --target $here/published --tokenizer $tokenizer
$python tools/convert_checkpoint.py export --source $here/checkpoint --target $here/transformers --tokenizer $tokenizer \
    --format transformers
rm $here/checkpoint/losses.jsonl $here/checkpoint/outcome
# Bits are the same on the same kind of CPU only, and with the same torch.
$python -c 'import json, torch; from tests.training.test_previous import machine; print(json.dumps(machine()))' \
    > $here/machine.json
