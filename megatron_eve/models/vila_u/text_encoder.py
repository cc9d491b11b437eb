"""The text side of VILA-U's tower: that of its SigLIP.

Shapes: n = texts, T = tokens of a text, C = width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class TextEncoder(nn.Module):
    """The text side of a SigLIP, of transformers' layers: a text becomes what its last position says of it. Frozen.

    Attributes:
        vocabulary: rows of its embedding.
        positions: T.
    """

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
        self.vocabulary, self.positions = config.vocab_size, config.max_position_embeddings
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
