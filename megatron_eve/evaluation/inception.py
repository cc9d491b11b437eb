"""Features of pictures by the Inception network of the FID, which is a TorchScript file that the user names.

The file has all of the network's code and weights, resizing included: `network(pixels uint8 [n, 3, H, W],
return_features=True)` gives float [n, 2048].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.images.resizing import Pixels
from megatron_eve.data.tokenizing.worker import code_device

FLAG = "--inception-weights"
_WRONG = "not the TorchScript file of the FID's Inception network (inception-2015-12-05.pt, see docs/evaluation.md)"
_TOGETHER = 32  # pictures that go through the network at once


class Inception:
    """The network.

    Args:
        path: of the file.

    Raises:
        ConfigError: it is missing, or another file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(
                f"{FLAG} {path}: no such file; name inception-2015-12-05.pt, see docs/evaluation.md"
            )
        self._device = code_device()
        try:
            self._network = torch.jit.load(str(path), map_location=self._device).eval()
            found = self._features(np.zeros((2, 299, 299, 3), np.uint8))
        except (RuntimeError, TypeError, ValueError, AttributeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{FLAG} {path}: {_WRONG}: {reason}") from None
        if found.ndim != 2 or len(found) != 2 or not np.isfinite(found).all():
            raise ConfigError(f"{FLAG} {path}: {_WRONG}: it gives {list(found.shape)} for two pictures")

    def features(self, pictures: Iterable[Pixels]) -> Iterator[NDArray[np.float64]]:
        """Features [n, F] of pictures uint8 [H, W, 3], in groups; pictures of a group have one size."""
        group: list[Pixels] = []
        for picture in pictures:
            if group and (len(group) == _TOGETHER or picture.shape != group[0].shape):
                yield self._features(np.stack(group))
                group = []
            group.append(picture)
        if group:
            yield self._features(np.stack(group))

    def _features(self, pixels: Pixels | Sequence[Pixels]) -> NDArray[np.float64]:
        with torch.inference_mode():
            given = torch.from_numpy(np.asarray(pixels)).permute(0, 3, 1, 2).contiguous().to(self._device)
            found = self._network(given, return_features=True)
            return np.asarray(found.double().cpu().numpy())
