"""SAVE/outcome, where the ranks leave word for the batch script that started them. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_eve.training.save_lock import in_use

OUTCOME = "outcome"


def write_outcome(save: str | None, why: str) -> None:
    """Leave word in SAVE/outcome that the run is done, or why it is not and will not be started again by itself.

    torchrun passes no exit status of its ranks on, so the batch scripts look there; without it they requeue. The first
    rank's word counts; that of another, which may be the only one with an error, is written where there is none.

    Args:
        save: the run's folder; None does nothing, and so does the folder of another run that is alive.
        why: "done", or one sentence.
    """
    if save is None:
        return
    first = os.environ.get("RANK", "0") == "0"
    try:
        if in_use(save):
            return
        Path(save).mkdir(parents=True, exist_ok=True)
        with (Path(save) / OUTCOME).open("w" if first else "x", encoding="utf-8") as stream:
            stream.write(why + "\n")
    except FileExistsError:
        return
    except OSError as error:
        print(f"{save}/{OUTCOME} could not be written ({error.strerror}): {why}", flush=True)
