"""VILA's settings, the section `vision` of a run's configuration, and its sizes by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eve.config.flag_types import Flag
from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.family import Preset

ProjectorType = Literal[
    "linear",
    "mlp2x_gelu",
    "mlp3x_gelu",
    "mlp_downsample",
    "mlp_downsample_2x2_fix",
    "mlp_downsample_3x3_fix",
    "qformer",
]


BLOCKS = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
"""Projectors that join the features of a block into one row, and the side of the block."""


@dataclass(frozen=True)
class VILAConfig:
    """The vision tower, and the projector that turns its features into rows of the decoder."""

    # Unknown keys in a recipe are errors (read by pydantic in config/recipe.py).
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vision_tower: Annotated[str | None, Flag("DIR", "those of --pretrained-checkpoint, or random ones")] = (
        None
    )
    """Folder of the vision tower in Hugging Face layout (CLIP or SigLIP), whose weights a new run starts from."""
    vision_model_type: Literal["clip", "siglip"] = "clip"
    """Architecture of the vision tower: clip has a class token and normalises pixels by CLIP's mean and deviation,
    siglip has none and maps pixels to -1 .. 1."""
    image_size: Annotated[int, Flag("PX")] = 28
    """Side of the square picture that the vision tower sees, in pixels: 224, 336 or 384."""
    vision_patch_size: Annotated[int, Flag("PX")] = 7
    """Side of a patch of the vision tower, in pixels."""
    vision_hidden_size: int = 24
    """Width of the vision tower."""
    vision_num_layers: int = 3
    """Layers of the vision tower, those behind --vision-select-layer included: they are kept and never run."""
    vision_num_attention_heads: int = 4
    """Attention heads of the vision tower."""
    vision_ffn_hidden_size: int = 48
    """Inner width of the MLP of the vision tower."""
    vision_hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "quick_gelu"
    """Activation of the vision tower: quick_gelu in OpenAI's CLIP, gelu_pytorch_tanh in SigLIP."""
    vision_norm_epsilon: float = 1e-5
    """Epsilon of the norms of the vision tower: 1e-5 in CLIP, 1e-6 in SigLIP."""
    vision_select_layer: int = -2
    """Hidden state of the vision tower that goes to the projector: 0 is its embeddings, -2 the output of its last
    layer but one."""
    image_fit: Literal["pad", "crop", "stretch", "tiles"] = "pad"
    """How a picture becomes a square: pad adds margins of the tower's mean colour, crop takes the middle of it,
    stretch gives up its aspect ratio, and tiles makes several squares of it, as NVILA does."""
    max_tiles: int = 12
    """Most tiles of a picture with --image-fit tiles, 1 to 12, without the whole picture behind them; datasets may be
    made for fewer."""
    projector_type: ProjectorType = "mlp2x_gelu"
    """What turns features of the tower into rows of the decoder: an affine map (linear), an MLP (mlp2x_gelu,
    mlp3x_gelu), an MLP over blocks of 2 x 2 or 3 x 3 features (mlp_downsample and the others), or learned queries
    that attend to the features (qformer)."""
    projector_token_order: Literal["row", "column"] = "row"
    """Order of the rows that mlp_downsample gives for a picture: column is that of VILA-1.5's checkpoints."""
    qformer_num_queries: int = 64
    """Learned queries of --projector-type qformer, and so rows of a picture."""
    freeze_ViT: bool = True
    """Freeze the vision tower."""
    freeze_LM: bool = False
    """Freeze the decoder with its embeddings and output layer; stage 1 always does."""
    recompute_vision: bool = False
    """Recompute the activations of the vision tower in the backward pass, to save memory."""

    @property
    def grid(self) -> int:
        """Features along each side of a picture."""
        return self.image_size // self.vision_patch_size

    @property
    def block(self) -> int:
        """Side of the block of features that becomes one row; 1 where none are joined."""
        return BLOCKS.get(self.projector_type, 1)

    @property
    def tower_layers(self) -> int:
        """Layers of the tower that are run."""
        return self.vision_select_layer % (self.vision_num_layers + 1)


_LLAMA_2_7B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
)
_LLAMA_3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rotary_base=500000,
)
# CLIP ViT-L/14-336, and SigLIP SO400M/14-384.
_CLIP_L = VILAConfig(
    image_size=336,
    vision_patch_size=14,
    vision_hidden_size=1024,
    vision_num_layers=24,
    vision_num_attention_heads=16,
    vision_ffn_hidden_size=4096,
)
_SIGLIP_SO400M = VILAConfig(
    vision_model_type="siglip",
    image_size=384,
    vision_patch_size=14,
    vision_hidden_size=1152,
    vision_num_layers=27,
    vision_num_attention_heads=16,
    vision_ffn_hidden_size=4304,
    vision_hidden_act="gelu_pytorch_tanh",
    vision_norm_epsilon=1e-6,
    image_fit="stretch",
    projector_type="mlp_downsample",
    projector_token_order="column",
)

PRESETS: dict[str, Preset] = {
    # VILA 1.0 (arXiv 2312.07533) and VILA-1.5 with Llama 3.
    "vila_7b": Preset(_LLAMA_2_7B, _CLIP_L),
    "vila15_8b": Preset(_LLAMA_3_8B, _SIGLIP_SO400M),
    # Wide enough to learn captions by heart on a laptop.
    "vila_tiny": Preset(
        ModelConfig(
            num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, vocab_size=512
        ),
        VILAConfig(
            image_size=112,
            vision_patch_size=14,
            vision_hidden_size=64,
            vision_num_layers=4,
            vision_num_attention_heads=4,
            vision_ffn_hidden_size=128,
        ),
    ),
}

# Flags of Megatron-LM and of the published training scripts, which have another name here.
OTHER_NAMES = {
    "--img-h": "use --image-size",
    "--img-w": "use --image-size",
    "--patch-dim": "use --vision-patch-size",
    "--mm-projector": "use --projector-type",
    "--mm-projector-type": "use --projector-type",
    "--mm-vision-select-layer": "use --vision-select-layer",
    "--image-aspect-ratio": "use --image-fit: pad, crop, stretch (resize) or tiles (dynamic)",
}
