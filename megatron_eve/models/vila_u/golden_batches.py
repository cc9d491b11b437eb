"""Batches of VILA-U's golden cases: outputs of the public code by batch. Imports no torch at its top.

A batch has tensors `<batch>.<name>`: `input_ids`, `labels`, `attention_mask` and `images` in inputs.safetensors; in
outputs.safetensors `labels_merged` [B, L, D], whose columns are the text label of a row, or, at the positions of a
picture that is to be drawn, its codes plus the vocabulary.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.golden_format import Comparison, GoldenBatch, image_names, read_case_file
from megatron_eve.models.vila_u.hf.layouts import PROJECTOR_KEYS, TOWER_KEYS
from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS
from megatron_eve.models.vila_u.tower_folder import read_tower_folder

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]

INPUTS, OUTPUTS = "inputs.safetensors", "outputs.safetensors"
# The public code's placeholder of a picture, and labels where nothing is learned.
_PICTURE, _IGNORED = -200, -100
_INPUT = re.compile(r"([^.]+)\.input_ids")
_MODEL_TYPE = "vila_u_llama"
# Names of parameters in the public code's modules, and in `names.py`.
_MODULES = {"vision_tower.vision_tower.": TOWER_KEYS, "mm_projector.": PROJECTOR_KEYS, "llm.": ""}


def has_batches(folder: Path) -> bool:
    """Does a folder hold batches of this form, with a model in it or beside it?"""
    if not ((folder / INPUTS).is_file() and (folder / OUTPUTS).is_file()) or model_folder(folder) is None:
        return False
    outputs = set(_keys(folder / OUTPUTS))
    return any(f"{name}.labels_merged" in outputs for name in _batch_names(folder))


def model_folder(folder: Path) -> Path | None:
    """The folder with the weights of a case: in it or beside it; None without one.

    Where there are several beside it, the one that the case's README names.
    """
    beside = sorted(path.parent for path in folder.parent.glob("*/config.json"))
    found = [path for path in (folder / "model", *beside) if _is_model(path)]
    if len(found) > 1 and found[0].parent != folder and (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8")
        found = [path for path in found if re.search(rf"\b{re.escape(path.name)}\b", text)] or found
    return found[0] if found else None


def _is_model(folder: Path) -> bool:
    if not all((folder / name).is_file() for name in ("config.json", "vision_tower/config.json")):
        return False
    return read_case_file(folder / "config.json").get("model_type") == _MODEL_TYPE


def read_batches(folder: Path) -> list[GoldenBatch]:
    """The batches of a case, each with what its model computed.

    Raises:
        ConfigError: files that are missing, or pictures that are none of 8 bits.
    """
    from safetensors.torch import load_file

    model = model_folder(folder)
    assert model is not None, folder
    inputs, outputs = load_file(folder / INPUTS), load_file(folder / OUTPUTS)
    return [_batch(folder, model, name, inputs, outputs) for name in _batch_names(folder)]


def _batch(folder: Path, model: Path, name: str, inputs: Tensors, outputs: Tensors) -> GoldenBatch:
    texts = {key: inputs[f"{name}.{key}"] for key in ("input_ids", "labels", "attention_mask")}
    of_batch = {
        key.removeprefix(f"{name}."): value for key, value in outputs.items() if key.startswith(f"{name}.")
    }
    vocabulary = _vocabulary(model)
    texts["labels"] = drawn_labels(texts["input_ids"], texts["labels"], vocabulary)
    counts = (texts["input_ids"] == _PICTURE).sum(1).tolist()
    images = inputs.get(f"{name}.images")
    if sum(counts) > (0 if images is None else len(images)):
        raise ConfigError(
            f"{folder}: batch {name} has {sum(counts)} placeholders and fewer pictures; copy the folder again"
        )
    # A batch of text alone has a picture that stands in no text.
    pixels = None if images is None else _bytes_of(images[: sum(counts)], f"{folder}: batch {name}")
    return GoldenBatch(
        name=name,
        weights=model,
        inputs=texts,
        outputs=_outputs(of_batch, texts, counts, vocabulary),
        pictures=_files(pixels, counts),
        codes=None if pixels is None else _encode(model, pixels),
        settings={"depth_dropout": 0.0},
    )


def drawn_labels(ids: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Labels with -200 at the pictures that are to be drawn, and -100 at the others.

    The public code decides by positions. On all its batches the same comes of this rule: a picture is drawn where the
    label just before it, or before the run of pictures that it is in, is a trained <im_start> or <vi_start>.

    Args:
        ids, labels: int64 [B, n].
        vocabulary: V, whose last rows are the special tokens.
    """
    first = vocabulary - len(SPECIAL_TOKENS)
    starts = [first + SPECIAL_TOKENS.index(token) for token in ("<im_start>", "<vi_start>")]
    found = labels.masked_fill(ids == _PICTURE, _IGNORED)
    for row, places in enumerate(ids == _PICTURE):
        for place in places.nonzero()[:, 0].tolist():
            before = place - 1
            while before >= 0 and ids[row, before] == _PICTURE:
                before -= 1
            if before >= 0 and int(labels[row, before]) in starts:
                found[row, place] = _PICTURE
    return found


def code_comparisons(folder: Path) -> Iterator[Comparison]:
    """Codes of the pictures of a case by our own tower, against those of the public code."""
    from safetensors.torch import load_file

    outputs = load_file(folder / OUTPUTS)
    for batch in read_batches(folder):
        golden = outputs.get(f"{batch.name}.image_codes_plus_vocab")
        if batch.codes is not None and golden is not None and len(batch.codes):
            codes = batch.codes.flatten(1, 2)
            theirs = golden[: len(codes)] - _vocabulary(batch.weights)
            yield Comparison(f"{batch.name}.codes", codes, theirs, "exact")


def _outputs(batch: Tensors, texts: Tensors, counts: list[int], vocabulary: int) -> dict[str, torch.Tensor]:
    """Outputs of a batch under the names of `verification/cases.py`."""
    found = {key: batch[key] for key in ("inputs_embeds",) if key in batch}
    merged = batch["labels_merged"]
    visual = merged >= vocabulary
    found["labels_merged"] = merged[..., 0].masked_fill(visual[..., 0], _IGNORED)
    found["codes_merged"] = (merged - vocabulary).masked_fill(~visual, _IGNORED)
    names = {"logits": "eval.logits", "llm_loss": "eval.text_loss", "image_loss": "eval.image_loss"}
    found |= {ours: batch[theirs] for ours, theirs in names.items() if theirs in batch}
    if "logits" not in found and {"train.logits", "repacked_labels", "repacked_position_ids"} <= set(batch):
        found["logits"] = _unpacked_logits(batch)
    if "eval.loss" in batch:
        found["total_loss"] = batch["eval.loss"]
    features = batch.get("image_features_projected")
    flat = [name for some in image_names(counts) for name in some]
    if features is not None:
        found |= {f"image_features.{name}": rows for name, rows in zip(flat, features, strict=False)}
    found |= _head_outputs(batch, found["codes_merged"])
    for key, value in batch.items():
        for kind in ("grad", "gradnorm"):
            if key.startswith(f"train.{kind}."):
                found[f"{kind}.{_parameter(key.removeprefix(f'train.{kind}.'))}"] = value
    return found


def _unpacked_logits(batch: Tensors) -> torch.Tensor:
    """Logits of training [B, L, V] by sample, of rows into which the public code packs samples in another order.

    Which sample a stretch of a row is, its labels tell. Behind a sample's end are zeros.
    """
    labels, logits = batch["labels_merged"], batch["train.logits"]
    found = logits.new_zeros(*labels.shape[:2], logits.shape[-1])
    lengths = batch["attention_mask_merged"].sum(1).tolist()
    missing = list(range(len(labels)))
    for positions, packed, row in zip(
        batch["repacked_position_ids"], batch["repacked_labels"], logits, strict=True
    ):
        for first in (positions == 0).nonzero()[:, 0].tolist():
            for sample in missing:
                stretch = slice(first, first + lengths[sample])
                if packed[stretch].equal(labels[sample, : lengths[sample]]):
                    found[sample, : lengths[sample]] = row[stretch]
                    missing.remove(sample)
                    break
    if missing:
        raise ConfigError("a golden batch has packed rows that are no sample's; copy the folder again")
    return found


def _head_outputs(batch: Tensors, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Targets of the head by sample, and its logits: of the first positions alone, as far as the case holds them.

    The public code packs samples in another order; which of them a stretch of its targets is, its codes tell.
    """
    targets = batch.get("train.image_targets")
    if targets is None:
        return {}
    depth = codes.shape[-1]
    by_sample = {sample: rows[rows[:, 0] != _IGNORED] for sample, rows in enumerate(codes)}
    rest, logits = targets.view(-1, depth), batch.get("train.image_logits_first128rows")
    logits = (
        None if logits is None else logits[: len(logits) // depth * depth].view(-1, depth * logits.shape[1])
    )
    found: dict[str, torch.Tensor] = {}
    while len(rest):
        matching = [
            sample for sample, rows in by_sample.items() if len(rows) and rest[: len(rows)].equal(rows)
        ]
        if not matching:
            raise ConfigError(
                "a golden batch has targets of codes that are no sample's; copy the folder again"
            )
        sample = matching[0]
        rows = by_sample.pop(sample)
        found[f"image_targets.{sample}"] = rows
        if logits is not None and len(logits):
            found[f"image_logits.{sample}"], logits = logits[: len(rows)], logits[len(rows) :]
        rest = rest[len(rows) :]
    return found


def _parameter(name: str) -> str:
    """A parameter of the public code's modules under its name in `names.py`."""
    for module, ours in _MODULES.items():
        if name.startswith(module):
            return ours + name.removeprefix(module)
    return name


def _vocabulary(model: Path) -> int:
    size: int = read_case_file(model / "llm" / "config.json")["vocab_size"]
    return size


def _bytes_of(images: torch.Tensor, where: str) -> torch.Tensor:
    """Pictures uint8 [n, S, S, 3] of normalised ones, float32 [n, 3, S, S] of -1 .. 1."""
    import torch

    pixels = (images.double() * 0.5 + 0.5).mul(255).round()
    again = ((pixels / 255).float() - 0.5) / 0.5
    if len(images) and (again - images).abs().max() > 1e-6:
        raise ConfigError(f"{where}: its pictures are no normalised bytes; copy the folder again")
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def _files(pixels: torch.Tensor | None, counts: list[int]) -> list[list[bytes]]:
    """The pictures of each sample as PNG files."""
    from PIL import Image

    files = []
    for picture in () if pixels is None else pixels:
        file = io.BytesIO()
        Image.fromarray(picture.numpy()).save(file, format="PNG")
        files.append(file.getvalue())
    some = iter(files)
    return [[next(some) for _ in range(count)] for count in counts]


def _encode(model: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Codes int64 [n, h, w, D] of pictures by the model's tower."""
    import torch

    tower = _tower(model)
    if not len(pixels):
        return torch.zeros(0, *tower.settings.code_shape, dtype=torch.int64)
    codes: torch.Tensor = tower.encode(pixels)
    return codes


@lru_cache(maxsize=2)
def _tower(model: Path):  # type: ignore[no-untyped-def]
    import torch

    from megatron_eve.models.vila_u.tower import load_tower

    return load_tower(read_tower_folder(model / "vision_tower"), torch.device("cpu"), torch.float32)


def _batch_names(folder: Path) -> list[str]:
    return sorted(found[1] for key in _keys(folder / INPUTS) if (found := _INPUT.fullmatch(key)))


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        return list(tensors.keys())
