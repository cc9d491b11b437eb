"""The tensors of a VILA-U tower, one at a time: from a published folder or from a checkpoint, by one set of names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache

import torch

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.vila_u.tower_names import decides_codes, stored_names
from megatron_eve.models.vila_u.tower_settings import TowerSettings

# Left out of the fingerprint: where a tower lies, and what only its pictures depend on.
_NOT_OF_CODES = ("folder", "decoder", "decoder_latent_shape")


class TowerWeights:
    """The tensors of a tower by their names in a checkpoint (`tower_names`); of copies the first is read.

    Args:
        tower: what its folder says.

    Raises:
        ConfigError: weights that are missing or cannot be read, or copies that are not as many as they should be.
    """

    def __init__(self, tower: TowerSettings) -> None:
        self._folder = HFFolder(tower.folder)
        self._keys = {name: keys[0] for name, keys in stored_names(self._folder.keys(), tower).items()}

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without reading it."""
        return self._folder.describe(self._keys[name])[0]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConfigError: there is none of that name, or it cannot be read.
        """
        if name not in self._keys:
            raise ConfigError(f"{self._folder.folder}: the weights lack {name}; copy the folder again")
        return self._folder.tensor(self._keys[name])


def fingerprint(tower: TowerSettings) -> str:
    """Of what decides the codes: the sizes, and the tensors that make codes. A published folder and its checkpoint have
    the same. Weights that have not changed since the last call are not read again.

    Raises:
        ConfigError: weights that are missing or damaged.
    """
    with os.scandir(tower.folder) as files:
        states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _fingerprint(tower, tuple(states))


@lru_cache(maxsize=4)
def _fingerprint(tower: TowerSettings, files: tuple[tuple[str, int, int], ...]) -> str:
    weights = TowerWeights(tower)
    sizes = [(one.name, getattr(tower, one.name)) for one in fields(tower) if one.name not in _NOT_OF_CODES]
    total = hashlib.sha256(repr(sizes).encode())
    for name in sorted(weights):
        if decides_codes(name, tower):
            tensor = weights.tensor(name).contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
