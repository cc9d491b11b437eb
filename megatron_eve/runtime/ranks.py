"""This process as a rank: its number, printing on rank 0, and exiting on an error without hanging the other ranks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from megatron_eve.runtime.errors import UserError, show_error, show_interrupt


def world_size() -> int:
    """Number of ranks that torchrun started (1 without it); needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process's rank; needs no process group."""
    return int(os.environ.get("RANK", "0"))


def print_rank_0(text: str) -> None:
    """Print on rank 0 only."""
    import torch  # not at the top: errors are also printed before torch, which takes seconds to import

    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


# Errors that a rank gets when another rank has died; they are printed without a traceback, which would hide the cause.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process",
)


def run_rank(main: Callable[[], None]) -> None:
    """Run a rank's `main`; on an error print it at once and exit without waiting for other ranks.

    A `UserError`, or an `OSError` about a file, is one `error:` line from one rank, with status 2. Any other error is
    printed with its traceback, with status 1. Other ranks notice when the failed rank's sockets close, and print one
    line; torchrun ends the rest.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:
        os._exit(show_interrupt(interrupt))
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            os._exit(show_error(error))
        rank = global_rank()
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _PEER_LOST):
            first_line = str(error).split("\n")[0]
            print(
                f"rank {rank}: lost contact with another rank, whose error stands above if it had time to print one "
                f"({first_line})",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # A normal exit would wait in the process group's destructor for ranks that do not answer.
        os._exit(1)
