"""A small SigLIP with random weights, and pairs of a picture and a text, for runs that train the tower."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess

SIDE = 64
_COLOURS = ("red", "green", "blue", "white", "black", "yellow", "pink", "brown")
_THINGS = ("car", "house", "tree", "dog", "boat", "chair", "lamp", "shoe")
SIGLIP = {
    "model_type": "siglip",
    "architectures": ["SiglipModel"],
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": SIDE, "patch_size": 16,
    },
    "text_config": {
        "model_type": "siglip_text_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 8, "bos_token_id": None,
        "eos_token_id": 1, "pad_token_id": 1,
    },
}  # fmt: skip


def caption(number: int) -> str:
    """Of eight words at most, with punctuation and capitals that SigLIP does not read."""
    return f"A {_COLOURS[number % 8]} {_THINGS[number // 8 % 8]}, Nr. {number % 3}!"


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of whole words, and its tokenizer_config.json; </s> is 1, as SigLIP's. Returns the file."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [
        caption(number).lower().replace(",", "").replace(".", "").replace("!", "") for number in range(192)
    ]
    made.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=96, special_tokens=["<pad>", "</s>", "<unk>"])
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder / "tokenizer.json"


def write_siglip(folder: Path, seed: int = 0) -> Path:
    """A SigLIP in Hugging Face layout, with its tokenizer; returns the folder."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.SiglipModel(transformers.SiglipConfig.from_dict(SIGLIP))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_rows(folder: Path, texts: Sequence[str]) -> Path:
    """Pictures of different colours and shapes with these texts, as rows of JSON; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, text in enumerate(texts):
        noise = np.random.default_rng(number)
        small = noise.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        size = (80 + 8 * (number % 5), 96)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": text}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def write_pairs(folder: Path, tokenizer: Path, texts: Sequence[str], **settings: object) -> str:
    """A dataset of pairs; returns its prefix."""
    rows = write_rows(folder / "pictures", texts)
    make = partial(
        PreprocessConfig,
        input=str(rows),
        image_root=str(rows.parent),
        tokenizer_model=str(tokenizer),
        output_prefix=str(folder / "pairs"),
        family="vila_u_tower",
        template="siglip_pair",
    )
    config = make(**settings)  # type: ignore[arg-type]
    preprocess(config, progress=False)
    return config.output_prefix
