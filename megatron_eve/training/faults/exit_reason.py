"""SAVE/outcome, the file that tells the batch script why a run ended. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.checkpoint.save_lock import in_use

OUTCOME = "outcome"


def write_exit_reason(save: str | None, why: str, replace: bool = True) -> None:
    """Write SAVE/outcome: "done", or the reason why the job must not be requeued.

    torchrun does not pass on the exit status of its ranks, so the batch scripts read this file. They make the folder
    and remove an older file before they start the ranks; if there is no file at the end, they requeue the job.

    Args:
        save: the run's folder. Nothing is written if it is None, or if another running process has locked it.
        why: "done", or one sentence.
        replace: overwrite the file; if False, the first rank that writes it wins.
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
