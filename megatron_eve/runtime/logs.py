"""What the libraries of a run have to say: rank 0 everything, other ranks their warnings, and not without end."""

from __future__ import annotations

import logging
import sys

from megatron_eve.runtime.ranks import global_rank

# A library that warns at every step would fill the log with one line from each of hundreds of ranks.
MAX_WARNINGS = 50


class _WarningLimit(logging.Filter):
    """Lets so many records through; the last one says that it is the last."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        self._left -= 1
        if self._left == 0:
            record.msg, record.args = (
                f"{record.getMessage()} (this rank's further warnings are not shown)",
                None,
            )
        return self._left >= 0


def configure_logging() -> None:
    """Send `logging` and `warnings` to stderr, a line a record, with the rank in front.

    Ranks other than 0 tell their errors, and `MAX_WARNINGS` warnings. What a run reports of itself (`Monitor`,
    `print_rank_0`) and errors that end it do not pass here.
    """
    rank = global_rank()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"rank {rank} %(levelname)s %(name)s: %(message)s"))
    if rank != 0:
        handler.addFilter(_WarningLimit(MAX_WARNINGS))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
