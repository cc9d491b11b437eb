"""OpenImages: pictures in folders, and a CSV that says where each comes from. There are no captions.

Layout (storage.googleapis.com/openimages, version 6): `ImageID,Subset,OriginalURL,OriginalLandingURL,License,
AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,Thumbnail300KURL,Rotation`, quoted where a field has a comma;
older files have no Rotation. An ImageID is 16 hexadecimal digits, and its picture is `<ImageID>.jpg`.
"""

from __future__ import annotations

import csv
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import source_name
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.text.conversation import IMAGE_TOKEN

_ID = re.compile(r"[0-9a-f]{16}")
_MAX_LINE = 4 << 20  # bytes; csv refuses a field of 128 KiB by itself


class OpenImagesSource(Source):
    """Pictures of OpenImages, each a pair with an empty caption.

    Pictures lie anywhere below `image_root` (in `V6Train1/` and so on, say). The folder is walked once,
    at the first row, and kept as 12 bytes a picture. `meta` has the fields of the CSV that are not empty, by their
    published names. Rotation (degrees, 0 to 270) says how far the stored picture is turned, as is commonly understood
    of it; nothing published says in which direction, so no picture is turned by it.

    Args:
        files: CSV files.
        image_root: the folder of the pictures.

    Raises:
        DataError: while iterating, there is no such folder, no picture below it, or a file that is not such a CSV.
    """

    def rows(self) -> Iterator[RawRow]:
        """The fields of each row, with the path of its picture."""
        if not self._files:
            return
        if self._image_root is None:
            raise DataError(
                f"{self._files[0]} names pictures: give --image-root, the folder that they are in"
            )
        pictures: _Pictures | None = None
        before = 0
        for file in self._files:
            with _open(file) as raw:
                # csv takes line breaks as they are; bytes that are not UTF-8 matter to a title alone.
                lines = (line.decode("utf-8-sig", "backslashreplace") for line in _lines(raw, file))
                reader = csv.reader(lines, strict=True)
                number = 0
                try:
                    names = next(reader, [])
                    if "ImageID" not in names:
                        raise DataError(
                            f"{file} is not a CSV of OpenImages: its first line has no column ImageID; give --input "
                            "the file with the image ids and URLs, such as train-images-boxable-with-rotation.csv"
                        )
                    pictures = pictures or _Pictures(self._image_root)
                    place = names.index("ImageID")
                    for number, values in enumerate(reader, start=1):
                        self._position = before + raw.tell()
                        if values:
                            yield _row(str(file), number, names, values, place, pictures)
                except csv.Error as error:
                    raise DataError(
                        f"{file}, row {number + 1}: the CSV cannot be read past this ({error}), a quote may be "
                        "missing: repair it, it may be a download that broke off"
                    ) from error
            before += file.stat().st_size
            self._position = before

    def _make_record(self, row: RawRow) -> Record:
        path, found = row.payload
        meta: dict[str, Any] = {key: value for key, value in found.items() if key != "ImageID"}
        if re.fullmatch(r"\d{1,3}(\.0*)?", meta.get("Rotation", "")):
            meta["Rotation"] = int(float(meta["Rotation"]))
        return Record(
            id=found["ImageID"],
            source=source_name(row.file),
            kind="pair",
            images=[ImageFile(path=path)],
            turns=[{"from": "gpt", "value": IMAGE_TOKEN}],
            meta=meta,
        )


def _open(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"cannot open {file} ({error.strerror}): give --input a CSV of OpenImages") from error


def _lines(raw: IO[bytes], file: Path) -> Iterator[bytes]:
    """Lines of a CSV, none so long that it fills the memory."""
    while line := raw.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            raise DataError(
                f"{file} is not a CSV of OpenImages: it has a line of more than {_MAX_LINE >> 20} MiB; give --input "
                "the file with the image ids and URLs"
            )
        yield line


def _row(
    file: str, number: int, names: list[str], values: list[str], place: int, pictures: _Pictures
) -> RawRow:
    if len(values) != len(names):
        return RawRow(
            file, number, None, ("csv_fields", f"{len(values)} fields, and the first line has {len(names)}")
        )
    path = pictures.find(values[place])
    if path is None:
        missing = f"no {values[place]:.80}.jpg below --image-root"
        return RawRow(file, number, None, ("image_missing", missing))
    return RawRow(
        file, number, (path, {name: value for name, value in zip(names, values, strict=True) if value})
    )


class _Pictures:
    """Where the pictures of a folder and of all folders in it lie: 8 bytes for an id and 4 for its folder.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """

    def __init__(self, root: str) -> None:
        if not Path(root).is_dir():
            raise DataError(f"--image-root {root} is not a directory")
        ids, places = array("Q"), array("I")
        self._folders: list[str] = []
        for folder, below, names in os.walk(root):
            below.sort()
            found = [name for name in names if name.endswith(".jpg") and _ID.fullmatch(name[:-4])]
            ids.extend(int(name[:-4], 16) for name in found)
            places.extend([len(self._folders)] * len(found))
            self._folders.append(os.path.relpath(folder, root))
        if not ids:
            raise DataError(
                f"no picture of OpenImages (16 hexadecimal digits and .jpg) is below --image-root {root}: give the "
                "folder that the archives of pictures were unpacked to"
            )
        # Stable: of a picture that lies in two folders, the first one counts.
        order = np.argsort(np.frombuffer(ids, dtype=np.uint64), kind="stable")
        self._ids = np.frombuffer(ids, dtype=np.uint64)[order]
        self._places = np.frombuffer(places, dtype=np.uint32)[order]

    def find(self, name: str) -> str | None:
        """Path of a picture, relative to the root; None if there is none."""
        if not _ID.fullmatch(name):
            return None
        wanted = np.uint64(int(name, 16))
        at = int(np.searchsorted(self._ids, wanted))
        if at == len(self._ids) or self._ids[at] != wanted:
            return None
        return os.path.normpath(os.path.join(self._folders[self._places[at]], f"{name}.jpg"))
