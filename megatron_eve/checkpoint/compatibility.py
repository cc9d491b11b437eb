"""Checks whether a run may resume from a checkpoint, and whether prompts are like its training data.

Model, data and frozen models of both are compared before any tensor is loaded. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eve.config import (
    DataConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    parse_split,
)
from megatron_eve.config.lora import TARGETS
from megatron_eve.config.upgrade import upgrade_saved
from megatron_eve.data.text.templates import prompt_templates, without_conversation
from megatron_eve.models.family import size_differences
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.models.rope_scaling import (
    SCALING_SETTINGS,
    adds_linear_scaling,
    position_note,
    scaling_difference,
)
from megatron_eve.runtime.errors import UserError

# Sizes of the decoder that change no weight.
_SHAPELESS = {"max_position_embeddings"}
# What a dataset's fingerprint calls the samples that no pack can hold (see `data.fitting`).
DROPPED = "dropped samples"
_CONTENT = "content"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used; the message names it, the reason and the remedy."""


def check_resume(
    folder: Path,
    saved: dict[str, Any],
    config: RunConfig,
    dataset: dict[str, Any] | None,
    frozen: dict[str, Any] | None,
) -> None:
    """Raise CheckpointError if a run cannot resume: other family, model, data, length, stage or frozen models.

    Args:
        folder: of the checkpoint.
        saved: what its `common.pt` holds.
        config: of the run.
        dataset: the fingerprint of the run's data; None if it is not known yet, which skips the check.
        frozen: the fingerprint of the run's frozen models (see `ModelFamily.fingerprint`); likewise.

    Raises:
        CheckpointError: naming what differs and the remedy.
    """
    if saved.get("dataset") is None:
        raise CheckpointError(
            f"{folder}: an import has weights alone and nothing to resume; give it as --pretrained-checkpoint in place "
            "of --load"
        )
    check_family(folder, saved, config)
    saved = with_upgraded_config(saved)
    check_model(folder, saved["config"]["model"], config.model)
    if check_adapters(folder, saved, config):
        raise CheckpointError(
            f"{folder}: was made without adapters, this run has --lora-rank {config.lora.lora_rank}; leave that out, "
            "or start adapters from these weights with --pretrained-checkpoint in place of --load"
        )
    check_parameter_groups(folder, saved, config)
    if dataset is not None:
        check_data(folder, saved, config, dataset)
    check_length(folder, saved, config)
    for sentence in find_family(config.family).check_resume(saved, config, frozen):
        raise CheckpointError(f"{folder}: {sentence}")


def with_upgraded_config(saved: dict[str, Any]) -> dict[str, Any]:
    """The contents of a checkpoint's `common.pt`, with the configuration in its current form.

    Raises:
        FamilyError: the checkpoint is of a family that is not installed.
    """
    return {**saved, "config": upgrade_saved(saved["config"])}


def family_of(saved: dict[str, Any]) -> str:
    """The name of a checkpoint's model family; checkpoints of older versions without one are of the default family.

    Args:
        saved: what its `common.pt` holds.
    """
    return saved["config"].get("family", DEFAULT_FAMILY)


def check_weights(folder: Path, saved: dict[str, Any], config: RunConfig) -> bool:
    """Raise CheckpointError if a run of other data and schedule cannot start from the weights of a checkpoint.

    Args:
        folder: of the checkpoint.
        saved: what its `common.pt` holds.
        config: of the run.

    Returns:
        True if the run has adapters and the checkpoint has none.
    """
    check_family(folder, saved, config)
    saved = with_upgraded_config(saved)
    check_start(folder, saved["config"]["model"], config.model)
    for sentence in find_family(config.family).check_weights(saved, config):
        raise CheckpointError(f"{folder}: {sentence}")
    return check_adapters(folder, saved, config)


def check_family(folder: Path, saved: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError if the checkpoint is of another model family."""
    family = family_of(saved)
    if family != config.family:
        raise CheckpointError(
            f"{folder}: was made with --family {family}, this run has {config.family}; use the same --family or "
            "--preset, or another checkpoint"
        )


def check_model(folder: Path, saved: dict[str, Any], model: ModelConfig) -> None:
    """Raise CheckpointError if a run of this model cannot go on from a checkpoint.

    Args:
        folder: of the checkpoint.
        saved: sizes that it was made with; settings that an older version did not write have their defaults.
        model: the run's.
    """
    before = _saved_model(saved)
    if difference := scaling_difference(before, model):
        linear = adds_linear_scaling(before, model)
        anew = ", or start anew from its weights with --pretrained-checkpoint" if linear else ""
        raise CheckpointError(f"{folder}: its {difference}; resume with the same flags{anew}")
    _check_sizes(folder, saved, model)


def check_start(folder: Path, saved: dict[str, Any], model: ModelConfig) -> None:
    """Raise CheckpointError if a model cannot start from weights of these sizes.

    Samples may be longer, and positions of a model that was not scaled may be divided for that.

    Args:
        folder: of the checkpoint.
        saved: sizes that it was made with; settings that an older version did not write have their defaults.
        model: the run's.
    """
    before = _saved_model(saved)
    difference = scaling_difference(before, model)
    if difference and not adds_linear_scaling(before, model):
        raise CheckpointError(
            f"{folder}: its {difference}; use the same flags, its preset or recipe, or another checkpoint"
        )
    # Experts that the weights lack begin as copies.
    added = {"modality_experts"} if model.modality_experts else set()
    _check_sizes(folder, saved, model, ignore=_SHAPELESS | added)


def start_note(folder: Path, saved: dict[str, Any], model: ModelConfig) -> str | None:
    """What a run does, or could do, for longer samples than those of the weights that it starts from."""
    note = position_note(_saved_model(saved), model)
    return note and f"{folder}: {note}"


def _saved_model(saved: dict[str, Any]) -> ModelConfig:
    """Sizes that a checkpoint was made with."""
    return ModelConfig(**{name: saved[name] for name in asdict(ModelConfig()) if name in saved})


def _check_sizes(
    folder: Path, saved: dict[str, Any], model: ModelConfig, ignore: Collection[str] = ()
) -> None:
    for sentence in size_differences({**asdict(ModelConfig()), **saved}, model, {*ignore, *SCALING_SETTINGS}):
        raise CheckpointError(f"{folder}: {sentence}")


def check_adapters(folder: Path, saved: dict[str, Any], config: RunConfig) -> bool:
    """Raise CheckpointError for a checkpoint with other adapters than the run's, or with adapters that it lacks.

    Args:
        folder: of the checkpoint.
        saved: what its `common.pt` holds; versions without adapters wrote no settings of them.
        config: of the run.

    Returns:
        True if the run has adapters and the checkpoint has none.
    """
    before, now = LoRAConfig(**saved["config"].get("lora", {})), config.lora
    if before.enabled and not now.enabled:
        raise CheckpointError(
            f"{folder}: was made with --lora-rank {before.lora_rank}, this run has no adapters; add the same flags, or "
            "merge the adapters into the weights (tools/convert_checkpoint.py export) and start from that folder"
        )
    if not before.enabled:
        return now.enabled
    for name in ("lora_rank", "lora_alpha", "lora_target"):
        old, new = (_words(getattr(some, name)) for some in (before, now))
        if old != new:
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointError(
                f"{folder}: was made with {flag} {old}, this run has {new}; use the same adapters, or merge them into "
                "the weights (tools/convert_checkpoint.py export) and start from that folder"
            )
    return False


def _words(value: Any) -> str:
    """A setting of LoRA as its flag takes it; the order of matrices does not matter."""
    if isinstance(value, list | tuple):
        return " ".join(name for name in TARGETS if name in value)
    return f"{value:g}"


def check_data(folder: Path, saved: dict[str, Any], config: RunConfig, dataset: dict[str, Any]) -> None:
    """Raise CheckpointError if seed or number of samples differ, since they decide the order of samples."""
    mine, before = _order(config.to_dict()), _order(saved["config"])
    for flag, value in before.items():
        if mine.get(flag) != value:
            raise CheckpointError(
                f"{folder}: was made with {flag} {value}, this run has {mine.get(flag)}; resume with the same "
                "order, or start anew from its weights with --pretrained-checkpoint"
            )
    # Checkpoints of versions that dropped no samples lack this entry.
    for name, value in {DROPPED: [], **saved["dataset"]}.items():
        if name == _CONTENT:
            _check_content(folder, value, dataset.get(name, []))
            continue
        found = dataset.get(name, [] if name == DROPPED else None)
        if found != value:
            same = "--data-path"
            if name == DROPPED:
                same = "--seq-length, --max-images-per-pack and --max-position-embeddings"
            raise CheckpointError(
                f"{folder}: was made with data whose {name} are {value}, this run's are {found}; "
                f"resume with the same {same}, or start anew from its weights with --pretrained-checkpoint"
            )


def _check_content(folder: Path, before: list[str], now: list[str]) -> None:
    """Raise CheckpointError if the samples or their order differ; datasets of older versions have no digest."""
    for number, (one, other) in enumerate(zip(before, now, strict=False), start=1):
        if one and other and one != other:
            raise CheckpointError(
                f"{folder}: dataset {number} of --data-path holds other samples than when this checkpoint was made, or "
                "the same in another order, so the next sample of the run is not known; resume with the dataset as it "
                "was, or start anew from the weights with --pretrained-checkpoint"
            )


def check_length(folder: Path, saved: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError for another batch size if the run's length is given in iterations.

    The run ends when --train-iters times --global-batch-size samples are consumed, and the learning rate follows them.
    After iterations of another size that is not at iteration --train-iters.
    """
    size, iterations = config.training.global_batch_size, config.training.train_iters
    iteration, consumed = saved["iteration"], saved["consumed_samples"]
    if iterations is None or consumed == iteration * size:
        return
    rest = max(iterations - iteration, 0) * size
    raise CheckpointError(
        f"{folder}: made with --global-batch-size {saved['config']['training']['global_batch_size']}, and this run has "
        f"{size}, which would end it at another iteration than --train-iters {iterations}; give the same size, or the "
        f"length in samples (--train-samples {consumed + rest} ends it after {iterations} iterations)"
    )


def check_parameter_groups(folder: Path, saved: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError for another stage or other globs of `--lr-overrides`: they decide the optimizer's groups.

    Other rates for the same globs are fine.
    """
    before = saved["config"]
    globs = list(before.get("optimizer", {}).get("lr_overrides", {}))
    groups = {
        "--stage": (before["training"].get("stage", config.training.stage), config.training.stage),
        "--lr-overrides": (" ".join(globs) or "none", " ".join(config.optimizer.lr_overrides) or "none"),
    }
    for flag, (old, new) in groups.items():
        if old != new:
            named = " for the globs" if flag == "--lr-overrides" else ""
            raise CheckpointError(
                f"{folder}: was made with {flag}{named} {old}, this run has {new}, so the optimizer's state does not "
                f"fit; resume with the same {flag}, or start a stage from these weights with --pretrained-checkpoint "
                "in place of --load"
            )


_LAYOUT = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


def rank_layout(config: dict[str, Any]) -> dict[str, Any]:
    """What decides which rank holds which part of the model: sizes of `parallel`, and the layers of each model chunk.

    Args:
        config: of a run, as nested dictionaries; an older version's may lack settings, which then have their defaults.
    """
    saved = config["parallel"]
    parallel = ParallelConfig(**{name: saved[name] for name in asdict(ParallelConfig()) if name in saved})
    chunks = parallel.chunk_layers(config["model"]["num_layers"])
    return {**{name: getattr(parallel, name) for name in _LAYOUT}, "chunk_layers": chunks}


def _order(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that the order of samples depends on, by flag; defaults if an older version did not write them."""
    data = {**asdict(DataConfig()), **config["data"]}
    held_out = 100 * parse_split(data["split"])
    order = {
        "--seed": config["training"]["seed"],
        "--shuffle": data["shuffle"],
        "--split": f"{100 - held_out:g},{held_out:g}",
        "--group-by-modality": data["group_by_modality"],
    }
    if data["group_by_modality"]:  # batches are drawn as such
        order["--global-batch-size"] = config["training"]["global_batch_size"]
    return order


def unlike_training(folder: Path, saved: dict[str, Any], conv_mode: str, apply_exif: bool) -> list[str]:
    """Warnings if prompts differ from a checkpoint's training data in template or image orientation.

    Args:
        folder: of the checkpoint, for messages.
        saved: what its `common.pt` holds. Imports and runs on `--mock-data` have no record of their data; for
            checkpoints of older versions, the template follows from the stage.
        conv_mode: the template of the prompts.
        apply_exif: pictures are turned upright.
    """
    dataset = saved.get("dataset") or {}
    if dataset.get("tokenizer_sha256") in (None, "mock"):
        return []
    warnings = []
    stage = saved["config"]["training"].get("stage")
    stages = find_family(family_of(saved)).stages
    templates = dataset.get("templates") or [stages[stage].template if stage in stages else "plain"]
    if conv_mode not in templates:
        kind = " and ".join(without_conversation(template) or "conversations" for template in templates)
        if all(map(without_conversation, templates)):
            kind += ", and taught no conversation"
        asked = [template for template in templates if template in prompt_templates()]
        remedy = "train it on captions or conversations before it is asked"
        if asked:
            remedy = f"tools/generate.py --conv-mode {asked[0]} asks as it was trained"
        warnings.append(
            f"{folder} was trained on {kind} (template {', '.join(templates)}, stage {stage}), and is asked here with "
            f"the template {conv_mode}, so answers may make no sense; {remedy}"
        )
    if dataset.get("apply_exif", apply_exif) != apply_exif:
        were, remedy = ("as they are stored", "add") if apply_exif else ("turned upright", "leave out")
        warnings.append(f"{folder} was trained on pictures {were}; {remedy} --ignore-exif-orientation")
    return warnings
