"""What a family says of the tower that turns pictures into codes, and codes into pictures: the typed interface.

`IMAGE_CODES` of the module `image_codes` in a family's folder is an `ImageCodes` (`registry.find_image_codes`), for
tools/tokenize_images.py and tools/reconstruct.py. Imports no torch: what is wrong with a folder is said before that is
loaded.

Shapes: n = pictures, S = side of a picture in pixels, h x w = positions, D = codes of a position, K = size of the
codebook.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class CodeTower(Protocol):
    """A tower as its folder describes it. Objects are pickled for other processes."""

    @property
    def grid(self) -> tuple[int, int]:
        """Positions, (h, w)."""
        ...

    @property
    def depth(self) -> int:
        """Codes of a position, D."""
        ...

    @property
    def codebook_size(self) -> int:
        """Size of the codebook, K."""
        ...

    def sha256(self) -> str:
        """Fingerprint of what decides the codes. It may read whole files."""
        ...


class CodeModel(Protocol):
    """A tower with its weights, on a device."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes of pictures, without a gradient.

        Args:
            pixels: uint8 [n, S, S, 3].

        Returns:
            int64 [n, h, w, D], each in 0 .. K - 1.
        """
        ...

    def decode(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """Pictures of codes, without a gradient.

        Args:
            codes: int64 [n, h, w, D].
            depth: codes of each position that count, from the first; None: all.

        Returns:
            float [n, S, S, 3] in 0 .. 255.
        """
        ...


class ImageCodes(Protocol):
    """The towers of a family whose models read pictures as codes.

    Attributes:
        tower: what `--tower` names, for its help.
        pad_colour: red, green and blue (0 to 255) of the placeholder image, which replaces a picture that does not
            decode.
    """

    tower: str
    pad_colour: tuple[int, int, int]

    def add_flags(self, parser: argparse._ActionsContainer) -> None:
        """Flags that a tower needs beside `--tower`; names are none of the tools that read towers."""

    def read_tower(self, folder: Path, flags: Mapping[str, Any]) -> CodeTower:
        """Read a folder, without the weights themselves.

        Args:
            folder: `--tower`.
            flags: values of `add_flags` by name.

        Raises:
            ConfigError: it is not such a folder, or lacks something; one sentence with the remedy.
        """
        ...

    def square_size(self, tower: CodeTower) -> int:
        """Side of the square picture that a tower reads, S, in pixels."""
        ...

    def load_tower(self, tower: CodeTower, device: torch.device, dtype: torch.dtype) -> CodeModel:
        """The tower with its weights, in evaluation.

        Raises:
            ConfigError: weights that are missing or damaged.
        """
        ...
