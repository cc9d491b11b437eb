"""The contrastive side of VILA-U's tower: pictures and texts as vectors of one space, for zero-shot classification.

A picture's quantised features go through the SigLIP's last layer, its last norm and its pooling head; a text goes
through the SigLIP's text encoder. Both are transformers' modules with the weights of the tower's folder.

Shapes: n = pictures or texts, S = side of a picture, H x W x C = features of one, L = tokens of a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, SiglipTextConfig, SiglipTextModel, SiglipTokenizer, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoderLayer,
    SiglipMultiheadAttentionPoolingHead,
)

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.vila_u.tower import UnifiedTower, load_tower
from megatron_eve.models.vila_u.tower_folder import SIGLIP_FLAG, SPIECE
from megatron_eve.models.vila_u.tower_settings import TowerSettings
from megatron_eve.models.vila_u.tower_weights import TowerWeights

_SIGLIP = "rqvaesiglip.siglip_model."
_VISION, _TEXT = f"{_SIGLIP}vision_model.", f"{_SIGLIP}text_model."
_LAYER = re.compile(rf"{re.escape(_TEXT)}encoder\.layers\.(\d+)\.")


class PictureSide(nn.Module):
    """From quantised features to one vector: the last layer of the SigLIP, its last norm and its pooling head."""

    def __init__(self, settings: TowerSettings) -> None:
        """Build it with random weights."""
        super().__init__()
        sizes = settings.encoder
        config = SiglipVisionConfig(
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            hidden_act=sizes.hidden_act,
            layer_norm_eps=sizes.norm_epsilon,
        )
        config._attn_implementation = "sdpa"
        self.layer = SiglipEncoderLayer(config)
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_epsilon)
        self.head = SiglipMultiheadAttentionPoolingHead(config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, H, W, C] -> vectors [n, C], of any length."""
        hidden = self.layer(features.flatten(1, 2), attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # transformers 4
        return self.head(self.post_layernorm(hidden))  # type: ignore[no-any-return]


class ContrastiveTower:
    """See `ContrastModel`."""

    def __init__(
        self, tower: UnifiedTower, pictures: PictureSide, texts: SiglipTextModel, tokenizer: Any
    ) -> None:
        self._tower, self._pictures, self._texts, self._tokenizer = tower, pictures, texts, tokenizer

    @torch.no_grad()
    def picture_vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `ContrastModel.picture_vectors`."""
        return nn.functional.normalize(self._pictures(self._tower.quantize(pixels).features), dim=-1)

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ContrastModel.text_vectors`."""
        # As the SigLIP was trained: padded to its length, padding attended to.
        length = self._texts.config.max_position_embeddings
        ids = self._tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)[
            "input_ids"
        ]
        found = self._texts(torch.tensor(ids, device=self._texts.device)).pooler_output
        return nn.functional.normalize(found, dim=-1)


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
    pictures, texts = load_pictures(settings, weights), text_encoder(settings, weights)
    found = _tokenizer(tokenizer)
    size = texts.config.vocab_size
    if len(found) > size:
        raise ConfigError(
            f"{SIGLIP_FLAG} {tokenizer}: its tokenizer has {len(found):,} tokens, and the tower's text encoder "
            f"{size:,}; name the folder of the tower's own SigLIP"
        )
    tower = load_tower(settings, device, torch.float32)
    for module in (pictures, texts):
        nn.Module.to(module, device=device, dtype=torch.float32).eval().requires_grad_(False)
    return ContrastiveTower(tower, pictures, texts, found)


def load_pictures(settings: TowerSettings, weights: TowerWeights) -> PictureSide:
    """The side of the pictures, with its weights.

    Raises:
        ConfigError: the folder lacks some.
    """
    side = PictureSide(settings)
    last = f"{_VISION}encoder.layers.{settings.encoder.num_layers - 1}."
    places = {"layer.": last, "post_layernorm.": f"{_VISION}post_layernorm.", "head.": f"{_VISION}head."}
    _load(side, places, weights)
    return side


def text_encoder(settings: TowerSettings, weights: TowerWeights) -> SiglipTextModel:
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
    config = SiglipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_shape(weights, f"{_TEXT}encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=settings.encoder.num_attention_heads,
        max_position_embeddings=_shape(weights, f"{_TEXT}embeddings.position_embedding.weight")[0],
        projection_size=_shape(weights, f"{_TEXT}head.weight")[0],
        hidden_act=settings.encoder.hidden_act,
        layer_norm_eps=settings.encoder.norm_epsilon,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    try:
        model = SiglipTextModel(config)
    except ValueError as error:
        raise ConfigError(f"{settings.folder}: its text encoder cannot be built: {error}") from None
    _load(getattr(model, "text_model", model), {"": _TEXT}, weights)  # transformers 4 has it one level deeper
    return model


def _shape(weights: TowerWeights, name: str) -> torch.Size:
    if name not in weights:
        weights.tensor(name)  # raises
    return weights.shape(name)


def _load(module: nn.Module, places: Mapping[str, str], weights: TowerWeights) -> None:
    """Fill a module with tensors of a folder, whose names begin otherwise.

    Args:
        module: that gets them.
        places: beginnings of its names, and of those in the folder.
        weights: of the folder.
    """
    found = {}
    for name, tensor in module.state_dict().items():
        ours = next(begin for begin in places if name.startswith(begin))
        key = places[ours] + name.removeprefix(ours)
        if _shape(weights, key) != tensor.shape:
            raise ConfigError(
                f"{key} is {list(weights.shape(key))} in the tower's weights, and its settings say "
                f"{list(tensor.shape)}; copy both from the same model"
            )
        found[name] = weights.tensor(key)
    module.load_state_dict(found)


def _tokenizer(folder: Path) -> Any:
    """The SigLIP's tokenizer. Nothing is fetched, and no code of the folder runs."""
    kind = SiglipTokenizer if (folder / SPIECE).is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{SIGLIP_FLAG} {folder}: its tokenizer cannot be read: {reason}") from None
