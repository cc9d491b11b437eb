"""OpenImages: images in folders, and a CSV with the origin of each. There are no captions.

Layout (storage.googleapis.com/openimages, version 6): `ImageID,Subset,OriginalURL,OriginalLandingURL,License,
AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,Thumbnail300KURL,Rotation`, quoted where a field has a comma;
older files have no Rotation. An ImageID is 16 hexadecimal digits, and its file is `<ImageID>.jpg`.
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
from megatron_eve.models.text_format import IMAGE_TOKEN

_ID = re.compile(r"[0-9a-f]{16}")
_MAX_LINE = 4 << 20  # bytes; the csv module itself refuses fields of more than 128 KiB


class OpenImagesSource(Source):
    """Images of OpenImages, each a pair with an empty caption.

    Images may be anywhere below `image_root` (for example in `V6Train1/`). The folder is walked once, at the first
    row; the index takes 12 bytes per image. `meta` has the non-empty fields of the CSV under their published names.
    Rotation (degrees, 0 to 270) is kept but not applied: its direction is not documented.

    Args:
        files: CSV files.
        image_root: folder of the images.

    Raises:
        DataError: while iterating, the folder does not exist or has no image, or a file is not an OpenImages CSV.
    """

    def rows(self) -> Iterator[RawRow]:
        """The fields of each row, with the path of its image."""
        if not self._files:
            return
        if self._image_root is None:
            raise DataError(f"{self._files[0]} names images: give --image-root, the folder that they are in")
        pictures: _Pictures | None = None
        before = 0
        for file in self._files:
            with _open(file) as raw:
                # The csv module handles line breaks itself; bytes that are not UTF-8 can only occur in titles.
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
    """Lines of a CSV; raises DataError at a line longer than _MAX_LINE, so that memory stays bounded."""
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
    """Index from image id to path, for a folder and all its subfolders: 8 bytes for an id and 4 for its folder.

    Raises:
        DataError: the folder does not exist or has no image.
    """

    def __init__(self, root: str) -> None:
        if not Path(root).is_dir():
            raise DataError(
                f"--image-root {root} is not a folder: name the one that file names are relative to"
            )
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
                f"no OpenImages file (16 hexadecimal digits and .jpg) is below --image-root {root}: give the "
                "folder that the image archives were unpacked to"
            )
        # A stable sort: if an image is in two folders, the first is used.
        order = np.argsort(np.frombuffer(ids, dtype=np.uint64), kind="stable")
        self._ids = np.frombuffer(ids, dtype=np.uint64)[order]
        self._places = np.frombuffer(places, dtype=np.uint32)[order]

    def find(self, name: str) -> str | None:
        """Path of an image relative to the root; None if it is not there."""
        if not _ID.fullmatch(name):
            return None
        wanted = np.uint64(int(name, 16))
        at = int(np.searchsorted(self._ids, wanted))
        if at == len(self._ids) or self._ids[at] != wanted:
            return None
        return os.path.normpath(os.path.join(self._folders[self._places[at]], f"{name}.jpg"))
