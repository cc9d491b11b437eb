"""Write datasets; `manifest` lists their files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.content_digest import ContentDigest
from megatron_eve.data.format.drawn import DRAWN, DRAWN_DTYPE, PART, part_record
from megatron_eve.data.format.manifest import (
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
    publish,
    sync,
)
from megatron_eve.data.format.megatron_index import IndexWriter
from megatron_eve.data.format.metadata import META, MetaWriter, SampleMeta
from megatron_eve.data.format.sample_block import (
    ImageBytes,
    Sample,
    SampleBlock,
    StoredImage,
    make_block,
    sum_changes,
)
from megatron_eve.data.format.write_lock import WriteLock


class DatasetWriter:
    """Writes a dataset with constant memory; it cannot be opened before `finalise`.

    Everything goes to files named `*.partial`. As a context manager it removes them unless finalised.

    Args:
        prefix: path of the dataset; see `manifest` for the suffixes. An existing dataset stays intact until `finalise`
            replaces it. Partial files of a killed run are removed.
        settings: recorded in the manifest; token counts follow from its image settings.
        made_with: how the images were made, recorded in the manifest's `parts`; "pixels" needs all of the
            family's `image_flags`, "jpeg" those that bind it.

    Attributes:
        image_path: temporary path of the images' .bin file; see `add_block`.
        num_samples: samples added so far.
        image_bytes: bytes of images added so far.

    Raises:
        DataError: another run is writing to this prefix.
    """

    def __init__(
        self, prefix: str | Path, settings: DatasetSettings, made_with: Mapping[str, Any] | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.settings = settings
        self._made_with = dict(made_with or {})
        as_pixels = settings.image_storage == PIXELS
        self._part = PIXELS if as_pixels else "image"
        self._image_parts = PIXEL_PARTS if as_pixels else IMAGE_PARTS
        Path(self.prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._lock = WriteLock(self.prefix)
        self._remove_partial()
        self.image_path = f"{self.prefix}_{self._part}.bin{PARTIAL}"
        self.image_bytes = 0
        Path(self.image_path).write_bytes(b"")
        self._image_file = ImageBytes(self.image_path)
        self._text: IO[bytes] = open(f"{self.prefix}_text.bin{PARTIAL}", "wb")  # noqa: SIM115 (see abort)
        self._text_index = IndexWriter(f"{self.prefix}_text.idx{PARTIAL}", np.dtype(np.int32))
        self._image_index = IndexWriter(f"{self.prefix}_{self._part}.idx{PARTIAL}", np.dtype(np.uint8))
        self._samples = _RecordWriter(self.prefix + "_samples.npy", SAMPLE_DTYPE)
        self._images = _RecordWriter(self.prefix + "_images.npy", IMAGE_DTYPE)
        self._drawn = _RecordWriter(self.prefix + DRAWN, DRAWN_DTYPE)
        self._num_drawn = self._visual_labels = 0
        self._text_bytes = self._tokens = self._text_tokens = self._labels = self._cut = self._missing = 0
        self._changes: dict[str, int] = {}
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
        return self._text_bytes + self.image_bytes

    def add_sample(
        self,
        tokens: ArrayLike,
        labels: ArrayLike,
        images: Sequence[StoredImage],
        *,
        cut: bool = False,
        meta: SampleMeta | None = None,
        num_missing: int = 0,
    ) -> None:
        """Append one sample; see `Sample` for its parts.

        Raises:
            DataError: the parts do not belong together, or an id is not in the vocabulary.
        """
        try:
            block = make_block([Sample(tokens, labels, images, cut, meta, num_missing)], self.settings)
        except DataError as error:
            raise DataError(f"sample {self.num_samples} for {self.prefix}: {error}") from error
        self._image_file.write([image.data for image in images], self.add_block(block))

    def add_block(self, block: SampleBlock) -> int:
        """Append samples without the bytes of their images.

        Returns:
            The offset in `image_path` at which the caller must write those bytes (`ImageBytes`) before `finalise`.
        """
        samples, offset = block.samples.copy(), self.image_bytes
        samples["first_image"] += self._images.rows
        longest = int(samples["length"].argmax())
        if samples["length"][longest] > self._longest[1]:
            self._longest = (self.num_samples + longest, int(samples["length"][longest]))
        self._text.write(block.text)
        self._text_bytes += len(block.text)
        self._text_index.add(block.text_sizes)
        self._image_index.add(block.images["num_bytes"])
        self.image_bytes += int(block.images["num_bytes"].sum())
        self._samples.add(samples)
        self._images.add(block.images)
        self._drawn.add(block.drawn)
        self._num_drawn += int(np.count_nonzero(block.drawn))
        self._visual_labels += block.num_visual_labels
        self._content.add(block.digest_input)
        self._tokens += int(samples["length"].sum(dtype=np.int64))
        self._text_tokens += int(samples["text_length"].sum(dtype=np.int64))
        self._labels += int(samples["labels"].sum(dtype=np.int64))
        self._cut += block.num_cut
        self._missing += block.num_missing
        self._changes = sum_changes([self._changes, block.changes])
        for meta in block.meta:
            self._meta = self._meta or MetaWriter(self.prefix)
            self._meta.add(meta)
        return offset

    def finalise(
        self,
        *,
        num_rows: int | None = None,
        skipped: Mapping[str, int] | None = None,
        skipped_first: Mapping[str, list[dict[str, Any]]] | None = None,
    ) -> DatasetInfo:
        """Put everything in place, the manifest last and atomically.

        A dataset that is there opens until all of this one is on the disk; then files are only renamed.

        Args:
            num_rows: rows of the input that were read; the number of samples if not given.
            skipped, skipped_first: see DatasetInfo.

        Raises:
            DataError: no sample was added, or images of a block were not written.
        """
        if self.num_samples == 0:
            raise DataError(f"no sample for {self.prefix}: an empty dataset is not written")
        written = Path(self.image_path).stat().st_size
        if written != self.image_bytes:
            raise DataError(f"{self.image_path} has {written} bytes where {self.image_bytes} are due")
        info = DatasetInfo(
            **asdict(self.settings),
            num_samples=self.num_samples,
            num_images=self._images.rows,
            num_tokens=self._tokens,
            num_text_tokens=self._text_tokens,
            num_labels=self._labels,
            num_cut=self._cut,
            text_bytes=self._text_bytes,
            image_bytes=0 if self._part == PIXELS else self.image_bytes,
            longest_sample=self._longest[0],
            longest_length=self._longest[1],
            num_rows=self.num_samples if num_rows is None else num_rows,
            skipped=dict(skipped or {}),
            skipped_first=dict(skipped_first or {}),
            content_sha256=self._content.hexdigest(),
            num_missing_images=self._missing,
            changes=self._changes,
            licenses=dict(self._meta.licenses) if self._meta else {},
            parts=self._described() if self._images.rows else {},
        )
        for close in (
            self._text.close, self._image_file.close, self._text_index.close, self._image_index.close,
            self._samples.close, self._images.close, self._drawn.close,
        ):  # fmt: skip
            close()
        if self._meta:
            self._meta.close()
        Path(self.prefix + MANIFEST + PARTIAL).write_text(info.to_json(), encoding="utf-8")
        images = self._image_parts if info.num_images else ()
        parts = [*TEXT_PARTS, *([META] if self._meta else []), *images, *([DRAWN] if self._num_drawn else [])]
        for part in (*parts, MANIFEST):  # takes long where much was written; the old dataset still opens
            sync(self.prefix + part + PARTIAL)
        Path(self.prefix + MANIFEST).unlink(missing_ok=True)  # from here on the old dataset is gone
        for part in parts:
            publish(self.prefix + part)
        if not images:  # megatron-core cannot map an empty file
            for part in self._image_parts:
                Path(self.prefix + part + PARTIAL).unlink()
        if not self._num_drawn:
            Path(self.prefix + DRAWN + PARTIAL).unlink()
        for part in {META, DRAWN, *IMAGE_PARTS, *PIXEL_PARTS}.difference(parts):  # of the old dataset
            Path(self.prefix + part).unlink(missing_ok=True)
        publish(self.prefix + MANIFEST)
        self._lock.release()
        return info

    def _described(self) -> dict[str, dict[str, Any]]:
        """The manifest's `parts`."""
        drawn = {PART: part_record(self._num_drawn, self._visual_labels)} if self._num_drawn else {}
        return {self._part: {**self._made_with, "dtype": "uint8", "bytes": self.image_bytes}, **drawn}

    def abort(self) -> None:
        """Close and remove what was written. Does nothing after `finalise`."""
        if not self._lock.held:
            return
        for close in (
            self._text.close, self._image_file.close, self._text_index.discard, self._image_index.discard,
            self._samples.discard, self._images.discard, self._drawn.discard,
            *([self._meta.discard] if self._meta else []),
        ):  # fmt: skip
            with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
                close()
        self._remove_partial()
        Path(self.prefix + MANIFEST + PARTIAL).unlink(missing_ok=True)
        self._lock.release()

    def _remove_partial(self) -> None:
        for part in {*TEXT_PARTS, *IMAGE_PARTS, *PIXEL_PARTS, DRAWN, META}:
            Path(self.prefix + part + PARTIAL).unlink(missing_ok=True)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class _RecordWriter:
    """A structured .npy file, written in pieces under its temporary name."""

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

    def add(self, records: NDArray[Any]) -> None:
        self._file.write(records.tobytes())
        self.rows += len(records)

    def close(self) -> None:
        self._file.seek(0)
        if self._write_header() != self._header_bytes:  # numpy leaves room for the first axis to grow
            raise RuntimeError("numpy's .npy header changed its length with the number of rows")
        self._file.close()

    def discard(self) -> None:
        self._file.close()
