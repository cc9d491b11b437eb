"""Tensors that are read or computed when they are needed, and new model folders written of them, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read or computed when it is needed.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        make: reads or computes it.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def empty(self) -> torch.Tensor:
        """A tensor of this shape and dtype without data (on the meta device), for planning."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def tensor(self) -> torch.Tensor:
        """The tensor itself, contiguous."""
        made = self.make().to(self.dtype)
        assert made.shape == self.shape, f"planned {tuple(self.shape)}, made {tuple(made.shape)}"
        return made.contiguous()


def _split(tensors: Mapping[str, LazyTensor], max_shard_size: int) -> Any:
    """Which tensor goes into which shard: huggingface_hub's `StateDictSplit`."""
    return split_torch_state_dict_into_shards(
        {key: lazy.empty() for key, lazy in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def count_shards(tensors: Mapping[str, LazyTensor], max_shard_size: int) -> int:
    """How many files of safetensors `write_shards` makes of tensors."""
    return len(_split(tensors, max_shard_size).filename_to_tensors)


def write_shards(
    folder: Path, tensors: Mapping[str, LazyTensor], max_shard_size: int, done: Callable[[int], None]
) -> None:
    """Write tensors as safetensors, with an index where there are several shards, holding one shard at a time.

    Args:
        folder: an existing one.
        tensors: in the order in which they are put into shards.
        max_shard_size: in bytes.
        done: called with the bytes of each tensor that was made.

    Raises:
        OSError: a file cannot be written.
    """
    split = _split(tensors, max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        shard = {}
        for key in keys:
            shard[key] = tensors[key].tensor()
            done(shard[key].nbytes)
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # for example a full disk
            raise OSError(
                f"{folder / name}: cannot be written ({error}); nothing is left of the folder"
            ) from None
        (folder / name).chmod(0o644)  # safetensors makes files that only their owner can read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
