"""MMC4: web pages whose images are matched to sentences.

Layout (github.com/allenai/mmc4), one line a document:
`{text_list: [str], url, could_have_url_duplicate, similarity_matrix: [pictures x sentences], image_info: [{image_name,
raw_url, matched_text_index, matched_sim, face_detections}]}`; the images are files `image_name` in a folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.reasons import IMAGES_AT_END, IMAGES_OVER_LIMIT
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import close_to_images, plain_text, source_name
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.source import RawRow
from megatron_eve.models.text_format import IMAGE_TOKEN

MAX_PICTURES = 6
"""Maximum images of one document: the first of its list that have a file, as published."""


class Mmc4Source(JsonSource):
    """Documents with images in them, composed as in published pretraining (arXiv 2312.07533, `LazyMMC4Dataset`).

    The first 6 images of the list are used, and the others counted (`Record.changes`). An image without a file (dead
    URL) is skipped and the next one takes its place; a document with no image file at all is skipped. The published
    tools keep only documents of which every image was downloaded; for those the result is the same.

    Each image goes in front of its matched sentence; images of one sentence keep the order of the list. Sentences are
    joined by one space; one space on either side of an image is removed. `<image>` in a sentence becomes `<IMAGE>`.
    Images at the end of the document are dropped, and counted. `meta` has the page's `url`, and `raw_url` and
    `matched_sim` as lists in the order of the record's images. Nothing is downloaded.

    Args:
        files: `docs_shard_<n>_v3.jsonl`.
        image_root: folder of the images.

    Raises:
        DataError: while iterating, there is no image_root, or a file cannot be read further.
    """

    def rows(self) -> Iterator[RawRow]:
        """The JSON text of each line, as bytes in `payload`."""
        if self._image_root is None and self._files:
            raise DataError(
                f"{self._files[0]} names image files: give --image-root, the folder that they are in"
            )
        yield from super().rows()

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        changes: Counter[str] = Counter()
        sentences = _sentences(fields.get("text_list"), changes)
        pictures, num_missing = self._pictures(fields.get("image_info"), len(sentences), changes)
        check_matrix(fields.get("similarity_matrix"), len(fields["image_info"]), len(sentences))
        pictures.sort(key=lambda picture: picture["matched_text_index"])  # a stable sort, as published
        for picture in pictures:
            place = picture["matched_text_index"]
            sentences[place] = IMAGE_TOKEN + sentences[place]
        text = close_to_images(" ".join(sentences))
        while text.endswith(IMAGE_TOKEN):
            text = text.removesuffix(IMAGE_TOKEN)
            pictures.pop()
            changes[IMAGES_AT_END] += 1
        meta: dict[str, Any] = {"url": fields.get("url")}
        for key in ("raw_url", "matched_sim"):
            meta[key] = [picture.get(key) for picture in pictures]
        return Record(
            id=None,
            source=source_name(row.file),
            kind="interleaved",
            images=[ImageFile(path=picture["image_name"]) for picture in pictures],
            turns=[{"from": "gpt", "value": text}],
            meta=meta,
            num_missing=num_missing,
            changes=changes,
        )

    def _pictures(
        self, found: object, num_sentences: int, changes: Counter[str]
    ) -> tuple[list[dict[str, Any]], int]:
        """The images that are used, validated, and the number of images skipped because they have no file."""
        if not isinstance(found, list) or not all(isinstance(picture, dict) for picture in found):
            raise SkipRow("document_layout", "'image_info' is not a list of objects")
        taken: list[dict[str, Any]] = []
        num_missing = 0
        for number, picture in enumerate(found):
            if len(taken) == MAX_PICTURES:
                changes[IMAGES_OVER_LIMIT] += len(found) - number
                break
            name, place = picture.get("image_name"), picture.get("matched_text_index")
            if not isinstance(name, str) or not name:
                raise SkipRow("image_field", f"'image_name' of picture {number} is {name!r:.80}")
            if _is_missing(os.path.join(self._image_root or "", name)):
                num_missing += 1
                continue
            check_place(place, number, num_sentences)
            taken.append(picture)
        if num_missing and not taken:
            raise SkipRow(
                "image_missing",
                f"none of its {num_missing} images has a file; the first is {found[0]['image_name']}",
            )
        return taken, num_missing


def _sentences(found: object, changes: Counter[str]) -> list[str]:
    if not isinstance(found, list):
        raise SkipRow("document_layout", f"'text_list' is {type(found).__name__}, not a list of sentences")
    return [
        plain_text(sentence, f"sentence {place} of 'text_list'", changes)
        for place, sentence in enumerate(found)
    ]


def _is_missing(path: str) -> bool:
    """Whether there is no such file; other problems are reported when the file is read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def check_place(place: object, picture: int, num_sentences: int) -> None:
    """Raise SkipRow unless the matched sentence of a picture, counted from 0, exists."""
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < num_sentences:
        raise SkipRow(
            "matched_text_index",
            f"{place!r:.80} of picture {picture}, where there are {num_sentences} sentences",
        )


def check_matrix(found: object, num_pictures: int, num_sentences: int) -> None:
    """Validate the shape of the matrix: a wrong one means that the row is incomplete. Its values are not used.

    Raises:
        SkipRow: it has another shape than pictures x sentences.
    """
    if found is None:
        return
    rows = found if isinstance(found, list) else []
    sizes = {len(row) if isinstance(row, list) else -1 for row in rows}
    if len(rows) != num_pictures or not sizes <= {num_sentences} or not isinstance(found, list):
        raise SkipRow(
            "document_layout",
            f"'similarity_matrix' is not {num_pictures} pictures x {num_sentences} sentences",
        )
