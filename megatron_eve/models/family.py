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

from megatron_eve.models.image_codes import CodeTower
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings
from megatron_eve.models.image_plan import CodeSizes, ImagePlan, ImagePlanner, View, ViewUse
from megatron_eve.models.model_parts import FamilyFlops, FamilyObjective, FrontEnd, Work
from megatron_eve.models.text_format import TextRules

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_eve.config.schema import ModelConfig, RunConfig
    from megatron_eve.models.golden_format import GoldenFormat
    from megatron_eve.models.hf_format import HFFormat

__all__ = [
    "ADAPTERS",
    "ADAPTER_PARAMETERS",
    "EXPERTS",
    "EXPERT_PARAMETERS",
    "FRONT_END",
    "CodeSizes",
    "ImagePlan",
    "ImagePlanner",
    "ModelFamily",
    "ModelSettings",
    "PartCounts",
    "Preset",
    "Stage",
    "View",
    "ViewUse",
    "begins_at_random",
    "matches",
    "size_differences",
]


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
        among: globs of which a name has to match one, too, to train; None: any name may.
    """

    name: str
    trainable: tuple[str, ...]
    template: str = "plain"
    among: tuple[str, ...] | None = None

    def trains(self, name: str) -> bool:
        """Does the parameter of this global name train?"""
        return matches(name, self.trainable) and (self.among is None or matches(name, self.among))

    @property
    def decoder_trains(self) -> bool:
        """Do the decoder's own matrices train? Frozen, their backward pass has no weight gradients."""
        return self.trains("decoder.layers.0.self_attention.linear_qkv.weight")

    @property
    def experts_train(self) -> bool:
        """Do the weights for rows of images train, of a decoder with experts?"""
        return self.trains("decoder.layers.0.self_attention.linear_qkv.visual_weight")


class ModelSettings(Protocol):
    """What a model is built from: of a run (`RunConfig`), or read from a folder of weights."""

    @property
    def family(self) -> str:
        """Its family, by name."""
        ...

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
    """Parameters of a rank beside the decoder's: on the first pipeline stage and on the last, which may be one.

    Attributes:
        first_stage, last_stage: all of them.
        frozen: those of the first stage that do not train, so that they have no gradient and no optimizer state.
        last_frozen: likewise of the last stage.
        float32: those of the first stage that train in float32 also with --bf16, and so need no master weights.
    """

    first_stage: int
    last_stage: int
    frozen: int = 0
    last_frozen: int = 0
    float32: int = 0


@runtime_checkable
class ModelFamily(Protocol):
    """A model family: everything that is particular to it, by one name.

    A family is a subclass with what has no default: methods with a default suit a family without checks of its own,
    frozen models, or settings that were once called otherwise.

    Attributes:
        name: of the family: of its folder, or of its entry point.
        Config: the settings of the family, the section `vision` of a run's configuration: a frozen dataclass whose
            fields all have defaults, each with a docstring for `--help`. Names are none of another section's.
        presets: model sizes by name, for `--preset`. Names are unique over all families.
        other_names: flags of other programs that have another name here, as in `config/flag_suggestions.py`,
            each with a remedy.
        stages: what trains in each stage, by the number that `--stage` takes.
        parts: what the family adds to a language model, by part: globs over global parameter names. A part that a
            folder of weights lacks keeps its initial weights.
        image_flags: settings of pictures that a dataset is made for, by their names in `image_settings`.
        text_rules: templates of the family's own, and how its texts are tokenised and cut.
        reads_codes: packs of its runs have `codes` on the first and on the last pipeline stage, from the code parts of
            the datasets (`data/format/code_part.py`); no pixels are decoded then (`views` is empty).
    """

    name: str
    Config: type[Any]
    presets: Mapping[str, Preset]
    other_names: Mapping[str, str] = {}
    stages: Mapping[int, Stage]
    parts: Mapping[str, tuple[str, ...]]
    image_flags: Mapping[str, ImageFlag]
    text_rules: TextRules = TextRules()
    reads_codes: bool = False

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's own sizes, in whatever run: a sentence each, with the flag and the remedy."""
        ...

    def check(self, config: RunConfig) -> Iterator[str]:
        """Errors in the family's other settings for a training run; likewise."""
        return iter(())

    def stage(self, config: RunConfig) -> Stage:
        """What trains in a run: the stage that `--stage` names, and what the family's own settings make of it."""
        return self.stages[config.training.stage]

    def chat_template(self) -> str:
        """Template of conversations with a trained model (`data/text/templates.py`): that of its last stage."""
        return self.stages[max(self.stages)].template

    # --- configuration ---

    def upgrade(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Settings as an older version wrote them, in today's form: whatever has moved into the section `vision`.

        A pure function; what it does not know is left where it is, and so is a key whose new place is taken.

        Args:
            tree: sections by name, each a dictionary of settings; a recipe's may lack any.
        """
        return tree

    def inference_settings(self, vision: Any) -> Any:
        """The settings of the same model for asking it: without what only training needs."""
        return vision

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """Parameters that the family adds to the decoder, by pipeline stage."""
        ...

    def fingerprint(self, config: RunConfig) -> dict[str, Any] | None:
        """What identifies the frozen models of a run, kept in its checkpoints; None where it has none.

        Plain values that YAML can write. It may read whole files, so one rank asks.

        Raises:
            ConfigError: a model that cannot be read.
        """
        return None

    def check_resume(
        self, saved: dict[str, Any], config: RunConfig, frozen: dict[str, Any] | None
    ) -> Iterator[str]:
        """Why a run cannot go on from a checkpoint, as far as the family's own settings tell: a sentence each.

        Args:
            saved: what its `common.pt` holds, the configuration in today's form. `frozen` is the fingerprint.
            config: of the run.
            frozen: the fingerprint of the run; None where it has none or is not known yet.
        """
        return size_differences(saved["config"].get("vision", {}), config.vision)

    def check_weights(self, saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
        """Why the weights of a checkpoint do not fit a run of other data and schedule; likewise."""
        return size_differences(saved["config"].get("vision", {}), config.vision)

    def missing_parts(self, saved: dict[str, Any], config: RunConfig) -> Mapping[str, str]:
        """Parts of the run's model that a checkpoint lacks, as `parts` names them, each with a sentence."""
        return {}

    # --- model ---

    def front_end(self, config: RunConfig, transformer: TransformerConfig) -> FrontEnd:
        """Build the front end, a `torch.nn.Module`; `transformer` is the decoder's configuration."""
        ...

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """What a run of this configuration trains beside the next token, in the order of logs and sums."""
        ...

    def flops(self, config: RunConfig, work: Work) -> FamilyFlops:
        """FLOPs of a step beside the decoder's (see `training/monitoring/flops.py` for what is counted)."""
        ...

    def image_work(self, config: RunConfig) -> float:
        """What a picture, or a tile of one, costs in the front end, in tokens of the decoder's matrix products, forward
        and backward.

        Packs are balanced with it, so that data-parallel ranks have equal work; 0 where the front end is too small to
        count. It must not depend on the parallel layout.
        """
        return 0.0

    def visual_label_work(self, config: RunConfig) -> float:
        """What a position of a picture that is to be drawn costs in the objectives, in the same tokens; likewise."""
        return 0.0

    def draws_random_numbers(self, config: RunConfig) -> bool:
        """Do modules of the family draw random numbers in a training step, for dropout? The step seeds them then."""
        return False

    # --- data ---

    def code_tower(self, config: RunConfig) -> CodeTower | None:
        """The tower whose codes a run reads, where the family reads codes and the run names it.

        Raises:
            ConfigError: a tower that cannot be read.
        """
        return None

    def code_sizes(self, config: RunConfig) -> CodeSizes | None:
        """Sizes of the codes that a run's model reads; None where the family reads none."""
        return None

    def image_settings(self, config: RunConfig) -> dict[str, ImageSetting]:
        """What a run's model makes of pictures, by the names of `image_flags`.

        One that the run has no use for is left out, and one that cannot be read from a folder, which `check` says.
        """
        ...

    def check_image_settings(self, settings: ImageSettings) -> Iterator[str]:
        """Errors in the settings of a dataset that is to be made: a sentence each, with the flag and the remedy."""
        ...

    def image_planner(self, settings: ImageSettings) -> ImagePlanner:
        """What pictures become under these settings; those that are left out have their defaults.

        Raises:
            ValueError: settings that do not go together.
        """
        ...

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """Which views a run of this configuration decodes, and where."""
        ...

    # --- Hugging Face ---

    def hugging_face(self) -> HFFormat:
        """Its folders in Hugging Face layout: names of tensors, configuration files, flags of conversions."""
        ...

    # --- verification ---

    def golden(self) -> GoldenFormat:
        """What its golden cases hold (`tools/verify_golden.py`)."""
        from megatron_eve.models.golden_format import LanguageGolden

        return LanguageGolden()


# Parts that a folder of weights may lack: what embeds the images (one of `ModelFamily.parts`), and the decoder's
# adapters and experts (of all families).
FRONT_END, ADAPTERS, EXPERTS = "front end", "adapters", "experts"
# Global names of the parameters of adapters (`--lora-rank`) and of experts (`--modality-experts`), as globs.
ADAPTER_PARAMETERS = "decoder.layers.*.lora.*"
EXPERT_PARAMETERS = "decoder.layers.*.visual_*"


def begins_at_random(family: ModelFamily, name: str, lacking: Collection[str]) -> bool:
    """Does a parameter keep its initial weights, when the others come from a folder?

    Args:
        family: of the model.
        name: of the parameter, local or global.
        lacking: parts that the folder does not hold, as `parts` names them, ADAPTERS and EXPERTS.
    """
    parts = {**family.parts, ADAPTERS: (ADAPTER_PARAMETERS,), EXPERTS: (EXPERT_PARAMETERS,)}
    return any(matches(name, parts.get(part, ())) for part in lacking)
