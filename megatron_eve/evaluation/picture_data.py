"""Datasets of tasks that ask for pictures: parquet files with pictures and labels, and prompts with reference pictures.

They are read as they are: nothing is converted.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import yaml

from megatron_eve.data.errors import DataError, SkipRow

PROMPTS, PICTURES = "meta_data.json", "mjhq30k_imgs"
"""Names of a dataset of prompts: `{ID: {"category": ..., "prompt": ...}}`, and the folder of CATEGORY/ID.jpg."""
CLASSES = "classes.json"
"""Names of the classes of a dataset, if they are not to be those of its README: a list, in the order of the labels, of
texts, or of lists of texts."""


JUDGED_PROMPTS, SKILLS = "genai_image.json", "genai_skills.json"
"""Names of GenAI-Bench's files: `{ID: {"prompt": ...}}`, and `{"basic": [ID, ...], "advanced": ..., ...}`, which may be
missing."""


class PictureRows:
    """Pictures and labels of parquet files, in order.

    Args:
        files: with the columns `image` ({bytes, path}) and `label`.
        where: begins the messages of errors.

    Raises:
        DataError: a file that is none of parquet.
    """

    def __init__(self, files: Sequence[Path], where: str) -> None:
        self._groups: list[tuple[Path, int]] = []
        self._firsts: list[int] = []
        self._read: tuple[int, pyarrow.ChunkedArray] | None = None
        self._count = 0
        for path in files:
            try:
                metadata = pyarrow.parquet.read_metadata(path)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{where}: {path} is not a parquet file ({str(error).splitlines()[0]}); copy it again"
                ) from None
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                self._firsts.append(self._count)
                self._count += metadata.row_group(group).num_rows

    def __len__(self) -> int:
        return self._count

    def image(self, row: int) -> bytes:
        """The file of a picture.

        Raises:
            SkipRow: it cannot be read.
        """
        group = bisect_right(self._firsts, row) - 1
        if self._read is None or self._read[0] != group:
            self._read = group, self._column("image", group)
        found = self._read[1][row - self._firsts[group]].as_py()
        if not isinstance(found, dict) or not found.get("bytes"):
            raise SkipRow("image_missing", f"row {row} has no bytes of a picture")
        return bytes(found["bytes"])

    def labels(self) -> list[Any]:
        """The labels of all rows."""
        return [
            label for group in range(len(self._groups)) for label in self._column("label", group).to_pylist()
        ]

    def _column(self, name: str, group: int) -> pyarrow.ChunkedArray:
        path, number = self._groups[group]
        try:
            return pyarrow.parquet.ParquetFile(path).read_row_group(number, columns=[name]).column(name)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: its rows cannot be read ({str(error).splitlines()[0]}); copy it again"
            ) from None


class ReferencePrompt(NamedTuple):
    """A prompt, and the picture that one of it is compared with."""

    prompt: str
    picture: Path


def read_prompts(folder: Path, where: str) -> list[ReferencePrompt]:
    """The prompts of a dataset, in the order of its file.

    Args:
        folder: of the dataset.
        where: begins the messages of errors.

    Raises:
        DataError: another file than that, or pictures that are missing.
    """
    path = folder / PROMPTS
    rows = _object(path, where, "prompts by id")
    found, missing = [], []
    for name, row in rows.items():
        prompt, category = (row.get("prompt"), row.get("category")) if isinstance(row, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(category, str) or not prompt.strip():
            raise DataError(f'{where}: {path}: {name} has no "prompt" and "category"; copy it again')
        found.append(ReferencePrompt(prompt, folder / PICTURES / category / f"{name}.jpg"))
        if not found[-1].picture.is_file():
            missing.append(found[-1].picture)
    if missing:
        raise DataError(
            f"{where}: {len(missing):,} of {len(found):,} reference pictures are missing, the first of them "
            f"{missing[0]}; unpack the dataset's {PICTURES}.zip there"
        )
    return found


class JudgedPrompt(NamedTuple):
    """A prompt whose picture a judge scores, and the skills that it needs."""

    id: str
    prompt: str
    skills: tuple[str, ...]


def read_judged_prompts(folder: Path, where: str) -> list[JudgedPrompt]:
    """The prompts of GenAI-Bench, in the order of its file, each with its skills where they are said.

    Args:
        folder: of the dataset.
        where: begins the messages of errors.

    Raises:
        DataError: other files than these.
    """
    path = folder / JUDGED_PROMPTS
    rows = _object(path, where, "prompts by id")
    skills: dict[str, list[str]] = {}
    named = folder / SKILLS
    for skill, names in _object(named, where, "lists of ids by skill").items() if named.exists() else ():
        if not isinstance(names, list):
            raise DataError(f"{where}: {named}: {skill} has no list of ids; copy it again")
        for name in names:  # numbers there, and with leading zeros in the file of prompts
            skills.setdefault(_number(name), []).append(skill)
    found = []
    for name, row in rows.items():
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f'{where}: {path}: {name} has no "prompt"; copy it again')
        found.append(JudgedPrompt(name, prompt, tuple(skills.get(_number(name), ()))))
    return found


def _number(name: Any) -> str:
    return str(name).lstrip("0") or "0"


def _object(path: Path, where: str, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: there is none, or an empty one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {path} cannot be read ({str(error).splitlines()[0]}); copy it again"
        ) from None
    if not isinstance(found, dict) or not found:
        raise DataError(f"{where}: {path} is no object of {what}; copy it again")
    return found


def class_names(folder: Path, where: str) -> list[tuple[str, ...]]:
    """The names of a dataset's classes, in the order of the labels: of CLASSES, or the first synonym of each in README.

    Raises:
        DataError: neither has them.
    """
    path = folder / CLASSES
    if path.is_file():
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: {path} cannot be read ({str(error).splitlines()[0]}); mend it"
            ) from None
        names = [(one,) if isinstance(one, str) else one for one in given] if isinstance(given, list) else []
        if not names or not all(
            isinstance(one, (list, tuple)) and one and all(isinstance(text, str) and text for text in one)
            for one in names
        ):
            raise DataError(f"{where}: {path} is no list of names of classes, or of lists of these; mend it")
        return [tuple(one) for one in names]
    found = _readme_names(folder / "README.md")
    if not found:
        raise DataError(
            f"{where}: {folder / 'README.md'} has no names of the classes of its column label; copy the README of the "
            f"hub, or write {CLASSES} there, a list of names in the order of the labels"
        )
    return [(name.partition(",")[0].strip(),) for name in found]


def _readme_names(readme: Path) -> list[str]:
    """The names of the column `label`, a `class_label`, in the head of a README; none where it does not say."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    try:
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except yaml.YAMLError:
        return []
    infos = head.get("dataset_info") if isinstance(head, Mapping) else None
    for info in infos if isinstance(infos, list) else [infos]:
        for feature in (info.get("features") or ()) if isinstance(info, Mapping) else ():
            kind = (
                feature.get("dtype")
                if isinstance(feature, Mapping) and feature.get("name") == "label"
                else None
            )
            names = (kind.get("class_label") or {}).get("names") if isinstance(kind, Mapping) else None
            if isinstance(names, Mapping) and {str(key) for key in names} == {
                str(n) for n in range(len(names))
            }:
                by_number = {str(key): str(name) for key, name in names.items()}
                return [by_number[str(number)] for number in range(len(names))]
    return []
