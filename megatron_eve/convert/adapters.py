"""Folders with adapters of LoRA alone, as peft has them: written from a checkpoint, and put on an imported model.

What trained beside the adapters, such as a projector, trained whole. It lies in the folder, too, as peft keeps its
`modules_to_save`: `PeftModel.from_pretrained` puts it into the model by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_eve.checkpoint.hf.rules import rules_of, unknown_keys
from megatron_eve.config import ConfigError, LoRAConfig, RunConfig
from megatron_eve.config.lora import TARGETS
from megatron_eve.config.lora_checks import projection_sizes
from megatron_eve.convert.adapter_base import METADATA, sample_of, sampled_names
from megatron_eve.convert.adapter_config import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, config_fields
from megatron_eve.convert.exporting import ExportPlan, map_entry
from megatron_eve.convert.folders import whole_folder
from megatron_eve.convert.meta_model import meta_model
from megatron_eve.convert.transformers_folder import write_json
from megatron_eve.models.decoder.lora_names import adapter_rules
from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.family import matches
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.hf_format import Flags
from megatron_eve.models.name_rules import renamed, rule_for
from megatron_eve.models.registry import find_family
from megatron_eve.models.stages import stage_of
from megatron_eve.models.tensor_layouts import Sizes

# What peft puts in front of the names of a model's modules.
_PREFIX = "base_model.model."
# A tensor of the adapter of a decoder's matrix, in whichever model transformers puts the decoder into.
_ADAPTER = re.compile(
    r"base_model\.model\.(?:model\.|language_model\.)+layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.lora_(A|B)\.weight"
)


# --- export ---


def plan_adapter_export(
    checkpoint: Path, config: RunConfig, dtype: torch.dtype | None, flags: Flags
) -> ExportPlan:
    """Decide what becomes of every tensor in a folder with the adapters alone; reads names and shapes, no data.

    Args:
        checkpoint: its folder.
        config: it was made with, with adapters.
        dtype: of the folder; None keeps that of the checkpoint.
        flags: of the export, the family's own among them.

    Raises:
        CheckpointError: a tensor that is missing or of another shape.
    """
    family, stage = find_family(config.family), stage_of(config)
    its, source, plan = family.hugging_face(), DistFolder(checkpoint), ExportPlan(config, flags)
    rules, modules = (*rules_of(config), *adapter_rules(config.lora)), its.module_names(config.vision)
    beside = tuple(pattern for some in family.parts.values() for pattern in some)
    base, sampled = ExportPlan(config, flags), set(sampled_names(config.model.num_layers))
    others: set[str] = set()  # words in the names of modules beside the decoder
    with meta_model(replace(config, vision=its.export_settings(config.vision, flags))) as model:
        sizes, rows = Sizes.of(config.model, model.padded_vocab_size), config.model.vocab_size
        for entry in model.entries:
            if matches(entry.name, beside):
                others.update(word for name in rule_for(entry.name, rules)[1] for word in name.split("."))
            if stage.trains(entry.name):
                map_entry(plan, entry, rules, source, sizes, dtype, rows)
            elif sampled.intersection(rule_for(entry.name, rules)[1]):
                map_entry(base, entry, rules, source, sizes, None, rows)
    plan.base = base.tensors
    peft = {name: _PREFIX + renamed(name, modules) for name in plan.tensors}
    plan.tensors = {peft[name]: tensor for name, tensor in plan.tensors.items()}
    plan.mapped = {key: tuple(peft[name] for name in names) for key, names in plan.mapped.items()}
    plan.files = {CONFIG_FILE: _fields(config, plan.tensors, others)}
    for key in source:
        if key not in plan.mapped:
            model_key = not key.startswith("optimizer.")
            plan.dropped[key] = "of the model that the adapter belongs to" if model_key else "optimizer state"
    return plan


def write_adapter_export(plan: ExportPlan, target: Path, done: Callable[[int], None]) -> None:
    """Write the folder, under its name only when it is whole.

    Args:
        plan: of `plan_adapter_export`.
        target: the new folder.
        done: called with the bytes of each tensor.

    Raises:
        ConfigError: the folder exists.
        OSError: it cannot be written.
    """
    with whole_folder(target) as unfinished:
        tensors = {}
        for name, lazy in plan.tensors.items():
            tensors[name] = lazy.tensor().clone()
            done(tensors[name].nbytes)
        base = sample_of(lambda name: plan.base[name].tensor(), plan.config.model.num_layers)
        try:
            save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt", METADATA: base})
        except SafetensorError as error:  # for example a full disk
            raise OSError(f"{unfinished / WEIGHTS_FILE}: cannot be written ({error})") from None
        for name, content in plan.files.items():
            write_json(unfinished / name, content)
        (unfinished / WEIGHTS_FILE).chmod(0o644)  # safetensors makes files that only their owner can read


def _fields(config: RunConfig, names: Collection[str], others: Collection[str]) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Args:
        config: of the checkpoint.
        names: of the folder's tensors.
        others: words in the names of modules beside the decoder.
    """
    adapters = [name for name in names if _ADAPTER.fullmatch(name)]
    targets = [name for name in TARGETS if name in config.lora.lora_target]
    modules: str | list[str] = targets
    if set(others) & set(targets):
        # A tower's matrices have the same names, so the decoder's are named by their whole paths.
        stem = re.escape(adapters[0].removeprefix(_PREFIX).partition("layers.")[0])
        modules = rf"{stem}layers\.\d+\.(?:self_attn|mlp)\.(?:{'|'.join(targets)})"
    # Modules beside the decoder by the first two parts of their names, such as model.mm_projector.
    whole = (name.removeprefix(_PREFIX).split(".") for name in names if name not in adapters)
    modules_to_save = sorted({".".join(parts[:2]) for parts in whole})
    return config_fields(config.lora, modules, modules_to_save, config.checkpoint.pretrained_checkpoint)


# --- import ---


@dataclass(frozen=True)
class AdapterTensors:
    """What an import takes from an adapter's folder.

    Attributes:
        files: with the names that their tensors have in the model's folder (see `Rule.hf`), by the keys in the file.
        lora: settings of the adapters, the matrices that have one among them.
    """

    files: Mapping[Path, Mapping[str, str]]
    lora: LoRAConfig

    def names(self) -> set[str]:
        """Of all tensors, as in the model's folder."""
        return {name for names in self.files.values() for name in names.values()}

    def put_into(self, folder: HFFolder) -> None:
        """Put them beside those of the model's folder, or in their place."""
        for path, names in self.files.items():
            folder.add_file(path, names)


def tensors_of(
    adapter: AdapterFolder, config: RunConfig, known: Collection[str], names_there: Mapping[str, str]
) -> AdapterTensors:
    """Find out what each tensor of an adapter's folder is; reads names and shapes, no data.

    Args:
        adapter: the folder.
        config: of the model that it is put on.
        known: names of that model's tensors.
        names_there: what keys begin with in that model's folder, and what stands there instead in `rules`.

    Raises:
        ConfigError: an adapter of another model, one that lacks tensors, or tensors that are none of this model's.
    """
    flag, on = f"--adapter {adapter.path}", f" (trained on {adapter.base})" if adapter.base else ""
    another = f"so it is an adapter for another model{on}; name the model that it was trained on as --source"
    its = find_family(config.family).hugging_face().module_names(config.vision)
    modules = {**names_there, **{theirs: ours for ours, theirs in its.items()}}
    sizes, rank, layers = projection_sizes(config.model), adapter.lora.lora_rank or 0, config.model.num_layers
    targets, files = set[str](), dict[Path, dict[str, str]]()

    def is_known(name: str) -> bool:
        return name in known or not unknown_keys(config, [name])

    for path in adapter.files:
        folder, names = HFFolder(adapter.path, {}), files.setdefault(path, {})
        folder.add_file(path)
        for key in list(folder.keys()):
            found = _ADAPTER.fullmatch(key)
            if found is None:
                name = key.removeprefix(_PREFIX)
                names[key] = name if is_known(name) else renamed(name, modules)
                if not is_known(names[key]):
                    raise ConfigError(
                        f"{flag}: holds {key}, which is no adapter of a matrix of the decoder ({', '.join(TARGETS)}) "
                        f"and no tensor of --source, {another}"
                    )
                continue
            layer, block, target, side = found.groups()
            if int(layer) >= layers or target not in sizes:
                raise ConfigError(
                    f"{flag}: holds {key}, and the model has {layers} layers with {', '.join(sizes)}, {another}"
                )
            inputs, outputs = sizes[target]
            shape, wanted = tuple(folder.describe(key)[0]), (rank, inputs) if side == "A" else (outputs, rank)
            if shape != wanted:
                raise ConfigError(
                    f"{flag}: {key} has the shape {shape}, and this model needs {wanted}, {another}"
                )
            names[key] = f"model.layers.{layer}.{block}.{target}.lora_{side}.weight"
            targets.add(target)
    if not targets:
        raise ConfigError(
            f"{flag}: holds no adapter of a matrix of the decoder ({', '.join(TARGETS)}); copy the folder again"
        )
    lora = replace(adapter.lora, lora_target=tuple(name for name in TARGETS if name in targets))
    missing = {name for rule in adapter_rules(lora) for star in rule.hf for name in _layers(star, layers)}
    tensors = AdapterTensors(files, lora)
    missing -= tensors.names()
    if missing:
        raise ConfigError(
            f"{flag}: has no {min(missing)}, which the other layers have, and the model has {layers}; adapters of some "
            "layers alone are not known here: merge it into its model (merge_and_unload, then save_pretrained), and "
            "import that folder"
        )
    return tensors


def _layers(name: str, layers: int) -> list[str]:
    return [name.replace("*", str(layer)) for layer in range(layers)]
