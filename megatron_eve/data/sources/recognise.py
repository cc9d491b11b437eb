"""Resolves --input: expands patterns, checks the files, detects their layout and opens the source."""

from __future__ import annotations

import glob
import importlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.sources.fields import VIDEO_SUFFIXES, parse_object
from megatron_eve.data.sources.json_reader import LINE_SUFFIXES, JsonReader
from megatron_eve.data.sources.source import Source
from megatron_eve.runtime.wrong_content import wrong_content

FORMATS = {
    "llava": "llava:LlavaSource",
    "webdataset": "webdataset:WebdatasetSource",
    "parquet": "parquet:ParquetSource",
    "mmc4": "mmc4:Mmc4Source",
    "text": "text:TextSource",
    "open_images": "open_images:OpenImagesSource",
    "video": "video:VideoSource",
}
"""{name of a layout (--input-format): module and class of its source}."""

LAYOUT_BY_SUFFIX = {".json": "llava", ".tar": "webdataset", ".parquet": "parquet", ".csv": "open_images"}
LAYOUT_BY_SUFFIX |= dict.fromkeys(VIDEO_SUFFIXES, "video")
_PICKLES = (".pkl", ".pickle")
_UNPACK_COMMANDS = {
    b"PK\x03\x04": "unzip",
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
"""{first bytes of a compressed file: command that unpacks it}."""
_FILE_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_MAX_ROWS_INSPECTED = 20  # the first JSON object among these rows decides the layout


def input_files(patterns: Sequence[str]) -> list[Path]:
    """Files of --input; the files of a pattern are sorted by name.

    Args:
        patterns: file names, or glob patterns such as `shards/*.tar`.

    Raises:
        DataError: no file matches, or a file cannot be read, is compressed, is a web page or a git-lfs pointer, is no
            regular file, or is named twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise DataError(
                f"--input {pattern} is a folder: name its files, as in '{pattern.rstrip('/')}/*.json'"
            )
        named = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        if not named and glob.has_magic(pattern):
            raise DataError(f"--input {pattern}: no file matches this pattern")
        files += map(Path, named or [pattern])
    for file in files:
        _check_file(file)
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise DataError(f"--input names {twice[0]} twice: its rows would be in the dataset twice")
    return files


def _check_file(file: Path) -> None:
    """Refuse files that no source can read."""
    try:
        mode = stat.S_IFMT(file.stat().st_mode)
        if mode != stat.S_IFREG:  # a pipe can be read only once, and opening it may block
            raise DataError(
                f"--input {file} is {_FILE_TYPES.get(mode, 'no file')}: give it files, which are read more than once"
            )
        if file.suffix.lower() in VIDEO_SUFFIXES:
            return  # each video is one row, which is skipped and counted if it cannot be used
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise DataError(
            f"cannot open {file} ({error.strerror}): give --input a file, or a pattern in quotation marks"
        ) from error
    for magic, command in _UNPACK_COMMANDS.items():
        if head.startswith(magic):
            raise DataError(
                f"{file} is compressed: unpack it with {command}, and give --input what comes out"
            )
    # An empty file is accepted: some layouts have shards without rows.
    if head and (what := wrong_content(file)):
        raise DataError(f"{file} {what}")


def recognise(files: Sequence[Path]) -> str:
    """Detect the layout of the files, from their suffixes and, for JSON lines, from the first object.

    Raises:
        DataError: the layout is unknown, or the files differ in it.
    """
    first = _layout(files[0])
    for file in files[1:]:
        if (other := _layout(file)) != first:
            raise DataError(
                f"--input names files of two layouts, {files[0]} ({first}) and {file} ({other}): make a dataset of "
                "each and join them with tools/merge_datasets.py, or give --input-format"
            )
    return first


def open_source(patterns: Sequence[str], name: str | None, image_root: str | None) -> Source:
    """Open the source that reads the files of --input.

    Args:
        patterns: see `input_files`.
        name: layout (--input-format); None detects it.
        image_root: folder that image names are relative to, if there is one.

    Raises:
        DataError: see `input_files` and `recognise`; or `name` is not a layout.
    """
    files = input_files(patterns)
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
    if suffix in _PICKLES:
        raise DataError(
            f"--input {file}: pickles are never opened, as they can run code; take the JSON, tar or CSV it was made "
            "from"
        )
    if suffix in LINE_SUFFIXES:
        return _layout_of_lines(file)
    if suffix not in LAYOUT_BY_SUFFIX:
        raise DataError(
            f"--input {file}: its layout is not known from its suffix; give --input-format, one of {', '.join(FORMATS)}"
        )
    return LAYOUT_BY_SUFFIX[suffix]


def _layout_of_lines(file: Path) -> str:
    with JsonReader(file) as reader:
        for number, (_, text) in enumerate(reader.texts()):
            try:
                fields = parse_object(text)
            except SkipRow:  # a damaged row: try the next one
                if number < _MAX_ROWS_INSPECTED:
                    continue
                break
            if "conversations" in fields:
                return "llava"
            if "text_list" in fields:
                return "mmc4"
            if "text" in fields or {"inputs", "targets"} <= fields.keys():
                return "text"
            break
    return "llava"  # the reader of this layout reports what is wrong with each row
