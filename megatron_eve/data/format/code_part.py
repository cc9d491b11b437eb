"""Codes of the images of a dataset, as a visual tokenizer made them: a part of the dataset with files of its own.

Beside the dataset at a prefix OUT, or at another prefix:

    OUT_codes.bin   uint16 [images, h, w, D], little endian: h x w positions of D codes an image; mapped into memory
    OUT_codes.json  the manifest (CodeInfo), written last: without it nothing opens

The dataset is not changed: it is read as before, whether codes are there or not. The manifest records the dataset that
the codes were made of and the tower that made them, so that codes of another one are refused.
`code_writer` writes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.joined import AnyDataset, MergedDataset, part_and_row
from megatron_eve.data.format.manifest import MANIFEST

CODES = "_codes.bin"
CODES_MANIFEST = "_codes.json"
CODE_DTYPE = np.dtype("<u2")
MOST_CODES = 1 << 16
"""Largest codebook whose codes fit into `CODE_DTYPE`."""
CODE_FORMAT_VERSION = 1
TOKENIZE_AGAIN = "make the codes again with tools/tokenize_images.py --overwrite"

_READ_BYTES = 1 << 24  # read at a time when all of a part is checked


@dataclass(frozen=True, kw_only=True)
class CodeSettings:
    """What codes are made of and with. Processes that share the work must agree in all of it.

    Attributes:
        family: name of the model family whose tower it was.
        tower_sha256: fingerprint of the tower.
        square_size: side of the square picture that the tower sees, in pixels.
        grid: positions of an image, (h, w).
        depth: codes of a position, D.
        codebook_size: codes lie in 0 .. codebook_size - 1.
        fit: how an image becomes a square, of `FITS`, or `AUTO` where that depends on the image.
        dtype: in which the tower ran, "float32" or "bfloat16".
        micro_batch_size: images that went through the tower together, which decides the last bits of its sums.
        dataset_sha256: see `dataset_digest`.
        num_images: of the dataset.
    """

    family: str
    tower_sha256: str
    square_size: int
    grid: tuple[int, int]
    depth: int
    codebook_size: int
    fit: str
    dtype: str
    micro_batch_size: int
    dataset_sha256: str
    num_images: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image's codes: (h, w, D)."""
        return (*self.grid, self.depth)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's codes."""
        return self.grid[0] * self.grid[1] * self.depth * CODE_DTYPE.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes of all images."""
        return self.num_images * self.image_bytes


@dataclass(frozen=True, kw_only=True)
class CodeInfo(CodeSettings):
    """The manifest.

    Attributes:
        sha256: of OUT_codes.bin.
        num_damaged: images that could not be decoded, which have the codes of the placeholder image.
        damaged_first: the first few of them, each with the reason.
        name: of the part.
    """

    sha256: str
    num_damaged: int = 0
    damaged_first: list[str] = field(default_factory=list)
    name: str = "codes"
    format_version: int = CODE_FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the manifest file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_settings(path: Path, kind: type[CodeSettings]) -> Any:
    """Read an object of `kind` from a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: not JSON, or not its fields.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        height, width = content["grid"]
        return kind(**{**content, "grid": (int(height), int(width))})
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not what this version of tools/tokenize_images.py writes ({error}): {TOKENIZE_AGAIN}"
        ) from error


def read_code_info(prefix: str) -> CodeInfo:
    """Read the manifest of the codes at `prefix`.

    Raises:
        DataError: missing, not JSON, of another version, or without one of its fields.
    """
    path = Path(prefix + CODES_MANIFEST)
    try:
        info: CodeInfo = read_settings(path, CodeInfo)
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: {prefix} has no codes; make them with tools/tokenize_images.py, or, if that did not "
            "finish, run the same command again"
        ) from None
    if info.format_version != CODE_FORMAT_VERSION:
        raise DataError(
            f"{path} is of format version {info.format_version!r} and this code reads {CODE_FORMAT_VERSION}: "
            f"{TOKENIZE_AGAIN}"
        )
    return info


def dataset_digest(dataset: AnyDataset) -> str:
    """Fingerprint of a dataset for its codes: its `content_sha256`.

    Of a dataset by an older version, which has none, the recorded sizes of its images.
    """
    if dataset.info.content_sha256:
        return dataset.info.content_sha256
    parts = dataset.parts if isinstance(dataset, MergedDataset) else [dataset]
    digest = hashlib.sha256()
    for part in parts:
        assert isinstance(part, IndexedVisionDataset)
        digest.update(part.images.tobytes())
    return digest.hexdigest()


class CodePart:
    """The codes of a dataset, opened read-only.

    Args:
        prefix: of the codes, OUT.
        dataset: the dataset that they must belong to; None leaves that unchecked.

    Attributes:
        info: the manifest.

    Raises:
        DataError: a file is missing, truncated or of another version, or the codes were made of another dataset.
    """

    def __init__(self, prefix: str | Path, dataset: AnyDataset | None = None) -> None:
        self.prefix = str(prefix)
        self.info = info = read_code_info(self.prefix)
        path = self.prefix + CODES
        try:
            size = Path(path).stat().st_size
        except FileNotFoundError:
            raise DataError(f"{path} is missing: copy it again, or {TOKENIZE_AGAIN}") from None
        if size != info.num_bytes:
            has = "is truncated: it has" if size < info.num_bytes else "has"
            raise DataError(
                f"{path} {has} {size:,} bytes where {info.num_images:,} images of {info.image_bytes:,} bytes are "
                f"{info.num_bytes:,}; copy it again, or {TOKENIZE_AGAIN}"
            )
        if dataset is not None:
            self._check_dataset(dataset)
        self._codes = np.memmap(path, CODE_DTYPE, "r", shape=(info.num_images, *info.image_shape))

    def _check_dataset(self, dataset: AnyDataset) -> None:
        theirs, path = dataset.info.num_images, self.prefix + CODES_MANIFEST
        if self.info.num_images != theirs:
            problem = f"is of {self.info.num_images:,} images and {dataset.prefix}{MANIFEST} has {theirs:,}"
        elif self.info.dataset_sha256 != dataset_digest(dataset):
            problem = f"is of another dataset than {dataset.prefix}{MANIFEST}, or that was changed since"
        else:
            return
        raise DataError(f"{path} {problem}: name the codes of this dataset, or {TOKENIZE_AGAIN}")

    def __len__(self) -> int:
        return self.info.num_images

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Codes of image number `image` of the dataset: uint16 [h, w, D], a copy.

        Raises:
            IndexError: no such image.
            DataError: a code is not below the size of the codebook.
        """
        if not 0 <= image < len(self):
            raise IndexError(f"index {image} is out of range for {len(self)} images")
        codes = np.array(self._codes[image])
        self._check_codes(image, codes[None])
        return codes

    def _check_codes(self, first: int, codes: NDArray[np.uint16]) -> None:
        """Refuse codes [images, h, w, D], of images from number `first` on, that the codebook has not."""
        if codes.max() < self.info.codebook_size:
            return
        largest = codes.reshape(len(codes), -1).max(axis=1)
        row = int(np.flatnonzero(largest >= self.info.codebook_size)[0])
        raise DataError(
            f"image {first + row} of {self.prefix}{CODES}: {self._too_large(int(largest[row]))}; copy it again, or "
            f"{TOKENIZE_AGAIN}"
        )

    def check_tower(
        self,
        *,
        grid: tuple[int, int],
        depth: int,
        codebook_size: int,
        tower_sha256: str | None = None,
    ) -> None:
        """Check that a model can train on these codes.

        Args:
            grid, depth, codebook_size: of the model's tower.
            tower_sha256: its fingerprint; None leaves that unchecked.

        Raises:
            DataError: the codes are another tower's; the message names the file, what differs and the remedy.
        """
        info = self.info
        remedy = f"give the tower that they were made with, or {TOKENIZE_AGAIN}"
        for name, ours, theirs in (
            ("a grid of", "{} x {}".format(*info.grid), "{} x {}".format(*grid)),
            ("depth", info.depth, depth),
            ("a codebook of", f"{info.codebook_size:,}", f"{codebook_size:,}"),
        ):
            if ours != theirs:
                raise DataError(
                    f"{self.prefix}{CODES_MANIFEST} has codes of {name} {ours} and the model's tower has {theirs}: "
                    f"{remedy}"
                )
        if tower_sha256 is not None and tower_sha256 != info.tower_sha256:
            raise DataError(
                f"{self.prefix}{CODES_MANIFEST} has codes of another tower (sha256 {info.tower_sha256[:12]}..., the "
                f"model's is {tower_sha256[:12]}...): {remedy}"
            )

    def check_first_codes(self, num_bytes: int) -> None:
        """Check that the codes in the first `num_bytes` bytes are below the size of the codebook; else DataError."""
        images = max(num_bytes // self.info.image_bytes, 1)
        for first, block in blocks(self._codes[:images]):
            self._check_codes(first, block)

    def damage(self) -> Iterator[tuple[str, str]]:
        """Read all codes; yield what is damaged, each with the file and the image, and the reason."""
        digest, path = hashlib.sha256(), self.prefix + CODES
        for first, block in blocks(self._codes):
            digest.update(block.tobytes())
            largest = block.reshape(len(block), -1).max(axis=1)
            for row in np.flatnonzero(largest >= self.info.codebook_size):
                yield f"image {first + row} of {path}", self._too_large(int(largest[row]))
        if digest.hexdigest() != self.info.sha256:
            yield (
                self.prefix + CODES_MANIFEST,
                f"sha256 is {self.info.sha256[:12]}... and the codes' is {digest.hexdigest()[:12]}...: bytes were "
                "changed since it was written",
            )

    def _too_large(self, code: int) -> str:
        return f"code {code:,} is not below the size of the codebook, {self.info.codebook_size:,}"


def blocks(codes: NDArray[np.uint16]) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """Codes uint16 [images, h, w, D] in pieces: the number of the first image of each, and codes [some, h, w, D]."""
    images = max(_READ_BYTES // max(codes[:1].nbytes, 1), 1)
    for first in range(0, len(codes), images):
        yield first, codes[first : first + images]


class JoinedCodes:
    """Codes of several datasets as of one, whose images are numbered consecutively (see `JoinedDataset`).

    Args:
        parts: of the datasets with images, in their order. They may differ in `fit`: pictures to read and pictures to
            draw are made into squares in different ways.

    Raises:
        DataError: they are of several towers.
    """

    def __init__(self, parts: Sequence[AnyCodes]) -> None:
        self.parts: list[CodePart] = [
            one for part in parts for one in (part.parts if isinstance(part, JoinedCodes) else [part])
        ]
        self._bounds = np.cumsum([len(part) for part in self.parts])
        first = self.parts[0]
        for part in self.parts[1:]:
            for name in ("tower_sha256", "grid", "depth", "codebook_size"):
                ours, theirs = getattr(part.info, name), getattr(first.info, name)
                if ours != theirs:
                    raise DataError(
                        f"{part.prefix}{CODES_MANIFEST} has {name} {_shown(ours)} and {first.prefix}{CODES_MANIFEST} "
                        f"{_shown(theirs)}: make the codes of both with the same tower (tools/tokenize_images.py)"
                    )

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def codes(self, image: int) -> NDArray[np.uint16]:
        """See `CodePart.codes`."""
        if not 0 <= image < len(self):
            raise IndexError(f"index {image} is out of range for {len(self)} images")
        number, row = part_and_row(self._bounds, image)
        return self.parts[number].codes(row)

    def check_tower(self, **needs: Any) -> None:
        """See `CodePart.check_tower`."""
        for part in self.parts:
            part.check_tower(**needs)

    def check_first_codes(self, num_bytes: int) -> None:
        """See `CodePart.check_first_codes`; so many of each part."""
        for part in self.parts:
            part.check_first_codes(num_bytes)


AnyCodes = CodePart | JoinedCodes


def _shown(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) else str(value)


def has_codes(prefix: str) -> bool:
    """Is the manifest of codes at `prefix`?"""
    return Path(prefix + CODES_MANIFEST).exists()


def open_codes(dataset: AnyDataset, prefix: str | Path | None = None) -> AnyCodes:
    """Open the codes of a dataset with images.

    Args:
        dataset: merged or not.
        prefix: of the codes. None: that of the dataset; of a merged dataset that has none there, of its parts.

    Raises:
        DataError: codes are missing, damaged, or not of this dataset; or parts have codes of several towers.
    """
    if prefix is None and isinstance(dataset, MergedDataset) and not has_codes(dataset.prefix):
        return JoinedCodes([open_codes(part) for part in dataset.parts if part.info.num_images])
    return CodePart(dataset.prefix if prefix is None else str(prefix).removesuffix(CODES_MANIFEST), dataset)
