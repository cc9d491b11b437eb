"""Small JSON files that say how far a curation is: whole and on the disk, or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.files import sync_to_disk


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that has its name once it is complete and on the disk.

    Args:
        path: of the file; its folder is there.
        content: JSON values.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync_to_disk(partial)
    partial.replace(path)
