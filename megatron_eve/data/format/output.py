"""What is checked of --output-prefix before any work: that it can be written, and that no dataset is there already."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.manifest import (
    IMAGE_PARTS,
    MANIFEST,
    PARTIAL,
    PIXEL_PARTS,
    TEXT_PARTS,
    read_info,
)
from megatron_eve.runtime.errors import UserError

_REMEDY = "add --overwrite to replace it, or choose another --output-prefix"


def check_output(prefix: str, overwrite: bool) -> None:
    """Refuse a prefix that no dataset can have, or, without `overwrite`, one that a dataset has.

    What a run that was killed left is no dataset: its files end in `.partial`, or OUT_dataset.json.partial is there and
    OUT_dataset.json is not.

    Args:
        prefix: of the dataset that is to be written (--output-prefix).
        overwrite: a dataset that is there may be replaced (--overwrite).

    Raises:
        DataError: naming the flag, what is there, and the remedy.
    """
    check_prefix(prefix)
    if not overwrite:
        refuse_existing(prefix)


def check_prefix(prefix: str) -> None:
    """Raise DataError if nothing can be written at `prefix` (--output-prefix)."""
    if Path(prefix).name in ("", "..") or prefix.endswith(("/", "/.")):
        raise DataError(
            f"--output-prefix {prefix} names a folder: add a name for the dataset, as in "
            f"{prefix.rstrip('/.') or '.'}/captions"
        )
    for folder in Path(prefix).absolute().parents:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"--output-prefix {prefix}: {folder} is a file; choose another --output-prefix")


def refuse_existing(prefix: str) -> None:
    """Raise DataError if a dataset is at `prefix`, or the files of one without its manifest."""
    manifest = Path(prefix + MANIFEST)
    if manifest.exists():
        made = datetime.fromtimestamp(manifest.stat().st_mtime).date().isoformat()
        try:
            samples = read_info(prefix).num_samples
            size = f"{samples:,} sample{'' if samples == 1 else 's'}"
        except UserError:  # damaged, or of another version
            size = "its manifest cannot be read"
        raise DataError(f"{prefix} is a dataset already (made {made}, {size}): {_REMEDY}")
    if Path(f"{manifest}{PARTIAL}").exists():
        return  # a run was killed while it gave the files their names
    for part in (*TEXT_PARTS, *IMAGE_PARTS, *PIXEL_PARTS):
        if Path(prefix + part).exists():
            raise DataError(
                f"{prefix}{part} is there already, a file of a dataset without its {manifest.name}: {_REMEDY}"
            )
