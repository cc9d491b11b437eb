"""Write datasets; `dataset_format` lists their files.

megatron-core is imported only when a writer is made, since that takes seconds.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_eve.data.content_digest import ContentDigest
from megatron_eve.data.conversation import IGNORE_INDEX
from megatron_eve.data.dataset_format import (
    IMAGE_DTYPE,
    IMAGE_PARTS,
    MANIFEST,
    PARTIAL,
    PIXEL_PARTS,
    PIXELS,
    SAMPLE_DTYPE,
    TEXT_PARTS,
    DatasetInfo,
    DatasetSettings,
    megatron_datasets,
    publish,
    row_problem,
)
from megatron_eve.data.errors import DataError
from megatron_eve.data.geometry import image_geometry
from megatron_eve.data.metadata import META, MetaWriter, SampleMeta

MAX_ROW_BYTES = 2**31 - 1
"""megatron-core keeps a row's length as int32."""
_INDEX_ROWS = 1 << 16  # of an index, of which the offsets are held at a time


@dataclass(frozen=True)
class StoredImage:
    """An image as it goes into a dataset: its bytes, and its size in pixels as it will be decoded.

    The bytes are those of a file, or with image storage "pixels" a row of OUT_pixels (see `IMAGE_STORAGES`).
    """

    data: bytes
    width: int
    height: int


class DatasetWriter:
    """Writes a dataset sample by sample; nothing can be opened before `finalise`.

    Everything goes to files named `*.partial`. As a context manager it removes them unless finalised.

    Args:
        prefix: where the dataset goes; see `dataset_format` for what is put behind it. A dataset that is
            there already stays whole until `finalise` replaces it.
        settings: recorded in the manifest; token counts follow from its sizes.
        made_with: of the images, recorded in the manifest's `parts`; "pixels" needs the `teacher_patch_size`.
    """

    def __init__(
        self, prefix: str | Path, settings: DatasetSettings, made_with: Mapping[str, Any] | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.settings = settings
        self._made_with = dict(made_with or {})
        as_pixels = settings.image_storage == PIXELS
        self._part = PIXELS if as_pixels else "image"
        self._image_parts, self._stale_parts = (
            (PIXEL_PARTS, IMAGE_PARTS[:2]) if as_pixels else (IMAGE_PARTS, PIXEL_PARTS[:2])
        )
        Path(self.prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._text = _IndexedWriter(self.prefix + "_text", np.int32)
        self._image = _IndexedWriter(f"{self.prefix}_{self._part}", np.uint8)
        self._samples = _RecordWriter(self.prefix + "_samples.npy", SAMPLE_DTYPE)
        self._images = _RecordWriter(self.prefix + "_images.npy", IMAGE_DTYPE)
        self._tokens = self._text_tokens = self._labels = self._cut = 0
        self._longest = (0, 0)  # (sample, tokens)
        self._content = ContentDigest()
        self._meta: MetaWriter | None = None

    @property
    def num_samples(self) -> int:
        """Samples added so far."""
        return self._samples.rows

    @property
    def num_bytes(self) -> int:
        """Bytes of text and images added so far."""
        return self._text.num_bytes + self._image.num_bytes

    def add_sample(
        self,
        tokens: ArrayLike,
        labels: ArrayLike,
        images: Sequence[StoredImage],
        *,
        cut: bool = False,
        meta: SampleMeta | None = None,
    ) -> None:
        """Append one sample.

        Args:
            tokens: n ids, an image counted as one IMAGE_TOKEN_ID.
            labels: n values, not shifted: the token where it trains, else IGNORE_INDEX.
            images: as many as there are placeholders, in their order.
            cut: the text was longer than `model_max_length`.
            meta: where the sample comes from, of all samples or of none.

        Raises:
            DataError: the parts do not belong together, or an id is not in the vocabulary.
        """
        ids, targets = np.asarray(tokens, dtype=np.int64), np.asarray(labels, dtype=np.int64)
        problem = row_problem(ids, targets, len(images), self.settings.vocab_size)
        if problem:
            raise DataError(f"sample {self.num_samples} for {self.prefix}: {problem}")
        length = len(ids)
        first_image = self._images.rows
        for image in images:
            settings = self.settings
            geometry = image_geometry(image.width, image.height, settings.image_size, settings.teacher_size)
            length += geometry.tokens - 1
            self._image.add(np.frombuffer(image.data, dtype=np.uint8))
            self._images.add((image.width, image.height, len(image.data)))
            self._content.add_image(image.width, image.height, image.data)
        num_labels = int(np.count_nonzero(targets[1:] != IGNORE_INDEX))
        if length > self._longest[1]:
            self._longest = (self.num_samples, length)
        text = np.concatenate([ids, targets]).astype(np.int32)
        self._text.add(text)
        self._content.add_text(ids, targets)
        self._samples.add((length, len(ids), num_labels, len(images), first_image))
        self._tokens += length
        self._text_tokens += len(ids)
        self._labels += num_labels
        self._cut += cut
        if meta is not None:
            self._meta = self._meta or MetaWriter(self.prefix)
            self._meta.add(meta)

    def finalise(
        self,
        *,
        num_rows: int | None = None,
        skipped: Mapping[str, int] | None = None,
        skipped_first: Mapping[str, list[dict[str, Any]]] | None = None,
    ) -> DatasetInfo:
        """Put everything in place, the manifest last and atomically.

        Args:
            num_rows: rows of the input that were read; the number of samples if not given.
            skipped, skipped_first: see DatasetInfo.

        Raises:
            DataError: no sample was added.
        """
        if self.num_samples == 0:
            raise DataError(f"no sample for {self.prefix}: an empty dataset is not written")
        info = DatasetInfo(
            **asdict(self.settings),
            num_samples=self.num_samples,
            num_images=self._images.rows,
            num_tokens=self._tokens,
            num_text_tokens=self._text_tokens,
            num_labels=self._labels,
            num_cut=self._cut,
            text_bytes=self._text.num_bytes,
            image_bytes=0 if self._part == PIXELS else self._image.num_bytes,
            longest_sample=self._longest[0],
            longest_length=self._longest[1],
            num_rows=self.num_samples if num_rows is None else num_rows,
            skipped=dict(skipped or {}),
            skipped_first=dict(skipped_first or {}),
            content_sha256=self._content.hexdigest(),
            licenses=dict(self._meta.licenses) if self._meta else {},
            parts=self._described() if self._images.rows else {},
        )
        for writer in (self._text, self._image, self._samples, self._images):
            writer.close()
        Path(self.prefix + MANIFEST).unlink(missing_ok=True)  # from here on the old dataset is gone
        for part in TEXT_PARTS:
            publish(self.prefix + part)
        if self._meta:
            self._meta.close()
            publish(self.prefix + META)
        else:
            Path(self.prefix + META).unlink(missing_ok=True)
        for part in self._stale_parts:  # of a dataset that stored its images otherwise
            Path(self.prefix + part).unlink(missing_ok=True)
        for part in self._image_parts:
            if info.num_images:
                publish(self.prefix + part)
            else:  # megatron-core cannot map an empty file
                Path(self.prefix + part + PARTIAL).unlink()
                Path(self.prefix + part).unlink(missing_ok=True)
        Path(self.prefix + MANIFEST + PARTIAL).write_text(info.to_json(), encoding="utf-8")
        publish(self.prefix + MANIFEST)
        return info

    def _described(self) -> dict[str, dict[str, Any]]:
        """The manifest's `parts`."""
        return {self._part: {**self._made_with, "dtype": "uint8", "bytes": self._image.num_bytes}}

    def abort(self) -> None:
        """Close and remove what was written. Does nothing after `finalise`."""
        for writer in (self._text, self._image, self._samples, self._images):
            writer.discard()
        if self._meta:
            self._meta.discard()
        for part in (*TEXT_PARTS, *self._image_parts, META, MANIFEST):
            Path(self.prefix + part + PARTIAL).unlink(missing_ok=True)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class _IndexedWriter:
    """One megatron-core indexed dataset under its partial name."""

    def __init__(self, prefix: str, dtype: type[np.generic]) -> None:
        self.num_bytes = 0
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._megatron = megatron_datasets("indexed_dataset")
        self._builder = self._megatron.IndexedDatasetBuilder(f"{prefix}.bin{PARTIAL}", dtype=dtype)
        self._builder.sequence_lengths = array("i")  # 4 bytes a row where a list of int takes 40

    def add(self, row: NDArray[Any]) -> None:
        if row.dtype != self._dtype:  # the builder would truncate values silently
            raise TypeError(f"{self._prefix} takes {self._dtype}, not {row.dtype}")
        if row.nbytes > MAX_ROW_BYTES:
            raise DataError(
                f"a row of {row.nbytes} bytes for {self._prefix}.bin: a row holds {MAX_ROW_BYTES}"
            )
        # What the builder's add_item does, without a torch tensor in between.
        self._builder.data_file.write(row.tobytes())
        self._builder.sequence_lengths.append(row.size)
        self.num_bytes += row.nbytes

    def close(self) -> None:
        """Write the index as the builder's `finalize` does, without its list of all offsets (44 MB a million rows)."""
        self._builder.data_file.close()
        lengths = np.frombuffer(self._builder.sequence_lengths, dtype=np.int32)
        with self._megatron._IndexWriter(f"{self._prefix}.idx{PARTIAL}", self._dtype.type) as index:
            # One document: samples are rows, and nothing reads document bounds.
            index.idx_writer.write(struct.pack("<QQ", len(lengths), 2))
            index.idx_writer.write(lengths.data)
            offset = 0
            for start in range(0, len(lengths), _INDEX_ROWS):
                sizes = lengths[start : start + _INDEX_ROWS].astype(np.int64) * self._dtype.itemsize
                ends = offset + np.cumsum(sizes)
                index.idx_writer.write((ends - sizes).tobytes())
                offset = int(ends[-1])
            index.idx_writer.write(struct.pack("<QQ", 0, len(lengths)))

    def discard(self) -> None:
        self._builder.data_file.close()


class _RecordWriter:
    """A structured .npy file written record by record, under its partial name."""

    def __init__(self, path: str, dtype: np.dtype[Any]) -> None:
        self.rows = 0
        self._dtype = dtype
        self._file: IO[bytes] = open(path + PARTIAL, "wb")  # noqa: SIM115 (closed by close or discard)
        self._header_bytes = self._write_header()

    def _write_header(self) -> int:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.rows,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def add(self, record: tuple[int, ...]) -> None:
        self._file.write(np.array(record, dtype=self._dtype).tobytes())
        self.rows += 1

    def close(self) -> None:
        self._file.seek(0)
        if self._write_header() != self._header_bytes:  # numpy leaves room for the first axis to grow
            raise RuntimeError("numpy's .npy header changed its length with the number of rows")
        self._file.close()

    def discard(self) -> None:
        self._file.close()
