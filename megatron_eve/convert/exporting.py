"""A checkpoint of ours -> a folder in Hugging Face layout: `tools/convert_checkpoint.py export`.

Two formats with the same names of weights: the published one, which the public code of a family loads, and one that
today's transformers loads by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.files import damaged_part, missing_part
from megatron_eve.checkpoint.hf.config import token_ids
from megatron_eve.checkpoint.hf.folder import LazyTensor, write_shards
from megatron_eve.checkpoint.hf.rules import rules_of
from megatron_eve.checkpoint.saved_state import read_common
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.config import ConfigError, RunConfig, from_saved
from megatron_eve.convert.fast_tokenizer import fast_tokenizer
from megatron_eve.convert.folders import whole_folder
from megatron_eve.convert.meta_model import Entry, meta_model
from megatron_eve.convert.published_tokenizer import (
    GENERATION,
    settings_beside,
    write_published_tokenizer,
)
from megatron_eve.convert.transformers_folder import write_json, write_transformers_files
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.decoder.lora_names import adapter_of, adapter_rules, merged
from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.family import ADAPTER_PARAMETERS, matches
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.hf_format import CopiedTensors, Flags
from megatron_eve.models.name_rules import Rule, placed, rule_for
from megatron_eve.models.registry import find_family
from megatron_eve.models.tensor_layouts import Sizes, Vocabulary


@dataclass
class ExportPlan:
    """What becomes of every tensor.

    Attributes:
        config: of the checkpoint.
        flags: of the export, the family's own among them.
        tensors: of the folder, by Hugging Face key.
        mapped: Hugging Face keys, by key of the checkpoint.
        dropped: keys of the checkpoint that nothing is made of, and why.
        added: Hugging Face keys that the checkpoint does not hold, and where they come from.
        adapters: of the decoder's matrices, by Hugging Face key, which are merged into them.
        files: of the folder of an adapter: what each holds.
        base: matrices of the model that an adapter belongs to, of which a sample is written beside it.
        dataset: what the checkpoint records of its data.
        folders: of the export, as `HFFormat.export_folders`. `tensors` has the names of the rules, `mapped` and `added`
            have those that are written, with their folder in front where there are several.
    """

    config: RunConfig
    flags: Flags
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, LazyTensor] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: dict[str, LazyTensor] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    folders: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {".": {}})

    def by_folder(self) -> dict[str, dict[str, LazyTensor]]:
        """What is written into each folder, by key there."""
        found: dict[str, dict[str, LazyTensor]] = {name: {} for name in self.folders}
        for key, tensor in self.tensors.items():
            folder, name = placed(key, self.folders)
            found[folder][name] = tensor
        return found

    def written_name(self, key: str) -> str:
        """The path of a tensor in the export, for the summary."""
        folder, name = placed(key, self.folders)
        return name if folder == "." else f"{folder}/{name}"


def open_checkpoint(source: Path) -> tuple[Path, RunConfig]:
    """The latest checkpoint of a run's folder, which must be whole, and the configuration it was made with.

    Raises:
        CheckpointError: none there, or a damaged one.
    """
    folder = whole_checkpoint(source)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    config, note = from_saved(common["config"], source=str(folder))
    if note:
        print(f"warning: {note}", file=sys.stderr)
    return folder, config


def whole_checkpoint(source: Path) -> Path:
    """The folder of the latest checkpoint of a run's folder.

    Raises:
        CheckpointError: none there, or a damaged one.
    """
    store = CheckpointStore(source)
    iteration = store.latest()
    if iteration is None:
        raise CheckpointError(
            f"{source}: no checkpoint there; name the folder that --save of a run, or an import, wrote"
        )
    folder = store.folder(iteration)
    problem = missing_part(folder) or damaged_part(folder, 0, 1)
    if problem:
        raise CheckpointError(f"{folder}: {problem}, so this checkpoint is not whole")
    return folder


def plan_export(
    checkpoint: Path,
    config: RunConfig,
    dtype: torch.dtype | None,
    published: bool,
    flags: Flags,
    image_token_id: int | None = None,
) -> ExportPlan:
    """Decide what becomes of every tensor; reads names and shapes, no data.

    Args:
        checkpoint: its folder.
        config: it was made with.
        dtype: of the folder; None keeps that of the checkpoint.
        published: in the published format, with the buffers that the public code expects.
        flags: of the export, the family's own among them; {} for a folder that holds what inference needs.
        image_token_id: id of `<image>` in the tokenizer of a folder for transformers.

    Raises:
        ConfigError: a model that the family's format cannot hold (`HFFormat.check_export`).
        CheckpointError: a tensor that is missing or of another shape.
    """
    family = find_family(config.family).hugging_face()
    for problem in family.check_export(config, published, flags):
        raise ConfigError(problem)
    source = DistFolder(checkpoint)
    saved = read_common(checkpoint) or {}
    frozen = saved.get("frozen")
    config = replace(config, vision=family.export_settings(config.vision, flags))
    plan = ExportPlan(config, flags)
    plan.dataset = saved.get("dataset") or {}
    plan.folders = family.export_folders(published, config.vision, flags)
    rows = config.model.vocab_size if image_token_id is None else family.rows(config.model, image_token_id)
    rules = rules_of(config)
    with meta_model(config) as model:
        sizes = Sizes.of(config.model, model.padded_vocab_size)
        plan_adapters(plan, model.entries, DistFolder(checkpoint), sizes)
        for entry in model.entries:
            if entry.key not in plan.dropped:
                map_entry(plan, entry, rules, source, sizes, dtype, rows)
    used = set(plan.mapped)
    for key in source:
        if key not in used and key not in plan.dropped:
            plan.dropped[key] = "optimizer state" if key.startswith("optimizer.") else family.left_out
    if published and family.rotary_buffers:
        _add_buffers(plan)
    copied = family.copied_tensors(config, frozen, published, flags)
    if copied is not None:
        model_dtype = source.dtype("embedding.word_embeddings.weight")
        _add_copied(plan, copied, dtype or (None if copied.keeps_dtype else model_dtype))
    plan.mapped = {key: tuple(map(plan.written_name, names)) for key, names in plan.mapped.items()}
    plan.added = {plan.written_name(name): origin for name, origin in plan.added.items()}
    return plan


def plan_adapters(plan: ExportPlan, entries: Sequence[Entry], source: DistFolder, sizes: Sizes) -> None:
    """Plan what is merged into the decoder's matrices: nothing without adapters.

    Args:
        plan: the export's.
        entries: of the model.
        source: of the checkpoint, of its own: it keeps the last tensor that was read, and so does the matrices'.
        sizes: of the model.
    """
    adapters, rules = ExportPlan(plan.config, plan.flags), adapter_rules(plan.config.lora)
    for entry in entries:
        if matches(entry.name, (ADAPTER_PARAMETERS,)):
            map_entry(adapters, entry, rules, source, sizes, None, plan.config.model.vocab_size)
    plan.adapters = adapters.tensors
    plan.dropped |= dict.fromkeys(adapters.mapped, "adapters, which are merged into the decoder's matrices")


def map_entry(
    plan: ExportPlan,
    entry: Entry,
    rules: Sequence[Rule],
    source: DistFolder,
    sizes: Sizes,
    dtype: torch.dtype | None,
    rows: int | None = None,
) -> None:
    """Plan the Hugging Face tensors that one of the checkpoint's makes.

    Args:
        plan: gets them.
        entry: the checkpoint's tensor.
        rules: of the model.
        source: the checkpoint.
        sizes: of the model.
        dtype: of the tensors; None keeps the checkpoint's.
        rows: of a vocabulary; None: as many as the model has.
    """
    rule, names = rule_for(entry.name, rules)
    if entry.key not in source:
        raise CheckpointError(f"the checkpoint has no {entry.key}, which its configuration asks for")
    vocabulary = isinstance(rule.layout, Vocabulary)
    shape = source.shape(entry.key)
    # Another tensor-parallel size pads the vocabulary to another number of rows.
    if shape[1:] != entry.shape[1:] or (shape[0] != entry.shape[0] and not vocabulary):
        raise CheckpointError(f"{entry.key} is {tuple(shape)} in the checkpoint, not {tuple(entry.shape)}")

    def split(full: torch.Tensor) -> list[torch.Tensor]:
        if vocabulary:
            full = full[: plan.config.model.vocab_size]
            full = torch.cat([full, full.new_zeros((rows or len(full)) - len(full), *full.shape[1:])])
        return rule.layout.split(full, sizes, len(names))

    shapes = [part.shape for part in split(torch.empty(shape, device="meta"))]
    plan.mapped[entry.key] = names
    for number, name in enumerate(names):

        def make(number: int = number) -> torch.Tensor:
            part = split(source.tensor(entry.key))[number]
            if plan.adapters.keys().isdisjoint(own := adapter_of(names[number])):
                return part
            read = {key: plan.adapters[key].tensor() for key in own}
            return merged(names[number], part, read, plan.config.lora.scale)

        plan.tensors[name] = LazyTensor(
            shapes[number], _dtype(plan, name, source.dtype(entry.key), dtype), make
        )


def _dtype(plan: ExportPlan, name: str, there: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Of a tensor in the export, which has the dtype `there` where it comes from."""
    keeps = find_family(plan.config.family).hugging_face().keeps_dtype(name)
    return there if wanted is None or keeps or not there.is_floating_point else wanted


def _add_buffers(plan: ExportPlan) -> None:
    """The rotary frequencies, which transformers 4.31 saved with every layer and the public code expects."""
    model = plan.config.model
    head = model.hidden_size // model.num_attention_heads

    def make() -> torch.Tensor:
        return 1.0 / (model.rotary_base ** (torch.arange(0, head, 2).float() / head))

    for layer in range(model.num_layers):
        key = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        plan.tensors[key] = LazyTensor(torch.Size([head // 2]), torch.float32, make)
        plan.added[key] = "computed"


def _add_copied(plan: ExportPlan, copied: CopiedTensors, dtype: torch.dtype | None) -> None:
    """Plan the tensors of another folder, in place of those of the checkpoint that have the same names.

    Raises:
        ConfigError: one of those differs from the checkpoint's.
    """
    folder = HFFolder(copied.folder)

    def read(key: str) -> torch.Tensor:
        return folder.tensor(
            key
        ).clone()  # of its own: several names may have one key, and safetensors shares nothing

    for name, key in copied.names.items():
        shape, there = folder.describe(key)
        if (known := plan.tensors.get(name)) is not None and not _same(known.make(), folder.tensor(key)):
            raise ConfigError(
                f"{copied.folder}: its {key} is not that of the checkpoint; name {copied.origin} that the model was "
                "trained with"
            )
        plan.tensors[name] = LazyTensor(shape, _dtype(plan, name, there, dtype), partial(read, key))
        plan.added[name] = copied.origin
    for key, names in list(plan.mapped.items()):
        if copied.names.keys() >= set(names):
            plan.dropped[key] = f"once more in {copied.origin}"
            del plan.mapped[key]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.float(), other.float())


def check_tokenizer_files(tokenizer: TextTokenizer, published: bool) -> int | None:
    """Refuse what an export could not write of a tokenizer, before anything is written.

    Returns:
        The id of `<image>` in the tokenizer of a folder for transformers.

    Raises:
        ConfigError: transformers could not have it; or a file beside it, which is copied, cannot be read.
    """
    if not published:
        return fast_tokenizer(tokenizer)[1]
    if (settings := Path(tokenizer.path).parent / GENERATION).is_file():
        settings_beside(settings)
    return None


def write_export(
    plan: ExportPlan,
    target: Path,
    tokenizer: TextTokenizer | None,
    max_shard_size: int,
    published: bool,
    done: Callable[[int], None],
) -> None:
    """Write the folder, under its name only when it is whole.

    Args:
        plan: what it holds.
        target: the new folder.
        tokenizer: is written, with its ids in the configuration; transformers' format needs it.
        max_shard_size: of one safetensors file, in bytes; so much is held in memory.
        published: in the published format.
        done: called with the bytes of each tensor.

    Raises:
        ConfigError: the folder exists, or a tokenizer that will not do.
    """
    with whole_folder(target) as unfinished:
        # The weights last: what can be wrong with the other files shows before minutes have passed.
        if published:
            _write_published_files(plan, unfinished, tokenizer)
        else:
            assert tokenizer is not None
            write_transformers_files(
                unfinished, plan.config, _dtype_name(plan), tokenizer, plan.flags, plan.dataset
            )
        for name, tensors in plan.by_folder().items():
            (unfinished / name).mkdir(exist_ok=True)
            write_shards(unfinished / name, tensors, max_shard_size, done)


def _dtype_name(plan: ExportPlan) -> str:
    return str(plan.tensors["lm_head.weight"].dtype).removeprefix("torch.")


def _write_published_files(plan: ExportPlan, folder: Path, tokenizer: TextTokenizer | None) -> None:
    ids, config = token_ids(tokenizer), plan.config
    family = find_family(config.family).hugging_face()
    files = family.published_files(config.model, config.vision, _dtype_name(plan), ids, plan.flags)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)
    if tokenizer is not None:
        write_published_tokenizer(folder / next(iter(plan.folders)), tokenizer, ids)
