"""Toy versions of what tasks that ask for pictures read: datasets, an Inception network, a tower that knows texts."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel

from tests.golden_dir import find_golden
from tests.models.vila_u.towers import CONFIG, SIGLIP, write_tower

IMAGENET, PROMPTS = "ILSVRC/imagenet-1k", "playgroundai/MJHQ-30K"
CLASSES = ("tench, Tinca tinca", "goldfish", "great white shark", "cock", "hen", "ostrich", "junco")


def picture_file(seed: int, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """A picture of random blocks as a file."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR).save(file, kind)
    return file.getvalue()


def write_imagenet(root: Path, count: int = 6, broken: int | None = None) -> Path:
    """Pictures with their labels in two files of two row groups, and a README that names the classes."""
    folder = root / IMAGENET
    (folder / "data").mkdir(parents=True)
    rows = [
        {
            "image": {"bytes": b"no picture" if row == broken else picture_file(row), "path": f"{row}.JPEG"},
            "label": row % len(CLASSES),
        }
        for row in range(count)
    ]
    half = count // 2
    for number, some in enumerate((rows[:half], rows[half:])):
        path = folder / "data" / f"validation-{number:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path, row_group_size=2)
    names = "\n".join(f"          '{number}': {name}" for number, name in enumerate(CLASSES))
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{names}\n---\n# A toy"
    )
    return folder


def write_prompts(root: Path, count: int = 4) -> Path:
    """Prompts of two categories and a reference picture of each."""
    folder = root / PROMPTS
    rows = {
        f"id{row}": {"category": ("food", "art")[row % 2], "prompt": f"A thing {row // 2}"}
        for row in range(count)
    }
    for number, (name, row) in enumerate(rows.items()):
        path = folder / "mjhq30k_imgs" / row["category"] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_file(100 + number, (64, 64), "JPEG"))
    (folder / "meta_data.json").write_text(json.dumps(rows))
    return folder


class MeanColours(torch.nn.Module):
    """In the place of the Inception network: the mean of red, green and blue, and of the left half's red."""

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        found = pixels.float()
        if not return_features:
            return found
        left = found[:, 0, :, : found.shape[3] // 2].mean(dim=[1, 2])
        return torch.cat([found.mean(dim=[2, 3]), left[:, None]], dim=1)


def features_by_hand(pictures: list[np.ndarray]) -> np.ndarray:
    """What `MeanColours` gives, float64 [n, 4]."""
    rows = [[*one.mean(axis=(0, 1)), one[:, : one.shape[1] // 2, 0].mean()] for one in pictures]
    return np.array(rows, dtype=np.float64)


def write_inception(path: Path) -> Path:
    """Its file."""
    torch.jit.save(torch.jit.script(MeanColours()), str(path))
    return path


def write_reading_tower(folder: Path) -> Path:
    """A tower whose folder has the whole SigLIP, text encoder included, and that SigLIP's tokenizer beside."""
    source = find_golden("tokenize") / "tokenizer.model"
    siglip: dict[str, Any] = {
        **SIGLIP,
        "text_config": {
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 400, "max_position_embeddings": 16, "projection_size": 32,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
    }  # fmt: skip
    write_tower(folder, CONFIG, siglip)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = SiglipModel(
            SiglipConfig(text_config=siglip["text_config"], vision_config=siglip["vision_config"])
        )
        for tensor in model.parameters():
            tensor.data.add_(torch.randn_like(tensor) * 0.2)
    tensors = load_file(folder / "model.safetensors")
    for part, name in ((model.text_model, "text_model"), (model.vision_model, "vision_model")):
        for key, tensor in part.state_dict().items():
            begins = f"rqvaesiglip.siglip_model.{name}."
            key = key.removeprefix(f"{name}.")
            tensors.setdefault(f"{begins}{key}", tensor.contiguous())
    save_file(tensors, folder / "model.safetensors")
    beside = folder / CONFIG["rqvaesiglip"]["pretrained_model"].rpartition("/")[2]
    shutil.copy(source, beside / "spiece.model")
    return folder
