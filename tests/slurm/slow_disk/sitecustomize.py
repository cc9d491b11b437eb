"""A disk that hangs once for some files of a curation: those whose path the regular expression in HANGING matches.

Python imports this at its start from a folder in PYTHONPATH. A table has a temporary name until `os.fsync` has
returned, so a test finds the process that writes it, and nothing else waits. The folder HUNG notes which files it was.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

_fsync = os.fsync


def _slow_fsync(file: int) -> None:
    path = Path(os.readlink(f"/proc/self/fd/{file}"))
    if re.search(os.environ["HANGING"], str(path)):
        try:
            (Path(os.environ["HUNG"]) / f"{path.parent.name}-{path.name}").touch(exist_ok=False)
            time.sleep(3600)
        except FileExistsError:
            pass
    _fsync(file)


if "HANGING" in os.environ:
    os.fsync = _slow_fsync
