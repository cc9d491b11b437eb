"""Prompts of captions: what a file of them may hold, and that a row's prompt depends on seed and row alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_eve.curation.caption_prompts import drawn_prompt, read_prompts
from megatron_eve.data.errors import DataError


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffDescribe the picture.\r\n\n  What is 猫?  \n<image>\tWhat is it?".encode())
    assert read_prompts(path) == ("Describe the picture.", "What is 猫?", "<image>\tWhat is it?")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n \n", "holds no prompt; write one a line"),
        (b"A\nWhich of <image> and <image>?\n", "line 2: holds 2 <image>, and a row has one picture"),
        ("é".encode("latin-1"), "is not UTF-8 text; save it as UTF-8"),
        (None, "no such file; write one prompt a line into it"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"^--prompt-file .*prompts\.txt") as raised:
        read_prompts(path)
    assert said in str(raised.value)


def test_prompts_are_drawn_with_equal_chances_by_seed_and_row() -> None:
    prompts = [f"prompt {number}" for number in range(3)]
    drawn = [drawn_prompt(prompts, 7, row) for row in range(6000)]
    assert drawn[::-1] == [drawn_prompt(prompts, 7, row) for row in reversed(range(6000))]
    counts = Counter(drawn)
    assert all(1850 < counts[prompt] < 2150 for prompt in prompts)  # 2000, and four standard deviations
    assert drawn != [drawn_prompt(prompts, 8, row) for row in range(6000)]
    # The draws of neighbouring rows do not depend on each other.
    pairs = Counter(pairwise(drawn))
    assert len(pairs) == 9 and min(pairs.values()) > 500
