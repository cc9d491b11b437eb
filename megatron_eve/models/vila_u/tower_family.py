"""The training of VILA-U's tower as a family of its own: sizes, checks, and what a pair becomes. Imports no torch."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import (
    ImagePlan,
    ImagePlanner,
    PartCounts,
    Preset,
    Stage,
    View,
    ViewUse,
    size_differences,
)
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings
from megatron_eve.models.text_format import Template, TextRules
from megatron_eve.models.tower_family import PairSizes, TowerFamily
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.models.vila_u.tower_checks import (
    check_pretrained,
    check_sizes,
    check_start,
    perceptual_fingerprint,
)
from megatron_eve.models.vila_u.tower_config import (
    OTHER_NAMES,
    PRESETS,
    START_SETTINGS,
    TowerConfig,
    text_sizes,
    tower_settings,
)
from megatron_eve.models.vila_u.tower_flops import pair_flops
from megatron_eve.models.vila_u.tower_parameters import float32_bytes, parameter_counts
from megatron_eve.models.vila_u.tower_record import record_of_run

if TYPE_CHECKING:
    from megatron_eve.models.towers.perceptual import PerceptualLoss
    from megatron_eve.models.towers.trainable import TrainableTower

_VIEW = "tower"
_GREY = (127, 127, 127)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_text(text: str) -> str:
    """A text as SigLIP reads it: lower case, no punctuation, one space between words (transformers'
    `SiglipTokenizer`)."""
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


PAIR = Template(
    name="siglip_pair",
    kinds=("pair", "conversation"),
    what="a picture and its caption as a SigLIP reads it, without punctuation and in lower case, to train a vision "
    "tower on (VILA-U)",
    samples="pairs of a picture and a text for a vision tower",
    prompts=False,
    clean_caption=clean_text,
    ends_captions="eos",
)

IMAGE_FLAGS = {
    "tower_size": ImageFlag(
        256, "side in pixels of the pictures that the tower reads", binds=("jpeg", "pixels"), metavar="PX"
    ),
}


class VILAUTowerFamily(TowerFamily):
    """See `TowerFamily`. A picture is one row of a sample: the square of S x S pixels that the encoder reads."""

    name = "vila_u_tower"
    Config: type[Any] = TowerConfig
    presets: Mapping[str, Preset] = PRESETS
    other_names: Mapping[str, str] = OTHER_NAMES
    stages: Mapping[int, Stage] = {1: Stage("vision tower", ("*",), template=PAIR.name)}
    image_flags: Mapping[str, ImageFlag] = IMAGE_FLAGS
    text_rules = TextRules(templates={PAIR.name: PAIR})
    # RQ-VAE's, in the autoencoder and in the discriminator.
    optimizer_defaults: Mapping[str, Any] = {"adam_beta1": 0.5, "adam_beta2": 0.9}

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_sizes`."""
        return check_sizes(config.vision)

    def check(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check`."""
        return check_start(config)

    # --- configuration ---

    def check_resume(
        self, saved: dict[str, Any], config: RunConfig, frozen: dict[str, Any] | None
    ) -> Iterator[str]:
        """See `ModelFamily.check_resume`: sizes and losses are those of the run, wherever the files lie now."""
        yield from size_differences(saved["config"].get("vision", {}), config.vision, _PLACES)
        before = saved.get("frozen")
        if before and frozen and before["sha256"] != frozen["sha256"]:
            yield (
                f"was made with other weights of the perceptual loss ({before['path']}) than those of "
                f"{frozen['path']}; resume with the same --perceptual-weights, or start a new run"
            )

    def check_weights(self, saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_weights`."""
        free = {*START_SETTINGS, *TowerTraining.__dataclass_fields__}
        return size_differences(saved["config"].get("vision", {}), config.vision, free)

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """See `ModelFamily.parameter_counts`."""
        return parameter_counts(config.vision)

    # --- of a tower ---

    def tower(self, config: RunConfig, pretrained: Path | None) -> TrainableTower:
        """See `TowerFamily.tower`."""
        from megatron_eve.models.vila_u.tower_start import start_tower

        return start_tower(config, pretrained)

    def perceptual(self, config: RunConfig) -> PerceptualLoss | None:
        """See `TowerFamily.perceptual`."""
        from megatron_eve.models.vila_u.tower_start import perceptual_loss

        return perceptual_loss(config)

    def pair_flops(self, config: RunConfig, iteration: int) -> float:
        """See `TowerFamily.pair_flops`."""
        return pair_flops(config.vision, iteration)

    def fingerprint(self, config: RunConfig) -> dict[str, Any] | None:
        """See `ModelFamily.fingerprint`: the network of the perceptual loss."""
        return perceptual_fingerprint(config.vision)

    def float32_bytes(self, config: RunConfig) -> int:
        """See `TowerFamily.float32_bytes`."""
        return float32_bytes(config.vision)

    def check_pretrained(self, config: RunConfig, folder: Path) -> Iterator[str]:
        """See `TowerFamily.check_pretrained`."""
        return check_pretrained(config.vision, folder)

    def pair_sizes(self, config: RunConfig) -> PairSizes:
        """See `TowerFamily.pair_sizes`."""
        return PairSizes(_VIEW, text_sizes(config.vision).positions)

    def contrast(self, config: RunConfig) -> bool:
        """See `TowerFamily.contrast`."""
        return bool(config.vision.contrastive_weight)

    def start_folder(self, config: RunConfig) -> Path:
        """See `TowerFamily.start_folder`."""
        return Path(config.vision.vision_tower)

    def record(self, config: RunConfig) -> dict[str, Any]:
        """See `TowerFamily.record`."""
        return record_of_run(config.vision)

    # --- data ---

    def vocabulary_size(self, config: RunConfig) -> int:
        """See `TowerFamily.vocabulary_size`."""
        return text_sizes(config.vision).vocabulary

    def image_settings(self, config: RunConfig) -> dict[str, ImageSetting]:
        """See `ModelFamily.image_settings`."""
        try:
            return {"tower_size": tower_settings(config.vision).image_size}
        except ConfigError:
            return {}

    def check_image_settings(self, settings: ImageSettings) -> Iterator[str]:
        """See `ModelFamily.check_image_settings`."""
        if int(settings["tower_size"]) < 1:
            yield f"--tower-size {settings['tower_size']}: use 1 or more"

    def image_planner(self, settings: ImageSettings) -> ImagePlanner:
        """See `ModelFamily.image_planner`."""
        side = int(settings.get("tower_size", IMAGE_FLAGS["tower_size"].default))
        if side < 1:
            raise ValueError(f"--tower-size {side}: use 1 or more")
        plan = ImagePlan(1, (1, 1), {_VIEW: View(side, side, _GREY, pass_order="pillow13")})

        def planned(width: int, height: int) -> ImagePlan:
            if width < 1 or height < 1:
                raise ValueError(
                    f"a picture of {width} x {height} pixels has no area: leave it out of the dataset"
                )
            return plan

        return planned

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """See `ModelFamily.views`: each rank decodes the pictures of its own pairs."""
        return {_VIEW: ViewUse("first", shared=False)}


# Settings that name files, and nothing else.
_PLACES = ("vision_tower", "perceptual_weights", "perceptual_linear")

FAMILY: TowerFamily = VILAUTowerFamily()
