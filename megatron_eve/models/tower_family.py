"""A family whose runs train a vision tower alone (`megatron_eve.train_tower`), on pairs of a picture and a text.

It lies in the folder of the model that reads the tower's codes, in `tower_family.py` (see `registry.py`), and has what
any family has of settings, checks and data; of a decoder it has nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from megatron_eve.models.family import ModelFamily, Stage
from megatron_eve.models.model_parts import FamilyFlops, FamilyObjective, FrontEnd, Work

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_eve.config.schema import RunConfig
    from megatron_eve.models.hf_format import HFFormat

TEXT_PAD = 1
"""The id with which a SigLIP ends a text, and fills it up to its positions."""


@dataclass(frozen=True)
class PairSizes:
    """What a pair becomes.

    Attributes:
        view: the one of the picture's plan that the tower reads, uint8 [S, S, 3].
        text_length: token ids of a text; a longer one is cut, a shorter one filled up with `TEXT_PAD`.
    """

    view: str
    text_length: int


@runtime_checkable
class TowerFamily(ModelFamily, Protocol):
    """See `ModelFamily`; `stages` has one, and `presets` have the default decoder, which nothing reads.

    Attributes:
        optimizer_defaults: settings of the section `optimizer` that have other defaults in its runs.
    """

    optimizer_defaults: Mapping[str, Any] = {}
    parts: Mapping[str, tuple[str, ...]] = {}

    def stage(self, config: RunConfig) -> Stage:
        """See `ModelFamily.stage`."""
        return next(iter(self.stages.values()))

    # --- of a tower ---

    @abstractmethod
    def pair_sizes(self, config: RunConfig) -> PairSizes:
        """What a run makes of a pair.

        Raises:
            ConfigError: the tower that the run starts from cannot be read.
        """
        ...

    @abstractmethod
    def vocabulary_size(self, config: RunConfig) -> int:
        """Rows of the embedding of text tokens, which the tokenizer of the datasets has to fit.

        Raises:
            ConfigError: likewise.
        """
        ...

    @abstractmethod
    def tower(self, config: RunConfig, pretrained: Path | None) -> Any:
        """Build the tower, in float32 on the CPU, with the weights that the run starts from: a `TrainableTower`
        (`models/towers/trainable.py`).

        Args:
            config: of the run.
            pretrained: folder of a tower, `--pretrained-checkpoint`, whose weights go before those of the SigLIP.

        Raises:
            ConfigError: weights that are missing, damaged or of other sizes.
        """
        ...

    @abstractmethod
    def perceptual(self, config: RunConfig) -> Any:
        """The network of the perceptual loss, in float32 on the CPU; None without that loss.

        A `PerceptualLoss` (`models/towers/perceptual.py`).

        Raises:
            ConfigError: weights that are missing, damaged or of another network.
        """
        ...

    @abstractmethod
    def pair_flops(self, config: RunConfig, iteration: int) -> float:
        """Model FLOPs of the training step behind so many iterations, of one pair."""
        ...

    @abstractmethod
    def contrast(self, config: RunConfig) -> bool:
        """Are pictures compared with the texts of other pictures? Each step then needs two pairs or more."""
        ...

    @abstractmethod
    def start_folder(self, config: RunConfig) -> Path:
        """Folder in Hugging Face layout whose encoder a run starts from, if it names no whole tower."""
        ...

    @abstractmethod
    def record(self, config: RunConfig) -> dict[str, Any]:
        """What config.yaml of a checkpoint says of the tower, beside the settings, so that tools can read it."""
        ...

    @abstractmethod
    def float32_bytes(self, config: RunConfig) -> int:
        """Bytes of what is kept in float32 also with --bf16 and is no parameter: codebooks, and networks of losses."""
        ...

    @abstractmethod
    def check_pretrained(self, config: RunConfig, folder: Path) -> Iterator[str]:
        """Why a run cannot start from the tower in a folder (`--pretrained-checkpoint`): a sentence each."""
        ...

    # --- of a decoder: none ---

    def front_end(self, config: RunConfig, transformer: TransformerConfig) -> FrontEnd:
        """Always an error."""
        raise TypeError(f"the family {self.name} trains a tower and has no decoder")

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """None."""
        return ()

    def flops(self, config: RunConfig, work: Work) -> FamilyFlops:
        """Always an error."""
        raise TypeError(f"the family {self.name} trains a tower and has no decoder")

    def hugging_face(self) -> HFFormat:
        """Always an error: towers have their own folders (`ImageCodes.folders`)."""
        raise TypeError(f"the family {self.name} trains a tower; its folders are those of the towers")
