"""What pipeline stages send each other when shapes are fixed: known from sizes, so that nobody has to ask.

With `variable_seq_lengths` megatron-core's stages exchange shapes before each tensor, and the receiver waits for its
GPU to read them. Here all packs of a step have one length (`data/sampling/loader.py`), and a stream has room for
intermediate features of all its rows (`stream_rows`): more bytes than a pack of pictures and text needs, and no wait.

Shapes: L = tokens of a pack, n = rows on this rank, D = decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from megatron.core import parallel_state

from megatron_eve.config import RunConfig
from megatron_eve.models.decoder.intermediate_features import stream_rows
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.runtime.accelerator import accelerator

Shapes = list[tuple[int, int, int]]


def fixed_length(config: RunConfig) -> Literal["step", "seq_length"] | None:
    """What packs are padded to, if to anything (see `StepLoader`).

    To what each step needs, by default on GPUs only. To --seq-length where buffers were made for one length.
    """
    if config.parallel.tp_comm_overlap:
        return "seq_length"
    variable = config.parallel.variable_seq_lengths
    if variable is None:
        variable = accelerator().name == "cpu"
    return None if variable else "step"


def _ranks_of_a_pack(chunk: VisionLanguageModel) -> int:
    """Ranks that its rows are spread over."""
    tensor = chunk.config.tensor_model_parallel_size if chunk.config.sequence_parallel else 1
    return parallel_state.get_context_parallel_world_size() * tensor


def rows_sent(chunk: VisionLanguageModel, pack_length: int) -> int:
    """Rows of the stream that leaves a chunk.

    The interleaved schedule has one shape for all boundaries, the largest; the other has one for each.
    """
    interleaved = chunk.config.virtual_pipeline_model_parallel_size is not None
    return _rows(chunk, pack_length, chunk.most_features if interleaved else chunk.features_out)


def _rows(chunk: VisionLanguageModel, pack_length: int, depths: int) -> int:
    rows, features = pack_length // _ranks_of_a_pack(chunk), chunk.features
    if features is None:
        return rows
    return stream_rows(rows, depths, features.width, chunk.config.hidden_size, features.pooling)


def schedule_shapes(chunk: VisionLanguageModel, pack_length: int | None) -> dict[str, Any]:
    """What megatron-core's schedule wants to know of shapes, as its keyword arguments.

    Args:
        chunk: one of this rank's.
        pack_length: L, or None if packs differ.
    """
    if pack_length is None:
        return {"seq_length": 1}  # not looked at: stages exchange shapes
    if chunk.config.virtual_pipeline_model_parallel_size is not None:
        return {"seq_length": rows_sent(chunk, pack_length) * _ranks_of_a_pack(chunk)}
    if chunk.config.pipeline_model_parallel_size == 1:
        return {"seq_length": pack_length}
    received, sent = (_rows(chunk, pack_length, depths) for depths in (chunk.features_in, chunk.features_out))
    return {"seq_length": pack_length, "adjust_tensor_shapes_fn": _replaced_rows(received, sent)}


def _replaced_rows(received: int, sent: int) -> Callable[[Shapes, Shapes], tuple[Shapes, Shapes]]:
    def adjust(receive: Shapes, send: Shapes) -> tuple[Shapes, Shapes]:
        return [(received, *shape[1:]) for shape in receive], [(sent, *shape[1:]) for shape in send]

    return adjust
