"""The steps of EVE v2 that its equivalence matrix runs (`tests/families/steps.py`)."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from megatron_eve.config import ModelConfig, ParallelConfig, RunConfig
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.models.eve2.config import EVE2Config
from tests.families.steps import case_of

# The padded vocabulary is the same with one, two and four tensor-parallel ranks.
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=512,
    norm_epsilon=1e-6,
    rotary_base=1_000_000,
    add_qkv_bias=True,
    modality_experts=True,
)
VISION = EVE2Config(patch_embedding_size=16, max_image_side=128)
# Width and height of the pictures of each sample, and tokens of its text: the longer ones have a pack of their own.
CONTENTS: dict[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    "mixed": (((90, 60),), (), ((64, 130), (40, 40)), (), ((200, 30),), ()),
    "lone": (((70, 70),), (), (), (), (), ()),  # ranks without pictures
    "text": ((),) * 6,
    "visual": (((90, 60),), ((64, 64),), ((64, 130),), ((32, 64),), ((200, 30),), ((40, 40),)),
}
_TOKENS = {"visual": (3, 3, 3, 3, 3, 3)}
_OTHERS = (40, 41, 42, 43, 15, 15)


@dataclass(frozen=True)
class Run:
    """A cell of the matrix.

    Attributes:
        content: one of `CONTENTS`: packs with and without pictures; one picture in all, so that ranks have none; a
            step of text alone; next to nothing but pictures.
        stage: 1 trains patch embedding and experts, 2 all.
        experts: the decoder has them.
        mistake: what is made wrong, for tests that are to notice it.
    """

    content: str = "mixed"
    stage: int = 2
    experts: bool = True
    mistake: Literal["", "class row is text", "one norm", "unsorted attention"] = ""

    def __str__(self) -> str:
        return f"{self.content}-stage{self.stage}"

    def spoil(self, chunk: Any) -> None:
        """Make the mistake, if there is one."""
        from megatron_eve.models.decoder.expert_rows import expert_rows
        from megatron_eve.models.decoder.experts import ExpertNorm, ExpertQKV

        if self.mistake == "class row is text":
            right = chunk.forward

            def forward(inputs: Any) -> Any:
                rows = inputs.packed.expert_rows
                is_visual = rows.place >= rows.text
                first = is_visual.nonzero()[:1, 0]
                is_visual[first] = False
                inputs.packed.expert_rows = expert_rows(is_visual)
                return right(inputs)

            chunk.forward = forward
        for module in chunk.modules():
            if self.mistake == "one norm" and isinstance(module, ExpertNorm):
                module.visual_weight = module.weight
            if self.mistake == "unsorted attention" and isinstance(module, ExpertQKV):
                module.forward = super(ExpertQKV, module).forward  # type: ignore[method-assign]

    def config(self, parallel: ParallelConfig) -> RunConfig:
        """Of a run of this cell under a layout."""
        from megatron_eve.verification.case_run import case_config

        config = case_config(self.case(), parallel, recompute=False)
        return replace(config, training=replace(config.training, stage=self.stage))

    def case(self) -> Any:
        """The samples, in the form of a golden case."""
        draw = np.random.default_rng(5)
        pictures = CONTENTS[self.content]
        lengths = _TOKENS.get(self.content, _OTHERS)
        shape = len(pictures), max(lengths) + 4
        ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        images = []
        for row, (sizes, tokens) in enumerate(zip(pictures, lengths, strict=True)):
            text = draw.integers(3, MODEL.vocab_size, tokens)
            for place in range(len(sizes)):
                text = np.insert(text, 1 + 9 * place, IMAGE_TOKEN_ID)
            ids[row, : len(text)], mask[row, : len(text)] = text, True
            images.append([_picture(draw, size) for size in sizes])
        labels = np.where(mask & (ids != IMAGE_TOKEN_ID), ids, IGNORE_INDEX)
        tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return case_of("eve2", replace(MODEL, modality_experts=self.experts), VISION, tensors, images)


def _picture(draw: np.random.Generator, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    width, height = size
    Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()
