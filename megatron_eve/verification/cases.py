"""Golden cases that need no model: preprocessing and tokenisation; and the reader of the model cases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_eve.checkpoint.hf.config import settings_of
from megatron_eve.config import ModelConfig, RunConfig
from megatron_eve.data.images import padded_square, resize, view_of
from megatron_eve.data.text.conversation import ConversationError, encode_conversation, encode_prompt
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.models.family import ImagePlan
from megatron_eve.models.registry import find_family, image_planner
from megatron_eve.verification.results import CheckResult, equal

TEACHER_SIZE = 336
# The published configuration's name of the teacher's folder, beside that of the weights in the cases.
_TEACHER = "mm_vision_tower_clip"


def linked(folder: Path, name: str) -> Path:
    """A link inside a case, which some copies hold as a text file with the target."""
    path = folder / name
    return path if path.is_dir() else folder / path.read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class ModelCase:
    """A case with weights, inputs and outputs.

    Attributes:
        folder: where it lies.
        meta: meta.json.
        inputs, outputs: tensors by name.
        hf: folder of the weights.
        teacher: folder of the teacher, None where the case has no aligning loss or the folder is not there.
        model: sizes of the decoder.
        vision: those of the patch embedding and of the aligning layer.
        images: for each sample, its picture file, or None where the text has no image.
    """

    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    hf: Path
    teacher: Path | None
    model: ModelConfig
    vision: Any
    images: list[Path | None]


def read_model_case(folder: Path) -> ModelCase:
    """Read a case folder (meta.json, inputs.safetensors, outputs.safetensors, records.json, raw/, hf)."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    hf = linked(folder, "hf")
    inputs = load_file(folder / "inputs.safetensors")
    raw = {path.name.split("_", 1)[0]: path for path in (folder / "raw").glob("*.png")}
    images = [raw[str(i)] if (row == -200).any() else None for i, row in enumerate(inputs["input_ids"])]
    outputs = load_file(folder / "outputs.safetensors")
    teacher = hf.resolve().parent / json.loads((hf / "config.json").read_text(encoding="utf-8"))[_TEACHER]
    aligned = "clip_loss" in outputs and (teacher / "config.json").is_file()
    sizes = {"image_size": meta["image_size"], "teacher_size": meta["image_size_clip"]}
    if aligned:
        fields = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
        sizes["teacher_hidden_size"] = fields["hidden_size"]
    settings = settings_of(hf, **sizes)
    return ModelCase(
        folder=folder,
        meta=meta,
        inputs=inputs,
        outputs=outputs,
        hf=hf,
        teacher=teacher if aligned else None,
        model=settings.model,
        vision=settings.vision,
        images=images,
    )


def canvases(
    path: Path, plan: ImagePlan, image_size: int, teacher_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both published canvases of a picture file: the model's and the teacher's."""
    with Image.open(path) as picture:
        image = picture.convert("RGB")
    view = plan.views["patches"]
    resized = resize(image, view.width, view.height)
    eve = padded_square(resized, image_size, view.patch_size * image_size // teacher_size, view.pad_colour)
    return eve, view_of(image, plan.views["teacher"])


def check_pictures(case: ModelCase) -> Iterator[CheckResult]:
    """Our resized pictures against those that entered the published model: equal in every byte."""
    for i, path in enumerate(case.images):
        if path is None:
            continue
        with Image.open(path) as picture:
            plan = image_planner(RunConfig(model=case.model, vision=case.vision))(*picture.size)
        ours = canvases(path, plan, case.vision.image_size, case.vision.teacher_size)
        for canvas, kind in zip(ours, ("eve", "clip"), strict=True):
            golden = np.asarray(Image.open(case.folder / "proc" / f"{i}_{kind}.png"))
            yield equal(f"pixels.{i}.{kind}", int((canvas != golden).sum()))


def check_preprocess(folder: Path) -> Iterator[CheckResult]:
    """`preprocess/`: sizes, grids, token counts and, where the raw picture is there, its sha256 after resizing."""
    for entry in json.loads((folder / "sizes.json").read_text(encoding="utf-8"))["geometry"]:
        width, height = entry["width"], entry["height"]
        path = folder / "raw" / f"{width}x{height}.png"
        for image_size in (672, 1344):
            golden = entry[str(image_size)]
            sizes = {"image_size": image_size, "teacher_size": TEACHER_SIZE}
            plan = find_family("eve").image_planner(sizes)(width, height)
            ours = [*plan.grid, plan.rows]
            expected = [*golden["token_hw"], golden["n_image_tokens"]]
            wrong = sum(a != b for a, b in zip(ours, expected, strict=True))
            yield equal(f"{width}x{height} at {image_size}: rows, columns, tokens", wrong)
            if path.exists():
                pair = canvases(path, plan, image_size, TEACHER_SIZE)
                for canvas, kind in zip(pair, ("eve", "clip"), strict=True):
                    sha256 = hashlib.sha256(canvas.tobytes()).hexdigest()
                    yield equal(
                        f"{path.name} at {image_size}: sha256 {kind}", sha256 != golden[f"sha256_u8_{kind}"]
                    )


def check_tokenize(folder: Path) -> Iterator[CheckResult]:
    """`tokenize/`: ids and labels of both templates, truncation, evaluation prompts, rows that must be refused."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["legacy_true"]
    for group, entries in cases.items():
        for entry in entries:
            name = f"{group}.{entry.get('name', entry.get('conv_mode'))}"
            if group == "eval_prompts":
                system = entry["prompt"].split(" USER: ")[0]
                ours = encode_prompt(entry["question"], tokenizer, "vicuna_v1", num_images=1, system=system)
                yield equal(name, _differences(ours, entry["input_ids"]))
            elif "error" in entry:
                yield equal(f"{name} is refused", not _refuses(entry, tokenizer, group))
            else:
                yield from _check_conversation(name, entry, tokenizer, group)


def _turns(entry: dict[str, Any]) -> tuple[list[dict[str, str]], int]:
    turns = entry["conversations"]
    return turns, sum(turn["value"].count("<image>") for turn in turns)


def _template(group: str) -> str:
    return "plain" if group.startswith("plain") else "vicuna_v1"


def _refuses(entry: dict[str, Any], tokenizer: Tokenizer, group: str) -> bool:
    turns, images = _turns(entry)
    try:
        encode_conversation(turns, tokenizer, _template(group), images)
    except ConversationError:
        return True
    return False


def _check_conversation(
    name: str, entry: dict[str, Any], tokenizer: Tokenizer, group: str
) -> Iterator[CheckResult]:
    turns, images = _turns(entry)
    encoded = encode_conversation(turns, tokenizer, _template(group), images)
    if "truncated" in group and not images:
        # The published code cuts samples without an image here, and the others in its collator.
        encoded = encoded.cut(int(group.rsplit("_", 1)[1]))
    yield equal(f"{name}: ids", _differences(encoded.tokens, entry["input_ids"]))
    if entry["n_trained"] or "printed" not in entry:
        # Where the published code prints a mismatch it drops all labels of a sample; ours are kept.
        yield equal(f"{name}: labels", _differences(encoded.labels, entry["labels"]))


def _differences(ours: list[int], golden: list[int]) -> int:
    return abs(len(ours) - len(golden)) + sum(a != b for a, b in zip(ours, golden, strict=False))
