"""What a family brings to the model: front end, objectives with their frozen models, and the FLOPs of all that.

Protocols and plain tuples; imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig


class SampleCounts(NamedTuple):
    """What the samples of a step, or of one pack, hold; known from the index before any image is decoded.

    Attributes:
        labels: tokens that are predicted.
        images: pictures, damaged ones included.
        visual_labels: positions of pictures that are to be drawn, each with codes to predict.
    """

    labels: int
    images: int
    visual_labels: int = 0


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
    def columns(self) -> Sequence[str]:
        """Names of the last dimension of the losses, whose means an evaluation reports one by one, too; () for none."""
        ...

    @property
    def adds_over_tensor_parallel(self) -> bool:
        """Do the parts of the tensor-parallel ranks add up under sequence parallelism? Else all have the same sum."""
        ...

    def count(self, counts: SampleCounts) -> int:
        """What the sum is divided by."""
        ...


@dataclass(frozen=True)
class ImageShare:
    """Which images (or tiles) of a pack a rank has where ranks share them: equal contiguous shares, the last short."""

    rank: int
    ranks: int
    """Ranks that share the images of a pack."""

    def images(self, count: int) -> range:
        """Positions of this rank's images among the ``count`` of a pack."""
        each = self.each(count)
        return range(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def each(self, count: int) -> int:
        """Images that every rank has room for."""
        return -(-count // self.ranks)


class Pack(Protocol):
    """What a family sees of a pack on the host (`data.batch.PackedBatch`). I = images, or their tiles; T = tokens with
    padding.

    Attributes:
        tokens: int64 [T].
        cu_seqlens_padded: int32 [samples + 1], where samples begin with their padding.
        image_starts: int64 [I], first row of each image.
        image_grids: int64 [I, 2], rows and columns of each image's merged patches.
        image_rows: int64 [I], rows of the sequence that each image takes.
        pixels: uint8, views of the images that this rank decodes, by name (see `data.batch.PackedBatch`).
        codes: int64 [V, D], codes of all images, image after image, row by row within one; None where this rank reads
            none.
        drawn: bool [I], is the image to be drawn (predicted)?
    """

    @property
    def tokens(self) -> torch.Tensor:
        """See above."""
        ...

    @property
    def cu_seqlens_padded(self) -> torch.Tensor:
        """See above."""
        ...

    @property
    def image_starts(self) -> torch.Tensor:
        """See above."""
        ...

    @property
    def image_grids(self) -> torch.Tensor:
        """See above."""
        ...

    @property
    def image_rows(self) -> torch.Tensor:
        """See above."""
        ...

    @property
    def pixels(self) -> Mapping[str, torch.Tensor]:
        """See above."""
        ...

    @property
    def codes(self) -> torch.Tensor | None:
        """See above."""
        ...

    @property
    def drawn(self) -> torch.Tensor:
        """See above."""
        ...


@dataclass
class VisualInputs:
    """What a front end gets of one pack.

    Attributes:
        pixels: decoded views of the images by name, uint8, on the device.
        grids: int64 [I, 2], rows and columns of each image's merged patches, on the host: shapes follow from them.
        codes: int64 [V, D], codes of all image rows, image after image, on the device; None where a family reads none.
    """

    pixels: dict[str, torch.Tensor]
    grids: torch.Tensor
    codes: torch.Tensor | None = None


class FrontEnd(Protocol):
    """The first stage's pre-process module: a `torch.nn.Module` that turns pictures into rows of the sequence."""

    def __call__(self, inputs: VisualInputs) -> torch.Tensor:
        """Rows of all images of a pack: [V, D], image after image, V = sum of the rows of their plans."""
        ...


class IntermediateFeatures(NamedTuple):
    """Hidden states of image rows at some depths of the decoder, projected where they arise and sent to the last stage.

    Attributes:
        depths: 0 is the decoder's input, i the output of layer i; below the number of layers; at least one.
        width: K, what they are projected to.
        pooling: merged patches along each side that are averaged to one row.
    """

    depths: tuple[int, ...]
    width: int
    pooling: int = 1


class PackRows(Protocol):
    """Which rows of a pack an objective takes on this rank; what else it remembers of them is its own.

    Attributes:
        rows: what of this rank's hidden states becomes intermediate features (`FeatureRows`); None for
            an objective without them.
    """

    @property
    def rows(self) -> Any:
        """See above."""
        ...


class TargetModel(Protocol):
    """A frozen model on the ranks of the last stage that computes what an objective trains towards."""

    def __call__(self, pack: Pack) -> torch.Tensor:
        """Targets of a pack, on the device. Collective over the ranks that share the pack; may run ahead of it."""
        ...


class FamilyObjective(Objective, Protocol):
    """An objective with modules and inputs of its own; the next token needs none.

    Attributes:
        module: attribute name of its module on the last stage, which is part of checkpoint keys; None without weights.
        features: intermediate features that it wants; at most one objective of a model may want any.
        gathers_rows: under sequence parallelism its head takes the hidden states of all tensor-parallel ranks, gathered
            as those of labelled rows are, and not this rank's share alone.
    """

    @property
    def gathers_rows(self) -> bool:
        """See above."""
        ...

    @property
    def module(self) -> str | None:
        """See above."""
        ...

    @property
    def features(self) -> IntermediateFeatures | None:
        """See above."""
        ...

    def head(self, transformer: TransformerConfig) -> torch.nn.Module:
        """The module of the last stage; R = this rank's rows.

        Its `forward(hidden [n, 1, D], features [J, R, K] or None, rows, inputs)` takes this rank's hidden states behind
        the final norm (see `gathers_rows`), the intermediate features, `PackRows.rows` and what `inputs` gave, and
        returns float32 losses of any shape (see `Objective`).
        """
        ...

    def target_model(self) -> TargetModel | None:
        """The frozen model, loaded on this rank's device; None if the targets need none.

        Raises:
            ConfigError: a model that cannot be loaded or has other sizes.
        """
        ...

    def rows(self, pack: Pack, sequence_parallel: bool) -> PackRows | None:
        """This rank's rows of a pack, computed on the host; None where hidden states are taken as they are.

        Args:
            pack: on the host.
            sequence_parallel: the rank holds only its share of the rows.
        """
        ...

    def inputs(self, pack: Pack, rows: Any, targets: torch.Tensor | None) -> Any | None:
        """What the head is given for a pack, on the device; None: the loss is not computed.

        Args:
            pack: on the host.
            rows: what `rows` gave for it.
            targets: from the target model; None without one, or where a run has not loaded it.
        """
        ...


@runtime_checkable
class CodeHead(Protocol):
    """The head of an objective that draws: it predicts the codes of a position, one after another."""

    def draw_codes(
        self, hidden: torch.Tensor, choose: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """Codes of one position of each row, chosen depth by depth.

        Args:
            hidden: [R, D_model] behind the final norm, the same on all tensor-parallel ranks: the rows in front of the
                positions.
            choose: gets float32 logits [R, K] of all classes, and the depth, counted from 0; returns codes int64 [R],
                the same on all tensor-parallel ranks. What it chooses is what the next depth sees.

        Returns:
            int64 [R, depths].
        """
        ...


@dataclass(frozen=True)
class Work:
    """What a step holds, over all data-parallel ranks and without any padding.

    Attributes:
        tokens: positions of the decoder, images expanded.
        attended: query-key pairs of causal attention: the sum over samples of length * (length + 1) / 2.
        labels: rows that reach the output layer.
        images: pictures, or tiles of pictures.
        merged_patches: the sum over images of rows times columns of their grids.
        image_rows: positions of the decoder that images take.
        visual_labels: those of them that images to be drawn take, each with codes to predict.
    """

    tokens: int
    attended: int
    labels: int
    images: int
    merged_patches: int
    image_rows: int
    visual_labels: int = 0


class FamilyFlops(NamedTuple):
    """FLOPs of a step, forward and backward, of what a family adds to the decoder, by part.

    Attributes:
        front_end: of the first stage.
        objectives: of the last stage, frozen models among them.
    """

    front_end: dict[str, int]
    objectives: dict[str, int]
