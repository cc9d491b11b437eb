"""One row of the input -> token ids, labels and checked image files, or the reason why not."""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.conversation import TEMPLATES, encode_conversation
from megatron_eve.data.dataset_format import IMAGE_STORAGES
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.geometry import check_sizes
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, MAX_PIXELS_LIMIT, decode_image
from megatron_eve.data.indexed_writer import MAX_ROW_BYTES, StoredImage
from megatron_eve.data.rows import InputRow
from megatron_eve.data.tokenizer import Tokenizer
from megatron_eve.errors import is_lfs_pointer

if TYPE_CHECKING:
    from megatron_eve.data.images.backends import BackendName
    from megatron_eve.data.storage import ImageStore, StorageSettings

_MEDIA_KEYS = frozenset({"video", "videos", "audio", "audios"})
# Keys under which other data sets name a picture; a row with one of them would be kept as text without it.
_OTHER_IMAGE_KEYS = frozenset(
    f"{word}{ending}"
    for word in ("image", "img", "picture", "photo")
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_name", "_url", "_urls")
) - {"image", "images"}


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What `preprocess` is to do; the flags of tools/preprocess_data.py.

    Attributes:
        input: a JSON array or a .jsonl file of rows with `id`, `image` (a name, a list or none) and
            `conversations`.
        image_root: the folder that image names are relative to, and must stay in.
        follow_links: take images under it that are links to files elsewhere, as in Hugging Face's cache.
        tokenizer_model: a Llama tokenizer.model.
        output_prefix: where the dataset goes.
        template: "plain" or "vicuna_v1".
        image_size, teacher_size: pixels, see `geometry`.
        model_max_length: texts are cut at this many tokens, an image counted as one.
        workers: processes; 1 works in this one.
        apply_exif: turn pictures upright as their EXIF data says.
        max_image_pixels: larger pictures are left out.
        image_storage: "encoded", "jpeg" or "pixels", see `dataset_format.IMAGE_STORAGES`.
        image_decoder: "auto", "dali", "threads" or "pillow", for "jpeg" and "pixels"; "encoded" takes Pillow.
        jpeg_quality: 1 to 100.
        jpeg_subsampling: of colours, "420" or "444".
        teacher_patch_size: side of the teacher's own patches in pixels, which "pixels" are bound to.
    """

    input: str
    image_root: str
    tokenizer_model: str
    output_prefix: str
    template: str = "plain"
    image_size: int = 672
    teacher_size: int = 336
    model_max_length: int = 2048
    workers: int = 1
    apply_exif: bool = True
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    follow_links: bool = False
    image_storage: str = "encoded"
    image_decoder: BackendName = "auto"
    jpeg_quality: int = 90
    jpeg_subsampling: str = "420"
    teacher_patch_size: int = 14

    def check(self) -> None:
        """Raise DataError, naming the flag and the remedy, for a value that cannot be."""
        try:
            check_sizes(self.image_size, self.teacher_size)
        except ValueError as error:
            raise DataError(f"--image-size, --teacher-size: {error}") from error
        if self.template not in TEMPLATES:
            raise DataError(f"--template {self.template}: use {' or '.join(sorted(TEMPLATES))}")
        if not Path(self.image_root).is_dir():
            raise DataError(f"--image-root {self.image_root} is not a directory")
        if self.workers < 1:
            raise DataError(f"--workers {self.workers}: use 1 or more")
        if self.model_max_length < 2:
            raise DataError(f"--model-max-length {self.model_max_length}: use 2 or more")
        if not 1 <= self.max_image_pixels <= MAX_PIXELS_LIMIT:
            raise DataError(f"--max-image-pixels {self.max_image_pixels}: use 1 to {MAX_PIXELS_LIMIT}")
        self._check_storage()

    def _check_storage(self) -> None:
        if self.image_storage not in IMAGE_STORAGES:
            raise DataError(f"--image-storage {self.image_storage}: use {' or '.join(IMAGE_STORAGES)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"--jpeg-quality {self.jpeg_quality}: use 1 to 100")
        if self.jpeg_subsampling not in ("420", "444"):
            raise DataError(f"--jpeg-subsampling {self.jpeg_subsampling}: use 420 or 444")
        if self.teacher_patch_size < 1:
            raise DataError(f"--teacher-patch-size {self.teacher_patch_size}: use 1 or more")
        if self.image_storage == "encoded" and self.image_decoder not in ("auto", "pillow"):
            raise DataError(
                f"--image-decoder {self.image_decoder}: encoded images are not decoded into the dataset; add "
                "--image-storage jpeg or pixels, or leave the flag out"
            )
        if self.image_decoder == "dali":
            try:
                importlib.import_module("nvidia.dali")
            except ImportError as error:
                raise DataError(
                    f"--image-decoder dali: nvidia.dali cannot be imported ({error}); see README (Installing), or use "
                    "threads"
                ) from error

    def storage(self) -> StorageSettings | None:
        """How images are stored; None where their files are kept as they are. Imports torch otherwise."""
        if self.image_storage == "encoded":
            return None
        from megatron_eve.data.images.backends import DecodeSettings
        from megatron_eve.data.storage import StorageSettings

        return StorageSettings(
            image_storage=self.image_storage,
            image_decoder=self.image_decoder,
            image_size=self.image_size,
            decode=DecodeSettings(
                self.apply_exif, self.max_image_pixels, self.teacher_size, self.teacher_patch_size
            ),
            jpeg_quality=self.jpeg_quality,
            jpeg_subsampling=self.jpeg_subsampling,
        )


@dataclass(frozen=True)
class EncodedRow:
    """A row that is kept: int32 [n] tokens and labels as `DatasetWriter.add_sample` takes them."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    images: list[StoredImage]
    cut: bool


@dataclass(frozen=True)
class SkippedRow:
    """A row that is left out: its number in the input (from 1), why, and what it called itself."""

    row: int
    reason: str
    detail: str
    id: str | None = None
    image: str | None = None


class RowEncoder:
    """Turns rows into samples; one for each process."""

    def __init__(self, config: PreprocessConfig) -> None:
        self._config = config
        self._tokenizer = Tokenizer(config.tokenizer_model)
        self._root = os.path.realpath(config.image_root)
        self._judges = True  # pictures are decoded where they are read
        self._store: ImageStore | None = None
        if (storage := config.storage()) is not None:
            from megatron_eve.data.storage import ImageStore

            self._store = ImageStore(storage, workers=config.workers)

    def encode_chunk(self, rows: Sequence[InputRow]) -> list[EncodedRow | SkippedRow]:
        """Encode rows, in order; their pictures are decoded together where they are stored decoded.

        A row with a picture that cannot be stored is encoded again as with image storage "encoded", so that the same
        rows are left out, for the same reasons.
        """
        if self._store is None:
            return [self.encode(row) for row in rows]
        self._judges = False
        results = [self.encode(row) for row in rows]
        self._judges = True
        for number, (row, result) in enumerate(zip(rows, results, strict=True)):
            # Pictures that were cut off with their text are not stored, but judged like the others.
            if isinstance(result, SkippedRow) or result.cut:
                judged = self.encode(row)
                if isinstance(judged, SkippedRow):
                    results[number] = judged
        kept = [(number, result) for number, result in enumerate(results) if isinstance(result, EncodedRow)]
        stored = iter(self._store.store([image.data for _, result in kept for image in result.images]))
        for number, result in kept:
            images = [next(stored) for _ in result.images]
            whole = [image for image in images if isinstance(image, StoredImage)]
            if len(whole) == len(images):
                results[number] = replace(result, images=whole)
                continue
            judged = self.encode(rows[number])
            if isinstance(judged, EncodedRow):  # Pillow decides whether a picture can be used
                judged = replace(result, images=[self._store.with_pillow(one.data) for one in result.images])
            results[number] = judged
        return results

    def encode(self, row: InputRow) -> EncodedRow | SkippedRow:
        """Tokenise the text of a row and decode its images."""
        try:
            return self._encode(row)
        except SkipRow as skip:
            fields = row.value if isinstance(row.value, Mapping) else {}
            named = {key: _printable(fields[key]) for key in ("id", "image") if fields.get(key) is not None}
            return SkippedRow(row.number, skip.reason, _printable(skip.detail), **named)

    def _encode(self, row: InputRow) -> EncodedRow:
        if row.problem is not None:
            raise SkipRow("broken_json", row.problem)
        if not isinstance(row.value, Mapping):
            raise SkipRow("not_an_object", f"it is {type(row.value).__name__}")
        names = _image_names(row.value)
        turns: Any = row.value.get("conversations")
        whole = encode_conversation(turns, self._tokenizer, self._config.template, len(names))
        encoded = whole.cut(self._config.model_max_length)
        if encoded.num_labels == 0:
            raise SkipRow(
                "nothing_to_train", f"{len(whole.tokens)} tokens, of which {whole.num_labels} train"
            )
        images = [self._load_image(name) for name in names]
        return EncodedRow(
            tokens=np.array(encoded.tokens, dtype=np.int32),
            labels=np.array(encoded.labels, dtype=np.int32),
            images=images[: encoded.num_images],  # an image whose place was cut off is not part of the sample
            cut=len(whole.tokens) > len(encoded.tokens),
        )

    def _load_image(self, name: str) -> StoredImage:
        data = read_image_file(self._root, name, self._config.follow_links)
        if not self._judges:
            return StoredImage(data, 0, 0)  # its size is known once it is stored
        image = decode_image(
            data, apply_exif=self._config.apply_exif, max_pixels=self._config.max_image_pixels
        )
        return StoredImage(data, image.width, image.height)


def _image_names(row: Mapping[str, Any]) -> list[str]:
    """The image files of a row, from `image` or `images`.

    Raises:
        SkipRow: they are no names, stand under another key, or the row has a video or sound in their place.
    """
    given = {key: row[key] for key in ("image", "images") if row.get(key) not in (None, [])}
    values = [value if isinstance(value, list) else [value] for value in given.values()]
    if len(values) == 2 and values[0] != values[1]:
        raise SkipRow("image_field", "'image' and 'images' name different files")
    names: list[object] = values[0] if values else []
    for name in names:
        if not isinstance(name, str) or not name:
            raise SkipRow("image_field", f"{name!r:.80}")
    if not names:
        for key, value in row.items():
            if not isinstance(value, (str, list, dict)) or not value:
                continue  # a table with gaps: the row has none
            if key.lower() in _MEDIA_KEYS:
                raise SkipRow("other_media", f"it has {key!r} and no image")
            if key.lower() in _OTHER_IMAGE_KEYS:
                raise SkipRow("image_field", f"it has {key!r} where 'image' is due")
    return [str(name) for name in names]


def read_image_file(root: str, name: str, follow_links: bool = False) -> bytes:
    """Bytes of the file `name` under `root`.

    Args:
        root: a real path (`os.path.realpath`).
        name: relative, and below `root`.
        follow_links: follow links wherever they lead; else as long as they stay under `root`.

    Raises:
        SkipRow: it leaves the root, is missing, is not a file, or cannot be read.
    """
    if "\0" in name:  # where some functions of os.path end a name
        raise SkipRow("image_field", f"{name!r:.80} cannot be a file name")
    if os.path.isabs(name):
        raise SkipRow("image_outside_root", f"{name} is an absolute path")
    if os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise SkipRow("image_outside_root", f"{name} leads out of --image-root")
    try:
        path = os.path.realpath(os.path.join(root, os.path.normpath(name) if follow_links else name))
    except ValueError:  # half of a surrogate pair
        raise SkipRow("image_field", f"{name!r:.80} cannot be a file name") from None
    if not follow_links and os.path.commonpath([root, path]) != root:
        raise SkipRow("image_outside_root", f"{name} is a link to {path}, which --follow-links takes")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise SkipRow("image_not_a_file", name)
        if status.st_size > MAX_ROW_BYTES:
            raise SkipRow("image_file_too_large", f"{name} has {status.st_size} bytes")
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise SkipRow("image_missing", name) from None
    except OSError as error:
        raise SkipRow("image_unreadable", f"{name}: {error.strerror}") from error
    if is_lfs_pointer(data):
        raise SkipRow("image_lfs_pointer", name)
    return data


def _printable(value: object) -> str:
    """Text for a list that people read: control characters and halves of surrogate pairs as escapes."""
    text = str(value)[:300]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
