"""Checks a configuration before any process group exists; each error names the flag and the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_eve.config.blend import parse_blend, parse_split
from megatron_eve.config.errors import ConfigError, at_least_one
from megatron_eve.config.expert_checks import expert_errors
from megatron_eve.config.kernel_checks import kernel_errors
from megatron_eve.config.lora_checks import lora_errors
from megatron_eve.config.pipeline import pipeline_errors
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.config.tower_runs import tower_run_errors
from megatron_eve.models.family import ModelFamily
from megatron_eve.models.registry import find_family, tower_family
from megatron_eve.runtime.dali import DALI_REMEDY, dali_is_installed

# Megatron's name of the file that names the latest checkpoint of a folder.
TRACKER = "latest_checkpointed_iteration.txt"
# Parts of a dense layer that megatron-core recomputes by themselves. Its "layernorm" finds none in TransformerEngine's
# layers, where each norm is part of the matrix behind it.
RECOMPUTE_MODULES = ("core_attn", "mlp")


def validate(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError if a configuration cannot run on `world_size` ranks.

    Raises:
        ConfigError: all errors at once, a line each.
    """
    family = find_family(config.family)
    if tower_family(config.family) and (unused := [*tower_run_errors(config, world_size)]):
        raise ConfigError("\n".join(unused))
    layers = [*pipeline_errors(config)]
    errors = [
        *_sizes(config.model), *family.check_sizes(config), *_layout(config, world_size),
        *layers, *_stage(config, family), *_training(config), *([] if layers else _chunks(config)),
        *kernel_errors(config), *_optimizer(config), *_data(config),
        *family.check(config), *lora_errors(config), *expert_errors(config), *_checkpoint(config), *_faults(config),
    ]  # fmt: skip
    if errors:
        raise ConfigError("\n".join(errors))


def validate_sizes(config: RunConfig) -> None:
    """Raise ConfigError for model sizes that are invalid in any run.

    Raises:
        ConfigError: all errors at once, a line each.
    """
    family = find_family(config.family)
    if errors := [*_sizes(config.model), *family.check_sizes(config)]:
        raise ConfigError("\n".join(errors))


def _sizes(model: ModelConfig) -> Iterator[str]:
    yield from at_least_one(
        model, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    if model.num_attention_heads > 0 and model.hidden_size % model.num_attention_heads:
        yield (
            f"--hidden-size {model.hidden_size}: not divisible by --num-attention-heads {model.num_attention_heads}"
        )
    groups = model.num_query_groups
    if groups and groups > 0 and model.num_attention_heads % groups:
        yield f"--num-query-groups {groups}: must divide --num-attention-heads {model.num_attention_heads}"
    yield from _rope_scaling(model)


def _rope_scaling(model: ModelConfig) -> Iterator[str]:
    linear, factor = model.rotary_seq_len_interpolation_factor, model.rope_scaling_factor
    if linear is not None and not 1 < linear < math.inf:
        yield (
            f"--rotary-seq-len-interpolation-factor {linear:g}: positions are divided by it, so it must be above 1; "
            "leave it out for positions as they are"
        )
    if linear is not None and model.use_rope_scaling:
        yield "--use-rope-scaling: give this or --rotary-seq-len-interpolation-factor, not both"
    if not 1 < factor < math.inf:
        yield f"--rope-scaling-factor {factor:g}: must be above 1"
    elif factor != ModelConfig.rope_scaling_factor and not model.use_rope_scaling:
        yield f"--rope-scaling-factor {factor:g}: is of --use-rope-scaling; add that, or leave it out"


def _layout(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    yield from at_least_one(
        parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
        "distributed_timeout_minutes",
    )  # fmt: skip
    tensor, pipeline, context = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size,
    )  # fmt: skip
    if min(tensor, pipeline, context) < 1:
        return
    ranks = tensor * pipeline * context
    if world_size % ranks:
        yield (
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} x "
            f"--context-parallel-size {context} = {ranks} ranks, but {world_size} were started; "
            f"start a multiple of {ranks} (torchrun --nproc-per-node) or change the layout"
        )
    for name in ("num_attention_heads", "ffn_hidden_size", "hidden_size"):
        if getattr(model, name) % tensor:
            yield (
                f"--tensor-model-parallel-size {tensor}: must divide --{name.replace('_', '-')} {getattr(model, name)}"
            )
    groups = model.num_query_groups
    if groups and groups > 0 and groups % tensor:
        yield f"--tensor-model-parallel-size {tensor}: must divide --num-query-groups {groups}"
    if parallel.sequence_parallel and tensor == 1:
        yield "--sequence-parallel: splits work between tensor-parallel ranks; set --tensor-model-parallel-size above 1"
    if parallel.overlap_param_gather and not (
        parallel.overlap_grad_reduce and parallel.use_distributed_optimizer
    ):
        yield "--overlap-param-gather: needs --overlap-grad-reduce and --use-distributed-optimizer"


def _stage(config: RunConfig, family: ModelFamily) -> Iterator[str]:
    stages = ", ".join(map(str, family.stages))
    if config.training.stage not in family.stages:
        yield f"--stage {config.training.stage}: the family {family.name} has no such stage; choose from {stages}"


def _training(config: RunConfig) -> Iterator[str]:
    training = config.training
    yield from at_least_one(training, "global_batch_size", "train_iters", "train_samples", "exit_interval")
    # numpy's generator takes 32 bits, and each pipeline stage adds 100.
    largest = 2**32 - 1 - 100 * config.parallel.pipeline_model_parallel_size
    if not 0 <= training.seed <= largest:
        yield f"--seed {training.seed}: must lie between 0 and {largest}"
    if training.train_iters is None and training.train_samples is None:
        yield "--train-iters: say how long to train (or give --train-samples)"
    if training.train_iters is not None and training.train_samples is not None:
        yield "--train-samples: give this or --train-iters, not both"
    if training.transformer_impl == "transformer_engine" and not training.bf16:
        yield "--transformer-impl transformer_engine: its attention over packs takes bfloat16 only; add --bf16"
    full = training.recompute_granularity == "full"
    if full and not (training.recompute_method and training.recompute_num_layers):
        yield (
            "--recompute-granularity full: also set --recompute-method and --recompute-num-layers "
            "(uniform and 1, say)"
        )
    if not full and (training.recompute_method or training.recompute_num_layers):
        yield "--recompute-method: only with --recompute-granularity full; leave it out"
    if training.recompute_modules and training.recompute_granularity != "selective":
        yield "--recompute-modules: only with --recompute-granularity selective; add that, or leave it out"
    for module in training.recompute_modules:
        if module not in RECOMPUTE_MODULES:
            yield f"--recompute-modules {module}: no such part of a layer; choose from {', '.join(RECOMPUTE_MODULES)}"


def _chunks(config: RunConfig) -> Iterator[str]:
    """Errors of other settings that depend on how the layers are divided, where they are divided well."""
    training = config.training
    if config.parallel.pipeline_model_parallel_size < 1:
        return  # reported by another check
    uniform = training.recompute_granularity == "full" and training.recompute_method == "uniform"
    group = training.recompute_num_layers
    if uniform and group:
        for layers in sorted(set(config.chunk_layers)):
            if group < 1 or layers % group:
                yield f"--recompute-num-layers {group}: must divide the {layers} layers of a model chunk"
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if config.faults.rerun_mode != "disabled" and interleaved and config.parallel.overlap_grad_reduce:
        yield (
            "--rerun-mode validate_results: with the interleaved schedule and --overlap-grad-reduce, gradients are "
            "reduced in another order after a restart, and megatron-core would compare one with another; leave one out"
        )


def _faults(config: RunConfig) -> Iterator[str]:
    faults = config.faults
    if faults.spike_factor is not None and faults.spike_factor <= 1:
        yield f"--spike-factor {faults.spike_factor}: must be above 1, such as 10"


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if not 0 <= optimizer.min_lr <= optimizer.lr:
        yield f"--min-lr {optimizer.min_lr}: must lie between 0 and --lr {optimizer.lr}"
    if not 0 <= optimizer.lr_warmup_fraction < 1:
        yield f"--lr-warmup-fraction {optimizer.lr_warmup_fraction}: must lie in [0, 1)"
    if optimizer.clip_grad < 0:
        yield f"--clip-grad {optimizer.clip_grad}: must be 0 (no clipping, as published) or a positive norm"
    for pattern, rate in optimizer.lr_overrides.items():
        if rate < 0:
            yield f"--lr-overrides {pattern}: a learning rate cannot be negative ({rate})"


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    yield from at_least_one(data, "seq_length", "num_workers", "max_images_per_pack")
    if data.image_decoder == "dali" and not dali_is_installed():
        yield f"--image-decoder dali: DALI is not installed here; {DALI_REMEDY}"
    if data.mock_data and data.data_path:
        yield "--mock-data: makes its own samples; leave --data-path out"
    if not data.mock_data and not data.data_path:
        yield "--data-path: name a dataset made by tools/preprocess_data.py (or use --mock-data)"
    yield from _sampling(config)
    parallel = config.parallel
    context = parallel.context_parallel_size
    # Each sample is cut into 2 * CP chunks, and a rank's share of the pack over the tensor-parallel ranks.
    rows = config.row_multiple
    multiple = parallel.tensor_model_parallel_size * (context * math.lcm(2, rows) if context > 1 else rows)
    if data.seq_length > 0 and multiple > 0 and data.seq_length % multiple:
        yield (
            f"--seq-length {data.seq_length}: must be a multiple of {multiple} with --tensor-model-parallel-size "
            f"{parallel.tensor_model_parallel_size} and --context-parallel-size {context}"
            + (f" in FP8 ({config.training.fp8_recipe})" if rows > 1 else "")
        )


def _sampling(config: RunConfig) -> Iterator[str]:
    data, training = config.data, config.training
    yield from at_least_one(training, "eval_interval", "eval_iters")
    try:
        blend, held_out = parse_blend(data.data_path), parse_blend(data.valid_data_path, "--valid-data-path")
        share = parse_split(data.split)
    except ConfigError as error:
        yield str(error)
        return
    if held_out.weights:
        yield "--valid-data-path: losses are measured on each dataset by itself; leave the weights out"
    trained = {Path(prefix).resolve() for prefix in blend.prefixes}
    for prefix in held_out.prefixes:
        if Path(prefix).resolve() in trained:
            yield f"--valid-data-path {prefix}: is trained on too (--data-path); hold out a part with --split instead"
    if data.mock_data and held_out.prefixes:
        yield "--mock-data: makes its own samples; leave --valid-data-path out"
    if training.eval_interval and not share and not held_out.prefixes:
        yield "--eval-interval: nothing is held out; add --split 99,1, say, or --valid-data-path"
    if held_out.prefixes and not training.eval_interval:
        yield "--valid-data-path: only read with --eval-interval; add that, or leave the path out"
    if training.eval_iters and not training.eval_interval:
        yield "--eval-iters: only used with --eval-interval; add that, or leave it out"
    if data.group_by_modality and blend.weights:
        yield "--group-by-modality: goes through all samples once an epoch; leave the weights of --data-path out"
    if data.group_by_modality and not data.shuffle:
        yield "--group-by-modality: draws an order of its own; leave --no-shuffle out"


def _checkpoint(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    yield from at_least_one(checkpoint, "save_interval")
    yield from at_least_one(config.logging, "log_interval")
    if checkpoint.save and re.fullmatch(r"iter_\d+", Path(checkpoint.save).name):
        yield f"--save {checkpoint.save}: is the name of one checkpoint; name the folder above it"
    elif (
        checkpoint.save
        and not same_folder(checkpoint.save, _run_folder(checkpoint.load))
        and _holds_checkpoints(checkpoint.save)
    ):
        yield (
            f"--save {checkpoint.save}: holds the checkpoints of a run; go on with it (--load {checkpoint.save}) "
            "or choose another folder"
        )
    if checkpoint.ckpt_step is not None and not (checkpoint.load or checkpoint.pretrained_checkpoint):
        yield f"--ckpt-step {checkpoint.ckpt_step}: of which run? Add --load or --pretrained-checkpoint"
    yield from at_least_one(checkpoint, "keep_last", "save_retain_interval")
    if checkpoint.save_retain_interval and not checkpoint.keep_last:
        yield "--save-retain-interval: all checkpoints are kept without --keep-last; add that, or leave it out"
    if checkpoint.retain_weights_only and not checkpoint.save_retain_interval:
        yield "--retain-weights-only: only used with --save-retain-interval; add that, or leave it out"
    if (checkpoint.keep_last or checkpoint.async_save) and not checkpoint.save:
        yield f"--{'keep-last' if checkpoint.keep_last else 'async-save'}: also say where, with --save"
    if checkpoint.save_interval and not checkpoint.save:
        yield "--save-interval: also say where, with --save"
    if config.training.exit_interval and not checkpoint.save:
        yield "--exit-interval: saves before it exits; say where with --save"


def same_folder(one: str | None, other: str | None) -> bool:
    """True if two paths name the same folder."""
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def _run_folder(load: str | None) -> str | None:
    """The run's folder of `--load`, which may name one checkpoint in it."""
    one = load is not None and re.fullmatch(r"iter_\d+", Path(load).name)
    return str(Path(load).parent) if load is not None and one else load


def _holds_checkpoints(folder: str) -> bool:
    """True if a folder has checkpoints: a tracker file, or iter_ folders whose tracker is missing."""
    root = Path(folder)
    return (root / TRACKER).exists() or any(
        re.fullmatch(r"iter_\d+", path.name) and (path / "metadata.json").exists()
        for path in root.glob("iter_*")
    )
