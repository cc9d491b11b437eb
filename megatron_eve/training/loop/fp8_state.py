"""Saves and restores the state of FP8's delayed recipe (scales and maxima) around a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_eve.models.build import unwrap


def snapshot_fp8_state(chunks: Sequence[Any]) -> Callable[[], None]:
    """Save the scales of FP8's delayed recipe and their history of maxima; other recipes have no state.

    TransformerEngine's layers record the maxima of what they quantise, in evaluation too; and a gradient that is not
    finite would block updates of the scales until it has left the history.

    Args:
        chunks: this rank's model chunks, wrapped or bare.

    Returns:
        A function that restores them; it can be called several times.
    """
    kept = []
    for chunk in map(unwrap, chunks):
        if chunk.config.fp8 and chunk.config.fp8_recipe == "delayed":
            layers = [layer for layer in chunk.decoder.modules() if hasattr(layer, "reset_fp8_meta_tensors")]
            # None before a layer's first pass; restoring that resets the layer to its initial state.
            kept += [(layer, layer.get_fp8_meta_tensors()) for layer in layers]

    def put_back() -> None:
        for layer, tensors in kept:
            layer.reset_fp8_meta_tensors(tensors)

    return put_back
