"""Errors that the user can mend, and how every command shows them: one line on standard error, exit status 2."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable

# Of argparse and of every command here, for a mistake in flags, files or folders.
USER_ERROR_STATUS = 2
# In which torchrun ends the other ranks once rank 0 has shown the error that all of them found.
_WAIT_FOR_RANK_0_SECONDS = 10.0

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UserError(Exception):
    """A wrong flag, file or folder. The message names it and says what to do; it is shown without a traceback."""


def run_command(main: Callable[[], int]) -> int:
    """Run a command's work and return its exit status.

    A `UserError` or an `OSError` becomes one `error:` line (see `show_error`) and status 2. Any other exception is a
    fault of this program and passes through.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except (UserError, OSError) as error:
        return show_error(error)


_sigterm_received = False


def note_sigterm() -> None:
    """To be called by a handler of SIGTERM, so that `show_error` knows of one that came before."""
    global _sigterm_received
    _sigterm_received = True


def show_error(error: Exception) -> int:
    """Show an error as one `error:` line from one rank; returns the exit status, with which the rank has to end.

    torchrun ends all ranks as soon as one of them exits. So the others wait for that, while rank 0, which mostly found
    the same error, says it. A rank that nobody ends is the only one that has the error, and says it itself.
    """
    if os.environ.get("RANK", "0") != "0":
        with contextlib.suppress(ValueError):  # not the main thread, whose handlers stay as they are
            # Not SIG_DFL: Python would drop a signal that came just before.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(USER_ERROR_STATUS))
        if _sigterm_received:
            return USER_ERROR_STATUS
        time.sleep(_WAIT_FOR_RANK_0_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return USER_ERROR_STATUS


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's bytes, or its first 40, are a git-lfs pointer: it stands for a file that was not downloaded."""
    return content.startswith(_LFS_POINTER)
