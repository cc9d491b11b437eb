"""The quickstart's folder: what it made there before is deleted, and nothing else.

    python examples/quickstart/folder.py FOLDER            (make clean)

Standard library only: `make clean` runs it without the environment.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

MARKER = ".megatron_eve_quickstart"
"""A file that the quickstart leaves in its folder: nothing is deleted where it is missing."""
MADE = (
    "answers.jsonl", "data", "interrupted", "logs", "loss.png", "questions.jsonl", "reference", "teacher",
    "export", "exported.jsonl", "lora", "stage1", "stage2", "stage3", "tower", "runs", "result.json", "result.png",
    "drawings", "pretraining", "sheet.png", "siglip", "photos", "scores", "settings.json", "captioner", "downloads",
    "prepared", "prompts.txt", "work", "language_model", "stage0", "start",
)  # fmt: skip
"""What the quickstart and the programs of `examples/vila_tiny/`, `examples/vila_u_tiny/`, `examples/eve2_tiny/`
and `examples/curation_tiny/` make in their folders. Whatever else lies there is the user's, and stays."""


class NotOurs(Exception):
    """The folder was not made by the quickstart; the message is one sentence."""


def check(folder: Path) -> None:
    """Raise `NotOurs` for what is no folder, and for a folder with files but without the marker."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise NotOurs(f"{folder} is not a folder that the quickstart made, so it stays as it is")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise NotOurs(f"{folder} holds files that the quickstart did not make, so it stays as it is")


def clear(folder: Path) -> None:
    """Delete what the quickstart made in a folder, and the folder if nothing else is in it.

    Raises:
        NotOurs: see `check`; nothing was deleted.
    """
    check(folder)
    if not folder.exists():
        return
    for name in (*MADE, MARKER):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def prepare(folder: Path) -> None:
    """Clear a folder and mark it as the quickstart's.

    Raises:
        NotOurs: see `check`; nothing was changed.
    """
    clear(folder)
    _mark(folder)


def keep(folder: Path) -> None:
    """Mark a folder as the quickstart's, and keep what the quickstart made there.

    Raises:
        NotOurs: see `check`; nothing was changed.
    """
    check(folder)
    _mark(folder)


def _mark(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def main() -> int:
    """Clear the folder that the command line names; returns the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        clear(Path(sys.argv[1]))
    except NotOurs as found:
        print(f"{found}: delete it yourself if it is not needed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
