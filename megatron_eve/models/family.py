"""What a model family is to the rest of the package: the typed interface, without a model in it.

A family is one folder of `megatron_eve/models/` (or a module elsewhere) with one object, `FAMILY`, of the type
`ModelFamily`. `registry.py` finds it by name. Nothing here imports torch, and a family object must not either: sizes,
checks and stages are asked for before torch is loaded. A family imports torch inside the methods that build modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class ModelFamily(Protocol):
    """A model family: everything that is particular to it, by one name.

    Attributes:
        name: of the family: of its folder, or of its entry point.
        presets: model sizes by name, for `--preset`. Names are unique over all families.
        stages: what trains in each stage, by the number that `--stage` takes.
        parts: what the family adds to a language model, by part: globs over global parameter names. A part that a
            folder of weights lacks keeps its initial weights.
    """

    name: str
    presets: Mapping[str, ModelConfig]
    stages: Mapping[int, Stage]
    parts: Mapping[str, tuple[str, ...]]

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's own sizes, in whatever run: a sentence each, with the flag and the remedy."""
        ...

    def check(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's other settings for a training run; likewise."""
        ...

    def objectives(self, config: RunConfig) -> tuple[Objective, ...]:
        """What a run of this configuration trains beside the next token, in the order of logs and sums."""
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
