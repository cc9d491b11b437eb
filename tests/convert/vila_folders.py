"""Folders of VILA for tests of conversions: a LLaVA of transformers' own making, and towers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOWER = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
LANGUAGE = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 480, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


def llava(
    folder: Path,
    tower: str = "clip",
    language: str = "llama",
    sizes: Mapping[str, Any] | None = None,
    image_fit: str = "",
) -> Path:
    """A LLaVA-1.5 at toy size, as transformers writes it.

    Args:
        folder: to be.
        tower: clip or siglip.
        language: llama or qwen2.
        sizes: of the language model, instead of those above.
        image_fit: with an image processor that fits pictures so.
    """
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(7)
    vision = AutoConfig.for_model(f"{tower}_vision_model", **TOWER).to_dict()
    text = AutoConfig.for_model(language, **{**LANGUAGE, **(sizes or {})}).to_dict()
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text["vocab_size"] - 1,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    if image_fit:
        processor = {"do_pad": image_fit == "pad", "do_center_crop": image_fit != "stretch"}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def tower_alone(folder: Path, kind: str = "clip_vision_model", **settings: Any) -> Path:
    """A CLIP or SigLIP, whole or its vision side, as transformers 5 writes it."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(8)
    if kind.endswith("vision_model"):
        config = AutoConfig.for_model(kind, **{**TOWER, **settings})
    else:
        text = {name: value for name, value in TOWER.items() if name not in ("image_size", "patch_size")}
        config = AutoConfig.for_model(
            kind, vision_config={**TOWER, **settings}, text_config={**text, "vocab_size": 90}
        )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def with_other_keys(source: Path, target: Path, prefixes: dict[str, str]) -> Path:
    """The same folder, whose keys begin otherwise: by the first of the prefixes that they have."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    renamed = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        old = next((some for some in prefixes if key.startswith(some)), "")
        renamed[prefixes.get(old, "") + key.removeprefix(old)] = tensor
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a folder's config.json; None takes one away."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(
        json.dumps(
            {name: value for name, value in fields.items() if name not in changes or value is not None}
        )
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by path of their file's folder and key."""
    return {
        f"{path.parent.relative_to(folder)}/{key}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Have both the same keys, and under each the same numbers of the same type?"""
    return set(first) == set(second) and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )
