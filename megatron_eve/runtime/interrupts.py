"""Ctrl-C while a command still imports its modules: one line, no traceback. The tools import this file first."""

from __future__ import annotations

import sys
from types import TracebackType

from megatron_eve.runtime.errors import show_interrupt

_show_others = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        show_interrupt(error)
    else:
        _show_others(kind, error, traceback)


sys.excepthook = _show
