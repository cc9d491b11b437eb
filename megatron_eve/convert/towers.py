"""Towers that make codes of pictures, between their folders and checkpoints: tools/convert_checkpoint.py.

What is particular to the towers of a family it says itself (`models/image_codes.TowerFolders`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.hf.folder import LazyTensor, write_shards
from megatron_eve.config import ConfigError
from megatron_eve.convert.exporting import whole_checkpoint
from megatron_eve.convert.folders import whole_folder
from megatron_eve.convert.importing import finite_tensor, write_iteration
from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.image_codes import CodeTower, TowerFolders


@dataclass
class TowerPlan:
    """What becomes of every tensor.

    Attributes:
        tower: as its folder describes it.
        folders: of the family.
        tensors: that are written, by name.
        mapped: names in a published folder, by name in a checkpoint.
        dropped: names of tensors that are not written, and why.
        source_bytes: of the tensors that an import reads.
    """

    tower: CodeTower
    folders: TowerFolders
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    source_bytes: int = 0


def plan_tower_import(tower: CodeTower, folders: TowerFolders, dtype: torch.dtype | None) -> TowerPlan:
    """Decide what becomes of every tensor of a published folder; reads names and shapes, no data.

    Args:
        tower: what its folder says.
        folders: of the family.
        dtype: of the checkpoint; None keeps what each tensor has. Codebooks and whole numbers keep theirs.

    Raises:
        ConfigError: tensors that are missing, of another shape, or of an unknown name.
    """
    source, plan = HFFolder(tower.folder), TowerPlan(tower, folders)
    keys = set(source.keys())
    plan.mapped = dict(folders.stored_names(keys, tower))
    unknown = sorted(keys.difference(*plan.mapped.values()))
    if unknown:
        raise ConfigError(
            f"{tower.folder}: holds {len(unknown)} tensors of unknown names ({', '.join(unknown[:3])}); is this "
            "another model?"
        )
    for name, shape in folders.shapes(tower).items():
        if name not in plan.mapped:
            raise ConfigError(
                f"{tower.folder}: has no tensor {name}; this is not a whole tower, copy it again"
            )
        found = tuple(source.describe(plan.mapped[name][0])[0])
        if found != shape:
            raise ConfigError(
                f"{tower.folder}: {name} is {found} in the weights, and its config.json says {shape}; copy both from "
                "the same model"
            )
    for name, (first, *others) in plan.mapped.items():
        size, kind = source.describe(first)
        plan.source_bytes += (1 + len(others)) * size.numel() * kind.itemsize
        plan.tensors[name] = LazyTensor(
            size, _dtype(name, kind, dtype, folders), partial(source.tensor, first)
        )
    return plan


def _dtype(name: str, kind: torch.dtype, wanted: torch.dtype | None, folders: TowerFolders) -> torch.dtype:
    """Of a tensor of a checkpoint, or of its copies, that has `kind` where it comes from."""
    if wanted is None or not kind.is_floating_point or folders.keeps_dtype(name):
        return kind
    return wanted


def check_tower(plan: TowerPlan, done: Callable[[int], None]) -> None:
    """Read every tensor of a published folder once.

    Raises:
        ConfigError: one holds NaN or infinity, or differs from what should be a copy of it.
    """
    source = HFFolder(plan.tower.folder)
    for first, *others in plan.mapped.values():
        tensor = finite_tensor(source, first)
        done(tensor.nbytes)
        for other in others:
            if not torch.equal(source.tensor(other), tensor):
                raise ConfigError(
                    f"{plan.tower.folder}: {other} should be a copy of {first} and differs from it; copy the folder "
                    "again"
                )
            done(tensor.nbytes)


def write_tower_import(plan: TowerPlan, family: str, target: Path, done: Callable[[int], None]) -> None:
    """Write the checkpoint as iteration 0 of a folder, under its name only when it is whole.

    Args:
        plan: what it holds.
        family: of the tower.
        target: the folder.
        done: called with the bytes of each tensor.

    Raises:
        ConfigError: the folder holds a run or a model already.
    """
    settings = {"family": family, "tower": plan.folders.record(plan.tower)}
    write_iteration(target, plan.tensors, settings, {"frozen": None, "tokenizer": None}, done)


def plan_tower_export(
    tower: CodeTower, folders: TowerFolders, dtype: torch.dtype | None, published: bool
) -> TowerPlan:
    """Decide what becomes of every tensor of a checkpoint; reads names and shapes, no data.

    Args:
        tower: what its settings say.
        folders: of the family.
        dtype: of the folder; None keeps what each tensor has. Codebooks and whole numbers keep theirs.
        published: in the published layout; else for transformers.

    Raises:
        CheckpointError: a damaged checkpoint, or a tensor that is missing or of another shape.
    """
    source, plan = DistFolder(whole_checkpoint(tower.folder)), TowerPlan(tower, folders)
    for name, shape in folders.shapes(tower).items():
        if name not in source or tuple(source.shape(name)) != shape:
            raise CheckpointError(
                f"{tower.folder}: has no {name} of shape {shape}, which its settings ask for"
            )
    known = folders.stored_names(source, tower)
    for name in source:
        if name not in known:
            plan.dropped[name] = (
                "of the run that trained the tower: its discriminator, or state of an optimizer"
            )
            continue
        if not published and (reason := folders.left_out(name, tower)):
            plan.dropped[name] = reason
            continue
        plan.mapped[name] = folders.published_names(name, tower) if published else (name,)
        kind = _dtype(name, source.dtype(name), dtype, folders)
        for key in plan.mapped[name]:
            plan.tensors[key] = LazyTensor(source.shape(name), kind, partial(_copy, source, name))
    return plan


def _copy(source: DistFolder, name: str) -> torch.Tensor:
    """A tensor of its own: safetensors writes none that share memory."""
    return source.tensor(name).clone()


def write_tower_export(
    plan: TowerPlan, target: Path, max_shard_size: int, published: bool, done: Callable[[int], None]
) -> None:
    """Write the folder, under its name only when it is whole.

    Args:
        plan: what it holds.
        target: the new folder.
        max_shard_size: of one safetensors file, in bytes; so much is held in memory.
        published: in the published layout; else for transformers.
        done: called with the bytes of each tensor.

    Raises:
        ConfigError: the folder exists.
    """
    floats = [lazy.dtype for lazy in plan.tensors.values() if lazy.dtype.is_floating_point]
    dtype = str(min(set(floats), key=lambda kind: (-floats.count(kind), str(kind)))).removeprefix("torch.")
    with whole_folder(target) as unfinished:
        plan.folders.write_files(unfinished, plan.tower, dtype, published)
        write_shards(unfinished, plan.tensors, max_shard_size, done)
