"""Reads a model folder in Hugging Face layout: its tensors, one at a time."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_eve.config import ConfigError
from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.hf_format import PartFolder
from megatron_eve.models.name_rules import renamed
from megatron_eve.runtime.wrong_content import wrong_content

# As safetensors and as torch spell them. Older folders have positions among their tensors, as int64.
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
# Names of the weights' files in a folder: shards with an index, or one file; the older ones are pickles.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# What says of a folder that it is a checkpoint of this package (`dist_folder`): a part may be one.
_CHECKPOINT = ".metadata"

_ALL_IN_ONE: Mapping[str, Mapping[str, str]] = {".": {}}


class HFFolder:
    """The shards of a folder, safetensors or pickled, as one lazily read collection of tensors.

    A part may lie in a checkpoint of this package instead, under its published names.

    From a pickle only tensors are read (torch's `weights_only`): no code in it runs.

    Args:
        folder: of the model.
        folders: in it, where the weights lie, each with how its keys are renamed (`HFFormat.folders`).

    Raises:
        ConfigError: no shards, one that cannot be read, or an index that names a shard which is not there or tensors
            that their shard lacks.
    """

    def __init__(self, folder: Path, folders: Mapping[str, Mapping[str, str]] = _ALL_IN_ONE) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        # The shard of each tensor, and its key there.
        self._places: dict[str, tuple[Path, str]] = {}
        for name, prefixes in folders.items():
            for key, path in self._shards(folder / name).items():
                self._places[renamed(key, prefixes)] = path, key

    def add(self, part: PartFolder) -> None:
        """Take the tensors of one part of the model from a folder of its own.

        Raises:
            ConfigError: as for the model's folder; or none of that part in it.
        """
        try:
            shards = self._shards(part.folder)
        except ConfigError as error:
            raise ConfigError(f"{part.flag} {error}") from None
        for prefix, ours in part.prefixes.items():
            keys = [key for key in shards if key.startswith(prefix)]
            for key in keys:
                self._places[ours + key.removeprefix(prefix)] = shards[key], key
            if keys:
                return

    def _shards(self, folder: Path) -> dict[str, Path]:
        """The shard of each tensor of a folder, by its key there."""
        if (folder / _CHECKPOINT).is_file():
            return dict.fromkeys(self._tensors(folder), folder)
        whole, index = _weights_of(folder)
        if whole is not None:
            return dict.fromkeys(self._tensors(whole).keys(), whole)
        assert index is not None
        places = _places(index)
        for path in sorted(set(places.values())):
            if not path.exists():
                raise ConfigError(f"{path}: named by {index.name} and missing; copy the folder again")
            lacking = {key for key, place in places.items() if place == path}
            lacking -= set(self._tensors(path).keys())
            if lacking:
                raise ConfigError(
                    f"{path}: holds no {min(lacking)}, which {index.name} says it does; copy the folder again"
                )
        return places

    def add_file(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        """Take the tensors of one more file, in place of those of the same name.

        Args:
            path: the file.
            names: of the tensors that are taken, by their keys in the file; None takes all, under their keys.

        Raises:
            ConfigError: it cannot be read.
        """
        taken = {key: key for key in self._tensors(path).keys()} if names is None else names  # noqa: SIM118
        self._places.update({name: (path, key) for key, name in taken.items()})

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._places)

    def describe(self, key: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of a tensor, without reading the tensor.

        Raises:
            ConfigError: the folder has none of that name, or it is not of floating-point numbers (quantised weights are
                not).
        """
        path, name = self._place(key)
        tensors = self._tensors(path)
        if isinstance(tensors, DistFolder):
            shape, dtype = tensors.shape(name), str(tensors.dtype(name)).removeprefix("torch.")
        elif isinstance(tensors, dict):
            shape, dtype = tensors[name].shape, str(tensors[name].dtype).removeprefix("torch.")
        else:
            part = tensors.get_slice(name)
            shape, dtype = torch.Size(part.get_shape()), part.get_dtype()
        if dtype not in _DTYPES:
            raise ConfigError(
                f"{path}: {name} is {dtype}; quantised weights cannot be trained, take the original ones"
            )
        return shape, _DTYPES[dtype]

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConfigError: if the folder has none of that name, or it lies in a file that cannot be read.
        """
        path, name = self._place(key)
        tensors = self._tensors(path)
        if isinstance(tensors, DistFolder):
            try:
                return tensors.tensor(name)
            except Exception as error:  # a damaged file raises nearly any
                raise ConfigError(f"{path}: {name}: {_error_text(path, error)}") from None
        return tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name)

    def _place(self, key: str) -> tuple[Path, str]:
        """The shard that holds a tensor, and its key there."""
        if key not in self._places:
            raise ConfigError(f"{self.folder}: has no tensor {key}; this is not a whole model, copy it again")
        return self._places[key]

    def _tensors(self, path: Path) -> Any:
        """An open shard: a reader of safetensors, the memory-mapped dictionary of a pickle, or a checkpoint."""
        if path not in self._open:
            try:
                if path.is_dir():
                    self._open[path] = DistFolder(path)
                elif path.suffix == ".safetensors":
                    self._open[path] = safe_open(path, "pt")
                else:
                    mapped = zipfile.is_zipfile(path)  # as torch has written since 1.6
                    self._open[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except Exception as error:  # a damaged pickle raises nearly any
                raise ConfigError(f"{path}: {_error_text(path, error)}") from None
            if path.suffix != ".safetensors" and not path.is_dir():
                _check_pickle(path, self._open[path])
        return self._open[path]


def _weights_of(folder: Path) -> tuple[Path | None, Path | None]:
    """The files to read, in the order of transformers: a single file, or else the index of shards.

    An index beside a single file may be left over from other weights, so the file is used.
    """
    for name in _WEIGHTS:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.exists():
            return whole, None
        if index.exists():
            return None, index
    others = ("*.bin", "*.safetensors")
    found = sorted(path.name for kind in others for path in folder.glob(kind))
    shown = f"; it has {', '.join(found[:3])}, and no index that says what is in them" if found else ""
    raise ConfigError(
        f"{folder}: holds no weights (model.safetensors or pytorch_model.bin, whole or in shards with an index){shown}"
    )


def _places(index: Path) -> dict[str, Path]:
    """The shard of each tensor, by an index."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: index.parent / shard for key, shard in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        other = wrong_content(index)
        problem = (
            f"cannot be read: it {other}" if other else "no index of a model's shards; copy the folder again"
        )
        raise ConfigError(f"{index}: {problem}") from None


def _error_text(path: Path, error: Exception) -> str:
    """Error text for a shard that cannot be opened, with the remedy."""
    if other := wrong_content(path):
        return f"cannot be read: it {other}"
    code = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch names the class that it refused to load
    if isinstance(error, pickle.UnpicklingError) and code:
        return f"asks for {code[1]}, and no code of a model folder runs; take weights that are safetensors"
    # torch's own message about a pickle advises to run its code.
    pickled = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
    reason = "no file that torch saved, or a damaged one" if pickled else str(error).split("\n")[0]
    return f"cannot be read ({reason}); copy the folder again"


def _check_pickle(path: Path, content: object) -> None:
    if not isinstance(content, dict) or not all(isinstance(x, torch.Tensor) for x in content.values()):
        raise ConfigError(
            f"{path}: holds other things than tensors by name, so these are not a model's weights alone; take the "
            "folder that save_pretrained wrote"
        )
