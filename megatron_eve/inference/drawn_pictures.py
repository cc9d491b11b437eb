"""The folder that drawn pictures go to: each picture with its codes, what they were drawn with, and a sheet of all.

Picture 0 of prompt 12 is 00012_00.png with its codes int64 [h, w, D] in 00012_00.npy; of a video the frames are
00012_00_0.png and so on, and the codes [frames, h, w, D]. Files are written under another name and renamed, the codes
last: a picture whose codes are there is whole, and is not drawn again. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megatron_eve.config import ConfigError
from megatron_eve.config.json_file import read_json
from megatron_eve.data.inspecting.drawing import load_font, shown

VIDEO_FRAMES = 8
"""Pictures of a video."""
RECORD, SHEET = "drawing.json", "sheet.png"
_NAME = re.compile(r"(\d{5,})_(\d{2,})")
_MOST_SHEET, _MOST_CELL = 6000, 256  # pixels
_MOST_ROWS = _MOST_COLUMNS = 64  # of a sheet
_GAP, _LINE = 8, 22
_INK, _GROUND = (28, 28, 28), (255, 255, 255)


class Place(NamedTuple):
    """Which picture: the number of its prompt, and its own among those of the prompt."""

    prompt: int
    number: int

    @property
    def name(self) -> str:
        """Of its files, without their endings."""
        return f"{self.prompt:05d}_{self.number:02d}"


class DrawnPictures:
    """An output folder.

    Args:
        folder: made if it is not there.
        prompts: texts, in order.
        settings: everything else that the pictures depend on, by flag, as JSON has it.
        frames: pictures of each drawing.

    Raises:
        ConfigError: it holds pictures of other prompts or settings.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], settings: dict[str, Any], frames: int) -> None:
        self.folder, self._prompts, self._frames = folder, list(prompts), frames
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output-dir {folder}: cannot be made ({error.strerror}); name another folder"
            ) from None
        path = folder / RECORD
        if path.exists():
            before = read_json(path)
            if not isinstance(before, dict) or not isinstance(before.get("prompts"), list):
                raise ConfigError(f"{path}: is no record of drawings; give another --output-dir")
            _compare(path, before, {"prompts": self._prompts, **settings})
            self._prompts = max(self._prompts, before["prompts"], key=len)
        text = json.dumps({"prompts": self._prompts, **settings}, indent=1, ensure_ascii=False)
        _write(path, lambda file: file.write(text.encode()))

    def is_whole(self, place: Place) -> bool:
        """Has this picture been drawn?"""
        return (self.folder / f"{place.name}.npy").is_file()

    def write(self, place: Place, codes: NDArray[np.int64], pictures: NDArray[np.uint8]) -> None:
        """Write a picture, whole or not at all.

        Args:
            place: of it.
            codes: [frames, h, w, D].
            pictures: [frames, P, P, 3].
        """
        for path, picture in zip(self._files(place), pictures, strict=True):
            image = Image.fromarray(picture)
            _write(path, lambda file, image=image: image.save(file, "PNG"))  # type: ignore[misc]
        kept = codes if self._frames > 1 else codes[0]
        _write(self.folder / f"{place.name}.npy", lambda file: np.save(file, kept))

    def write_sheet(self) -> Path:
        """A row for each prompt with its pictures, or for each video with its frames; returns the file.

        Of many, the first 64 rows and the first 64 pictures of each.
        """
        names = (_NAME.fullmatch(path.stem) for path in self.folder.glob("*.npy"))
        found: dict[tuple[int, ...], list[Path]] = {}
        for place in sorted(Place(int(name[1]), int(name[2])) for name in names if name):
            found.setdefault(place if self._frames > 1 else (place.prompt,), []).extend(self._files(place))
        rows = {row: files[:_MOST_COLUMNS] for row, files in list(found.items())[:_MOST_ROWS]}
        columns = max(len(files) for files in rows.values())
        cell = min(_MOST_CELL, (_MOST_SHEET - _GAP) // columns - _GAP)
        height = _LINE + cell + _GAP
        sheet = Image.new("RGB", (_GAP + columns * (cell + _GAP), len(rows) * height + _GAP), _GROUND)
        draw, font = ImageDraw.Draw(sheet), load_font(13)
        for row, ((prompt, *_), files) in enumerate(rows.items()):
            draw.text((_GAP, row * height + 4), shown(self._prompts[prompt], font), _INK, font)
            for column, path in enumerate(files):
                with Image.open(path) as picture:
                    small = picture.resize(
                        (cell, cell),
                        Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS,
                    )
                sheet.paste(small, (_GAP + column * (cell + _GAP), row * height + _LINE))
        path = self.folder / SHEET
        _write(path, lambda file: sheet.save(file, "PNG"))
        return path

    def _files(self, place: Place) -> list[Path]:
        ends = [f"_{frame}" for frame in range(self._frames)] if self._frames > 1 else [""]
        return [self.folder / f"{place.name}{end}.png" for end in ends]


def _compare(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse pictures of other prompts or settings; prompts may be added at the end, or left out there."""
    for (number, ours), theirs in zip(enumerate(now["prompts"]), before["prompts"], strict=False):
        if ours != theirs:
            raise ConfigError(
                f"{path}: its prompt {number} is {theirs!r}, and this command's {ours!r}; give another --output-dir"
            )
    for name in sorted({*before, *now} - {"prompts"}):
        theirs, ours = before.get(name, "left out"), now.get(name, "left out")
        if theirs != ours:
            raise ConfigError(
                f"{path}: its pictures were drawn with {name} {theirs}, and this command has {ours}; give another "
                "--output-dir"
            )


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under another name, and rename it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
    os.replace(partial, path)
