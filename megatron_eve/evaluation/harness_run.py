"""What runs of both harnesses share: where they work, what becomes of their errors, and how they say things."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.data_root import alone_in
from megatron_eve.runtime.errors import UserError

ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
"""Roles of messages, and what turns here call them."""


class RequestsComplete(BaseException):
    """Ends a harness's run once it has made all requests; no Exception, which it would take for a failure."""


@contextlib.contextmanager
def quiet_run(harness: str, task: str, root: Path, copies: Path) -> Iterator[None]:
    """Inside, a harness works in the data root and prints nothing; its errors become one sentence.

    Args:
        harness: its name, for messages.
        task: that it asks or scores.
        root: the data root.
        copies: folder of the dataset's copy in Arrow.

    Raises:
        DataError: it could not read the data.
    """
    printed = io.StringIO()
    try:
        with alone_in(root, copies), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Task files are programs that raise nearly anything on data they do not expect.
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise DataError(
            f"--tasks {task}: {harness} could not read the data in --data-root {root} ({type(error).__name__}: "
            f"{reason}); compare the files and columns with those of the hub, or leave the task out"
        ) from error


def stop_texts(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that end an answer, from a task's `until`: one text or several."""
    until = settings.get("until") or ()
    return tuple(text for text in ((until,) if isinstance(until, str) else until) if text)


def lower_is_better(results: Mapping[str, Any], task: str) -> list[str]:
    """The metrics of a task in a harness's results of which a small value is a good one."""
    higher = (results.get("higher_is_better") or {}).get(task) or {}
    return [name for name, better in higher.items() if better is False]
