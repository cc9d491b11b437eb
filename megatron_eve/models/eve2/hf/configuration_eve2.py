"""Configuration of EVE v2 for transformers: Qwen2's fields, experts, and the patch embedding layer."""

from __future__ import annotations

from transformers import Qwen2Config


class EVE2Config(Qwen2Config):
    """`config.json` of the published EVE v2 (baaivision/EVE, `EVEv2`), and of folders exported for transformers.

    Attributes:
        add_moe: each layer has a second set of weights, for rows of images; the model of stage 0 has none.
        moe_part: which modules have it; all do (see `EXPERT_PARTS` of the model's code).
        mm_hidden_size: C, width between the two convolutions of the patch embedding.
        image_token_index: stands for one row of an image in `input_ids`, a class, cell or split row; none of the text.
            None means the first id behind the vocabulary.
    """

    model_type = "eve-qwen2"

    add_moe: bool = False
    moe_part: str | None = None
    mm_hidden_size: int = 1024
    image_token_index: int | None = None
