"""What a family says of its golden cases (`verification/`): the typed interface; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.json_file import read_json

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.model_parts import Pack, VisualInputs


_LONGEST_HEADER = 100_000_000  # bytes, the bound of safetensors itself


def read_case_file(path: Path) -> dict[str, Any]:
    """What a JSON file of a golden case holds, by name.

    Raises:
        ConfigError: it is not JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no values by name; copy the folder again")
    return content


def read_case_rows(path: Path) -> list[Any]:
    """The rows of a JSON file of a golden case; likewise."""
    content = read_json(path)
    if not isinstance(content, list):
        raise ConfigError(f"{path}: holds no rows; copy the folder again")
    return content


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file, of which the header alone is read; none in another file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            names = json.loads(file.read(size) if size < _LONGEST_HEADER else b"")
        return set(names) - {"__metadata__"}
    except (OSError, ValueError):
        return set()


@dataclass(frozen=True)
class GoldenBatch:
    """A batch of samples, and what a published model computed of it, under the names of `verification/cases.py`.

    Attributes:
        name: of the batch, in front of the names of its rows.
        weights: folder of the model in Hugging Face layout.
        inputs: `input_ids` int64 [B, n] with -200 for each picture, `labels` int64 [B, n] (not shifted) and
            `attention_mask` bool [B, n].
        outputs: by name.
        pictures: of each sample, as files.
        codes: int64 [pictures, h, w, D] of all pictures, where the model reads codes. Of a picture that it is to draw
            the label in `inputs` is -200, too.
        settings: of the family, as far as the folder of weights does not hold them.
        stage: of training that its gradients are of.
    """

    name: str
    weights: Path
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    pictures: Sequence[Sequence[bytes]]
    codes: torch.Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: int = 3


class Comparison(NamedTuple):
    """Something that a family compares by itself.

    Attributes:
        name: of the row.
        ours, golden: of one shape.
        kind: activations, gradients and what differs by rounding alone (1e-6) are compared by relative L2 norm; what is
            exact, entry by entry.
    """

    name: str
    ours: torch.Tensor
    golden: torch.Tensor
    kind: Literal["activation", "gradient", "rounding", "exact"]


class GoldenRow(NamedTuple):
    """A row of text, and the ids and labels that a published data set made of it.

    Attributes:
        name: of the row.
        template: by name.
        kind: of the row (`data/schema.py`).
        turns: of the row, as there.
        pictures: number of its pictures.
        tokenizer: its file.
        tokens: ids, -200 for each picture.
        labels: of the same length, -100 where nothing is learned, -200 at pictures that are to be drawn.
        drawn: of each picture, is it to be drawn? Empty: none is.
        is_video: the pictures are the frames of one video.
        prompt: the row is a prompt, of one turn: "text" for one that is answered, "image" or "video" for one from which
            a picture or a video is drawn; "" for a row to train on.
    """

    name: str
    template: str
    kind: str
    turns: list[dict[str, str]]
    pictures: int
    tokenizer: Path
    tokens: list[int]
    labels: list[int]
    drawn: tuple[bool, ...] = ()
    is_video: bool = False
    prompt: Literal["", "text", "image", "video"] = ""


class GoldenSteps(NamedTuple):
    """Steps that a published trainer took on one batch with AdamW, at a constant learning rate.

    Attributes:
        name: in front of the names of the rows.
        weights: folder of the model in Hugging Face layout, with the tokenizer; the steps begin there.
        stage: of training; says what trains.
        optimizer: settings of `OptimizerConfig`, by their names.
        samples: rows of text; their tokens and labels are empty.
        pictures: of each sample, as files.
        losses, grad_norms: of each step, before its update.
        changes: L2 norm of what all steps changed in a parameter, by key; of the others nothing changed.
        final: some parameters behind the last step, by key.
    """

    name: str
    weights: Path
    stage: int
    optimizer: Mapping[str, Any]
    samples: Sequence[GoldenRow]
    pictures: Sequence[Sequence[bytes]]
    losses: Sequence[float]
    grad_norms: Sequence[float]
    changes: Mapping[str, float]
    final: Mapping[str, torch.Tensor]


class GoldenPicture(NamedTuple):
    """What a published processor made of a picture.

    Attributes:
        name: of the row.
        file: the picture.
        settings: of pictures, by the family's names; those that are left out have their defaults.
        view: that is compared.
        sha256: of its bytes, [3, height, width].
        channels_last: its bytes are [height, width, 3].
    """

    name: str
    file: Path
    settings: Mapping[str, Any]
    view: str
    sha256: str
    channels_last: bool = False


def image_names(counts: Sequence[int]) -> list[list[str]]:
    """What outputs inside the front end are called for the pictures of each sample: by the sample, and by the place in
    it where that has several.

    Args:
        counts: pictures of each sample.
    """
    return [
        [str(sample)] if count == 1 else [f"{sample}.{image}" for image in range(count)]
        for sample, count in enumerate(counts)
    ]


class GoldenFormat(Protocol):
    """Golden cases of a family: outputs of its published model, by the names that the cases give them.

    The defaults are those of a family whose cases have the form of `verification/cases.py`, and hold nothing beside
    what a language model computes.

    Attributes:
        sizes: image sizes of the case `preprocess`, by its names of them, as `ModelFamily.image_planner` takes them.
        losses: losses beside `llm_loss`, and the objectives that compute them.
        gradients: of those losses, the prefix of their own part of a gradient.
        heads: by objective, the outputs that hold predictions and targets of its head; a case may hold predictions of
            the first rows of a sample alone.
        recomputing: settings of the family in a run with recomputation.
        without_gradient: of parameters (keys of a folder in Hugging Face layout) whose gradients are rounding noise,
            since they cancel; these are compared absolutely.
    """

    sizes: Mapping[str, Mapping[str, int]] = {}
    losses: Mapping[str, str] = {}
    gradients: Mapping[str, str] = {}
    heads: Mapping[str, tuple[str, str]] = {}
    recomputing: Mapping[str, Any] = {}
    without_gradient: re.Pattern[str] | None = None

    def reads(self, folder: Path) -> bool:
        """Is this folder a case of a form of the family's own? Its `batches` and `comparisons` are compared then."""
        return False

    def batches(self, folder: Path) -> Sequence[GoldenBatch]:
        """Batches of samples that such a folder holds.

        Raises:
            ConfigError: a case that lacks files.
        """
        return ()

    def rows(self, folder: Path) -> Iterator[GoldenRow]:
        """Rows of text that such a folder holds."""
        return iter(())

    def steps(self, folder: Path) -> Iterator[GoldenSteps]:
        """Steps of the optimizer that such a folder holds."""
        return iter(())

    def pictures_alone(self, folder: Path) -> Iterator[GoldenPicture]:
        """Pictures that such a folder holds without a model."""
        return iter(())

    def comparisons(self, folder: Path) -> Iterator[Comparison]:
        """What else such a folder holds. Collective; the groups of tensor parallelism are there."""
        return iter(())

    def settings(self, meta: Mapping[str, Any], folder: Path, outputs: Collection[str]) -> dict[str, Any]:
        """Settings of the family for a run of a case, as far as config.json does not hold them.

        Args:
            meta: the case's meta.json.
            folder: of the weights.
            outputs: names of the case's outputs; what none of them needs is left out of the run.
        """
        return {}

    def pictures(self, plan: Any, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
        """The pictures that entered the published model, by the case's names, each as a `View` that is not cut.

        Args:
            plan: the `ImagePlan` of a picture.
            sizes: what it was planned for.
        """
        return {}

    def front_end_outputs(
        self, front_end: torch.nn.Module, visual: VisualInputs
    ) -> Mapping[str, Sequence[torch.Tensor]]:
        """Outputs inside the front end, by the case's names: a tensor [rows, width] for each image of a pack."""
        return {}

    def predictions(self, head: torch.nn.Module, given: tuple[Any, ...]) -> torch.Tensor:
        """Predictions [R, width] of an objective's head for what its `forward` was given."""
        ...

    def row_places(self, rows: Any, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows of a head belong, from what `FamilyObjective.rows` gave for a pack: the image of each among the
        pack's, -1 for none, and its number among the rows of which the case has an output; int64 [R] both."""
        ...


class LanguageGolden(GoldenFormat):
    """Cases that hold nothing of the family's own; with no `heads`, nobody asks for predictions and rows."""

    def predictions(self, head: torch.nn.Module, given: tuple[Any, ...]) -> torch.Tensor:
        """See `GoldenFormat.predictions`."""
        raise NotImplementedError

    def row_places(self, rows: Any, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GoldenFormat.row_places`."""
        raise NotImplementedError
