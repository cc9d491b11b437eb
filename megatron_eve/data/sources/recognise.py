"""Which files --input names, which layout they have, and the source that reads them."""

from __future__ import annotations

import glob
import importlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.rows import LINE_SUFFIXES, RowReader
from megatron_eve.data.sources.fields import VIDEO_SUFFIXES, parse_object
from megatron_eve.data.sources.source import Source

FORMATS = {
    "llava": "llava:LlavaSource",
    "webdataset": "webdataset:WebdatasetSource",
    "parquet": "parquet:ParquetSource",
    "mmc4": "mmc4:Mmc4Source",
    "text": "text:TextSource",
    "open_images": "open_images:OpenImagesSource",
    "video": "video:VideoSource",
}
"""Names of the layouts, and where each is read."""

_OF_SUFFIX = {".json": "llava", ".tar": "webdataset", ".parquet": "parquet", ".csv": "open_images"}
_OF_SUFFIX |= dict.fromkeys(VIDEO_SUFFIXES, "video")
_UNPACK = {
    ".zip": "unzip it",
    ".gz": "gunzip it",
    ".tgz": "gunzip it",
    ".bz2": "bunzip2 it",
    ".xz": "unxz it",
    ".zst": "unzstd it",
    ".pkl": "pickles are never opened, as they can run code; take the JSON, tar or CSV it was made from",
    ".pickle": "pickles are never opened, as they can run code; take the JSON, tar or CSV it was made from",
}
_LOOKED_AT = 20  # rows, of which the first that is a JSON object tells the layout


def input_files(words: Sequence[str]) -> list[Path]:
    """The files that --input names, those of a pattern in the order of their names.

    Args:
        words: files, or patterns such as `shards/*.tar`.

    Raises:
        DataError: nothing matches, a file cannot be read, is a folder, or is named twice.
    """
    files: list[Path] = []
    for word in words:
        if os.path.isdir(word):
            raise DataError(f"--input {word} is a folder: name its files, as in '{word.rstrip('/')}/*.json'")
        named = [word] if os.path.lexists(word) else sorted(glob.glob(word))
        if not named and glob.has_magic(word):
            raise DataError(f"--input {word}: no file matches this pattern")
        files += map(Path, named or [word])
    for file in files:
        try:
            with file.open("rb") as stream:
                stream.read(1)
        except OSError as error:
            raise DataError(
                f"cannot open {file} ({error.strerror}): give --input a file, or a pattern in quotation marks"
            ) from error
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise DataError(f"--input names {twice[0]} twice: its rows would stand twice in the dataset")
    return files


def recognise(files: Sequence[Path]) -> str:
    """The layout that all files have, from their suffixes and, of JSON lines, the first object.

    Raises:
        DataError: it is not known, or not the same for all.
    """
    first = _layout(files[0])
    for file in files[1:]:
        if (other := _layout(file)) != first:
            raise DataError(
                f"--input names files of two layouts, {files[0]} ({first}) and {file} ({other}): make a dataset of "
                "each and join them with tools/merge_datasets.py, or say --input-format"
            )
    return first


def open_source(words: Sequence[str], name: str | None, image_root: str | None) -> Source:
    """The source that reads the files of --input.

    Args:
        words: see `input_files`.
        name: of the layout; None recognises it.
        image_root: the folder that names of pictures are relative to, if there is one.

    Raises:
        DataError: as `input_files` and `recognise`; or the name is not that of a layout.
    """
    files = input_files(words)
    name = name or recognise(files)
    if name not in FORMATS:
        raise DataError(f"--input-format {name}: use one of {', '.join(FORMATS)}")
    module, kind = FORMATS[name].split(":")
    source: Source = getattr(importlib.import_module(f"megatron_eve.data.sources.{module}"), kind)(
        files, image_root
    )
    return source


def _layout(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in _UNPACK:
        raise DataError(f"--input {file}: {_UNPACK[suffix]}")
    if suffix in LINE_SUFFIXES:
        return _layout_of_lines(file)
    if suffix not in _OF_SUFFIX:
        raise DataError(
            f"--input {file}: its layout is not known by its suffix; say --input-format, one of {', '.join(FORMATS)}"
        )
    return _OF_SUFFIX[suffix]


def _layout_of_lines(file: Path) -> str:
    with RowReader(file) as reader:
        for number, (_, text) in enumerate(reader.texts()):
            try:
                fields = parse_object(text)
            except SkipRow:  # a damaged row among others: the next one tells
                if number < _LOOKED_AT:
                    continue
                break
            if "conversations" in fields:
                return "llava"
            if "text_list" in fields:
                return "mmc4"
            if "text" in fields or {"inputs", "targets"} <= fields.keys():
                return "text"
            break
    return "llava"  # whose reader says what is wrong with each row
