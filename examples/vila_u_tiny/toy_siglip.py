"""A toy SigLIP with both sides, and its tokenizer, trained on pairs: what a toy tower starts from.

The sizes are those that `--preset vila_u_tower_tiny` expects: pictures of 64 pixels in patches of 16. Texts have 16
tokens, of which most sentences need less: a text is read at its last position, which has all others before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece
from vila_u_tiny.pairs import SIDE, Pair, varied

from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.models.tower_family import TEXT_PAD
from megatron_eve.models.vila_u.tower_family import clean_text

if TYPE_CHECKING:
    import torch

WIDTH, LAYERS, TEXT_LAYERS, HEADS, PATCH = 64, 4, 1, 4, 16
TEXT_LENGTH = 16
BATCH, RATE, WARM_UP, WEIGHT_DECAY = 64, 1e-3, 40, 0.05


@dataclass(frozen=True)
class Retrieval:
    """Shares of right answers, 0 to 1, when the nearest of all others is taken; equal sentences are as right.

    Attributes:
        picture: the picture of a text.
        text: the text of a picture.
        chance: the share of a guess.
    """

    picture: float
    text: float
    chance: float


def retrieval(pictures: torch.Tensor, texts: torch.Tensor, sentences: Sequence[str]) -> Retrieval:
    """Top-1 retrieval among pairs.

    Args:
        pictures, texts: float [n, C], of length 1.
        sentences: n, what the texts are.
    """
    alike, rows = texts @ pictures.T, range(len(sentences))  # [texts, pictures]
    same = np.array([[one == other for other in sentences] for one in sentences])
    return Retrieval(
        float(same[rows, alike.argmax(1).numpy()].mean()),
        float(same[rows, alike.argmax(0).numpy()].mean()),
        float(same.mean()),
    )


def train_tokenizer(sentences: Sequence[str], path: Path, words: int) -> Path:
    """Train a tokenizer of at most so many whole words, with `</s>` as id 1, which SigLIP fills texts up with.

    Of a few hundred sentences whole words carry more over to new ones than pieces of words do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(clean_text, sentences),
            model_writer=file,
            model_type="word",
            vocab_size=words,
            hard_vocab_limit=False,
            character_coverage=1.0,
            bos_id=0,
            eos_id=TEXT_PAD,
            unk_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    return path


def token_ids(sentences: Sequence[str], tokenizer: Path) -> torch.Tensor:
    """Sentences as the dataset has them, with `<s>` in front: int64 [n, TEXT_LENGTH]."""
    import torch

    read = Tokenizer(tokenizer)
    found = torch.full((len(sentences), TEXT_LENGTH), TEXT_PAD)
    for row, sentence in enumerate(sentences):
        ids = read.encode(clean_text(sentence), bos=True)[: TEXT_LENGTH - 1]
        found[row, : len(ids)] = torch.tensor(ids)
    return found


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S], -1 .. 1, as SigLIP reads pictures."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def save_toy_siglip(
    pairs: Sequence[Pair], tokenizer: Path, folder: Path, steps: int, seed: int = 0
) -> list[float]:
    """Train a SigLIP on pairs and save it in transformers' layout, with the tokenizer beside it.

    Args:
        pairs: to train on; pictures are varied (`varied`) each time.
        tokenizer: sentencepiece model of the texts.
        folder: for config.json, model.safetensors and spiece.model.
        steps: of AdamW with a cosine schedule.
        seed: of weights, batches and variants.

    Returns:
        The sigmoid loss of each step: the sum over the pictures of a batch, its mean over the texts.
    """
    import torch
    from transformers import SiglipConfig, SiglipModel

    _quiet()
    sides: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
    }
    vocabulary = Tokenizer(tokenizer).vocab_size
    text = {
        **sides,
        "num_hidden_layers": TEXT_LAYERS,
        "vocab_size": vocabulary,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_size": WIDTH,
        "bos_token_id": 0,
        "eos_token_id": TEXT_PAD,
        "pad_token_id": TEXT_PAD,
    }
    vision = {**sides, "num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": PATCH}
    tokens, drawn = token_ids([pair.sentence for pair in pairs], tokenizer), np.random.default_rng(seed)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        model.logit_scale.data.fill_(math.log(10))
        model.logit_bias.data.fill_(-10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            rows = drawn.integers(0, len(pairs), BATCH)
            pixels = torch.from_numpy(np.stack([varied(pairs[row].pixels, drawn) for row in rows]))
            ids = tokens[rows]
            logits = model(input_ids=ids, pixel_values=normalised(pixels)).logits_per_text
            sign = 2 * (ids[:, None] == ids[None]).all(-1).float() - 1
            loss = -torch.nn.functional.logsigmoid(sign * logits).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.save_pretrained(folder)
    (folder / "spiece.model").write_bytes(tokenizer.read_bytes())
    return losses


def siglip_retrieval(folder: Path, pairs: Sequence[Pair], tokenizer: Path) -> Retrieval:
    """Retrieval of a saved SigLIP among pairs."""
    import torch
    from transformers import SiglipModel

    _quiet()
    model = SiglipModel.from_pretrained(folder).eval()
    sentences = [pair.sentence for pair in pairs]
    pixels = torch.from_numpy(np.stack([pair.pixels for pair in pairs]))
    with torch.no_grad():
        found = model(input_ids=token_ids(sentences, tokenizer), pixel_values=normalised(pixels))
    return retrieval(found.image_embeds, found.text_embeds, sentences)


def _quiet() -> None:
    """No progress bars of transformers, and no warnings of ids that a small vocabulary has not."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
