"""Megatron's notation for how the layers are divided into pipeline stages and chunks; imports nothing.

As in `--pipeline-model-parallel-layout` of Megatron-LM (megatron-core's `PipelineParallelLayerLayout`): E is the
embedding, t a decoder layer, L the loss with the output layer, and | stands between model chunks. Chunks are listed in
the order of the model: first one of each stage, then, under the interleaved schedule, the next of each stage. `t*3` is
`ttt`, `(t|)*2` is `t|t|`, and commas are for the eye.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# More than any model has layers and stages, so that a typing mistake does not fill the memory.
_LONGEST = 100_000
# As megatron-core unrolls them: brackets first, and none inside another.
_REPEATED = (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)")


def parse_layout(text: str) -> tuple[int, ...]:
    """Decoder layers of each model chunk, in the order of the model; a chunk may have none.

    Raises:
        ValueError: what is wrong, with the remedy.
    """
    letters = text.replace(",", "")
    for pattern in _REPEATED:
        found = re.findall(pattern, letters)
        if len(letters) + sum(len(part) * int(times[:9]) for part, times in found) > _LONGEST:
            raise ValueError(f"is longer than {_LONGEST:,} layers and stages; check the numbers behind *")
        letters = re.sub(pattern, lambda match: match[1] * int(match[2]), letters)
    if "m" in letters:
        raise ValueError("the model has no multi-token prediction layers; leave m out")
    unknown = next((letter for letter in letters if letter not in "EtL|"), None)
    if unknown is not None:
        raise ValueError(
            f"{unknown!r} has no meaning here; write E (embedding), t (decoder layer), L (loss) and | between stages, "
            "as in Et*3|t*4|t*3,L"
        )
    if letters.count("E") != 1 or not letters.startswith("E"):
        raise ValueError("must begin with E, the embedding, and have it once")
    if letters.count("L") != 1 or not letters.endswith("L"):
        raise ValueError("must end in L, the loss, and have it once")
    return tuple(chunk.count("t") for chunk in letters.split("|"))


def write_layout(chunks: Sequence[int]) -> str:
    """The reverse of `parse_layout`, such as Et*3|t|t*4,L."""
    written = "|".join({0: "", 1: "t"}.get(layers, f"t*{layers}") for layers in chunks)
    return f"E{written}{',L' if chunks[-1] else 'L'}"
