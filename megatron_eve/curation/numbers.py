"""Numbers of shards on the command line and in messages: "0,3,7-9", as Slurm writes tasks of an array."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_eve.data.errors import DataError

_RANGES_SHOWN = 20


def ranges(numbers: Iterable[int]) -> list[str]:
    """Ascending numbers as ranges: [0, 3, 7, 8, 9] are "0", "3" and "7-9"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def shown(numbers: Iterable[int]) -> str:
    """Ascending numbers for a message; of many ranges the first."""
    words = ranges(numbers)
    return ", ".join(words[:_RANGES_SHOWN]) + (" ..." if len(words) > _RANGES_SHOWN else "")


def parse_numbers(text: str, count: int) -> list[int]:
    """The numbers that --shards names, ascending.

    Args:
        text: such as "0,3,7-9".
        count: number of shards; they are numbered from 0.

    Raises:
        DataError: it is written otherwise, or names a shard that does not exist.
    """
    found: set[int] = set()
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if match is None:
            raise DataError(
                f"--shards {text}: write numbers and ranges with commas between them, such as 0,3,7-9"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise DataError(f"--shards {text}: there are {count} shards, 0 to {count - 1}")
        found.update(range(first, last + 1))
    return sorted(found)
