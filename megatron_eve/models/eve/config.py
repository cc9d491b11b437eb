"""EVE's settings, the section `vision` of a run's configuration, and its sizes by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from megatron_eve.config.flag_types import Flag
from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.family import Preset
from megatron_eve.models.towers.sizes import TowerFlags, TowerSizes, tower_sizes

TEACHER_FLAGS = TowerFlags(
    "--teacher-model",
    "--teacher-trust-remote-code of a run, --trust-remote-code of an import",
    "CLIP ViT-L/14-336",
)


@dataclass(frozen=True)
class EVEConfig:
    """The patch embedding layer, and the patch aligning layer, which distils a frozen vision tower (the teacher)."""

    # Unknown keys in a recipe are errors (read by pydantic in config/recipe.py).
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    patch_embedding_size: int = 32
    """Width of the patch embedding layer (mm_hidden_size of the published configuration)."""
    patch_embedding_heads: int = 8
    """Attention heads of the patch embedding layer."""
    image_size: Annotated[int, Flag("PX")] = 224
    """Long side of an image, in pixels: 672, or 1344 for the HD model."""
    teacher_size: Annotated[int, Flag("PX")] = 112
    """Side of the teacher's image, counted as its patches times 14 pixels (336 for CLIP ViT-L/14-336); the shapes of
    images are rounded to its patch grid."""
    teacher_hidden_size: int = 48
    """Width of the teacher, and so of the patch aligning layer (1024 for CLIP ViT-L/14-336)."""
    aligning_heads: int = 8
    """Attention heads of the patch aligning layer."""
    tap_interval: int = 4
    """Decoder layers between two depths whose hidden states go to the patch aligning layer, counted down from the last
    layer."""
    patch_aligning: bool = False
    """Train with the patch aligning layer; needs --teacher-model."""
    teacher_model: Annotated[str | None, Flag("DIR", "no teacher")] = None
    """Folder of the teacher in Hugging Face layout: a vision tower that gives a patch grid (CLIP, SigLIP, DINOv2)."""
    teacher_hidden_state: int = -2
    """Hidden state of the teacher that is the target; -2 is the output of its last layer but one."""
    teacher_trust_remote_code: bool = False
    """Run Python files of the teacher's folder, for towers that transformers does not know (EVA-CLIP)."""
    align_loss_weight: float = 1.0
    """Weight of the aligning loss beside the language loss."""

    def tower(self) -> TowerSizes:
        """Sizes of the teacher, by the config.json of its folder.

        Raises:
            ConfigError: see `tower_sizes`.
        """
        assert self.teacher_model is not None
        return tower_sizes(self.teacher_model, self.teacher_trust_remote_code, TEACHER_FLAGS)

    def tap_depths(self, num_layers: int) -> tuple[int, ...]:
        """Depths of a decoder that are aligned, last first: 0 is its input, num_layers the output of the final norm.

        Args:
            num_layers: decoder layers.
        """
        return tuple(range(num_layers, -1, -self.tap_interval))

    @property
    def pooling(self) -> int:
        """Tokens along each side of a teacher patch: 1 at 672 pixels, 2 at 1344."""
        return self.image_size // (2 * self.teacher_size)


# `eve_7b` and `eve_7b_hd` are the published sizes (arXiv 2406.11832; BAAI/EVE-7B-v1.0).
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

# Settings of training, which are no sizes of the model.
TRAINING_SETTINGS = (
    "patch_aligning", "teacher_model", "teacher_hidden_state", "teacher_trust_remote_code", "align_loss_weight",
)  # fmt: skip

# Flags of Megatron-LM and of the published training scripts, which have another name here.
OTHER_NAMES = {
    "--img-h": "use --image-size",
    "--img-w": "use --image-size",
    "--patch-dim": "patches have 14 pixels a side",
    "--freeze-lm": "use --stage 1, which trains what is in front of the decoder",
    "--vision-tower": "use --teacher-model",
}

# What older versions kept in other sections: sizes in `model`, and all of `alignment`.
_ONCE_IN_MODEL = (
    "patch_embedding_size", "patch_embedding_heads", "image_size", "teacher_size", "teacher_hidden_size",
    "aligning_heads", "tap_interval",
)  # fmt: skip


def upgrade(tree: dict[str, Any]) -> dict[str, Any]:
    """See `ModelFamily.upgrade`."""
    sections, vision = dict(tree), tree.get("vision")
    if vision is not None and not isinstance(vision, dict):
        return sections
    moved: dict[str, Any] = dict(vision or {})
    for name in ("model", "alignment"):
        section = sections.get(name)
        if not isinstance(section, dict):
            continue
        kept: dict[str, Any] = {}
        for key, value in section.items():
            goes = key not in moved and (name == "alignment" or key in _ONCE_IN_MODEL)
            (moved if goes else kept)[key] = value
        sections[name] = kept
        if not kept and name == "alignment":
            del sections[name]
    if moved:
        sections["vision"] = moved
    return sections
