"""The steps of VILA that its equivalence matrix runs (`tests/families/steps.py`)."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from megatron_eve.config import LoRAConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from tests.families.steps import case_of
from tests.models.vila.golden_front_end import SIGLIP

# The padded vocabulary is the same with one, two and four tensor-parallel ranks.
MODEL = ModelConfig(num_layers=4, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4, vocab_size=512)
ROPES: dict[str, dict[str, Any]] = {
    "not scaled": {},
    "linear": {"rotary_seq_len_interpolation_factor": 3.0},
    "llama3": {"use_rope_scaling": True},
}
LORA = LoRAConfig(lora_rank=3, lora_alpha=6.0, lora_dropout=0.0)
# Pictures of each sample, and tokens of its text: the longer ones have a pack of their own.
CONTENTS = {
    "mixed": (3, 1, 0, 2, 0, 1),
    "lone": (1, 0, 0, 0, 0, 0),
    "text": (0,) * 6,
    "tiles": (2, 1, 0, 1, 0, 1),
}
# Pictures in tiles, as many as follow: of one tile; of 2 x 1, 1 x 3 and 2 x 2 with the whole.
_MOST_TILES = 4
_TILED: tuple[tuple[tuple[int, int], int], ...] = (((30, 30), 1), ((80, 40), 3), ((30, 90), 4), ((70, 68), 5))
_TOKENS = (40, 41, 42, 43, 15, 15)
_SQUARE, _NEWLINE = (SIGLIP.image_size, SIGLIP.image_size), 7


@dataclass(frozen=True)
class Run:
    """A cell of the matrix.

    Attributes:
        content: one of `CONTENTS`: packs with and without pictures; one picture in all, so that ranks have none; a
            step of text alone; pictures in tiles, with a token behind each.
        trained: the tower trains, too.
        lora: adapters train in place of the decoder.
        row_order: the rows of a picture lie row by row, which is not what the others have.
        unmarked: the tower's parameters lose the mark by which their gradients are averaged.
        rope: how rotary embeddings are scaled, one of `ROPES`.
    """

    content: str = "mixed"
    trained: bool = True
    lora: bool = False
    row_order: bool = False
    unmarked: bool = False
    rope: str = "not scaled"

    def __str__(self) -> str:
        words = [self.content, "trained" if self.trained else "frozen", "lora" if self.lora else "full"]
        return "-".join(words)

    def spoil(self, chunk: Any) -> None:
        """Take the marks of the tower away, if asked."""
        for name, parameter in chunk.named_parameters():
            if self.unmarked and ".tower." in name:
                parameter.average_gradients_across_tp_domain = False

    def config(self, parallel: ParallelConfig) -> RunConfig:
        """Of a run of this cell under a layout."""
        from megatron_eve.verification.case_run import case_config

        config = case_config(self.case(), parallel, recompute=False)
        config = replace(config, model=replace(config.model, **ROPES[self.rope]))
        return replace(config, lora=LORA) if self.lora else config

    def case(self) -> Any:
        """The samples, in the form of a golden case."""

        draw = np.random.default_rng(5)
        counts = CONTENTS[self.content]
        length = max(_TOKENS) + 20
        shape = len(counts), length
        ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        images, tiled = [], self.content == "tiles"
        for row, (count, tokens) in enumerate(zip(counts, _TOKENS, strict=True)):
            text = draw.integers(3, MODEL.vocab_size, tokens)
            sizes = [_TILED[(row + place) % 4] for place in range(count)] if tiled else [(_SQUARE, 1)] * count
            # Spread over the text: the first at its beginning, the second and third within.
            for place, (_, tiles) in reversed(list(enumerate(sizes))):
                behind = [_NEWLINE] if tiled else []
                text = np.insert(text, 1 + 9 * place, [IMAGE_TOKEN_ID, *behind] * tiles)
            ids[row, : len(text)], mask[row, : len(text)] = text, True
            images.append([_picture(draw, size) for size, _ in sizes])
        labels = np.where(mask & (ids != IMAGE_TOKEN_ID), ids, IGNORE_INDEX)
        vision = replace(
            SIGLIP,
            freeze_ViT=not self.trained,
            projector_token_order="row" if self.row_order or tiled else "column",
        )
        if tiled:
            vision = replace(vision, image_fit="tiles", max_tiles=_MOST_TILES)
        tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return case_of("vila", MODEL, vision, tensors, images)


def _picture(draw: np.random.Generator, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    width, height = size
    Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()
