"""Python logging of a run: rank 0 prints everything, other ranks a limited number of warnings."""

from __future__ import annotations

import logging
import sys

from megatron_eve.runtime.ranks import global_rank

# Per rank. A library that warns at every step would print one line a step from each of hundreds of ranks.
MAX_WARNINGS = 50


class _WarningLimit(logging.Filter):
    """Passes `limit` records below ERROR, and notes on the last one that further ones are not shown."""

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
    """Send `logging` and `warnings` to stderr, one line each, prefixed with the rank.

    Ranks other than 0 log errors, and up to `MAX_WARNINGS` warnings. The run's own output (`Monitor`, `print_rank_0`)
    and errors that end it do not use `logging`.
    """
    rank = global_rank()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"rank {rank} %(levelname)s %(name)s: %(message)s"))
    if rank != 0:
        handler.addFilter(_WarningLimit(MAX_WARNINGS))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
