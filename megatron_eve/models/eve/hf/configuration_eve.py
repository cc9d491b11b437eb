"""Configuration of EVE v1 for transformers: Llama's fields and those of the patch embedding layer."""

from __future__ import annotations

from transformers import LlamaConfig


class EVEConfig(LlamaConfig):
    """`config.json` of the published EVE folders (baaivision/EVE), and of those exported for transformers.

    Attributes:
        mm_hidden_size: C, width of the patch embedding layer.
        image_token_index: stands for one row of an image in `input_ids`, a CLS, merged-patch or row-end token; it has
            no embedding. None means the first id behind the vocabulary.
        qkv_bias: the decoder's query, key and value maps have biases (Qwen2), which the published models lack.
    """

    model_type = "eve"

    mm_hidden_size: int = 1024
    image_token_index: int | None = None
    qkv_bias: bool = False
