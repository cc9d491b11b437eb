"""Prompts that ask a model for captions: a file of them, and the one that a row is asked with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.data.errors import DataError
from megatron_eve.models.text_format import IMAGE_TOKEN

FLAG = "--prompt-file"


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        DataError: the file is missing, not UTF-8, or without a prompt, or a prompt names more than one picture.
    """
    if not path.is_file():
        raise DataError(f"{FLAG} {path}: no such file; write one prompt a line into it")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{FLAG} {path}: is not UTF-8 text; save it as UTF-8") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.count(IMAGE_TOKEN) > 1:
            raise DataError(
                f"{FLAG} {path}, line {number}: holds {line.count(IMAGE_TOKEN)} {IMAGE_TOKEN}, and a row has one "
                "picture; leave it out to have the picture in front"
            )
        if line.strip():
            prompts.append(line.strip())
    if not prompts:
        raise DataError(f"{FLAG} {path}: holds no prompt; write one a line")
    return tuple(prompts)


def drawn_prompt(prompts: Sequence[str], seed: int, row: int) -> str:
    """The prompt of a row, drawn with equal chances.

    It depends on the seed and the row alone, not on the number of ranks or on where a run was interrupted.

    Args:
        prompts: to draw from.
        seed: of the draw.
        row: its number among the rows of all shards, from 0.
    """
    digest = hashlib.sha256(f"prompt {seed} {row}".encode()).digest()
    return prompts[int.from_bytes(digest[:8], "little") % len(prompts)]
