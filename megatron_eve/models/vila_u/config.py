"""VILA-U's settings, the section `vision` of a run's configuration, and its sizes by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_eve.config.flag_types import Flag
from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.family import Preset
from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS


@dataclass(frozen=True)
class VILAUConfig:
    """The codes of pictures, the projector that reads them, and the depth transformer that predicts them."""

    # Unknown keys in a recipe are errors (read by pydantic in config/recipe.py).
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vision_tokenizer: Annotated[
        str | None, Flag("DIR", "codebook of --pretrained-checkpoint, or a random one")
    ] = None
    """Folder of the vision tower that made the codes of the dataset: vision_tower of a VILA-U, or the folder that has
    it. Its codebook is a frozen part of the model."""
    siglip_config: Annotated[
        str | None, Flag("DIR", "the one that --vision-tokenizer names, if it is near it")
    ] = None
    """Folder of the SigLIP of --vision-tokenizer, of which config.json is read; nothing is fetched."""
    code_grid: Annotated[int, Flag("N")] = 4
    """Positions along each side of a picture; a picture is N x N rows of the sequence."""
    codes_per_position: Annotated[int, Flag("D")] = 4
    """Residual codes of each position."""
    visual_codebook_size: Annotated[int, Flag("K")] = 1024
    """Vectors of the codebook, and classes of the depth transformer."""
    code_vector_size: int = 32
    """Width of a vector of the codebook, which the projector reads."""
    separate_codebooks: bool = False
    """Each depth has a codebook of its own."""
    depth_hidden_size: int = 64
    """Width of the depth transformer."""
    depth_num_layers: int = 2
    """Layers of the depth transformer."""
    depth_num_attention_heads: int = 4
    """Attention heads of the depth transformer."""
    depth_dropout: Annotated[float, Flag("P")] = 0.1
    """Dropout of the depth transformer, on both residual branches of each layer."""
    visual_loss_weight: float = 1.0
    """Weight of the visual loss, the mean over positions and depths as in the public code; the paper's equation sums
    over the depths, which is the weight --codes-per-position."""
    visual_loss_chunk: Annotated[int | None, Flag("N", "all at once")] = 256
    """Positions that go through the depth transformer at a time; those of a chunk are computed again in the backward
    pass, so that the logits of one chunk at most are in memory."""

    @property
    def rows(self) -> int:
        """Rows of a picture in the sequence."""
        return self.code_grid**2

    @property
    def codebooks(self) -> int:
        """Codebooks that are kept: one, or one for each depth."""
        return self.codes_per_position if self.separate_codebooks else 1


# Settings that change no shape of the model.
TRAINING_SETTINGS = (
    "vision_tokenizer",
    "siglip_config",
    "depth_dropout",
    "visual_loss_weight",
    "visual_loss_chunk",
)

PRESETS: dict[str, Preset] = {
    # Llama 2 with the four special tokens, and the tower of 256 pixels.
    "vila_u_7b": Preset(
        ModelConfig(
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=11008,
            num_attention_heads=32,
            vocab_size=32000 + len(SPECIAL_TOKENS),
            max_position_embeddings=4096,
        ),
        VILAUConfig(
            code_grid=16,
            codes_per_position=4,
            visual_codebook_size=16384,
            code_vector_size=1024,
            depth_hidden_size=2560,
            depth_num_layers=6,
            depth_num_attention_heads=40,
        ),
    ),
    # Wide enough to learn captions and drawings by heart on a laptop.
    "vila_u_tiny": Preset(
        ModelConfig(
            num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, vocab_size=512
        ),
        VILAUConfig(),
    ),
}

# Flags of Megatron-LM and of the published training scripts, which have another name here.
OTHER_NAMES = {
    "--img-h": "the vision tower decides it; use --vision-tokenizer",
    "--img-w": "the vision tower decides it; use --vision-tokenizer",
    "--vision-tower": "use --vision-tokenizer",
    "--mm-projector": "the projector is mlp2x_gelu; leave it out",
    "--mm-projector-type": "the projector is mlp2x_gelu; leave it out",
    "--image-aspect-ratio": "codes are made by tools/tokenize_images.py; use its --fit",
}
