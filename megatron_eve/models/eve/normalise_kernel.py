"""The table look-up of `normalise.py` in Triton, which imports only where torch brings it (GPUs, on Linux)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


# Triton compiles the source of this function and looks names up in annotations too: pointers have none.
@triton.jit
def _look_up(  # type: ignore[no-untyped-def]
    patches,
    table,
    out,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLOUR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One patch: byte v of colour c becomes table[c, v]; columns behind the last value become 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < COLUMNS
    value = tl.load(patches + row * COLUMNS + column, mask=real, other=0).to(tl.int32)
    found = tl.load(table + column // COLOUR * 256 + value, mask=real, other=0.0)
    tl.store(out + row * WIDTH + column, found, mask=column < WIDTH)


def look_up(patches: torch.Tensor, table: torch.Tensor, alignment: int) -> torch.Tensor:
    """Every byte of every patch through the table of its colour.

    Args:
        patches: uint8 [P, K], contiguous.
        table: [3, 256] in the dtype of the result.
        alignment: the rows of the result are a multiple of this wide.

    Returns:
        [P, K rounded up], zeros behind K.
    """
    count, columns = patches.shape
    width = -(-columns // alignment) * alignment
    out = torch.empty(count, width, dtype=table.dtype, device=patches.device)
    if count:
        _look_up[(count,)](
            patches.contiguous(),
            table,
            out,
            COLUMNS=columns,
            WIDTH=width,
            COLOUR=columns // table.shape[0],
            BLOCK=triton.next_power_of_2(width),
        )
    return out
