"""Errors that the user can mend, and how every command shows them: one line on standard error, exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

# Of argparse and of every command here, for a mistake in flags, files or folders.
USER_ERROR_STATUS = 2

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UserError(Exception):
    """A wrong flag, file or folder. The message names it and says what to do; it is shown without a traceback."""


def run_command(main: Callable[[], int]) -> int:
    """Run a command's work and return its exit status.

    A `UserError` or an `OSError` becomes one `error:` line, written by rank 0 alone, and status 2. Any other exception
    is a fault of this program and passes through.
    """
    try:
        return main()
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_STATUS


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's bytes, or its first 40, are a git-lfs pointer: it stands for a file that was not downloaded."""
    return content.startswith(_LFS_POINTER)
