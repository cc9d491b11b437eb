"""Names a package that an example needs and does not find, with the command that installs it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def installed_by(command: str, *later: str, extras: str = "quickstart") -> Iterator[None]:
    """Around imports: a package that is missing ends the program with one sentence and status 2.

    Args:
        command: that installs the packages.
        later: packages that are imported near the end of the program, and looked for now.
        extras: of this package, that pip installs instead.
    """
    try:
        for name in later:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(name=name)
        yield
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed: {command} installs it, or pip install '.[{extras}]'",
            file=sys.stderr,
        )
        sys.exit(2)
