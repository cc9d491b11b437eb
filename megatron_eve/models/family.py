"""What a model family is to the rest of the package: the typed interface, without a model in it.

A family is one folder of `megatron_eve/models/` (or a module elsewhere) with one object, `FAMILY`, of the type
`ModelFamily`. `registry.py` finds it by name. Nothing here imports torch, and a family object must not either: sizes,
checks and stages are asked for before torch is loaded. A family imports torch inside the methods that build modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from megatron_eve.config.schema import ModelConfig, RunConfig
    from megatron_eve.models.hf_format import HFFormat


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Does a parameter's name match one of these globs?"""
    return any(fnmatch(name, pattern) for pattern in patterns)


def size_differences(saved: Mapping[str, Any], settings: Any, ignore: Collection[str] = ()) -> Iterator[str]:
    """What a checkpoint was made with and a run has otherwise: a sentence each.

    Args:
        saved: settings of the checkpoint.
        settings: the run's, a dataclass of the same names.
        ignore: names that may differ.
    """
    for name, value in saved.items():
        mine = getattr(settings, name, None)
        if name not in ignore and mine != value:
            yield (
                f"was made with --{name.replace('_', '-')} {value}, this run has {mine}; "
                "use the same --preset or recipe, or another checkpoint"
            )


@dataclass(frozen=True)
class Stage:
    """What trains in one stage.

    Attributes:
        name: for plans and logs.
        trainable: globs over global parameter names; everything else is frozen before the DDP wrap.
        template: what its data is usually made with (`tools/preprocess_data.py --template`).
    """

    name: str
    trainable: tuple[str, ...]
    template: str = "plain"

    def trains(self, name: str) -> bool:
        """Does the parameter of this global name train?"""
        return matches(name, self.trainable)

    @property
    def decoder_trains(self) -> bool:
        """Do the decoder's own layers train? Frozen, their backward pass has no weight gradients."""
        return self.trains("decoder.layers.0.self_attention.linear_qkv.weight")


class ModelSettings(Protocol):
    """What a model is built from: of a run (`RunConfig`), of a preset (`Preset`), or read from a folder of weights."""

    @property
    def model(self) -> ModelConfig:
        """Sizes of the decoder."""
        ...

    @property
    def vision(self) -> Any:
        """Settings of the family: an instance of its `Config`."""
        ...


class Preset(NamedTuple):
    """Sizes of a model by name.

    Attributes:
        model: of the decoder.
        vision: settings of the family: an instance of its `Config`.
    """

    model: ModelConfig
    vision: Any


class PartCounts(NamedTuple):
    """Parameters beside the decoder's: on the first pipeline stage and on the last, which may be one."""

    first_stage: int
    last_stage: int


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
        Config: the settings of the family, the section `vision` of a run's configuration: a frozen dataclass whose
            fields all have defaults, each with a docstring for `--help`. Names are none of another section's.
        presets: model sizes by name, for `--preset`. Names are unique over all families.
        other_names: flags of other programs that have another name here, as in `config/hints.py`, each with a remedy.
        stages: what trains in each stage, by the number that `--stage` takes.
        parts: what the family adds to a language model, by part: globs over global parameter names. A part that a
            folder of weights lacks keeps its initial weights.
    """

    name: str
    Config: type[Any]
    presets: Mapping[str, Preset]
    other_names: Mapping[str, str]
    stages: Mapping[int, Stage]
    parts: Mapping[str, tuple[str, ...]]

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's own sizes, in whatever run: a sentence each, with the flag and the remedy."""
        ...

    def check(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's other settings for a training run; likewise."""
        ...

    # --- configuration ---

    def upgrade(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Settings as an older version wrote them, in today's form: whatever has moved into the section `vision`.

        A pure function; what it does not know is left where it is, and so is a key whose new place is taken.

        Args:
            tree: sections by name, each a dictionary of settings; a recipe's may lack any.
        """
        ...

    def inference_settings(self, vision: Any) -> Any:
        """The settings of the same model without what only training needs."""
        ...

    def stored_patch_size(self, vision: Any) -> int | None:
        """Side in pixels of the patches that stored pixels must have been cut for; None where any do."""
        ...

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """Parameters that the family adds to the decoder, by pipeline stage."""
        ...

    def fingerprint(self, config: RunConfig) -> dict[str, Any] | None:
        """What identifies the frozen models of a run, kept in its checkpoints; None where it has none.

        Plain values that YAML can write. It may read whole files, so one rank asks.

        Raises:
            ConfigError: a model that cannot be read.
        """
        ...

    def check_resume(
        self, saved: dict[str, Any], config: RunConfig, frozen: dict[str, Any] | None
    ) -> Iterator[str]:
        """Why a run cannot go on from a checkpoint, as far as the family's own settings tell: a sentence each.

        Args:
            saved: what its `common.pt` holds, the configuration in today's form. `frozen` is the fingerprint.
            config: of the run.
            frozen: the fingerprint of the run; None where it has none or is not known yet.
        """
        ...

    def check_weights(self, saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
        """Why the weights of a checkpoint do not fit a run of other data and schedule; likewise."""
        ...

    def missing_parts(self, saved: dict[str, Any], config: RunConfig) -> Mapping[str, str]:
        """Parts of the run's model that a checkpoint lacks, as `parts` names them, each with a sentence."""
        ...

    # --- model ---

    def objectives(self, config: RunConfig) -> tuple[Objective, ...]:
        """What a run of this configuration trains beside the next token, in the order of logs and sums."""
        ...

    # --- Hugging Face ---

    def hugging_face(self) -> HFFormat:
        """Its folders in Hugging Face layout: names of tensors, configuration files, flags of conversions."""
        ...


# Parts, as `ModelFamily.parts` names them, that a folder of weights may lack: what embeds the images, and the layer
# that trains with a teacher. A family need not have both.
FRONT_END, ALIGNING_LAYER = "front end", "aligning layer"


def begins_at_random(family: ModelFamily, name: str, lacking: Collection[str]) -> bool:
    """Does a parameter keep its initial weights, when the others come from a folder?

    Args:
        family: of the model.
        name: of the parameter, local or global.
        lacking: parts that the folder does not hold, as `parts` names them.
    """
    return any(matches(name, family.parts.get(part, ())) for part in lacking)
