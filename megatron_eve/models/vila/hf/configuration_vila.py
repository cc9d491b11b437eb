"""Configuration of a VILA whose projector transformers' LLaVA does not have."""

from __future__ import annotations

from transformers import LlavaConfig


class VILAConfig(LlavaConfig):
    """`config.json` of VILA folders that are exported for transformers.

    Attributes:
        mm_projector_type: linear, mlp3x_gelu, mlp_downsample, mlp_downsample_2x2_fix, mlp_downsample_3x3_fix, or
            qformer.
        projector_token_order: order of the rows that a projector makes of blocks of features: "row", or "column" as in
            VILA-1.5.
        qformer_num_queries: learned queries of qformer, which are the rows of a picture.
    """

    model_type = "megatron_vila"

    mm_projector_type: str = "mlp_downsample"
    projector_token_order: str = "row"
    qformer_num_queries: int = 64
