"""What FP8's delayed recipe has seen of each tensor, put back where a forward pass is to leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_eve.models.build import unwrap


def snapshot_fp8_state(chunks: Sequence[Any]) -> Callable[[], None]:
    """Take down the scales of FP8's delayed recipe and the maxima they come from; other recipes have none.

    TransformerEngine's layers note the maxima of what they quantise, in evaluation too, and gradients that are not
    finite would keep all scales as they are until they have left the window.

    Args:
        chunks: this rank's model chunks, wrapped or bare.

    Returns:
        What puts them back, as often as it is called.
    """
    kept = []
    for chunk in map(unwrap, chunks):
        if chunk.config.fp8 and chunk.config.fp8_recipe == "delayed":
            layers = [layer for layer in chunk.decoder.modules() if hasattr(layer, "reset_fp8_meta_tensors")]
            # None before a layer's first pass, for which it puts back what a layer begins with.
            kept += [(layer, layer.get_fp8_meta_tensors()) for layer in layers]

    def put_back() -> None:
        for layer, tensors in kept:
            layer.reset_fp8_meta_tensors(tensors)

    return put_back
