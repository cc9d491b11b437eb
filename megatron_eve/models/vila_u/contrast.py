"""The contrastive side of VILA-U's tower: pictures and texts as vectors of one space, for zero-shot classification.

A picture's quantised features go through the SigLIP's last layer, its last norm and its pooling head; a text goes
through the SigLIP's text encoder.

Shapes: n = pictures or texts, S = side of a picture, C = width of a vector, T = tokens of a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, SiglipTokenizer

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.vila_u.text_encoder import TextEncoder
from megatron_eve.models.vila_u.tower import UnifiedTower, load_tower
from megatron_eve.models.vila_u.tower_folder import SIGLIP_FLAG, SPIECE
from megatron_eve.models.vila_u.tower_settings import TowerSettings
from megatron_eve.models.vila_u.tower_weights import TowerWeights

_TEXT = "rqvaesiglip.siglip_model.text_model."
_LAYER = re.compile(rf"{re.escape(_TEXT)}encoder\.layers\.(\d+)\.")


class ContrastiveTower:
    """See `ContrastModel`."""

    def __init__(self, tower: UnifiedTower, texts: TextEncoder, tokenizer: Any) -> None:
        self._tower, self._texts, self._tokenizer = tower, texts, tokenizer

    @torch.no_grad()
    def picture_vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `ContrastModel.picture_vectors`."""
        return nn.functional.normalize(self._tower.pooled(self._tower.quantize(pixels).features), dim=-1)

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ContrastModel.text_vectors`."""
        # As the SigLIP was trained: padded to its length, padding attended to.
        ids = self._tokenizer(
            list(texts), padding="max_length", max_length=self._texts.positions, truncation=True
        )["input_ids"]
        device = next(self._texts.parameters()).device
        return nn.functional.normalize(self._texts(torch.tensor(ids, device=device)), dim=-1)


def load_contrast(settings: TowerSettings, tokenizer: Path, device: torch.device) -> ContrastiveTower:
    """The contrastive side of a folder's tower, in float32.

    Args:
        settings: what `read_tower_folder` says of the folder.
        tokenizer: folder of the SigLIP's tokenizer (`tower_folder.text_folder`).
        device: that it runs on.

    Raises:
        ConfigError: a tower without a text side, damaged weights, or a tokenizer of another model.
    """
    weights = TowerWeights(settings)
    texts, found = text_encoder(settings, weights), _tokenizer(tokenizer)
    size = texts.vocabulary
    if len(found) > size:
        raise ConfigError(
            f"{SIGLIP_FLAG} {tokenizer}: its tokenizer has {len(found):,} tokens, and the tower's text encoder "
            f"{size:,}; name the folder of the tower's own SigLIP"
        )
    tower = load_tower(settings, device, torch.float32)
    return ContrastiveTower(tower, texts.to(device=device, dtype=torch.float32).eval(), found)


def text_encoder(settings: TowerSettings, weights: TowerWeights) -> TextEncoder:
    """The text encoder, with its weights. Their shapes say its sizes; its heads are as many as the encoder's.

    Raises:
        ConfigError: the folder has none, or a damaged one.
    """
    layers = {int(found[1]) for name in weights if (found := _LAYER.match(name))}
    tokens = f"{_TEXT}embeddings.token_embedding.weight"
    if not layers or tokens not in weights:
        raise ConfigError(
            f"{settings.folder}: the tower has no text encoder, by which pictures are classified; name a tower that has"
        )
    vocabulary, width = _shape(weights, tokens)
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(weights, f"{_TEXT}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": settings.encoder.num_attention_heads,
        "max_position_embeddings": _shape(weights, f"{_TEXT}embeddings.position_embedding.weight")[0],
        "projection_size": _shape(weights, f"{_TEXT}head.weight")[0],
        "hidden_act": settings.encoder.hidden_act,
        "layer_norm_eps": settings.encoder.norm_epsilon,
    }
    try:
        texts = TextEncoder(fields)
    except ValueError as error:
        raise ConfigError(f"{settings.folder}: its text encoder cannot be built: {error}") from None
    tensors = {}
    for name, tensor in texts.state_dict().items():
        key = _TEXT + name
        if _shape(weights, key) != tensor.shape:
            raise ConfigError(
                f"{key} is {list(weights.shape(key))} in the tower's weights, and its settings say "
                f"{list(tensor.shape)}; copy both from the same model"
            )
        tensors[name] = weights.tensor(key)
    texts.load_state_dict(tensors)
    return texts


def _shape(weights: TowerWeights, name: str) -> torch.Size:
    if name not in weights:
        weights.tensor(name)  # raises
    return weights.shape(name)


def _tokenizer(folder: Path) -> Any:
    """The SigLIP's tokenizer. Nothing is fetched, and no code of the folder runs."""
    kind = SiglipTokenizer if (folder / SPIECE).is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{SIGLIP_FLAG} {folder}: its tokenizer cannot be read: {reason}") from None
