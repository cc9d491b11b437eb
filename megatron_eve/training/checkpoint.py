"""Checkpoints in Megatron's layout on disk: `iter_0000100/` folders and `latest_checkpointed_iteration.txt`.

A checkpoint is megatron-core's distributed format (`torch_dist`), which any layout can read. It is written into
`iter_0000100.partial`, renamed when every rank has finished, and only then named in the tracker file, itself
replaced in one step: a kill at any moment leaves the previous checkpoint the latest.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_eve.config import TRACKER, ModelConfig, RunConfig
from megatron_eve.models.vlm import is_aligning
from megatron_eve.training.compatibility import (
    ALIGNING_SIZES,
    SHAPELESS,
    CheckpointError,
    check_data,
    check_model,
    check_teacher,
)
from megatron_eve.training.model import parameters_gathered, unwrap
from megatron_eve.training.monitor import print_rank_0

# Tap projections make layers differ from each other; and optimizer state must load under any layout.
# Handed out as copies: megatron-core adds process groups to what it is given.
CONTENT = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
_EXTRA = "_extra_state"
# A resumed run follows its own flags in these, not those the checkpoint was written under.
_OWN_SETTINGS = ("max_lr", "min_lr", "betas", "eps")


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: samples seen; with the seed, all the state the data order has.
    """

    iteration: int = 0
    consumed_samples: int = 0


def latest_iteration(folder: Path) -> int | None:
    """The iteration that the tracker file names, or None where there is no tracker.

    Raises:
        CheckpointError: if the tracker file does not hold a number.
    """
    tracker = folder / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise CheckpointError(
            f"{tracker}: holds {text[:40]!r}, not an iteration; write the number of a whole iter_ folder into it"
        )
    return int(text)


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Megatron's name for a checkpoint."""
    return folder / f"iter_{iteration:07d}"


def save_checkpoint(
    config: RunConfig,
    progress: Progress,
    chunks: Sequence[Any],
    optimizer: Any,
    dataset: dict[str, Any],
    teacher: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint and make it the latest. Collective.

    Args:
        config: kept with the checkpoint, with `config.yaml` beside it for people.
        progress: where the run stands.
        chunks: this rank's model chunks, wrapped or bare.
        optimizer: megatron-core's.
        dataset: what identifies the data (see `megatron_eve.training.data.RunData`).
        teacher: what identifies the teacher (see `megatron_eve.models.eve.teacher.teacher_identity`).
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save)
    final = iteration_folder(root, progress.iteration)
    partial = final.with_name(final.name + ".partial")
    main_rank = torch.distributed.get_rank() == 0
    if main_rank:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    with parameters_gathered(config, chunks):
        dist_checkpointing.save(
            {**_run_state(config, progress, chunks, optimizer, dataset), "teacher": teacher},
            str(partial),
            content_metadata=dict(CONTENT),
        )
    torch.distributed.barrier()
    if main_rank:
        (partial / "config.yaml").write_text(
            yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8"
        )
        _sync(partial)
        replaced = final.with_name(final.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # whole, but of a run that was killed before it named it
            final.rename(replaced)
        partial.rename(final)
        _write_tracker(root, progress.iteration)
        shutil.rmtree(replaced, ignore_errors=True)
    torch.distributed.barrier()


def _run_state(
    config: RunConfig, progress: Progress, chunks: Sequence[Any], optimizer: Any, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Everything a checkpoint holds, as megatron-core's sharded state."""
    return {
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "config": config.to_dict(),
        "dataset": dataset,
        **_model_state(chunks),
        "rng_state": _rng_state(),
        "optimizer": optimizer.sharded_state_dict(
            _model_state(chunks), is_loading=False, metadata=dict(CONTENT)
        ),
    }


def load_checkpoint(
    config: RunConfig,
    chunks: Sequence[Any],
    optimizer: Any,
    dataset: dict[str, Any],
    teacher: dict[str, Any] | None = None,
) -> Progress:
    """Resume from `--load`, under any layout. Collective.

    Returns:
        Where the run stood; `Progress()` if the folder has no checkpoint yet.

    Raises:
        CheckpointError: a checkpoint that is half there, of another model size, or made with other data, another
            teacher, or none.
    """
    assert config.checkpoint.load is not None
    root = Path(config.checkpoint.load)
    iteration = latest_iteration(root)
    if iteration is None:
        return Progress()
    folder = iteration_folder(root, iteration)
    saved = _open(folder)
    check_model(folder, saved["config"]["model"], config.model, ignore=set())
    check_data(folder, saved, config, dataset)
    check_teacher(folder, saved, config, teacher)
    settings = [{name: group.get(name) for name in _OWN_SETTINGS} for group in optimizer.param_groups]
    state = _model_state(chunks)
    request = {
        **state,
        "optimizer": optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(CONTENT)),
    }
    same_layout = saved["config"]["parallel"] == config.to_dict()["parallel"]
    if same_layout:
        request["rng_state"] = _rng_state()
    loaded = dist_checkpointing.load(request, str(folder))
    _load_model(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if same_layout:
        _restore_rng(loaded["rng_state"])
    return Progress(saved["iteration"], saved["consumed_samples"])


def load_weights(folder: str, chunks: Sequence[Any], model: ModelConfig) -> None:
    """Read only the weights of a checkpoint folder's latest checkpoint, for another stage or for generation.

    An aligning layer that the checkpoint lacks keeps its initial weights; one that the model lacks is not read.

    Raises:
        CheckpointError: no checkpoint, one that is half there, or another model size.
    """
    path = _latest_folder(folder)
    saved = _open(path)
    aligned = bool(saved["config"].get("alignment", {}).get("patch_aligning"))
    wanted = unwrap(chunks[0]).patch_aligning
    fresh = wanted and not aligned
    ignore = SHAPELESS if wanted and aligned else SHAPELESS | ALIGNING_SIZES
    check_model(path, saved["config"]["model"], model, ignore=ignore)
    state = _model_state(chunks)
    if fresh:
        print_rank_0(
            f"{path}: made without --patch-aligning, so the aligning layer keeps its initial weights"
        )
        for part in state.values():
            for name in [name for name in part if is_aligning(name)]:
                del part[name]
    _load_model(chunks, dist_checkpointing.load(state, str(path)), optional=is_aligning if fresh else None)


def saved_config(folder: str) -> dict[str, Any]:
    """The configuration kept in a folder's latest checkpoint, as nested dictionaries.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    path = _latest_folder(folder) / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{path}: missing, so this checkpoint is not whole; {_REMEDY}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


_REMEDY = f"put the number of an older whole iter_ folder into {TRACKER}, or restore this one"


def _latest_folder(folder: str) -> Path:
    """The folder of a run's latest checkpoint, which must be there."""
    root = Path(folder)
    iteration = latest_iteration(root)
    if iteration is None:
        raise CheckpointError(
            f"{root}: no {TRACKER} there, so no checkpoint; name the folder that --save wrote"
        )
    return iteration_folder(root, iteration)


def _model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Sharded weights. TransformerEngine's extra state (FP8 scales) stays out, so both layer specs read it."""
    states = {}
    for i, chunk in enumerate(chunks):
        state = unwrap(chunk).sharded_state_dict(metadata=dict(CONTENT))
        states[f"model{i}"] = {name: part for name, part in state.items() if not name.endswith(_EXTRA)}
    return states


def _load_model(
    chunks: Sequence[Any], loaded: dict[str, Any], optional: Callable[[str], bool] | None = None
) -> None:
    for i, chunk in enumerate(chunks):
        result = unwrap(chunk).load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [name for name in result.missing_keys if not (optional and optional(name))]
        wrong = [name for name in missing if not name.endswith(_EXTRA)] + result.unexpected_keys
        assert not wrong, f"megatron-core loaded other weights than it was asked for: {wrong}"


def _open(folder: Path) -> dict[str, Any]:
    """The common part of a checkpoint that rank 0 found whole; every rank raises alike if it is not."""
    verdict: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        verdict[0] = _missing_part(folder)
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise CheckpointError(f"{folder}: {verdict[0]}, so this checkpoint is not whole; {_REMEDY}")
    return dist_checkpointing.load_common_state_dict(str(folder))


def _missing_part(folder: Path) -> str | None:
    """What a checkpoint folder lacks: a file, or the end of one. None if it is whole."""
    from torch.distributed.checkpoint import FileSystemReader

    if not folder.is_dir():
        return "the folder is missing"
    for name in ("metadata.json", "common.pt", ".metadata", "config.yaml"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        index = FileSystemReader(folder).read_metadata()
    except Exception as error:  # a damaged pickle can raise almost anything
        return f".metadata cannot be read ({type(error).__name__})"
    needed: dict[str, int] = {}
    for entry in (index.storage_data or {}).values():
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} holds {path.stat().st_size} of {size} bytes"
    return None


def _rng_state() -> ShardedObject:
    """Random states of this rank's place in the tensor and pipeline grid; data-parallel ranks share them."""
    states = {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject(
        "rng_state",
        states,
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _restore_rng(states: dict[str, Any]) -> None:
    if ("cuda" in states) != torch.cuda.is_available():
        return  # written on the other accelerator, whose generators have other states
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _sync(folder: Path) -> None:
    """Flush a folder's files to disk before it gets its final name."""
    for path in [*folder.rglob("*"), folder]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_tracker(root: Path, iteration: int) -> None:
    temporary = root / f".{TRACKER}.partial"
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(str(iteration))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(root / TRACKER)
    _sync_path(root)
