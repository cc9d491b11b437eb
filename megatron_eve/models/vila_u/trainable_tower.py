"""VILA-U's tower in training: it makes codes and pictures, and its features are compared with texts.

What of a picture is compared with a text is not published. It is inferred here, as all of the contrastive side: the
quantised features (or the unquantised ones) go through the SigLIP's last encoder layer, its last norm and its pooling
head. The text encoder is the SigLIP's, and frozen.

Shapes: n = pictures, S = side of a picture in pixels, H x W x C = features of one, T = tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_eve.models.towers.trainable import ContrastivePath, TowerOutput
from megatron_eve.models.vila_u.quantizer import Quantized
from megatron_eve.models.vila_u.restart import KeyedDraw
from megatron_eve.models.vila_u.tower import UnifiedTower
from megatron_eve.models.vila_u.tower_names import published_name, stored_name
from megatron_eve.models.vila_u.tower_settings import TowerSettings

# Of a SigLIP before any training (arXiv 2303.15343).
_LOGIT_SCALE, _LOGIT_BIAS = math.log(10), -10.0
_SCALARS = ("logit_scale", "logit_bias")


class TextEncoder(nn.Module):
    """The text side of a SigLIP, of transformers' layers: a text becomes what its last position says of it. Frozen."""

    embeddings: Any
    encoder: Any
    final_layer_norm: Any
    head: Any

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Random weights, in float32 on the CPU.

        Args:
            fields: `text_config` of the SigLIP's config.json.
        """
        super().__init__()
        import transformers

        # Its own ids of a beginning and an end are not used, and outside of a small vocabulary it warns of them.
        unused = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
        config = transformers.SiglipTextConfig(**{**fields, **unused})
        model = transformers.SiglipTextModel(config)
        model = getattr(model, "text_model", model)  # transformers 4.57 wraps it
        for name in ("embeddings", "encoder", "final_layer_norm", "head"):
            setattr(self, name, getattr(model, name))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [n, T], filled up to T without a mask, as SigLIP was trained -> [n, C]."""
        hidden = self.embeddings(input_ids=tokens)
        for layer in self.encoder.layers:
            output = layer(hidden, None)
            hidden = output[0] if isinstance(output, tuple) else output
        return self.head(self.final_layer_norm(hidden)[:, -1])  # type: ignore[no-any-return]


class VILAUTrainableTower(UnifiedTower):
    """See `models.towers.trainable.TrainableTower`.

    Its tensors have the names of a published folder in a checkpoint, so that every tool that reads a published tower
    reads one that was trained.
    """

    def __init__(
        self,
        settings: TowerSettings,
        text: Mapping[str, Any] | None,
        *,
        contrast: bool = True,
        reconstruct: bool = True,
        bf16: bool = False,
        seed: int = 0,
    ) -> None:
        """Build it with random weights, the same on all ranks, in float32 on the CPU.

        Args:
            settings: what it is built from.
            text: `text_config` of the SigLIP's config.json; None for a tower without texts.
            contrast: train what only the comparison with texts needs; else it is frozen.
            reconstruct: train what only pictures need; else it is frozen.
            bf16: the tower will be wrapped for bfloat16.
            seed: of the weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(settings)
            self.quantizer.reset(torch.Generator().manual_seed(seed))
            if text is not None:
                self.text = TextEncoder(text)
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=settings.encoder.hidden_size,
            num_attention_heads=1,
            use_cpu_initialization=True,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        self.has_texts = text is not None
        self.logit_scale = nn.Parameter(torch.full((1,), _LOGIT_SCALE))
        self.logit_bias = nn.Parameter(torch.full((1,), _LOGIT_BIAS))
        contrast = contrast and self.has_texts
        for _, parameter in self.encoder.never_run():
            parameter.requires_grad_(contrast)
        for scalar in (self.logit_scale, self.logit_bias):
            scalar.requires_grad_(contrast)
        for part in (self.post_quant_conv, self.decoder):
            part.requires_grad_(reconstruct)

    def train_forward(
        self,
        pixels: torch.Tensor,
        *,
        seed: int,
        iteration: int,
        group: ProcessGroup | None,
        contrast: ContrastivePath | None,
    ) -> TowerOutput:
        """See `TrainableTower.train_forward`."""
        features = self.features(pixels)
        quantized = self.quantizer.train_forward(features, KeyedDraw(seed, iteration), group)
        return self._output(features, quantized, contrast)

    def forward(self, pixels: torch.Tensor, contrast: ContrastivePath | None) -> TowerOutput:
        """See `TrainableTower.forward`."""
        features = self.features(pixels)
        return self._output(features, self.quantizer(features), contrast)

    def targets(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `TrainableTower.targets`; resized with anti-aliasing where the tower makes pictures of another size."""
        pictures = pixels.permute(0, 3, 1, 2).to(_exact(self.post_quant_conv.weight)) / 127.5 - 1
        if self.settings.picture_size == self.settings.image_size:
            return pictures
        size = (self.settings.picture_size,) * 2
        return functional.interpolate(pictures, size, mode="bilinear", align_corners=False, antialias=True)

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `TrainableTower.text_features`."""
        return _unit(self.text(tokens))

    def image_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, H, W, C], quantised or not, as they are compared with texts: [n, C] of unit length."""
        return _unit(self.encoder.pooled(features.flatten(1, 2)))

    def logit_scale_and_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TrainableTower.logit_scale_and_bias`."""
        return self.logit_scale[0].exp(), self.logit_bias[0]

    def last_weight(self) -> torch.Tensor:
        """See `TrainableTower.last_weight`."""
        return self.decoder.conv_out.weight

    def usage(self) -> torch.Tensor:
        """See `TrainableTower.usage`."""
        assert self.quantizer.last_usage is not None
        return self.quantizer.last_usage

    def global_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `TrainableTower.global_named_parameters`."""
        return self.named_parameters()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """All tensors for a checkpoint, as megatron-core asks for them: each key is the name in a published folder.

        Of a codebook that several depths share only the first is written; all are read.
        """
        del prefix, sharded_offsets, metadata  # a tower is no part of another model
        found: dict[str, Any] = {}
        times: dict[str, int] = {}
        rank = torch.distributed.get_rank()
        for name, tensor in self.state_dict(keep_vars=True).items():
            key = stored_name(published_name(name), self.settings)
            assert key is not None, name
            copy = times[key] = times.get(key, -1) + 1
            found[name] = make_sharded_tensor_for_checkpoint(tensor, key, replica_id=(copy, 0, rank))
        return found

    def _output(
        self, features: torch.Tensor, quantized: Quantized, contrast: ContrastivePath | None
    ) -> TowerOutput:
        compared = {"quantized": quantized.features, "unquantized": features}
        return TowerOutput(
            self.decode_features(quantized.features),
            quantized.commitment_loss,
            None if contrast is None else self.image_features(compared[contrast]),
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VILAUTrainableTower:
        """Move or convert; scale and bias of the logits are never rounded: in bfloat16 a bias of -10 has no digit."""
        kept = {name: getattr(self, name).detach().clone() for name in _SCALARS}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            scalar = getattr(self, name)
            if scalar.dtype in (torch.bfloat16, torch.float16):
                scalar.data = tensor.to(scalar.device)
        return self


def _exact(weight: torch.Tensor) -> torch.dtype:
    """Of losses: float32, and float64 where the weights are."""
    return torch.promote_types(weight.dtype, torch.float32)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return functional.normalize(features.to(_exact(features)), dim=-1)
