"""Golden cases that need no model: preprocessing and tokenisation; and the reader of the model cases."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_eve.checkpoint.hf.config import settings_of
from megatron_eve.config import ModelConfig, RunConfig
from megatron_eve.data.images import view_of
from megatron_eve.data.images.patches import picture_of
from megatron_eve.data.text.conversation import encode_conversation
from megatron_eve.data.text.prompts import encode_prompt
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.data.text.turns import ConversationError
from megatron_eve.models.family import ModelFamily
from megatron_eve.models.golden_format import GoldenBatch, read_case_file
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.verification.results import CheckResult, equal


def linked(folder: Path, name: str) -> Path:
    """The target of a link inside a case; some copies hold it as a text file with the path."""
    path = folder / name
    return path if path.is_dir() else folder / path.read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class ModelCase:
    """A batch of samples with weights, inputs and outputs.

    Attributes:
        name: of the batch, for a case of several.
        folder: of the case.
        inputs: `input_ids`, `labels` and `attention_mask`, [B, n] each; -200 stands for a picture.
        outputs: tensors by name.
        hf: folder of the weights.
        family: of the model.
        model: sizes of the decoder.
        vision: settings of the family.
        images: for each sample, its picture files.
        codes: int64 [pictures, h, w, D], where the model reads codes.
        stage: of training that its gradients are of.
    """

    name: str
    folder: Path
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    hf: Path
    family: str
    model: ModelConfig
    vision: Any
    images: Sequence[Sequence[bytes]]
    stage: int
    codes: torch.Tensor | None = None


def case_family(meta: Mapping[str, Any]) -> ModelFamily:
    """The family that a case names in its JSON file; the default one if it names none."""
    return find_family(meta.get("family", DEFAULT_FAMILY))


def read_model_case(folder: Path) -> ModelCase:
    """Read a case folder (meta.json, inputs.safetensors, outputs.safetensors, records.json, raw/, hf)."""
    meta = read_case_file(folder / "meta.json")
    hf = linked(folder, "hf")
    inputs = load_file(folder / "inputs.safetensors")
    raw = {path.name.split("_", 1)[0]: path for path in (folder / "raw").glob("*.png")}
    images = [
        [raw[str(i)].read_bytes()] if (row == -200).any() else [] for i, row in enumerate(inputs["input_ids"])
    ]
    outputs = load_file(folder / "outputs.safetensors")
    family = case_family(meta)
    settings = settings_of(hf, **family.golden().settings(meta, hf, outputs))
    return ModelCase(
        name="",
        folder=folder,
        inputs=inputs,
        outputs=outputs,
        hf=hf,
        family=family.name,
        model=settings.model,
        vision=settings.vision,
        images=images,
        stage=3 if "lm_head.weight" in meta.get("trainable", ["lm_head.weight"]) else 1,
    )


def batch_case(folder: Path, batch: GoldenBatch) -> ModelCase:
    """A batch of a case of a family's own form."""
    settings = settings_of(batch.weights, **batch.settings)
    return ModelCase(
        name=batch.name,
        folder=folder,
        inputs=batch.inputs,
        outputs=batch.outputs,
        hf=batch.weights,
        family=settings.family,
        model=settings.model,
        vision=settings.vision,
        images=batch.pictures,
        stage=batch.stage,
        codes=batch.codes,
    )


def check_pictures(case: ModelCase, config: RunConfig) -> Iterator[CheckResult]:
    """Compare our resized pictures with the inputs of the published model, where a case holds these: every byte must
    be equal."""
    family = find_family(case.family)
    sizes, golden = family.image_settings(config), family.golden()
    if not (case.folder / "proc").is_dir():
        return
    for i, files in enumerate(case.images):
        for file in files:
            with Image.open(io.BytesIO(file)) as picture:
                image = picture.convert("RGB")
            plan = family.image_planner(sizes)(*image.size)
            for kind, view in golden.pictures(plan, sizes).items():
                expected = np.asarray(Image.open(case.folder / "proc" / f"{i}_{kind}.png"))
                yield equal(f"pixels.{i}.{kind}", int((view_of(image, view) != expected).sum()))


def check_pictures_alone(family: ModelFamily, folder: Path) -> Iterator[CheckResult]:
    """Pictures of a case of a family's own form: the bytes of each, by their sha256."""
    for one in family.golden().pictures_alone(folder):
        with Image.open(one.file) as picture:
            image = picture.convert("RGB")
        view = family.image_planner(one.settings)(*image.size).views[one.view]
        pixels = picture_of(view_of(image, view), view)
        pixels = pixels if one.channels_last else pixels.transpose(2, 0, 1)
        sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        yield equal(f"{one.name}: sha256", sha256 != one.sha256)


def check_preprocess(folder: Path) -> Iterator[CheckResult]:
    """`preprocess/`: sizes, grids, token counts and, where the raw picture is there, its sha256 after resizing."""
    content = read_case_file(folder / "sizes.json")
    family = case_family(content)
    for entry in content["geometry"]:
        width, height = entry["width"], entry["height"]
        path = folder / "raw" / f"{width}x{height}.png"
        for name, sizes in family.golden().sizes.items():
            golden = entry[name]
            plan = family.image_planner(sizes)(width, height)
            ours = [*plan.grid, plan.rows]
            expected = [*golden["token_hw"], golden["n_image_tokens"]]
            wrong = sum(a != b for a, b in zip(ours, expected, strict=True))
            yield equal(f"{width}x{height} at {name}: rows, columns, tokens", wrong)
            if path.exists():
                with Image.open(path) as picture:
                    image = picture.convert("RGB")
                for kind, view in family.golden().pictures(plan, sizes).items():
                    sha256 = hashlib.sha256(view_of(image, view).tobytes()).hexdigest()
                    yield equal(
                        f"{path.name} at {name}: sha256 {kind}", sha256 != golden[f"sha256_u8_{kind}"]
                    )


def check_tokenize(folder: Path) -> Iterator[CheckResult]:
    """`tokenize/`: ids and labels of both templates, truncation, evaluation prompts, rows that must be rejected."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    cases = read_case_file(folder / "cases.json")["legacy_true"]
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
