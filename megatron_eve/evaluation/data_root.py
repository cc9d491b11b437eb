"""`--data-root`: folders of datasets in the hub's layout, `OWNER/NAME/README.md` with parquet files.

They are checked before a harness loads them, since it would look for what is missing on the hub. Nothing is written
there: `datasets` converts parquet to Arrow below `--data-cache-path`, in a folder that is named by the digest of the
dataset: by itself `datasets` takes a copy for that of any folder with the same relative path. Nothing here imports a
harness.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.errors import DataError

FIRST_BYTES = 1 << 20
"""Bytes of each file that are hashed."""
_READERS = 16  # threads: thousands of small files on a network's disk
# What torchrun and Slurm tell a process of the others. lmms-eval would wait for ranks that never come.
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_LMMS_COPIES = "LMMS_EVAL_DATASETS_CACHE"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True)
class DatasetNeed:
    """What a task reads.

    Attributes:
        task: its name.
        path: the dataset's folder below the data root.
        config: of its README; None if it has one.
        split: that is asked.
        columns: that the task reads, where it says so.
        files: names of the files and folders that make up a dataset of another layout, in place of config and split.
    """

    task: str
    path: str
    config: str | None
    split: str
    columns: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def prepare_environment(cache: Path) -> None:
    """Keep the libraries of Hugging Face off the net, and what they convert in a folder.

    Called before they are imported: they read these variables once.
    """
    os.environ.update(_OFFLINE)
    os.environ["HF_HOME"] = str(cache)


@contextlib.contextmanager
def alone_in(root: Path, copies: Path) -> Iterator[None]:
    """Inside, the working directory is the data root, and nothing says that there are other ranks.

    Args:
        root: the data root.
        copies: folder that gets what `datasets` converts.
    """
    import datasets.config

    changed = {name: os.environ.pop(name, None) for name in (*_RANKS, _LMMS_COPIES)}
    before, copies_before = Path.cwd(), datasets.config.HF_DATASETS_CACHE
    os.environ[_LMMS_COPIES], datasets.config.HF_DATASETS_CACHE = str(copies), copies
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)
        datasets.config.HF_DATASETS_CACHE = copies_before
        del os.environ[_LMMS_COPIES]
        os.environ.update({name: value for name, value in changed.items() if value is not None})


def check_dataset(root: Path, need: DatasetNeed) -> list[Path]:
    """Check that a task's dataset is there, and return its parquet files, if it is of these.

    Raises:
        DataError: a missing folder, config, split, column or file: names what is there and the layout that is expected.
    """
    where = f"--tasks {need.task}: --data-root {root}"
    folder = root / need.path
    if not folder.is_dir():
        raise DataError(
            f"{where} has no folder {need.path}: copy the dataset there, as the hub has it "
            f"({', '.join(need.files) or 'README.md and parquet files'})"
        )
    if need.files:
        if missing := [name for name in need.files if not (folder / name).exists()]:
            raise DataError(f"{where}: {need.path} has no {missing[0]}; copy it there, zip files unpacked")
        return []
    patterns = _patterns(folder, need, where)
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        there = sorted({str(path.parent.relative_to(folder)) for path in folder.rglob("*.parquet")})
        raise DataError(
            f"{where}: {need.path} has no file {' or '.join(patterns)}; parquet files are in "
            f"{', '.join(there) or 'none of its folders'}"
        )
    parquet = [path for path in files if path.suffix == ".parquet"]
    if parquet and need.columns:
        _check_columns(parquet[0], need, where)
    return files


def _patterns(folder: Path, need: DatasetNeed, where: str) -> list[str]:
    """Patterns of the files of a split, from the head of README.md, or from the split's name without one."""
    configs = _configs(folder, where)
    if not configs:
        if need.config not in (None, "default"):
            raise DataError(
                f"{where}: {need.path}/README.md names no configs, and the task reads {need.config}; "
                "copy the README of the hub, too"
            )
        return [f"{need.split}*.parquet", f"**/{need.split}-*.parquet"]
    names = [str(config.get("config_name", "default")) for config in configs]
    if need.config is not None and need.config not in names:
        raise DataError(f"{where}: {need.path} has no config {need.config}; there are {', '.join(names)}")
    config = configs[names.index(need.config)] if need.config is not None else configs[0]
    files = config.get("data_files")
    if (
        isinstance(files, str)
        or not isinstance(files, list)
        or not all(isinstance(one, Mapping) for one in files)
    ):
        return [str(files)] if isinstance(files, str) else [f"**/{need.split}-*.parquet"]
    splits = [str(one.get("split")) for one in files]
    if need.split not in splits:
        raise DataError(f"{where}: {need.path} has no split {need.split}; there are {', '.join(splits)}")
    found = files[splits.index(need.split)].get("path")
    return [found] if isinstance(found, str) else [str(one) for one in found or []]


def _configs(folder: Path, where: str) -> list[Mapping[str, Any]]:
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return []
    try:
        head = yaml.safe_load(text.split("---", 2)[1])
    except yaml.YAMLError as error:
        raise DataError(
            f"{where}: the head of {readme} is not YAML ({str(error).splitlines()[0]}); copy it again"
        ) from None
    found = head.get("configs") if isinstance(head, Mapping) else None
    return [one for one in found or [] if isinstance(one, Mapping)]


def _check_columns(path: Path, need: DatasetNeed, where: str) -> None:
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (OSError, ValueError) as error:
        raise DataError(
            f"{where}: {path} is not a parquet file ({str(error).splitlines()[0]}); copy it again"
        ) from None
    if missing := [name for name in need.columns if name not in names]:
        raise DataError(f"{where}: {path} has no column {', '.join(missing)}; it has {', '.join(names)}")


def copies_folder(cache: Path, digest: str) -> Path:
    """The folder of a dataset's copy in Arrow."""
    return cache / digest[:16]


def check_space(cache: Path, files: Mapping[str, Sequence[Path]]) -> None:
    """Refuse to convert datasets to Arrow where there is no room for a second copy; what is there already counts.

    Args:
        cache: `--data-cache-path`.
        files: of each dataset, by its digest.

    Raises:
        ConfigError: naming both sizes.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--data-cache-path {cache}: {error.strerror}; name a folder that can be written"
        ) from None
    wanted = 0
    for digest, some in files.items():
        there = sum(path.stat().st_size for path in copies_folder(cache, digest).rglob("*.arrow"))
        wanted += max(0, sum(path.stat().st_size for path in set(some)) - there)
    if wanted > (free := shutil.disk_usage(cache).free):
        raise ConfigError(
            f"--data-cache-path {cache}: datasets of {wanted / 1e9:,.1f} GB are copied there as Arrow, and "
            f"{free / 1e9:,.1f} GB are free; name a larger disk, or ask fewer --tasks"
        )


def data_digest(folder: Path, without: tuple[str, ...] = ()) -> str:
    """One digest of a dataset's folder: names, sizes and first megabyte of its files, but for hidden ones.

    Args:
        folder: of the dataset.
        without: endings of names; of such files, of which there are many small ones, names and sizes alone count.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        digest.update(_described(name.as_posix(), path, not path.name.endswith(without)))
    return digest.hexdigest()


def pictures_digest(files: Sequence[Path]) -> str:
    """One digest of pictures that lie in a folder of their own, as `data_digest`; one that is not there counts, too."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_READERS) as readers:
        for line in readers.map(lambda path: _described(path.name, path), files):
            digest.update(line)
    return digest.hexdigest()


def _described(name: str, path: Path, content: bool = True) -> bytes:
    first = ""
    try:
        if content:
            with path.open("rb") as file:
                first = hashlib.sha256(file.read(FIRST_BYTES)).hexdigest()
        size = str(path.stat().st_size)
    except FileNotFoundError:
        size = first = "missing"
    return f"{name!r} {size} {first}\n".encode(errors="surrogateescape")
