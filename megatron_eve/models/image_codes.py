"""What a family says of the tower that turns pictures into codes, and codes into pictures: the typed interface.

`IMAGE_CODES` of the module `image_codes` in a family's folder is an `ImageCodes` (`registry.find_image_codes`), for
tools/tokenize_images.py and tools/reconstruct.py. Imports no torch: what is wrong with a folder is said before that is
loaded.

Shapes: n = pictures, S = side of a picture in pixels, P = side of one that is made of codes, h x w = positions,
D = codes of a position, K = size of the codebook.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.golden_format import GoldenFormat


class CodeTower(Protocol):
    """A tower as its folder describes it. Objects are pickled for other processes."""

    @property
    def folder(self) -> Path:
        """Where its weights are."""
        ...

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
            float [n, P, P, 3] in 0 .. 255.
        """
        ...


class ContrastModel(Protocol):
    """A tower's contrastive side with its weights: vectors of pictures and texts, alike where they belong together."""

    def picture_vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors float32 [n, C] of length 1, of pictures uint8 [n, S, S, 3] as their codes have them."""
        ...

    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors float32 [n, C] of length 1, of texts."""
        ...


class TowerFolders(Protocol):
    """The folders in which towers of a family lie, for tools/convert_checkpoint.py: published, checkpoints, and for
    transformers.

    A checkpoint keeps every tensor of a published folder once, under one of its names there.
    """

    def is_tower(self, folder: Path) -> bool:
        """Is this a tower's folder, published or a checkpoint (one, or the folder that has several)?"""
        ...

    def is_published(self, folder: Path) -> bool:
        """Is it a published one?"""
        ...

    def record(self, tower: CodeTower) -> dict[str, Any]:
        """What a checkpoint keeps beside its tensors, as plain values for YAML; `ImageCodes.read_tower` reads it."""
        ...

    def stored_names(self, keys: Iterable[str], tower: CodeTower) -> Mapping[str, tuple[str, ...]]:
        """Names in a checkpoint of the tensors of a published folder, each with its keys there, of which copies have
        several; unknown keys are left out.

        Raises:
            ConfigError: a tensor that is there more than once, and not as often as the tower's settings ask for.
        """
        ...

    def published_names(self, name: str, tower: CodeTower) -> tuple[str, ...]:
        """The names in a published folder of a tensor of a checkpoint, its copies included."""
        ...

    def shapes(self, tower: CodeTower) -> Mapping[str, tuple[int, ...]]:
        """The tensors that a tower cannot do without, by name in a checkpoint, with their shapes. It loads torch."""
        ...

    def keeps_dtype(self, name: str) -> bool:
        """Does a tensor of a checkpoint stay as it is under `--dtype`? Codebooks do: rounded ones give other codes."""
        ...

    def left_out(self, name: str, tower: CodeTower) -> str | None:
        """Why a tensor of a checkpoint is no part of a folder for transformers; None if it is one."""
        ...

    def write_files(self, folder: Path, tower: CodeTower, dtype: str, published: bool) -> None:
        """Write what stands beside the weights.

        Args:
            folder: an existing one.
            tower: that is exported.
            dtype: of the weights, such as "bfloat16".
            published: in the published layout; else for transformers.
        """
        ...

    def register(self) -> Mapping[str, type]:
        """Register the towers with transformers; returns the classes by name (`megatron_eve.hf`)."""
        ...


class ImageCodes(Protocol):
    """The towers of a family whose models read pictures as codes.

    Attributes:
        tower: what `--tower` names, for its help.
        pad_colour: red, green and blue (0 to 255) of the placeholder image, which replaces a picture that does not
            decode.
        golden: their golden cases, of which `comparisons` are compared; None without any.
        folders: in which towers lie; None where tools/convert_checkpoint.py knows none.
    """

    tower: str
    pad_colour: tuple[int, int, int]
    golden: GoldenFormat | None
    folders: TowerFolders | None

    def add_flags(self, parser: argparse._ActionsContainer) -> None:
        """Flags that a tower needs beside `--tower`; names are none of the tools that read towers."""

    def read_tower(self, folder: Path, flags: Mapping[str, Any]) -> CodeTower:
        """Read a folder, without the weights themselves.

        Args:
            folder: `--tower`; published, or a checkpoint.
            flags: values of `add_flags` by name.

        Raises:
            ConfigError: it is not such a folder, or lacks something; one sentence with the remedy.
        """
        ...

    def sha256(self, tower: CodeTower) -> str:
        """Fingerprint of what decides the codes, the same for a published folder and its checkpoint. It reads weights.

        Raises:
            ConfigError: weights that are missing or damaged.
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

    def text_folder(self, tower: CodeTower, flags: Mapping[str, Any]) -> Path:
        """The folder of the tokenizer of the texts that a tower's contrastive side takes.

        Args:
            tower: it.
            flags: values of `add_flags` by name.

        Raises:
            ConfigError: it is not there.
        """
        ...

    def load_contrast(self, tower: CodeTower, texts: Path, device: torch.device) -> ContrastModel:
        """The contrastive side of a tower with its weights, in float32.

        Args:
            tower: it.
            texts: `text_folder`.
            device: that it runs on.

        Raises:
            ConfigError: the tower has none, or it or the tokenizer is damaged.
        """
        ...
