"""EVE's sizes by name. `eve_7b` and `eve_7b_hd` are the published ones (arXiv 2406.11832; BAAI/EVE-7B-v1.0)."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.family import Preset

EVE_7B = Preset(
    ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    EVEConfig(patch_embedding_size=1024, image_size=672, teacher_size=336, teacher_hidden_size=1024),
)

PRESETS: dict[str, Preset] = {
    "eve_7b": EVE_7B,
    # The HD model sees 1344 pixels; its weights have the same shapes.
    "eve_7b_hd": Preset(EVE_7B.model, replace(EVE_7B.vision, image_size=1344)),
    # Small enough for a laptop: the shape of the test cases, and one wide enough to learn captions by heart.
    "eve_mini": Preset(ModelConfig(), EVEConfig()),
    "eve_tiny": Preset(
        ModelConfig(
            num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, vocab_size=512
        ),
        EVEConfig(patch_embedding_size=64, image_size=224, teacher_size=112, teacher_hidden_size=64),
    ),
}
