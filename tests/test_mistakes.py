"""Wrong usages of every command: one sentence with the remedy, exit status 2, before torch is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.checkpoint.saved_state import read_common
from megatron_eve.checkpoint.tokenizer_record import TokenizerRecord
from megatron_eve.config import TRACKER, LoRAConfig, RunConfig
from megatron_eve.data.format.code_part import dataset_digest
from megatron_eve.data.format.indexed import DatasetWriter
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import MINI_SETTINGS, picture, write_dataset
from tests.data.tokenizing.helpers import write_codes, write_tower
from tests.families.toy.image_codes import ToyCodes
from tests.golden_dir import find_golden
from tests.hf.test_export import spoilt_tokenizer
from tests.models.vila_u.pairs import SIGLIP, caption, write_pairs
from tests.models.vila_u.pairs import write_tokenizer as write_siglip_tokenizer

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mistake:
    """A wrong usage. Names in braces are files of the `places` fixture.

    Attributes:
        tool: the command.
        words: its flags.
        says: must stand in its one line.
        ranks: started; 0 is a command of its own, without torchrun.
    """

    tool: str
    words: str
    says: str
    ranks: int = 0


PRETRAIN = "--preset eve_mini --global-batch-size 4 --train-iters 1"
MOCK = f"{PRETRAIN} --mock-data"
VILA = MOCK.replace("eve_mini", "vila_tiny")
DATA = f"{PRETRAIN} --data-path {{set}}"
PREPROCESS = "--input {rows} --image-root {root} --tokenizer-model {tokenizer} --output-prefix {root}/out"
ASK = "--question-file {questions} --image-folder {root} --answers-file {root}/answers"
MODEL = "--model-path {run} --tokenizer-model {tokenizer}"
CURVE = "--model-path {run} --data-path {set} --output {root}/curve.json"
CODES = "--family tests.families.toy.family --tower {toy}"
TOWER = (
    "--preset vila_u_tower_tiny --vision-tower {siglip} --data-path {pairs} --perceptual-weights random "
    "--global-batch-size 4 --train-iters 1"
)
SHEET = f"{CODES} --input {{photo}} --output {{root}}/sheet.png"
CAPTION = "caption --work {root}/w --prompt-file {recipe}"
IMPORT, EXPORT = "import --source {root} --target {root}/y", "export --source {run} --target {root}/y"

# Of several ranks, all of which find the same.
SHARED = [
    Mistake("pretrain", f"{PRETRAIN} --data-path {{set}}x", "{set}x_dataset.json is missing: the path of a dataset is"),
    Mistake("pretrain", f"{DATA} --tokenizer-model {{root}}/x", "cannot read the tokenizer {root}/x"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{root}}/x", "{root}/x: no such folder"),
    Mistake("pretrain", f"{MOCK} --no-such-flag", "--no-such-flag: no such flag"),
    Mistake("pretrain", f"{MOCK} --micro-batch-size 2", "--micro-batch-size: no such flag; samples are packed"),
    Mistake("pretrain", f"{MOCK} --config {{recipe}}", "{recipe}, line 2: training.global_batch_sise: no such setting"),
    Mistake("pretrain", f"{DATA} --image-size 448", "made for image size 224 and the run has 448"),
    Mistake("pretrain", f"{MOCK} --pipeline-model-parallel-size 8", "start a multiple of 8"),
    Mistake("pretrain", f"{MOCK} --seed -1", "--seed -1: must lie between 0 and"),
    Mistake("pretrain", f"{MOCK} --load {{run}} --num-layers 4", "--num-layers 8, this run has 4"),
    Mistake("pretrain", "--preset eve_7b --mock-data --train-iters 1 --num-layers 32000", "out of memory before"),
]  # fmt: skip

MISTAKES = [
    *SHARED,
    Mistake("pretrain", f"{MOCK} --lr fast", "--lr fast: must be a number"),
    Mistake("pretrain", f"{MOCK} --stage 4", "--stage 4: must be one of"),
    Mistake("pretrain", f"{MOCK} --bf16=no", "--bf16 no: this flag takes no value"),
    Mistake("pretrain", f"{MOCK} --variable-seq-lengths maybe", "--variable-seq-lengths maybe: must be true or false"),
    Mistake("pretrain", f"{MOCK} --recompute-granularity some", "must be one of full, selective"),
    Mistake("pretrain", f"{MOCK} --preset eve_8b", "eve_8b: no such preset"),
    Mistake("pretrain", f"{MOCK} --family no_such", "--family no_such: no such family; choose one of eve"),
    Mistake("pretrain", f"{MOCK} --config nowhere.yaml", "--config nowhere.yaml: No such file"),
    Mistake("pretrain", f"{MOCK} --lr-warmup-iters 5", "--lr-warmup-iters: no such flag;"),
    Mistake("pretrain", f"{MOCK} --finetune", "--finetune: no such flag;"),
    Mistake("pretrain", f"{MOCK} --seq-lenght 256", "did you mean --seq-length"),
    Mistake("pretrain", f"{PRETRAIN}", "--data-path: name a dataset"),
    Mistake("pretrain", f"{DATA} --vocab-size 500", "a tokenizer of 384 pieces, and the run's vocabulary has 500"),
    Mistake("pretrain", f"{DATA} --tokenizer-model {{tokenizer}}", "was made with another tokenizer"),
    Mistake("pretrain", f"{DATA} --tokenizer-model {{recipe}}", "is not a sentencepiece model"),
    Mistake("pretrain", f"{DATA} --seq-length 8", "nothing is left of {set} to train on"),
    Mistake("pretrain", f"{DATA} --split 99,1", "--split 99,1 leaves nothing to hold out"),
    Mistake("pretrain", f"{PRETRAIN} --data-path {{cut}}", "{cut}_text.bin is truncated"),
    Mistake("pretrain", f"{DATA} {{set}}", "comes twice"),
    Mistake("pretrain", f"{DATA} --load {{run}}", "was made with data whose samples are [9], this run's are [8]"),
    Mistake("pretrain", f"{DATA} --load {{run}} --seed 7", "was made with --seed 1234, this run has 7"),
    Mistake("pretrain", f"{MOCK} --load {{recipe}}", "--load {recipe}: is a file"),
    Mistake("pretrain", f"{MOCK} --save {{recipe}}", "--save {recipe}: {recipe} is a file; name a folder"),
    Mistake("pretrain", f"{MOCK} --tensorboard-dir {{recipe}}", "--tensorboard-dir {recipe}"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{root}}", "neither a checkpoint (no"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{recipe}}", "is a file; name the folder"),
    Mistake("pretrain", f"{MOCK} --patch-aligning", "name the teacher's folder with --teacher-model"),
    Mistake("pretrain", f"{MOCK} --patch-aligning --teacher-model {{root}}", "no config.json there"),
    Mistake("pretrain", f"{MOCK} --patch-aligning --teacher-model {{tower}}", "--teacher-hidden-size 48: the tower in"),
    Mistake("pretrain", f"{MOCK} --ckpt-step 5", "--ckpt-step 5: of which run? Add --load or --pretrained-checkpoint"),
    Mistake("pretrain", f"{MOCK} --load {{run}} --ckpt-step 5", "--ckpt-step 5: {run} has no iteration 5; there are 2"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{run}} --ckpt-step 5", "{run} has no iteration 5"),
    Mistake("pretrain", f"{DATA} --pretrained-checkpoint {{spoken}}", "was trained with the tokenizer {unlike}/"),
    Mistake("pretrain", f"{MOCK} --pipeline-model-parallel-layout Et*8|xL", "'x' has no meaning here; write E (embed"),
    Mistake("pretrain", f"{MOCK} --pipeline-model-parallel-layout Et*7,L", "has 7 decoder layers (t), and the model"),
    Mistake("pretrain", f"{MOCK} --pipeline-model-parallel-layout Et*8,m,L", "has no multi-token prediction layers"),
    Mistake("pretrain", f"{MOCK} --lora-rank 0", "--lora-rank 0: must be at least 1"),
    Mistake("pretrain", f"{MOCK} --lora-rank 8 --lora-target q_prj", "--lora-target q_prj: no such matrix of a layer"),
    Mistake("pretrain", f"{MOCK} --lora-rank 8 --stage 1", "freezes it, so that no adapter would train; leave"),
    Mistake("pretrain", f"{MOCK} --lora-rank 8 --lora-dropout 1", "--lora-dropout 1: must lie in [0, 1)"),
    Mistake("pretrain", f"{MOCK} --lora-alpha 32", "--lora-alpha: only used with --lora-rank; add that, or leave it"),
    Mistake("pretrain", f"{MOCK} --load {{run}} --lora-rank 8", "made without adapters, this run has --lora-rank 8"),
    Mistake("pretrain", f"{MOCK} --load {{adapted}}", "was made with --lora-rank 8, this run has no adapters; add the"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{adapted}}", "with --lora-rank 8, this run has no adapters;"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{adapted}} --lora-rank 8 --lora-target v_proj",
            "was made with --lora-target q_proj v_proj, this run has v_proj; use the same adapters"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{adapter}}", "holds an adapter of PEFT and no model; merge"),
    Mistake("pretrain", f"{VILA} --vision-tower {{tower}}", "its config.json is of --vision-ffn-hidden-"),
    Mistake("pretrain", f"{VILA} --vision-tower {{root}}/nowhere", "No such file or directory; name the folder"),
    Mistake("pretrain", f"{VILA} --vision-select-layer 5", "a vision tower of 4 layers has the hidden"),
    Mistake("pretrain", f"{VILA} --projector-token-order column", "is for --projector-type mlp_downsample"),
    Mistake("pretrain", f"{VILA} --freeze-LM --lora-rank 8", "freezes it, so that no adapter would train"),
    Mistake("pretrain", f"{VILA} --vision-num-attention-heads 5", "must divide --vision-hidden-size 64"),
    Mistake("pretrain", f"{DATA} {{modern}}", "{modern}_dataset.json has the tokenizer mode"),
    Mistake("pretrain", f"{MOCK} --rotary-seq-len-interpolation-factor 0.5", "factor 0.5: positions are divided by it"),
    Mistake("pretrain", f"{MOCK} --use-rope-scaling --rotary-seq-len-interpolation-factor 2", "give this or --rotary"),
    Mistake("pretrain", f"{MOCK} --rope-scaling-factor 32", "--rope-scaling-factor 32: is of --use-rope-scaling; add"),
    Mistake("pretrain", f"{MOCK} --use-rope-scaling --rope-scaling-factor 0", "factor 0: must be above 1"),
    Mistake("pretrain", f"{VILA} --projector-type mlp_downsample_3x3_fix --vision-hidden-size 63 "
            "--vision-num-attention-heads 3 --tensor-model-parallel-size 2", "must divide 189, three times", ranks=2),
    Mistake("pretrain", f"{MOCK} --load {{run}} --use-rope-scaling", "rotary embeddings are not scaled, and scaled as"),
    Mistake("pretrain", f"{MOCK} --pretrained-checkpoint {{run}} --use-rope-scaling", "run; use the same flags"),
    Mistake("preflight", f"--ranks 3 {MOCK} --tensor-model-parallel-size 2", "but 3 were started"),
    Mistake("preflight", "--preset eve_7b --mock-data --train-iters 1 --num-layers 32000", "out of memory before"),
    Mistake("preflight", f"--ranks many {MOCK}", "--ranks many: the number of ranks"),
    Mistake("preprocess_data", f"{PREPROCESS} --input {{root}}/x", "{root}/x"),
    Mistake("preprocess_data", f"{PREPROCESS} --tokenizer-model {{root}}/x", "cannot read the tokenizer {root}/x"),
    Mistake("preprocess_data", f"{PREPROCESS} --image-size 100", "100"),
    Mistake("preprocess_data", f"{PREPROCESS} --template v0", "--template v0: must be one of plain, vicuna_v1"),
    Mistake("preprocess_data", f"{PREPROCESS} --worker 4", "--worker: no such flag; did you mean --workers?"),
    Mistake("preprocess_data", "--inputs {rows}", "--inputs: no such flag; did you mean --input?"),
    Mistake("preprocess_data", f"{PREPROCESS} --follow-links=yes", "--follow-links yes: this flag takes no value"),
    Mistake("preprocess_data", f"{PREPROCESS} --image-root {{root}}/x", "{root}/x"),
    Mistake("preprocess_data", f"{PREPROCESS} --opt-out {{root}}/x", "--opt-out {root}/x cannot be read"),
    Mistake("preprocess_data", f"{PREPROCESS} --input {{root}}/*.xyz", "no file matches this pattern"),
    Mistake("preprocess_data", f"{PREPROCESS} --family", "--family: a value is missing behind it"),
    Mistake("merge_datasets", "--output-prefix {root}/all {set} {set}", "{set} is named 2 times"),
    Mistake("merge_datasets", "--output-prefix {root}/all {set} {root}/x", "{root}/x_dataset.json is missing"),
    Mistake("merge_datasets", "--output-prefix {set} {set}", "{set} is one of the datasets to merge: choose another"),
    Mistake("merge_datasets", "{set} --output-prefix", "--output-prefix: a value is missing behind it"),
    Mistake("merge_datasets", "{set} --output {root}/all", "--output: no such flag; did you mean --output-prefix?"),
    Mistake("preprocess_data", f"{PREPROCESS} --output-prefix {{set}}", "8 samples): add --overwrite to replace it,"),
    Mistake("preprocess_data", f"{PREPROCESS} --output-prefix {{root}}/", "{root}/ names a folder: add a name for"),
    Mistake("preprocess_data", f"{PREPROCESS} --output-prefix {{rows}}/x", "{rows} is a file; choose another"),
    Mistake("preprocess_data", f"{PREPROCESS} --input {{root}}", "--input {root} is a folder: name its files, as in"),
    Mistake("preprocess_data", f"{PREPROCESS} --input {{rows}} {{rows}}", "--input names {rows} twice"),
    Mistake("preprocess_data", f"{PREPROCESS} --input {{recipe}}", "its layout is not known from its suffix; give"),
    Mistake("preprocess_data", f"{PREPROCESS} --workers 0", "--workers 0: use 1 or more"),
    Mistake("preprocess_data", f"{PREPROCESS} --video-frames 0", "--video-frames 0: use 1 to"),
    Mistake("preprocess_data", f"{PREPROCESS} --max-image-pixels 0", "--max-image-pixels 0: use 1 to"),
    Mistake("preprocess_data", f"{PREPROCESS} --jpeg-quality 0", "--jpeg-quality 0: use 1 to 100"),
    Mistake("preprocess_data", f"{PREPROCESS} --image-decoder threads", "add --image-storage jpeg or pixels, or leave"),
    Mistake("preprocess_data", f"{PREPROCESS} --image-root {{rows}}", "--image-root {rows} is not a folder: name"),
    Mistake("preprocess_data", f"{PREPROCESS} --tokenizer-model {{recipe}}", "is not a sentencepiece model: use"),
    Mistake("preprocess_data", f"{PREPROCESS} --opt-out {{root}}", "--opt-out {root} cannot be read"),
    Mistake("preprocess_data", f"{PREPROCESS} --family no_such", "--family no_such: no such family; choose one of eve"),
    Mistake("preprocess_data", f"{PREPROCESS} --template llama_3", "it has the control token <|start_header_id|>,"),
    Mistake("preprocess_data", f"{PREPROCESS} --template chat_template", "chat_template is that of a tokenizer.json,"),
    Mistake("preprocess_data", f"{PREPROCESS} --tokenizer-model {{bare}}", "tokenizer_config.json is missing: it"),
    Mistake("preprocess_data", f"{PREPROCESS} --tokenizer-model {{rows}}", "{rows} is not a tokenizer.json ("),
    Mistake("preprocess_data", f"{PREPROCESS} --tokenizer-model {{bare}} --tokenizer-legacy",
            "--tokenizer-legacy: says how a tokenizer.model is read, and {bare} is a tokenizer.json; leave"),
    Mistake("preprocess_data", f"{PREPROCESS} --family vila --image-fit round", "--image-fit round: must be one of"),
    Mistake("preprocess_data", f"{PREPROCESS} --family vila --image-size 13", "--image-size 13: is smaller than"),
    Mistake("preprocess_data", f"{PREPROCESS} --family vila --image-fit", "--image-fit: a value is missing behind it"),
    Mistake("preprocess_data", f"{PREPROCESS} --family vila --max-tiles 6", "--max-tiles 6: is for --image-fit tiles"),
    Mistake("preprocess_data", f"{PREPROCESS} --family vila --max-tiles 13", "--max-tiles 13: use 1 to"),
    Mistake("preprocess_data", f"{PREPROCESS} --image-fit pad", "--image-fit: no such flag"),
    Mistake("merge_datasets", "--output-prefix {set} {set} --overwrite", "{set} is one of the datasets to merge:"),
    Mistake("merge_datasets", "--output-prefix {set} {other}", "8 samples): add --overwrite to replace it, or choose"),
    Mistake("merge_datasets", "--output-prefix {root}/ {set}", "{root}/ names a folder: add a name for the dataset"),
    Mistake("merge_datasets", "--output-prefix {root}/all {set} {cut}", "{cut}_text.bin is truncated"),
    Mistake("merge_datasets", "--output-prefix {root}/all {set} {rows}", "{rows} is a file: name a dataset by its"),
    Mistake("merge_datasets", "--output-prefix {root}/all", "required: PREFIX"),
    Mistake("merge_datasets", "--output-prefix {root}/all {set} {modern}",
            "{modern}_dataset.json has tokenizer_kind 'sentencepiece legacy=False'"),
    Mistake("merge_datasets", "--output-prefix {root}/all {coded} {cut_codes}", "{cut_codes}_codes.bin is truncated"),
    Mistake("curate", "caption --work {root}/w", "required: --prompt-file; see --help"),
    Mistake("curate", "caption --work {root}/w --prompt-file {root}/x", "--prompt-file {root}/x: no such file;"),
    Mistake("curate", CAPTION, "name one model: --model-path DIR, or --base-url URL with --model NAME"),
    Mistake("curate", f"{CAPTION} --model-path {{run}}", "{run}: no folder that transformers loads (it has"),
    Mistake("curate", f"{CAPTION} --model-path {{adapter}}", "{adapter}: holds an adapter of PEFT and no"),
    Mistake("curate", f"{CAPTION} --model-path {{tower}}", "{root}/w holds no curation: begin with tools/curate.py"),
    Mistake("curate", f"{CAPTION} --base-url node7:8000 --model x", "not an address such as http://HOST:8000/v1"),
    Mistake("curate", f"{CAPTION} --base-url http://127.0.0.1:9/v1", "--base-url: name the model, as the server calls"),
    Mistake("curate", f"{CAPTION} --model-path {{run}} --top-p 0.9", "--top-p: has no effect without --temperature"),
    Mistake("curate", f"{CAPTION} --model-path {{run}} --batch-size 0", "--batch-size 0: must be 1 or more"),
    Mistake("curate", f"{CAPTION} --prompts {{recipe}}", "--prompts: no such flag; did you mean --prompt-file?"),
    Mistake("curate", "filter --work {root}/w --input {root}/*.xyz", "--input {root}/*.xyz: no file matches this"),
    Mistake("curate", "filter --work {root}/w --input {rows}", "{rows}: curation reads parquet shards of records"),
    Mistake("curate", "filter --work {recipe}", "--work {recipe} is a file: name a folder"),
    Mistake("curate", "filter --work {root}/w", "{root}/w holds no curation: begin with tools/curate.py filter"),
    Mistake("curate", "filter --input {rows}", "required: --work; see --help"),
    Mistake("curate", "filters --work {root}/w", "filters: no such command; choose one of filter, "),
    Mistake("curate", "filter --work {root}/w --worker 2", "--worker: no such flag; did you mean --workers?"),
    Mistake("curate", "features --work {root}/w --tower {root}/none", "--tower {root}/none: no config.json there"),
    Mistake("curate", "centres --work {root}/w --centres 0", "--centres 0: must be 1 or more"),
    Mistake("curate", "centres --work {root}/w --centres 9", "{root}/w holds no curation"),
    Mistake("curate", "select --work {root}/w --per-cluster 0", "--per-cluster 0: must be 1 or more"),
    Mistake("curate", "filter --work {root}/w --min-side -1", "--min-side -1: must be 0 or more"),
    Mistake("curate", "filter --work {root}/w --max-aspect 0.5", "--max-aspect 0.5: must be 1 or more"),
    Mistake("curate", "filter --work {root}/w --max-repeated 2", "--max-repeated 2: must lie between 0 and 1"),
    Mistake("inspect_data", "{root}/x", "{root}/x_dataset.json is missing: the path of a dataset is"),
    Mistake("inspect_data", "{cut} --check", "{cut}_text.bin is truncated"),
    Mistake("inspect_data", "{set} --tokenizer-model {root}/x", "cannot read the tokenizer {root}/x"),
    Mistake("inspect_data", "{set} --tokenizer-model {tokenizer}", "set_dataset.json was made with another tokenizer"),
    Mistake("inspect_data", "{set} --sample -1", "--sample -1: must be 0 or more"),
    Mistake("inspect_data", "{set} --check --workers 0", "--workers 0: must be 1 or more"),
    Mistake("inspect_data", "", "required: PREFIX; see --help"),
    Mistake("inspect_data", "{set} {cut}", "{cut}: no flag, nor a value of the flag before it"),
    Mistake("inspect_data", "{set} --workers many", "--workers many: must be a whole number"),
    Mistake("inspect_data", "{set} --output-dir {recipe}", "--output-dir {recipe}: {recipe} is a file; name a folder"),
    Mistake("inspect_data", "{root}", "{root} is a folder: name a dataset in it, such as {root}/cut"),
    Mistake("inspect_data", "{set}_text.bin", "{set}_text.bin is a file of the dataset {set}: name that"),
    Mistake("inspect_data", "{rows}", "{rows} is a file: name a dataset by its --output-prefix"),
    Mistake("inspect_data", "{set} --seed -1", "--seed -1: must be 0 or more"),
    Mistake("inspect_data", "{set} --sample many", "--sample many: must be a whole number"),
    Mistake("inspect_data", "{set} --tokenizer-model {recipe}", "is not a sentencepiece model: use"),
    Mistake("inspect_data", "{set} --output-dir {recipe}/look", "--output-dir {recipe}/look: {recipe} is a file; name"),
    Mistake("inspect_data", "{set} --codes {root}/x", "--codes {root}/x: {root}/x_codes.json is missing; name the"),
    Mistake("convert_checkpoint", "import --source {root}/x --target {root}/y", "{root}/x"),
    Mistake("convert_checkpoint", "import --source {root} --target {run}", "{run}: holds a run already"),
    Mistake("convert_checkpoint", "import --source {root} --target {recipe}", "{recipe}: is a file"),
    Mistake("convert_checkpoint", f"{IMPORT} --trust-remote-code", "add --teacher-model"),
    Mistake("convert_checkpoint", "export --source {root} --target {root}/y", "{root}: no checkpoint there"),
    Mistake("convert_checkpoint", f"{EXPORT} --format transformers", "add --tokenizer DIR"),
    Mistake("convert_checkpoint", f"{EXPORT} --family", "--family: a value is missing behind it"),
    Mistake("convert_checkpoint", f"{EXPORT} --format onnx", "--format onnx: must be one of published, transformers"),
    Mistake("convert_checkpoint", "imports --source {root}", "imports: no such command; choose one of import, export"),
    Mistake("convert_checkpoint", f"{IMPORT} --format transformers", "--format: no such flag; "),
    Mistake("convert_checkpoint", f"{EXPORT} --tokenizer-model {{tokenizer}}", "did you mean --tokenizer"),
    Mistake("convert_checkpoint", f"{EXPORT} --ckpt-step 5", "{run} has no iteration 5; there are 2"),
    Mistake("convert_checkpoint", "export --source {run}/iter_0000009 --target {root}/y", "no iteration 9; there"),
    Mistake("convert_checkpoint", f"{EXPORT} --max-shard-size 2", "--max-shard-size 2: is no size"),
    Mistake("convert_checkpoint", f"{EXPORT} --dry-run --tokenizer {{root}}/x", "cannot read the tokenizer {root}/x"),
    Mistake("convert_checkpoint", f"{EXPORT} --tokenizer {{recipe}}", "{recipe} is not a sentencepiece model"),
    Mistake("convert_checkpoint", "export --source {spoken} --target {root}/y --tokenizer {tokenizer}",
            "--tokenizer {tokenizer}: is another tokenizer (sha256"),
    Mistake("convert_checkpoint", "export --source {run} --target {recipe} --dry-run", "{recipe}: exists already"),
    Mistake("convert_checkpoint", "import --source {root} --target {run} --dry-run", "{run}: holds a run already"),
    Mistake("convert_checkpoint", "import --source {recipe} --target {root}/y", "--source {recipe}: is a file; name"),
    Mistake("convert_checkpoint", f"{IMPORT} --seed -1", "--seed -1: must be 0 or more"),
    Mistake("convert_checkpoint", "import --source {adapter} --target {root}/y", "{adapter}: holds an adapter of PEFT"),
    Mistake("convert_checkpoint", f"{IMPORT} --adapter {{root}}", "--adapter {root}: has no adapter_config.json; name"),
    Mistake("convert_checkpoint", f"{IMPORT} --adapter {{adapter}}", "{adapter}: has no adapter_model.safetensors"),
    Mistake("convert_checkpoint", f"{EXPORT} --format adapter", "--format adapter: {run} was made without adapters"),
    Mistake("convert_checkpoint", f"{EXPORT} --format adapter --tokenizer {{tokenizer}}", "an adapter has none; leave"),
    Mistake("convert_checkpoint", "import --source {tower} --target {root}/y", "is named by --vision-tower"),
    Mistake("convert_checkpoint", f"{IMPORT} --family vila --image-fit anyres", "be one of pad, crop, stretch, tiles"),
    Mistake("convert_checkpoint", f"{IMPORT} --family vila --qformer-num-queries 0", "0: must be 1 or more"),
    Mistake("convert_checkpoint", f"{EXPORT} --family vila --published-layout vila2", "must be one of vila1"),
    Mistake("convert_checkpoint", f"{EXPORT} --family vila --conv-mode llama_3", "--conv-mode: is for --format"),
    Mistake("generate", f"{ASK} --model-path {{root}}", "--model-path {root}: neither a checkpoint"),
    Mistake("generate", f"{ASK} --model-path {{run}}", "--tokenizer-model: a checkpoint does not hold its tokenizer"),
    Mistake("generate", f"{ASK} --model-path {{run}} --tokenizer-model {{root}}/x", "{root}/x: no such file"),
    Mistake("generate", f"{ASK} {MODEL} --image-folder {{root}}/x",
            "--image-folder {root}/x: no such folder"),
    Mistake("generate", f"{ASK} {MODEL} --batch-size 0", "--batch-size"),
    Mistake("generate", f"{ASK} {MODEL} --conv-mode document", "which no prompt fits: use plain or vicuna_v1"),
    Mistake("generate", f"{ASK} {MODEL} --question-file {{root}}/x", "{root}/x"),
    Mistake("generate", f"{ASK} {MODEL} --batch 4", "--batch: no such flag; did you mean --batch-size?"),
    Mistake("generate", f"{ASK} {MODEL} --num-chunks 2 --chunk-idx 2", "--chunk-idx 2: counts from 0 to"),
    Mistake("generate", f"{ASK} {MODEL} --ckpt-step 5", "--ckpt-step 5: {run} has no iteration 5; there are 2"),
    Mistake("generate", f"{ASK} --model-path {{run}} --tokenizer-model {{recipe}}", "is not a sentencepiece model"),
    Mistake("generate", f"{ASK} --model-path {{spoken}} --tokenizer-model {{tokenizer}}", "is another tokenizer"),
    Mistake("generate", f"{ASK} {MODEL} --temperature -1", "--temperature -1.0: must lie between 0 (greedy) and 10"),
    Mistake("generate", f"{ASK} {MODEL} --top-p 0.9", "--top-p: has no effect without --temperature above 0"),
    Mistake("generate", f"{ASK} --model-path {{spoken}}x", "--model-path {spoken}x: neither a checkpoint"),
    Mistake("generate", f"{ASK} --model-path {{adapter}}", "{adapter}: holds an adapter of PEFT and no model"),
    Mistake("generate", f"{ASK} {MODEL} --conv-mode qwen2", "--conv-mode qwen2: it has the control token"),
    Mistake("generate", f"{ASK} {MODEL} --conv-mode chat_template", "--conv-mode chat_template: the template chat_t"),
    Mistake("chat", "--model-path {root}", "--model-path {root}: neither a checkpoint"),
    Mistake("chat", f"{MODEL} --image {{root}}/x", "--image {root}/x: no such file"),
    Mistake("chat", f"{MODEL} --max-new-tokens 0", "--max-new-tokens 0: must be 1 or more"),
    Mistake("chat", f"{MODEL} --web --image {{root}}/x", "--image: cannot be given together with --web"),
    Mistake("chat", f"{MODEL} --port http", "--port http: must be a whole number"),
    Mistake("chat", "--model-path {run}/iter_0000009", "{run} has no iteration 9; there are 2"),
    Mistake("chat", "--model-path {run}", "name the tokenizer.model that {run}/iter_0000002 was trained with"),
    Mistake("chat", "--model-path {spoken} --tokenizer-model {tokenizer}", "trained with, {unlike}/tokenizer.model"),
    Mistake("chat", f"{MODEL} --temperature 1 --top-p 0", "--top-p 0.0: must lie above 0, and be 1"),
    Mistake("chat", f"{MODEL} --web --port 70000", "--port 70000: must lie between 1 and 65535"),
    Mistake("chat", "--model-path {root}/x --web", "--model-path {root}/x: neither a checkpoint"),
    Mistake("chat", f"{MODEL} --image {{root}}", "--image {root}: not a file"),
    Mistake("chat", f"{MODEL} --tensor-model-parallel-size 2", "use torchrun --nproc-per-node 2"),
    Mistake("chat", "--model-path {adapter}", "{adapter}: holds an adapter of PEFT and no model; merge it"),
    Mistake("chat", "--model-path {tower}", "has no tokenizer.json; if transformers saved the folder"),
    Mistake("alignment", f"{CURVE} --output {{root}}/x.png", "--output {root}/x.png: must end in .json"),
    Mistake("alignment", f"{CURVE} --output {{root}}/x/y.json", "--output {root}/x/y.json: {root}/x is no folder"),
    Mistake("alignment", f"{CURVE} --model-path {{root}}", "--model-path {root}: not a checkpoint"),
    Mistake("alignment", f"{CURVE} --model-path {{adapter}}", "{adapter}: holds an adapter of PEFT and no model"),
    Mistake("alignment", f"{CURVE} --ckpt-step 5", "--ckpt-step 5: {run} has no iteration 5; there are 2"),
    Mistake("alignment", f"{CURVE} --data-path {{set}}x", "{set}x_dataset.json is missing"),
    Mistake("alignment", f"{CURVE} --model-path {{spoken}}", "was made with another tokenizer"),
    Mistake("alignment", f"{CURVE} --data-path {{text}}", "{text}: no sample has a picture and text and fits"),
    Mistake("alignment", f"{CURVE} --samples 0", "--samples 0: must be 1 or more"),
    Mistake("alignment", f"{CURVE} --with {{rows}}", "{rows}: not a curve; name files that --output of this command"),
    Mistake("alignment", f"{CURVE} --with {{root}}/x", "{root}/x"),
    Mistake("alignment", f"{CURVE} --pipeline-model-parallel-size 2", "use torchrun --nproc-per-node 2"),
    Mistake("chat", f"{MODEL} --conv-mode llama_3", "--conv-mode llama_3: it has the control token"),
    Mistake("verify_golden", "{root} --tensor-parallel 2", "did you mean --tensor-model-parallel-size?"),
    Mistake("verify_golden", "{root}", "{root}: no golden case there"),
    Mistake("verify_golden", "{damaged}", "{damaged}/case/meta.json: not JSON (Expecting"),
    Mistake("compare_losses", "HEAD --stage 2", "--stage: no such flag; did you mean --stages?"),
    Mistake("compare_losses", "HEAD --example", "--example: a value is missing behind it"),
    Mistake("compare_losses", "HEAD --layouts tp3", "--layouts tp3: must be one of tp1, tp2-sp"),
    Mistake("tokenize_images", f"{CODES} --input {{set}}x", "{set}x_dataset.json is missing: the path of a dataset is"),
    Mistake("tokenize_images", f"{CODES} --input {{text}}", "{text} has no images: there is nothing to make codes of"),
    Mistake("tokenize_images", f"{CODES} --input {{cut}}", "{cut}_text.bin is truncated"),
    Mistake("tokenize_images", f"{CODES} --input {{coded}} --fit square",
            "{coded}_codes.json is there already, made with --fit stretch, and this command has square: add"),
    Mistake("tokenize_images", f"{CODES} --input {{coded}} --dtype bfloat16", "made with --dtype float32, and this"),
    Mistake("tokenize_images", f"{CODES} --input {{coded}} --micro-batch-size 8", "made with --micro-batch-size 16,"),
    Mistake("tokenize_images", f"{CODES} --tower {{other_toy}} --input {{coded}}", "made with another tower (sha256"),
    Mistake("tokenize_images", f"{CODES} --input {{set}} --output-prefix {{coded}}", "made of another dataset, or"),
    Mistake("tokenize_images", f"{CODES} --input {{cut_codes}}", "{cut_codes}_codes.bin is truncated: it has"),
    Mistake("tokenize_images", f"{CODES} --input {{begun}} --fit square", "holds unfinished codes, made with --fit"),
    Mistake("tokenize_images", f"{CODES} --tower {{root}} --input {{set}}", "--tower {root}: is not folder of a toy"),
    Mistake("tokenize_images", f"{CODES} --family vila --input {{set}}", "--family vila: has no towers that make"),
    Mistake("tokenize_images", f"{CODES} --family no_such --input {{set}}", "--family no_such: has no towers that"),
    Mistake("tokenize_images", f"{CODES} --input {{set}} --fit crop", "--fit crop: must be one of auto, stretch, sq"),
    Mistake("tokenize_images", f"{CODES} --input {{set}} --workers 0", "--workers 0: must be 1 or more"),
    Mistake("tokenize_images", f"{CODES} --input {{set}} --output-prefix {{root}}/", "{root}/ names a folder: add a"),
    Mistake("tokenize_images", f"{CODES} --input {{set}} --output {{root}}/x", "did you mean --output-prefix?"),
    Mistake("tokenize_images", "--input {set}", "required: --tower; see --help"),
    Mistake("tokenize_images", "--tower {tower} --input {set}", "{tower}/config.json: model_type is 'clip_vision"),
    Mistake("tokenize_images", "--tower {root}/x --input {set}", "--tower {root}/x: no such folder; name that of a"),
    Mistake("reconstruct", f"{SHEET} --output {{root}}/x.jpg", "--output {root}/x.jpg: must end in .png"),
    Mistake("reconstruct", f"{SHEET} --output {{root}}/x/y.png", "--output {root}/x/y.png: {root}/x is no folder;"),
    Mistake("reconstruct", f"{SHEET} --input {{root}}/x", "--input {root}/x: No such file or directory; name files of"),
    Mistake("reconstruct", f"{SHEET} --input {{rows}}", "--input {rows}: not JPEG, PNG"),
    Mistake("reconstruct", f"{SHEET} --input {{root}}", "--input {root}: Is a directory; name files of pictures"),
    Mistake("reconstruct", f"{SHEET} --tower {{root}}", "--tower {root}: is not folder of a toy tower"),
    Mistake("reconstruct", f"{SHEET} --dtype float16", "--dtype float16: must be one of float32, bfloat16"),
    Mistake("prepare_data", "", "required: NAME; see --help"),
    Mistake("prepare_data", "sa1 --source {root} --output {root}/p", "NAME sa1: must be one of sa1b, openimages"),
    Mistake("prepare_data", "sa1b --source {root}/x --output {root}/p", "--source {root}/x is not a folder: name that"),
    Mistake("prepare_data", "sa1b --source {root} --output {root}/p", "has no sa_*.tar: sa1b expects the archives sa_"),
    Mistake("prepare_data", "sa1b --source {root} --output {root}/p --best-share 1", "--best-share: no such flag;"),
    Mistake("prepare_data", "coyo --source {root} --output {root}/p --best-share 2", "must lie between 0 and 1"),
    Mistake("prepare_data", "coyo --source {root} --output {root}/p --min-clip-similarity x", "x: must be a number"),
    Mistake("prepare_data", "mmc4 --source {root} --output {root}/p --workers 0", "--workers 0: must be 1 or more"),
    Mistake("doctor", "--fix", "--fix: no such flag; --help lists them all"),
    Mistake("doctor", "--perceptual-linear {rows}", "--perceptual-linear: only used with --perceptual-weights; add"),
    Mistake("train_tower", f"{TOWER} --preset vila_u_tiny", "a decoder; use python -m megatron_eve.pretrain"),
    Mistake("train_tower", f"{TOWER} --code-grid 3", "--code-grid 3: must divide 4, the patches along a side of"),
    Mistake("train_tower", f"{TOWER} --decoder-grid 8", "make pictures of 128 pixels from a grid of 8, and 64 are"),
    Mistake("train_tower", f"{TOWER} --visual-codebook-size 1", "--visual-codebook-size 1: one vector tells nothing"),
    Mistake("train_tower", f"{TOWER} --codes-per-position 0", "--codes-per-position 0: must be above 0"),
    Mistake("train_tower", f"{TOWER} --vision-tower {{tower}}", "is 'clip', and a SigLIP is needed; name its"),
    Mistake("train_tower", f"{TOWER} --vision-tower {{root}}/x", "--vision-tower {root}/x"),
    Mistake("train_tower", f"{TOWER} --perceptual-weights {{root}}/x", "weights {root}/x: no such file; name the one"),
    Mistake("train_tower", TOWER.replace("--perceptual-weights random", ""), "--perceptual-weights: name the file"),
    Mistake("train_tower", f"{TOWER} --global-batch-size 1", "compares a picture with the texts of others; use 2 or"),
    Mistake("train_tower", f"{TOWER} --recompute-granularity full", "--recompute-granularity full: is of no use to a"),
    Mistake("train_tower", f"{TOWER} --tensor-model-parallel-size 2", "a tower is trained data parallel only", ranks=2),
    Mistake("train_tower", f"{TOWER} --data-path {{set}}", "{set} was made with --template"),
    Mistake("train_tower", f"{TOWER} --data-path {{wordless}}", "has no text, and a tower trains on pairs of"),
    Mistake("train_tower", f"{TOWER} --vision-tokenizer {{tower}}", "--vision-tokenizer: no such flag; use --vision-"),
    Mistake("train_tower", f"{TOWER} --pretrained-checkpoint {{siglip}}", "'rqvaesigliptransformer_model' is needed;"),
    Mistake("train_tower", f"{TOWER} --pretrained-checkpoint {{run}}", "{run}: is a checkpoint of another model; name"),
    Mistake("train_tower", f"{TOWER} --seq-lenght 8", "--seq-lenght: no such flag; --help lists them all"),
    Mistake("train_tower", f"{TOWER} --micro-batch-size 2", "--micro-batch-size: no such flag; there are no micro"),
    Mistake("train_tower", f"{TOWER} --load {{run}}", "made with --family eve, this run has vila_u_tower; use"),
    Mistake("train_tower", f"{TOWER} --data-path {{foreign}}", "and the run's vocabulary has 96: name the Sig"),
    Mistake("train_tower", f"{TOWER} --vision-tower {{voiceless}}", "config.json has no text_config, and texts are"),
]  # fmt: skip
ON_RANKS = [Mistake(one.tool, one.words, one.says, ranks=4) for one in SHARED]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that are good and bad, by the names that the table uses."""
    root = tmp_path_factory.mktemp("mistakes")
    write_dataset(root / "set", 8, 0)
    write_dataset(root / "other", 2, 0)
    write_dataset(root / "modern", 2, 0, tokenizer_kind="sentencepiece legacy=False")
    write_dataset(root / "cut", 2, 0)
    with DatasetWriter(root / "text", MINI_SETTINGS) as writer:
        writer.add_sample([1, 5, 6], [-100, 5, 6], [])
        writer.finalise()
    text = root / "cut_text.bin"
    text.write_bytes(text.read_bytes()[:-4])
    recipe = root / "recipe.yaml"
    recipe.write_text("training:\n  global_batch_sise: 4\n")
    (root / "rows.json").write_text("[]")
    bare = root / "bare.json"
    bare.write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    (root / "questions.jsonl").write_text('{"question_id": 1, "text": "What?"}\n')
    tower = root / "tower"
    tower.mkdir()
    sizes = {
        "hidden_size": 64,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
        "image_size": 112,
    }
    (tower / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **sizes}))
    (tower / "model.safetensors").write_bytes(b"")
    write_run(root / "run")
    unlike = spoilt_tokenizer(root / "unlike")  # of just as many pieces
    spoken = TokenizerRecord.of(Tokenizer(unlike / "tokenizer.model")).to_dict()
    write_run(root / "spoken", tokenizer=spoken)
    lora = LoRAConfig(lora_rank=8, lora_target=("q_proj", "v_proj"))
    write_run(root / "adapted", config=RunConfig(lora=lora).to_dict())
    (root / "adapter").mkdir()
    for name in ("adapter_config.json", "processor_config.json", "tokenizer.json"):
        (root / "adapter" / name).write_text("{}")
    write_coded_datasets(root / "of_codes")
    write_tower_inputs(root)
    damaged = root / "damaged" / "case"
    (damaged / "raw").mkdir(parents=True)
    (damaged / "meta.json").write_text("{")
    return {
        "damaged": str(damaged.parent),
        "siglip": str(root / "siglip"), "pairs": str(root / "pairs"), "wordless": str(root / "wordless"),
        "foreign": str(root / "foreign"), "voiceless": str(root / "voiceless"),
        **{name: str(root / "of_codes" / name) for name in ("toy", "other_toy", "coded", "cut_codes", "begun")},
        "photo": str(root / "of_codes" / "photo.png"),
        "root": str(root), "set": str(root / "set"), "cut": str(root / "cut"), "recipe": str(recipe),
        "text": str(root / "text"),
        "unlike": str(unlike), "spoken": str(root / "spoken"), "adapter": str(root / "adapter"),
        "adapted": str(root / "adapted"),
        "other": str(root / "other"), "modern": str(root / "modern"), "bare": str(bare),
        "rows": str(root / "rows.json"), "questions": str(root / "questions.jsonl"),
        "run": str(root / "run"), "tower": str(tower), "tokenizer": str(find_golden("tokenize") / "tokenizer.model"),
    }  # fmt: skip


def write_coded_datasets(root: Path) -> None:
    """Datasets with codes by the toy tower, of which some are damaged or unfinished, and a picture."""
    root.mkdir()
    tower, codes = write_tower(root / "toy"), ToyCodes()
    write_tower(root / "other_toy", depth=2)
    settings = codes.read_tower(tower, {})
    for name in ("coded", "cut_codes", "begun"):
        dataset = open_dataset(write_dataset(root / name, 2, 0))
        made = {
            "grid": (4, 4),
            "depth": 3,
            "codebook_size": 8,
            "tower_sha256": codes.sha256(settings),
            "dtype": "float32",
        }
        made |= {
            "micro_batch_size": 16,
            "dataset_sha256": dataset_digest(dataset),
            "num_images": dataset.info.num_images,
        }
        write_codes(root / name, **made, begin_only=name == "begun")
    path = root / "cut_codes_codes.bin"
    path.write_bytes(path.read_bytes()[:-1])
    picture(20, 20).save(root / "photo.png")


def write_tower_inputs(root: Path) -> None:
    """A SigLIP without its weights, and datasets of pairs, of which one lacks a text."""
    tokenizer = write_siglip_tokenizer(root / "siglip")
    (root / "siglip" / "config.json").write_text(json.dumps(SIGLIP))
    write_pairs(root, tokenizer, [caption(number) for number in range(8)])
    for path in root.glob("pairs_*"):
        for name in ("wordless", "foreign"):
            shutil.copyfile(path, root / path.name.replace("pairs", name))
    manifest = root / "foreign_dataset.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "vocab_size": 97}))
    (root / "voiceless").mkdir()
    (root / "voiceless" / "config.json").write_text(json.dumps(SIGLIP["vision_config"]))
    samples = np.load(root / "wordless_samples.npy")
    samples["text_length"][3] = 1
    np.save(root / "wordless_samples.npy", samples)


def write_run(folder: Path, **more: Any) -> Path:
    """A folder of a run of nine samples, with what a start reads of a checkpoint; returns the checkpoint's."""
    checkpoint = folder / "iter_0000002"
    checkpoint.mkdir(parents=True)
    (folder / TRACKER).write_text("2")
    saved: dict[str, Any] = {
        "iteration": 2,
        "config": RunConfig().to_dict(),
        "dataset": {"samples": [9]},
        "optimizer": {"lr": torch.ones(2), "dtype": torch.float32},
        **more,
    }
    torch.save(saved, checkpoint / "common.pt")
    return checkpoint


def test_common_is_read_without_torch(tmp_path: Path) -> None:
    saved = read_common(write_run(tmp_path))
    assert saved is not None and saved["config"] == RunConfig().to_dict()
    assert (saved["iteration"], saved["dataset"]) == (2, {"samples": [9]})
    (tmp_path / "common.pt").write_bytes(b"PK")
    assert read_common(tmp_path) is None and read_common(tmp_path / "nowhere") is None


def run_driver(cases: list[Mistake], places: dict[str, str]) -> list[dict[str, Any]]:
    told = [
        {"tool": one.tool, "words": one.words.format(**places).split(), "ranks": one.ranks} for one in cases
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.mistake_driver"], input=json.dumps(told), capture_output=True, text=True,
        timeout=240, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def problem(one: Mistake, found: dict[str, Any], places: dict[str, str]) -> str | None:
    """What of an outcome is not as it should be."""
    lines = found["err"].splitlines()
    right = (
        found["status"] == 2
        and not found["torch"]
        and not found["out"]
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and one.says.format(**places) in lines[0]
        and "Traceback" not in found["err"]
    )
    return None if right else f"{one}: {found}"


@pytest.mark.parametrize("cases", [MISTAKES, ON_RANKS], ids=["alone", "four ranks"])
def test_a_mistake_is_one_sentence_before_torch_is_loaded(
    cases: list[Mistake], places: dict[str, str]
) -> None:
    found = run_driver(cases, places)
    problems = [problem(one, outcome, places) for one, outcome in zip(cases, found, strict=True)]
    assert not [one for one in problems if one], "\n".join(one for one in problems if one)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("one", SHARED[:3])
def test_under_torchrun_all_ranks_together_print_one_line(one: Mistake, places: dict[str, str]) -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=4",
        "-m",
        "megatron_eve.pretrain",
    ]
    done = subprocess.run(
        [sys.executable, *command, *one.words.format(**places).split()],
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and one.says.format(**places) in ours[0], done.stderr
    assert "rank 0 failed" not in done.stderr and "megatron_eve/pretrain.py" not in done.stderr
