"""Batches of VILA's golden cases: outputs of the public code by batch. Imports no torch at its top."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.golden_format import GoldenBatch, image_names, read_case_file
from megatron_eve.models.vila.hf.layouts import PROJECTOR_KEYS, TOWER_KEYS

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]

INPUTS, OUTPUTS = "inputs.safetensors", "outputs.safetensors"
# The public code's placeholder of a picture, and labels where nothing is learned. Its labels hold -200, too.
_PICTURE, _IGNORED = -200, -100
_INPUT = re.compile(r"batch\.(.+)\.input_ids")
# Names of parameters in the public code's modules, and in `names.py`.
_MODULES = {
    "vision_tower.vision_tower.vision_model.": TOWER_KEYS,
    "mm_projector.layers.": PROJECTOR_KEYS,
    "mm_projector.": PROJECTOR_KEYS,
    "llm.": "",
}
# What gives the loss of the batch without packing: the first that is there.
_LOSSES = ("eval.loss", "eval_loss_no_packing", "loss")


def has_batches(folder: Path) -> bool:
    """Does a folder hold outputs for batches of this form, itself or (`_grads`) beside a folder with the inputs?"""
    home = inputs_folder(folder)
    if home is None:
        return False
    batches = _batch_names(home)
    return any(key.startswith(f"{name}.") for key in _keys(folder / OUTPUTS) for name in batches)


def inputs_folder(folder: Path) -> Path | None:
    """The folder with weights and inputs of a case: itself, or the neighbour whose name begins likewise; None without.

    `vila10_grads` holds outputs for the inputs of `vila10_llm`.
    """
    if not (folder / OUTPUTS).is_file():
        return None
    neighbours = sorted(folder.parent.glob(f"{folder.name.split('_', 1)[0]}_*"))
    for home in (folder, *neighbours):
        if (home / "model" / "config.json").is_file() and (home / INPUTS).is_file() and _batch_names(home):
            return home
    return None


def read_batches(folder: Path) -> Iterator[GoldenBatch]:
    """The batches of a case, each with what its model computed without packing.

    Raises:
        ConfigError: pictures that are none of 8 bits, or fewer of them than placeholders.
    """
    from safetensors.torch import load_file

    home = inputs_folder(folder)
    assert home is not None, folder
    inputs, outputs = load_file(home / INPUTS), load_file(folder / OUTPUTS)
    meta = _meta(home)
    for name in _batch_names(home):
        of_batch = {
            key.removeprefix(f"{name}."): value
            for key, value in outputs.items()
            if key.startswith(f"{name}.")
        }
        texts = _texts({key: inputs[f"batch.{name}.{key}"] for key in _TEXT_KEYS}, meta)
        if not of_batch or texts is None:
            continue
        counts = (texts["input_ids"] == _PICTURE).sum(1).tolist()
        found = _outputs(of_batch, _unmixed(texts, of_batch), counts)
        gradients = [key.removeprefix("grad.") for key in found if key.startswith("grad.")]
        trains = {
            part: any(key.startswith(prefix) for key in gradients)
            for part, prefix in (("tower", TOWER_KEYS), ("projector", PROJECTOR_KEYS))
        }
        alone = gradients and all(key.startswith((TOWER_KEYS, PROJECTOR_KEYS)) for key in gradients)
        yield GoldenBatch(
            name=name,
            weights=home / "model",
            inputs=texts,
            outputs=found,
            pictures=_pictures(
                home, inputs.get(f"batch.{name}.images"), counts, f"{home.name}: batch {name}"
            ),
            settings={"freeze_ViT": not trains["tower"]},
            stage=1 if alone and trains["projector"] else 3,
        )


_TEXT_KEYS = ("input_ids", "labels", "attention_mask")


def _texts(batch: Tensors, meta: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """The texts of a batch with -200 for each picture, and -100 as its label; None with videos, which are not built.

    In NVILA a placeholder is a token of the tokenizer, and the embedding of a line break follows each picture.
    """
    import torch

    special = meta.get("special", {})
    media = special.get("media_token_ids", {})
    if "image" not in media:
        labels = batch["labels"].masked_fill(batch["input_ids"] == _PICTURE, _IGNORED)
        return {**batch, "labels": labels}
    if (batch["input_ids"] == media.get("video", _PICTURE)).any():
        return None
    behind = torch.tensor(special.get("newline_ids", []))
    rows = []
    for ids, labels, mask in zip(*(batch[key] for key in _TEXT_KEYS), strict=True):
        pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        for token, label in zip(ids[mask], labels[mask], strict=True):
            if token == media["image"]:
                new = torch.cat([torch.tensor([_PICTURE]), behind])
                pieces.append((new, torch.full_like(new, _IGNORED)))
            else:
                pieces.append((token[None], label[None]))
        rows.append([torch.cat(some) for some in zip(*pieces, strict=True)])
    length = max(len(ids) for ids, _ in rows)
    padded = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
        "labels": torch.full((len(rows), length), _IGNORED),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.bool),
    }
    for row, (ids, labels) in enumerate(rows):
        for key, value in (("input_ids", ids), ("labels", labels), ("attention_mask", True)):
            padded[key][row, : len(ids)] = value
    return padded


def _unmixed(texts: Tensors, outputs: Tensors) -> bool:
    """Are gradients of the packed batch (`train.grad`) those of its samples?

    In the public code's packs the last row of a sample learns the first label of the next one, and samples attend to
    each other where no row of a batch has padding.
    """
    if len(texts["labels"]) == 1:
        return True
    packed = outputs.get("repacked_attention_mask")
    padding = packed is not None and not bool(packed.all())
    return padding and bool((texts["labels"][:, 0] == _IGNORED).all())


def _outputs(batch: Tensors, unmixed: bool, counts: list[int]) -> dict[str, torch.Tensor]:
    """Outputs of a batch under the names of `verification/cases.py`."""
    found = {key: batch[key] for key in ("inputs_embeds",) if key in batch}
    if "labels_merged" in batch:
        found["labels_merged"] = batch["labels_merged"].masked_fill(
            batch["labels_merged"] == _PICTURE, _IGNORED
        )
    if "eval.logits" in batch:
        found["logits"] = batch["eval.logits"]
    if (loss := next((batch[key] for key in _LOSSES if key in batch), None)) is not None:
        found["llm_loss"] = loss
    names = [name for some in image_names(counts) for name in some]
    for kind in ("vision_features", "image_features"):
        # A batch of text alone has a picture that stands in no text.
        found |= {f"{kind}.{name}": rows for name, rows in zip(names, batch.get(kind, ()), strict=False)}
    prefixes = ("grad.", "eval.grad.", *(["train.grad."] if unmixed else []))
    for prefix in prefixes:
        for key, value in batch.items():
            if key.startswith(prefix):
                found.setdefault(f"grad.{_parameter(key.removeprefix(prefix))}", value)
    return found


def _parameter(name: str) -> str:
    """A parameter of the public code's modules under its key in a flat folder."""
    for module, ours in _MODULES.items():
        if name.startswith(module):
            return ours + name.removeprefix(module)
    return name


def _pictures(home: Path, images: torch.Tensor | None, counts: list[int], where: str) -> list[list[bytes]]:
    """The pictures of each sample as PNG files, of their normalised values.

    Args:
        home: the folder with the inputs.
        images: float32 [I, 3, S, S].
        counts: pictures of each sample.
        where: for messages.
    """
    import torch
    from PIL import Image

    if sum(counts) > (0 if images is None else len(images)):
        raise ConfigError(
            f"{where}: has {sum(counts)} placeholders and fewer pictures; copy the folder again"
        )
    if images is None or not sum(counts):
        return [[] for _ in counts]
    mean, deviation = _normalisation(home / "model")
    scaled = (images.double() * deviation + mean) * 255
    pixels = scaled.round()
    again = ((pixels / 255).float() - mean.float()) / deviation.float()
    used = sum(counts)
    if (again[:used] - images[:used]).abs().max() > 1e-6:
        raise ConfigError(f"{where}: its pictures are no normalised bytes; copy the folder again")
    files = []
    for picture in pixels.to(torch.uint8).permute(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray(picture.numpy()).save(file, format="PNG")
        files.append(file.getvalue())
    some = iter(files)
    return [[next(some) for _ in range(count)] for count in counts]


def _normalisation(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of pixels, float64 [3, 1, 1], by the image processor of a model's folder."""
    import torch

    for folder in (model, model / "vision_tower"):
        path = folder / "preprocessor_config.json"
        if path.is_file():
            fields = read_case_file(path)
            mean, deviation = (
                torch.tensor(fields[key], dtype=torch.float64).view(3, 1, 1)
                for key in ("image_mean", "image_std")
            )
            return mean, deviation
    raise ConfigError(f"{model}: has no preprocessor_config.json; copy the folder again")


def _batch_names(home: Path) -> list[str]:
    return sorted(found[1] for key in _keys(home / INPUTS) if (found := _INPUT.fullmatch(key)))


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        return list(tensors.keys())


def _meta(home: Path) -> dict[str, Any]:
    path = home / "meta.json"
    return read_case_file(path) if path.is_file() else {}
