"""This process as a rank: its number, what is printed once a run, and a failure that does not hang the others."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from megatron_eve.runtime.errors import UserError, show_error


def world_size() -> int:
    """Ranks that torchrun started (1 without it), known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process's rank, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def print_rank_0(text: str) -> None:
    """Print once a run."""
    import torch  # not at the top: a rank prints its errors also before torch, which takes seconds, is imported

    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


# What a rank sees when another one died: not the cause, and not worth a page of traceback from every rank.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process",
)


def run_rank(main: Callable[[], None]) -> None:
    """Run a rank's `main`; on an error print it at once and end the process without waiting for anybody.

    What the user can mend (a `UserError`, or an `OSError` about a file) is one `error:` line from one rank, with status
    2. Of any other error the rank that failed first prints its traceback first: the others learn of it only when its
    sockets close, and then say so in one line. torchrun ends whoever is left.
    """
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
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
        # A normal exit would wait in process-group destructors for ranks that will not answer.
        os._exit(1)
