"""A Hugging Face folder -> a checkpoint of ours, one tensor at a time: `tools/convert_checkpoint.py import`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_eve.checkpoint.files import write_checksums, write_config
from megatron_eve.checkpoint.hf.config import HFConfig
from megatron_eve.checkpoint.hf.folder import LazyTensor
from megatron_eve.checkpoint.hf.rules import (
    ignored_because,
    lacking_parts,
    open_weights,
    optional_part,
    rules_of,
)
from megatron_eve.checkpoint.state import CONTENT
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.checkpoint.tokenizer_record import TokenizerRecord
from megatron_eve.config import ConfigError, RunConfig, validate_sizes
from megatron_eve.convert.adapter_base import check_base
from megatron_eve.convert.adapter_config import AdapterFolder
from megatron_eve.convert.adapters import AdapterTensors, tensors_of
from megatron_eve.convert.dist_folder import write_dist_folder
from megatron_eve.convert.folders import check_target, rows_of_vocabulary, source_tokenizer
from megatron_eve.convert.meta_model import Entry, MetaModel, meta_model
from megatron_eve.models.decoder.lora_names import adapter_rules
from megatron_eve.models.family import ModelFamily, begins_at_random
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.hf_format import Flags
from megatron_eve.models.name_rules import HEAD_KEY, Rule, rule_for, source_for
from megatron_eve.models.registry import find_family
from megatron_eve.models.tensor_layouts import Sizes, Vocabulary


@dataclass
class ImportPlan:
    """What becomes of every tensor.

    Attributes:
        config: of the checkpoint, with the model's sizes.
        tensors: of the checkpoint, by key.
        mapped: Hugging Face keys that go into them, by key of the checkpoint.
        dropped: Hugging Face keys that nothing is made of, and why.
        initialised: keys of the checkpoint that begin at random.
        added_rows: rows of the vocabulary that the folder lacks, for control tokens of the family.
        source_bytes: of the Hugging Face tensors that are mapped.
        tokenizer: the source folder's tokenizer.model, if it has one.
        adapter: which tensors come from an adapter's folder, if there is one.
    """

    config: RunConfig
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    added_rows: int = 0
    source_bytes: int = 0
    tokenizer: TokenizerRecord | None = None
    adapter: AdapterTensors | None = None


def plan_import(
    source: Path,
    config: RunConfig,
    dtype: torch.dtype | None,
    seed: int,
    adapter: AdapterFolder | None = None,
) -> ImportPlan:
    """Decide what becomes of every tensor of a folder; reads names and shapes, and no data but a sample of it.

    Args:
        source: the folder.
        config: with the model's sizes and the parts that the checkpoint is to have.
        dtype: of the checkpoint; None keeps what each tensor has.
        seed: for what begins at random.
        adapter: is put on the model; `config` has its settings then.

    Raises:
        ConfigError: tensors that are missing, of another shape, or that no rule knows; an adapter of another model.
    """
    found = HFConfig.read(source)
    folder, plan = open_weights(source, found.folders, config), ImportPlan(config)
    keys = set(folder.keys())
    family = find_family(config.family)
    plan.added_rows = config.model.vocab_size - found.model_config().vocab_size
    for problem in family.hugging_face().check_weights(config.vision, folder):
        raise ConfigError(f"{source}: {problem}")
    if adapter is not None:
        there = next(iter(found.folders.values()))
        plan.adapter = tensors_of(adapter, config, keys, there)
        config = plan.config = replace(config, lora=plan.adapter.lora)
        check_base(adapter.files[0], f"--adapter {adapter.path}", folder.tensor, config.model.num_layers)
        plan.adapter.put_into(folder)
        keys = set(folder.keys())
    text = family.text_rules
    plan.tokenizer = source_tokenizer(
        found.language_folder, config.model.vocab_size, text.tokenizer_legacy, text.added_tokens
    )
    rules = (*rules_of(config), *adapter_rules(config.lora))
    lacking = lacking_parts(family, keys, language_model=found.family is None)
    with meta_model(config) as model:
        taken = plan.adapter.names() if plan.adapter else set[str]()
        fresh = {
            e.name
            for e in model.entries
            if begins_at_random(family, e.name, lacking)
            and not (taken and taken.issuperset(rule_for(e.name, rules)[1]))
        }
        initial = model.initial(seed) if fresh else {}
        for entry in model.entries:
            if entry.name in fresh:
                weights = initial[entry.name]
                plan.initialised.append(entry.key)
                plan.tensors[entry.key] = LazyTensor(
                    entry.shape, dtype or weights.dtype, partial(_given, weights)
                )
            else:
                rule, names = source_for(entry.name, rules, found.is_tied, found.has_experts)
                _map(plan, entry, folder, rule, names, model, dtype)
    used = {key for some in plan.mapped.values() for key in some}
    _account(plan, source, family, keys - used, found.is_tied)
    return plan


def _given(weights: torch.Tensor) -> torch.Tensor:
    return weights


def _map(
    plan: ImportPlan,
    entry: Entry,
    folder: HFFolder,
    rule: Rule,
    names: tuple[str, ...],
    model: MetaModel,
    dtype: torch.dtype | None,
) -> None:
    """Plan one tensor of the checkpoint from those of the folder that make it up."""
    missing = set(names) - set(folder.keys())
    if missing:
        raise ConfigError(
            f"{folder.folder}: has no tensor {', '.join(sorted(missing))}; this is not a whole model, copy it again"
        )
    sizes = Sizes.of(plan.config.model, model.padded_vocab_size)
    parts = [folder.describe(name) for name in names]
    rows = plan.config.model.vocab_size - plan.added_rows
    try:
        merged = rule.layout.merge([torch.empty(shape, device="meta") for shape, _ in parts], sizes).shape
    except RuntimeError:
        merged = torch.Size()
    if merged != entry.shape or (isinstance(rule.layout, Vocabulary) and parts[0][0][0] != rows):
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, (shape, _) in zip(names, parts, strict=True))
        raise ConfigError(
            f"{folder.folder}: {shapes}: does not make {entry.name} of shape {tuple(entry.shape)} with {rows} pieces "
            "in the vocabulary; is config.json that of these weights?"
        )

    def make() -> torch.Tensor:
        return rule.layout.merge([folder.tensor(name) for name in names], sizes)

    plan.mapped[entry.key] = names
    plan.source_bytes += sum(shape.numel() * kind.itemsize for shape, kind in parts)
    its = find_family(plan.config.family).hugging_face()
    kind = None if any(map(its.keeps_dtype, names)) else dtype
    plan.tensors[entry.key] = LazyTensor(entry.shape, kind or parts[0][1], make)


def _account(plan: ImportPlan, source: Path, family: ModelFamily, left: set[str], tied: bool) -> None:
    """Say why tensors are left out; refuse those that no rule knows."""
    unexpected = []
    for key in sorted(left):
        if part := optional_part(family, key):
            plan.dropped[key] = f"the {part}, which this checkpoint is made without"
        elif reason := ignored_because(family, key):
            plan.dropped[key] = reason
        elif tied and key == HEAD_KEY:
            plan.dropped[key] = "the embedding once more, which config.json ties it to"
        else:
            unexpected.append(key)
    if unexpected:
        raise ConfigError(
            f"{source}: holds {len(unexpected)} tensors that no rule knows ({', '.join(unexpected[:3])}); is this "
            "another model family?"
        )


def check_finite(source: Path, plan: ImportPlan, done: Callable[[int], None]) -> None:
    """Read every tensor that is taken over once.

    Raises:
        ConfigError: one holds NaN or infinity.
    """
    folder = open_weights(source, HFConfig.read(source).folders, plan.config)
    if plan.adapter is not None:
        plan.adapter.put_into(folder)
    for names in plan.mapped.values():
        for name in names:
            done(finite_tensor(folder, name).nbytes)


def finite_tensor(folder: HFFolder, name: str) -> torch.Tensor:
    """Read a tensor.

    Raises:
        ConfigError: it holds NaN or infinity.
    """
    tensor = folder.tensor(name)
    # Twenty times as fast as asking each value: the least and the greatest tell, and NaN is both of them.
    if tensor.numel() and not all(bool(edge.isfinite()) for edge in tensor.aminmax()):
        raise ConfigError(f"{folder.folder}: {name} holds values that are not finite; copy the folder again")
    return tensor


def write_import(
    plan: ImportPlan, target: Path, frozen: dict[str, Any] | None, done: Callable[[int], None]
) -> None:
    """Write the checkpoint as iteration 0 of a run's folder, under its name only when it is whole.

    Args:
        plan: what it holds.
        target: the run's folder.
        frozen: what identifies its frozen models, as `ModelFamily.fingerprint`; None where it has none.
        done: called with the bytes of each tensor.

    Raises:
        ConfigError: see `check_target`.
    """
    tokenizer = plan.tokenizer.to_dict() if plan.tokenizer else None
    write_iteration(
        target, plan.tensors, plan.config.to_dict(), {"frozen": frozen, "tokenizer": tokenizer}, done
    )


def write_iteration(
    target: Path,
    tensors: Mapping[str, LazyTensor],
    settings: Mapping[str, Any],
    origin: Mapping[str, Any],
    done: Callable[[int], None],
) -> None:
    """Write weights as iteration 0 of a run's folder, under its name only when it is whole.

    Args:
        target: the run's folder.
        tensors: by key.
        settings: of the run, as config.yaml holds them.
        origin: what else `common.pt` holds: `frozen` and `tokenizer`.
        done: called with the bytes of each tensor.

    Raises:
        ConfigError: see `check_target`.
    """
    check_target(target)
    store = CheckpointStore(target)
    store.clear()
    partial_folder = store.begin(0)
    try:
        common = {
            "checkpoint_version": 3.0, "iteration": 0, "consumed_samples": 0, "config": dict(settings),
            "dataset": None, **origin, "content_metadata": dict(CONTENT),
        }  # fmt: skip
        write_dist_folder(partial_folder, tensors, common, done)
        store.free_reserve(partial_folder)
        write_config(partial_folder, settings)
        write_checksums(partial_folder, "rank00000", [path.name for path in partial_folder.glob("*.distcp")])
        store.publish(partial_folder, 0)
    except BaseException:
        store.abandon(partial_folder)
        raise


def import_config(source: Path, family: ModelFamily, flags: Flags) -> RunConfig:
    """The configuration of a checkpoint that is made of a folder.

    Args:
        source: the folder.
        family: of the checkpoint.
        flags: of the import, the family's own among them.

    Raises:
        ConfigError: no config.json that can be used, one of another family, or sizes that do not go together.
    """
    found = HFConfig.read(source)
    if found.family not in (None, family):
        raise ConfigError(
            f"--family {family.name}: {found.source} is of the family {found.family.name}; leave --family out"
        )
    its = family.hugging_face()
    vision, model = its.import_settings(found.fields, source, flags), found.model_config()
    if its.adds_experts(flags):
        model = replace(model, modality_experts=True)
    if found.family is None:
        text = family.text_rules
        rows = rows_of_vocabulary(
            found.language_folder, model.vocab_size, text.tokenizer_legacy, text.added_tokens
        )
        model = replace(model, vocab_size=rows)
    config = RunConfig(family=family.name, model=model, vision=vision)
    validate_sizes(config)
    return config
