"""Errors that the user can fix, and how every command shows them: one line on stderr, exit status 2."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Exit status for a mistake in flags, files or folders; argparse uses the same.
USER_ERROR_STATUS = 2
# Exit status after Ctrl-C, as shells have it (128 + SIGINT), so that a script does not go on with its next command.
INTERRUPTED_STATUS = 130
# Other ranks wait this long before they print an error: rank 0 mostly has the same one, and torchrun then ends them.
_WAIT_FOR_RANK_0_SECONDS = 10.0

# torchrun exits with 1 whatever its ranks exit with. A batch script that wants to know names a file here.
STATUS_FILE = "MEGATRON_EVE_STATUS_FILE"

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UserError(Exception):
    """A wrong flag, file or folder. The message names it and says what to do; it is shown without a traceback."""


def run_command(main: Callable[[], int], stopped: str = "stopped") -> int:
    """Run a command's work and return its exit status.

    A `UserError` or an `OSError` becomes one `error:` line (see `show_error`) and status 2, Ctrl-C the line `stopped`
    and status 130. Any other exception is a bug of this program and is not caught.

    Args:
        main: the work; returns the exit status.
        stopped: said after Ctrl-C, with what became of the output; a `KeyboardInterrupt` with a message says that.
    """
    # File names may hold characters that the terminal cannot show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except (UserError, OSError) as error:
        return show_error(error)
    except KeyboardInterrupt as interrupt:
        return show_interrupt(interrupt, stopped)


def show_interrupt(interrupt: KeyboardInterrupt, stopped: str = "stopped") -> int:
    """After Ctrl-C: print the interrupt's message, or else `stopped`, from rank 0; returns the exit status."""
    if os.environ.get("RANK", "0") == "0":
        below = "\n" * sys.stderr.isatty()  # the ^C that a terminal shows
        print(f"{below}{str(interrupt) or stopped}", file=sys.stderr, flush=True)
    return INTERRUPTED_STATUS


_sigterm_received = False


def note_sigterm() -> None:
    """Record that SIGTERM arrived, for `show_error`; the SIGTERM handler calls it."""
    global _sigterm_received
    _sigterm_received = True


def show_error(error: Exception) -> int:
    """Print an error as one `error:` line from one rank; returns the status that this process has to exit with.

    Rank 0 prints at once. Other ranks wait, because most errors occur on all ranks, and torchrun ends all ranks as soon
    as one exits. A rank that is not ended within that time is the only one with the error, and prints it.
    """
    if os.environ.get("RANK", "0") != "0":
        with contextlib.suppress(ValueError):  # signal handlers can only be set in the main thread
            # Not SIG_DFL, with which Python would drop a signal that arrived just before.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(USER_ERROR_STATUS))
        if _sigterm_received:
            return USER_ERROR_STATUS
        time.sleep(_WAIT_FOR_RANK_0_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return record_status(USER_ERROR_STATUS)


def record_status(status: int) -> int:
    """Write an exit status to the file that the variable `STATUS_FILE` names, if it is set; returns the status."""
    if path := os.environ.get(STATUS_FILE):
        with contextlib.suppress(OSError):  # the batch script then takes torchrun's status
            Path(path).write_text(f"{status}\n", encoding="utf-8")
    return status


def is_lfs_pointer(content: bytes) -> bool:
    """True if a file's first 40 bytes or more are a git-lfs pointer, that is, the real file was not downloaded."""
    return content.startswith(_LFS_POINTER)
