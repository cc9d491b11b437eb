"""Flags that decide which other flags there are, so that they are read before the parser is built."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile

from megatron_eve.config.errors import ConfigError


def flag_values(argv: Sequence[str] | None, flag: str) -> tuple[str, ...]:
    """The values of a flag on a command line; where it is given several times, of the last.

    Args:
        argv: words of the command line; None: of this process.
        flag: its full name, such as "--family".

    Returns:
        Empty if the flag is not there.

    Raises:
        ConfigError: the flag has no value.
    """
    words = sys.argv[1:] if argv is None else argv
    values: tuple[str, ...] = ()
    for number, word in enumerate(words):
        if word == flag:
            values = tuple(takewhile(lambda value: not value.startswith("-"), words[number + 1 :]))
        elif word.startswith(flag + "="):
            values = (word[len(flag) + 1 :],)
        else:
            continue
        if not any(values):
            raise ConfigError(f"{flag}: a value is missing behind it")
    return values


def flag_value(argv: Sequence[str] | None, flag: str) -> str | None:
    """The value of a flag that takes one; None where it is not there. See `flag_values`."""
    return next(iter(flag_values(argv, flag)), None)
