"""SAVE/outcome, where the ranks leave word for the batch script that started them. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.checkpoint.save_lock import in_use

OUTCOME = "outcome"


def write_exit_reason(save: str | None, why: str, replace: bool = True) -> None:
    """Leave word in SAVE/outcome that the run is done, or why it is not and will not be started again by itself.

    torchrun passes no exit status of its ranks on, so the batch scripts look there, which make the folder and remove an
    older word before they start the ranks; without a word they requeue.

    Args:
        save: the run's folder; without one, or in that of another run that is alive, nothing is written.
        why: "done", or one sentence.
        replace: also over a word that is there; without it the first of the ranks that have an error says it.
    """
    if save is None or in_use(save):
        return
    try:
        if not Path(save).is_dir():
            return
        with (Path(save) / OUTCOME).open("w" if replace else "x", encoding="utf-8") as stream:
            stream.write(why + "\n")
    except FileExistsError:
        return
    except OSError as error:
        print(f"{save}/{OUTCOME} could not be written ({error.strerror}): {why}", flush=True)
