"""`adapter_config.json` of an adapter folder, as peft writes it: what its adapters are. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eve.config import ConfigError, LoRAConfig
from megatron_eve.runtime.wrong_content import wrong_content

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# The weights as older versions of peft write them: pickled.
_PICKLED = "adapter_model.bin"
# What trained beside the adapters, as published training code of VLMs writes it; peft keeps it with the adapters.
_BESIDE = "non_lora_trainables.bin"
# Settings of peft that change what an adapter computes, and which nothing here computes: they must be unset.
_UNSET = (
    "fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config", "alora_invocation_tokens",
)  # fmt: skip
# Ways to begin that change the model's own weights, too, so that the adapter does not fit the model as it was.
_CHANGES_WEIGHTS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter of peft.

    Attributes:
        path: of the folder.
        files: with its tensors: the adapters, and what trained beside them where that lies in a file of its own.
        lora: settings of the adapters; which matrices have one, its tensors say.
        base: what it calls the model it was trained on; "" where it does not say.
    """

    path: Path
    files: tuple[Path, ...]
    lora: LoRAConfig
    base: str

    @staticmethod
    def read(path: Path) -> AdapterFolder:
        """Read and check its configuration.

        Raises:
            ConfigError: it cannot be read, is none of LoRA, or asks for what is not computed here.
        """
        flag, source = f"--adapter {path}", path / CONFIG_FILE
        if not source.is_file():
            what = "has no" if path.is_dir() else "no such folder, or no"
            raise ConfigError(
                f"{flag}: {what} {CONFIG_FILE}; name a folder that peft's save_pretrained, or an export with --format "
                "adapter, wrote"
            )
        weights = next((path / name for name in (WEIGHTS_FILE, _PICKLED) if (path / name).is_file()), None)
        if weights is None:
            raise ConfigError(f"{flag}: has no {WEIGHTS_FILE}; copy the folder again")
        try:
            fields = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            fields = None
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{source}: not JSON ({wrong_content(source) or 'damaged'}); copy the folder again"
            )
        if fields.get("peft_type") != "LORA":
            raise ConfigError(
                f"{source}: peft_type is {fields.get('peft_type')!r}, and only LORA is known here"
            )
        for name in _UNSET:
            if fields.get(name):
                raise ConfigError(
                    f"{source}: {name} is {fields[name]!r}, which adapters here do not have; merge the adapter into "
                    "its model (merge_and_unload, then save_pretrained), and import that folder"
                )
        if fields.get("bias", "none") != "none":
            raise ConfigError(
                f"{source}: bias is {fields['bias']!r}, and biases do not train here; merge the adapter into its model "
                "(merge_and_unload, then save_pretrained), and import that folder"
            )
        begins = fields.get("init_lora_weights")
        if isinstance(begins, str) and begins.startswith(_CHANGES_WEIGHTS):
            raise ConfigError(
                f"{source}: init_lora_weights is {begins!r}, which changes the model's own weights; convert it to a "
                "plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        rank, alpha, dropout = (fields.get(name) for name in ("r", "lora_alpha", "lora_dropout"))
        if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and alpha > 0):
            raise ConfigError(
                f"{source}: r is {rank!r} and lora_alpha {alpha!r}, which must be above 0; copy the folder again"
            )
        lora = LoRAConfig(lora_rank=rank, lora_alpha=float(alpha), lora_dropout=float(dropout or 0.0))
        beside = path / _BESIDE
        files = (weights, beside) if beside.is_file() else (weights,)
        return AdapterFolder(path, files, lora, str(fields.get("base_model_name_or_path") or ""))


def config_fields(
    lora: LoRAConfig, modules: str | Sequence[str], modules_to_save: Sequence[str], base: str | None
) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Args:
        lora: settings of the adapters.
        modules: that have one: names, or an expression that a module's whole path matches.
        modules_to_save: modules that trained whole and lie beside the adapters.
        base: what the model is called that it was trained on; None where it is not known.
    """
    alpha = lora.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": modules if isinstance(modules, str) else list(modules),
        "modules_to_save": list(modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
    }
