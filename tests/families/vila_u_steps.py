"""The steps of VILA-U that its equivalence matrix runs (`tests/families/steps.py`)."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from megatron_eve.config import ModelConfig, ParallelConfig, RunConfig
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.models.vila_u.config import VILAUConfig
from tests.families.steps import case_of

# The padded vocabulary is the same with one, two and four tensor-parallel ranks.
MODEL = ModelConfig(num_layers=4, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4, vocab_size=512)
GRID = 3
VISION = VILAUConfig(
    code_grid=GRID,
    codes_per_position=3,
    visual_codebook_size=40,
    code_vector_size=12,
    separate_codebooks=True,
    depth_hidden_size=24,
    depth_num_layers=2,
    depth_num_attention_heads=4,
    depth_dropout=0.0,
    visual_loss_chunk=7,
)

Kind = Literal["read", "drawn", "video", "text", "silent"]
CONTENTS: dict[str, tuple[Kind, ...]] = {
    "mixed": ("drawn", "read", "text", "video", "text", "read"),
    "read": ("read", "text", "text", "read", "text", "read"),
    # One picture to draw in all, so that packs and ranks have none.
    "lone": ("drawn", "text", "text", "text", "text", "text"),
    "text": ("text",) * 6,
    # Pictures to draw without a word that trains, beside nothing that does.
    "wordless": ("silent", "silent", "silent", "silent", "silent", "silent"),
}
_TOKENS = (40, 41, 42, 43, 15, 15)
_FRAMES = 3
Mutation = Literal["", "targets", "sees itself", "own count", "not summed"]


@dataclass(frozen=True)
class Run:
    """A cell of the matrix.

    Attributes:
        content: one of `CONTENTS`.
        mutation: what is done wrong, as a test is to notice: targets are those of the next row; a depth sees its own
            code; the visual loss of a pack is divided by the pack's own count; codes are embedded without their sum.
    """

    content: str = "mixed"
    mutation: Mutation = ""

    def __str__(self) -> str:
        return self.content

    def config(self, parallel: ParallelConfig) -> RunConfig:
        """Of a run of this cell under a layout."""
        from megatron_eve.verification.case_run import case_config

        return case_config(self.case(), parallel, recompute=False)

    def spoil(self, chunk: Any) -> None:
        """Do wrong what the mutation says, until `undo`."""
        mutate(self.mutation)

    def case(self) -> Any:
        """The samples, in the form of a golden case."""
        import torch

        draw = np.random.default_rng(6)
        kinds = CONTENTS[self.content]
        shape = len(kinds), max(_TOKENS) + 20
        ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX)
        mask, images, codes = np.zeros(shape, dtype=bool), [], []
        for row, (kind, tokens) in enumerate(zip(kinds, _TOKENS, strict=True)):
            count = {"read": 2, "drawn": 1, "silent": 1, "video": _FRAMES, "text": 0}[kind]
            text = draw.integers(3, MODEL.vocab_size, tokens)
            # Pictures to read are spread over the text, the others are behind it, in front of its last token.
            places = [1 + 9 * place for place in range(count)] if kind == "read" else [tokens - 1] * count
            text = np.insert(text, places, IMAGE_TOKEN_ID)
            ids[row, : len(text)], mask[row, : len(text)] = text, True
            trains = kind in ("drawn", "silent", "video")
            is_picture = text == IMAGE_TOKEN_ID
            words = IGNORE_INDEX if kind == "silent" else text
            labels[row, : len(text)] = np.where(is_picture, IMAGE_TOKEN_ID if trains else IGNORE_INDEX, words)
            images.append([_picture()] * count)
            codes += [
                draw.integers(0, VISION.visual_codebook_size, (GRID, GRID, VISION.codes_per_position))
            ] * count
        empty = np.zeros((0, GRID, GRID, VISION.codes_per_position), dtype=np.int64)
        tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        every = torch.from_numpy(np.concatenate([empty, *(one[None] for one in codes)]))
        return case_of("vila_u", MODEL, VISION, tensors, images, every)


@cache
def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="PNG")
    return file.getvalue()


_UNDONE: list[Any] = []


def undo() -> None:
    """Runs on each rank: take back what a mutation patched in its process."""
    mutate("")


def mutate(mutation: Mutation) -> None:
    """Patch this process for one kind of mistake, in place of what an earlier call patched."""
    from unittest.mock import patch

    import torch

    from megatron_eve.models.vila_u.codebook import FrozenCodebook
    from megatron_eve.models.vila_u.visual_head import VisualHeadInputs, visual_head_inputs
    from megatron_eve.training.loop.loss import Normalizer

    while _UNDONE:
        _UNDONE.pop().stop()
    cumulative = FrozenCodebook.cumulative

    def next_row(pack: Any, rows: Any) -> VisualHeadInputs:
        inputs = visual_head_inputs(pack, rows)
        return VisualHeadInputs(inputs.here, inputs.targets.roll(-1, 0))

    def with_itself(book: Any, codes: torch.Tensor) -> torch.Tensor:
        return cumulative(book, codes).roll(-1, 1)

    def apart(book: Any, codes: torch.Tensor) -> torch.Tensor:
        sums = cumulative(book, codes)
        return torch.cat([sums[:, :1], sums.diff(dim=1)], dim=1)

    def last_alone(book: Any, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        return book.vectors(book.depth - 1, codes[:, -1])

    of_step = Normalizer.loss_function

    def of_own(normalizer: Normalizer, batch: Any) -> Any:
        counts = normalizer.counts._replace(visual_labels=int(batch.image_rows[batch.drawn].sum()))
        return of_step(replace(normalizer, counts=counts), batch)

    head = "megatron_eve.models.vila_u.visual_head."
    patches = {
        "": [],
        "targets": [patch(f"{head}visual_head_inputs", next_row)],
        "sees itself": [patch.object(FrozenCodebook, "cumulative", with_itself)],
        "own count": [patch.object(Normalizer, "loss_function", of_own)],
        "not summed": [
            patch.object(FrozenCodebook, "cumulative", apart),
            patch.object(FrozenCodebook, "embed", last_alone),
        ],
    }
    for one in patches[mutation]:
        one.start()
        _UNDONE.append(one)
