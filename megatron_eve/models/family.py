"""What a model family is to the rest of the package: the typed interface, without a model in it.

A family is one folder of `megatron_eve/models/` (or a module elsewhere) with one object, `FAMILY`, of the type
`ModelFamily`. `registry.py` finds it by name. Nothing here imports torch, and a family object must not either: sizes,
checks and stages are asked for before torch is loaded. A family imports torch inside the methods that build modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from megatron_eve.config.schema import ModelConfig, RunConfig


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Does a parameter's name match one of these globs?"""
    return any(fnmatch(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Stage:
    """What trains in one stage.

    Attributes:
        name: for plans and logs.
        trainable: globs over global parameter names; everything else is frozen before the DDP wrap.
    """

    name: str
    trainable: tuple[str, ...]

    def trains(self, name: str) -> bool:
        """Does the parameter of this global name train?"""
        return matches(name, self.trainable)

    @property
    def decoder_trains(self) -> bool:
        """Do the decoder's own layers train? Frozen, their backward pass has no weight gradients."""
        return self.trains("decoder.layers.0.self_attention.linear_qkv.weight")


class SampleCounts(NamedTuple):
    """What the samples of a step, or of one pack, hold; known from the index before any image is decoded.

    Attributes:
        labels: tokens that are predicted.
        images: pictures, damaged ones included.
    """

    labels: int
    images: int


class Objective(Protocol):
    """A loss that is computed on the last pipeline stage, by name.

    The model returns the sums, float32: losses of any shape `[...]` whose sum over all packs and ranks of a step,
    divided by `count` of the step, is the step's mean. The mean times `weight` is added to what is differentiated.
    """

    @property
    def name(self) -> str:
        """In logs, in losses.jsonl and TensorBoard (with underscores), and in the rules of bad steps."""
        ...

    @property
    def weight(self) -> float:
        """Of this loss in the sum of all."""
        ...

    @property
    def adds_over_tensor_parallel(self) -> bool:
        """Do the parts of the tensor-parallel ranks add up under sequence parallelism? Else all have the same sum."""
        ...

    def count(self, counts: SampleCounts) -> int:
        """What the sum is divided by."""
        ...


# --- data ---


class View(NamedTuple):
    """One thing that is decoded of a picture, as uint8; its shape is known before decoding.

    A picture is resized, then laid on a square canvas (if `square`), then cut into patches (if `patch_size`).

    Attributes:
        width, height: pixels that the picture is resized to.
        pad_colour: red, green and blue (0 to 255) of the canvas, and of what replaces a picture that does not decode.
        square: side in pixels of the canvas in whose middle the picture lies; 0: none.
        margin_unit: the margins left of it and above it are whole multiples of this, in pixels.
        patch_size: side of the patches that it is cut into, in pixels; 0: not cut.
        merge: patches come in groups of merge x merge, row by row; so do those of a group.
    """

    width: int
    height: int
    pad_colour: tuple[int, int, int]
    square: int = 0
    margin_unit: int = 1
    patch_size: int = 0
    merge: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3), (square, square, 3) or, where it is cut, (patches, 3 * patch_size ** 2)."""
        height, width = (self.square, self.square) if self.square else (self.height, self.width)
        if not self.patch_size:
            return height, width, 3
        return height * width // self.patch_size**2, 3 * self.patch_size**2


class ImagePlan(NamedTuple):
    """What one picture becomes, from its width and height alone. Plans are shared: nobody changes one.

    Attributes:
        rows: positions in the sequence.
        grid: rows and columns of its features.
        views: what is decoded of it, by name; the first is what image storage "jpeg" stores.
    """

    rows: int
    grid: tuple[int, int]
    views: Mapping[str, View]


ImagePlanner = Callable[[int, int], ImagePlan]
"""The plan of an upright picture of (width, height) pixels; raises ValueError for a size below 1."""


class ViewUse(NamedTuple):
    """Which ranks decode a view of the pictures of a pack.

    Attributes:
        stage: first or last pipeline stage.
        shared: each of the ranks that share a pack decodes its share of the pictures. Otherwise the first of these
            ranks decodes all and sends them to the others.
    """

    stage: Literal["first", "last"]
    shared: bool


class SizeFlag(NamedTuple):
    """A size that datasets are made for, as a flag of tools/preprocess_data.py.

    Attributes:
        default: in pixels.
        help: of the flag.
        pixels_alone: it changes decoded pixels and no row of the sequence, so that only a dataset that stores pixels
            is bound to it.
    """

    default: int
    help: str
    pixels_alone: bool = False


# --- the family ---


@runtime_checkable
class ModelFamily(Protocol):
    """A model family: everything that is particular to it, by one name.

    Attributes:
        name: of the family: of its folder, or of its entry point.
        presets: model sizes by name, for `--preset`. Names are unique over all families.
        stages: what trains in each stage, by the number that `--stage` takes.
        parts: what the family adds to a language model, by part: globs over global parameter names. A part that a
            folder of weights lacks keeps its initial weights.
        image_flags: sizes that a dataset is made for, by their names in `image_sizes`.
    """

    name: str
    presets: Mapping[str, ModelConfig]
    stages: Mapping[int, Stage]
    parts: Mapping[str, tuple[str, ...]]
    image_flags: Mapping[str, SizeFlag]

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's own sizes, in whatever run: a sentence each, with the flag and the remedy."""
        ...

    def check(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's other settings for a training run; likewise."""
        ...

    def objectives(self, config: RunConfig) -> tuple[Objective, ...]:
        """What a run of this configuration trains beside the next token, in the order of logs and sums."""
        ...

    # --- data ---

    def image_sizes(self, config: RunConfig) -> dict[str, int]:
        """Sizes of a run's model in pixels, by the names of `image_flags`.

        One that the run has no use for is left out, and one that cannot be read from a folder, which `check` says.
        """
        ...

    def check_image_sizes(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """Errors in the sizes of a dataset that is to be made: a sentence each, with the flag and the remedy."""
        ...

    def image_planner(self, sizes: Mapping[str, int]) -> ImagePlanner:
        """What pictures become under these sizes, in pixels; those that are left out have their defaults.

        Raises:
            ValueError: sizes that do not go together.
        """
        ...

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """Which views a run of this configuration decodes, and where."""
        ...


# Parts, as `ModelFamily.parts` names them, that a folder of weights may lack: what embeds the images, and the layer
# that trains with a teacher. A family need not have both.
FRONT_END, ALIGNING_LAYER = "front end", "aligning layer"


def parts_lacking(language_model: bool, aligned: bool) -> tuple[str, ...]:
    """Parts of the model that a folder of weights lacks.

    Args:
        language_model: the folder holds a language model alone.
        aligned: the folder holds an aligning layer.
    """
    return (FRONT_END,) * language_model + (ALIGNING_LAYER,) * (not aligned)


def begins_at_random(family: ModelFamily, name: str, lacking: Collection[str]) -> bool:
    """Does a parameter keep its initial weights, when the others come from a folder?

    Args:
        family: of the model.
        name: of the parameter, local or global.
        lacking: parts that the folder does not hold, as `parts_lacking` names them.
    """
    return any(matches(name, family.parts.get(part, ())) for part in lacking)
