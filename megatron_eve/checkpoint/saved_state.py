"""Reads the plain values of a checkpoint's `common.pt` without torch.

`torch.save` writes a zip archive whose `data.pkl` is a pickle. Nothing that it names is imported or called: tensors and
classes become placeholders. The values that a run is compared by (configuration, data, frozen models) are plain.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from typing_extensions import override


class _Placeholder:
    """Placeholder for an object of any class."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> _Placeholder:
        return self

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """As a list has it, since a pickle fills lists so."""

    def extend(self, _: object) -> None:
        """As a list has it, since a pickle fills lists so."""


class _PlainUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        return _Placeholder

    @override
    def persistent_load(self, pid: Any) -> Any:
        return _Placeholder()


def read_common(folder: Path) -> dict[str, Any] | None:
    """The plain values in the `common.pt` of a checkpoint's folder; None if it is missing or cannot be read.

    Whether the checkpoint is complete is checked when it is loaded.
    """
    try:
        with zipfile.ZipFile(folder / "common.pt") as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(name) as stream:
                values = _PlainUnpickler(stream).load()
    except Exception:  # a damaged pickle raises nearly anything
        return None
    return values if isinstance(values, dict) else None
