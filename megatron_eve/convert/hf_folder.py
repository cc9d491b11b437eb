"""A model folder in Hugging Face layout: its tensors one at a time, and new folders written shard by shard."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_eve.config import ConfigError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Names of the weights' files in a folder: shards with an index, or one file; the older ones are pickles.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HFFolder:
    """The shards of a folder, safetensors or pickled, as one lazily read collection of tensors.

    Of a pickle only tensors are read (torch's `weights_only`): no code in it runs.

    Raises:
        ConfigError: no shards, or an index that names a shard which is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        for name in _WEIGHTS:
            index = folder / f"{name}.index.json"
            if index.exists():
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._places = {key: folder / shard for key, shard in places.items()}
                break
            if (folder / name).exists():
                self._places = dict.fromkeys(self._tensors(folder / name).keys(), folder / name)
                break
        else:
            raise ConfigError(
                f"{folder}: holds no weights (model.safetensors or pytorch_model.bin, whole or in shards with an index)"
            )
        for path in set(self._places.values()):
            if not path.exists():
                raise ConfigError(f"{path}: named by {index.name} and missing; copy the folder again")

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._places)

    def describe(self, key: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of a tensor, which is not read for it."""
        tensors = self._tensors(self._places[key])
        if isinstance(tensors, dict):
            return tensors[key].shape, tensors[key].dtype
        part = tensors.get_slice(key)
        return torch.Size(part.get_shape()), _DTYPES[part.get_dtype()]

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConfigError: if the folder has none of that name, or it lies in a file that cannot be read.
        """
        if key not in self._places:
            raise ConfigError(f"{self.folder}: has no tensor {key}; this is not a whole model")
        tensors = self._tensors(self._places[key])
        return tensors[key] if isinstance(tensors, dict) else tensors.get_tensor(key)

    def _tensors(self, path: Path) -> Any:
        """A shard that is open: of safetensors its reader, of a pickle its dictionary, mapped into memory."""
        if path not in self._open:
            try:
                if path.suffix == ".safetensors":
                    self._open[path] = safe_open(path, "pt")
                else:
                    mapped = zipfile.is_zipfile(path)  # as torch has written since 1.6
                    self._open[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                first_line = str(error).split("\n")[0]
                raise ConfigError(f"{path}: cannot be read ({first_line}); copy the folder again") from None
        return self._open[path]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is wanted.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        make: reads or computes it.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def empty(self) -> torch.Tensor:
        """A tensor of this shape and dtype without data, for those who plan."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def tensor(self) -> torch.Tensor:
        """The tensor itself, contiguous."""
        made = self.make().to(self.dtype)
        assert made.shape == self.shape, f"planned {tuple(self.shape)}, made {tuple(made.shape)}"
        return made.contiguous()


def write_shards(
    folder: Path, tensors: Mapping[str, LazyTensor], max_shard_size: str, done: Callable[[int], None]
) -> None:
    """Write tensors as safetensors, with an index where there are several shards, holding one shard at a time.

    Args:
        folder: an existing one.
        tensors: in the order in which they are shared out.
        max_shard_size: such as "2GB".
        done: called with the bytes of each tensor that was made.
    """
    split = split_torch_state_dict_into_shards(
        {key: lazy.empty() for key, lazy in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        shard = {}
        for key in keys:
            shard[key] = tensors[key].tensor()
            done(shard[key].nbytes)
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors lets nobody else read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
