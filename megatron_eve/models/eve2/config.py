"""EVE v2's settings, the section `vision` of a run's configuration, and its sizes by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eve.config.flag_types import Flag
from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.family import Preset

ImageResize = Literal["shrink", "scale"]


@dataclass(frozen=True)
class EVE2Config:
    """The patch embedding, how large pictures are, and what trains."""

    # Unknown keys in a recipe are errors (read by pydantic in config/recipe.py).
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    patch_embedding_size: int = 24
    """Width of the patch embedding layer, between its two convolutions."""
    max_image_side: Annotated[int, Flag("PX")] = 160
    """Pixels of a picture, as the side of a square of as many: 800, or 1600 from stage 1.1 on."""
    image_resize: ImageResize = "shrink"
    """How a picture gets its size: shrink makes those above --max-image-side smaller and rounds sides to the next
    multiple of 32 (published training), scale makes all as large as that and rounds up (published evaluation)."""


_QWEN25_7B = ModelConfig(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    vocab_size=152064,
    max_position_embeddings=32768,
    norm_epsilon=1e-6,
    rotary_base=1_000_000,
    add_qkv_bias=True,
    modality_experts=True,
)

PRESETS: dict[str, Preset] = {
    # The published sizes (BAAI/EVE-7B-HD-v2.0), on Qwen2.5-7B-Instruct.
    "eve2_7b": Preset(_QWEN25_7B, EVE2Config(patch_embedding_size=1024, max_image_side=1600)),
    # Wide enough to learn captions by heart on a laptop.
    "eve2_tiny": Preset(
        ModelConfig(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=352,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=512,
            norm_epsilon=1e-6,
            rotary_base=1_000_000,
            add_qkv_bias=True,
            modality_experts=True,
        ),
        EVE2Config(patch_embedding_size=64),
    ),
}

# Flags of Megatron-LM and of the published training scripts, which have another name here.
OTHER_NAMES = {
    "--img-h": "use --max-image-side",
    "--img-w": "use --max-image-side",
    "--image-size": "use --max-image-side: pictures keep their shape",
    "--patch-dim": "patches have 16 pixels a side, and 2 x 2 of them are a row",
    "--add-moe": "use --modality-experts",
    "--moe-part": "norms, attention and MLP all have experts, as published (--modality-experts)",
    "--tune-VE": "use --stage, which says what trains",
    "--tune-MOE": "use --stage, which says what trains",
    "--tune-LLM": "use --stage, which says what trains",
}
