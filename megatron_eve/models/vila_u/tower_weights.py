"""The tensors of a VILA-U tower, one at a time: from a published folder or from a checkpoint, by one set of names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields

import torch

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.vila_u.tower_folder import CONFIG, TowerSettings
from megatron_eve.models.vila_u.tower_names import copies, decides_codes, stored_name

# Left out of the fingerprint: where a tower lies, and what only its pictures depend on.
_NOT_OF_CODES = ("folder", "decoder", "decoder_latent_shape")


class TowerWeights:
    """The tensors of a tower by their names in a checkpoint (`tower_names`); of copies the first is read.

    Args:
        tower: what its folder says.

    Raises:
        ConfigError: weights that are missing or cannot be read.
    """

    def __init__(self, tower: TowerSettings) -> None:
        self._tower = tower
        self._published: HFFolder | None = None
        self._keys: dict[str, str] = {}
        found: dict[str, int] = {}
        if (tower.folder / CONFIG).is_file():
            self._published = HFFolder(tower.folder)
            for key in sorted(self._published.keys()):
                name = stored_name(key, tower)
                if name is not None:
                    self._keys.setdefault(name, key)
                    found[name] = found.get(name, 0) + 1
            for name, count in found.items():
                if count not in (1, wanted := len(copies(name, tower))):
                    raise ConfigError(
                        f"{tower.folder}: holds {name} {count} times, and its config.json asks for {wanted}; copy both "
                        "from the same model"
                    )
            return
        try:
            self._checkpoint = DistFolder(tower.folder)
        except Exception as error:  # a damaged index raises nearly anything
            raise ConfigError(
                f"{tower.folder}: cannot be read ({type(error).__name__}: {error}); import the tower again"
            ) from None
        self._keys = {key: key for key in self._checkpoint}

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without reading it."""
        if self._published is not None:
            return self._published.describe(self._keys[name])[0]
        return self._checkpoint.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConfigError: there is none of that name, or it cannot be read.
        """
        if name not in self._keys:
            raise ConfigError(f"{self._tower.folder}: the weights lack {name}; copy the folder again")
        if self._published is not None:
            return self._published.tensor(self._keys[name])
        try:
            return self._checkpoint.tensor(name)
        except Exception as error:  # likewise
            raise ConfigError(
                f"{self._tower.folder}: {name} cannot be read ({type(error).__name__}: {error}); import the tower again"
            ) from None


def fingerprint(tower: TowerSettings) -> str:
    """Of what decides the codes: the sizes, and the tensors that make codes. A published folder and its checkpoint have
    the same.

    Raises:
        ConfigError: weights that are missing or damaged.
    """
    weights = TowerWeights(tower)
    sizes = [(one.name, getattr(tower, one.name)) for one in fields(tower) if one.name not in _NOT_OF_CODES]
    total = hashlib.sha256(repr(sizes).encode())
    for name in sorted(weights):
        if decides_codes(name, tower):
            tensor = weights.tensor(name).contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
