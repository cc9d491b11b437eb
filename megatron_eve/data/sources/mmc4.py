"""MMC4: web pages, each with its pictures placed at the sentences that they match.

Layout (github.com/allenai/mmc4), one line a document:
`{text_list: [str], url, could_have_url_duplicate, similarity_matrix: [pictures x sentences], image_info: [{image_name,
raw_url, matched_text_index, matched_sim, face_detections}]}`; the pictures are files `image_name` in a folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import plain_text, source_name
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.source import RawRow
from megatron_eve.data.text.conversation import IMAGE_TOKEN

MAX_PICTURES = 6
"""Of one document; the first ones of its list that are there. VILA takes as many."""


class Mmc4Source(JsonSource):
    """Documents with pictures in them, put together as VILA does (NVlabs/VILA v1.0, `LazyMMC4Dataset`).

    The first 6 pictures of the list are taken. One that is not there, as its URL has rotted since, is passed over
    and the next one takes its place; a document of which no picture is there is left out. VILA's tools keep the
    documents alone of which every picture was downloaded; those come out the same.

    Each picture stands in front of its matched sentence, those of one sentence in the order of the list. Sentences are
    joined by one space; one space on either side of a picture goes. `<image>` in a sentence becomes `<IMAGE>`. A
    picture that no text follows is left out. `meta` has the page's `url`, and `raw_url` and `matched_sim` as lists in
    the order of the record's pictures. Nothing is downloaded.

    Args:
        files: `docs_shard_<n>_v3.jsonl`.
        image_root: the folder of the pictures.

    Raises:
        DataError: while iterating, there is no image_root, or a file cannot be read on.
    """

    def rows(self) -> Iterator[RawRow]:
        """The text of each line."""
        if self._image_root is None and self._files:
            raise DataError(
                f"{self._files[0]} names picture files: give --image-root, the folder that they are in"
            )
        yield from super().rows()

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        sentences = _sentences(fields.get("text_list"))
        pictures, num_missing = self._pictures(fields.get("image_info"), len(sentences))
        _check_matrix(fields.get("similarity_matrix"), len(fields["image_info"]), len(sentences))
        pictures.sort(key=lambda picture: picture["matched_text_index"])  # stable, as published
        for picture in pictures:
            place = picture["matched_text_index"]
            sentences[place] = IMAGE_TOKEN + sentences[place]
        text = " ".join(sentences)
        text = text.replace(f"{IMAGE_TOKEN} ", IMAGE_TOKEN).replace(f" {IMAGE_TOKEN}", IMAGE_TOKEN)
        while text.endswith(IMAGE_TOKEN):
            text = text.removesuffix(IMAGE_TOKEN)
            pictures.pop()
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
        )

    def _pictures(self, found: object, num_sentences: int) -> tuple[list[dict[str, Any]], int]:
        """The pictures that are taken, checked; and how many were passed over as they are not there."""
        if not isinstance(found, list) or not all(isinstance(picture, dict) for picture in found):
            raise SkipRow("document_layout", "'image_info' is not a list of objects")
        taken: list[dict[str, Any]] = []
        num_missing = 0
        for number, picture in enumerate(found):
            if len(taken) == MAX_PICTURES:
                break
            name, place = picture.get("image_name"), picture.get("matched_text_index")
            if not isinstance(name, str) or not name:
                raise SkipRow("image_field", f"'image_name' of picture {number} is {name!r:.80}")
            if _is_missing(os.path.join(self._image_root or "", name)):
                num_missing += 1
                continue
            if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < num_sentences:
                raise SkipRow(
                    "matched_text_index",
                    f"{place!r:.80} of picture {number}, where there are {num_sentences} sentences",
                )
            taken.append(picture)
        if num_missing and not taken:
            raise SkipRow(
                "image_missing",
                f"none of its {num_missing} pictures, of which {found[0]['image_name']} is the first",
            )
        return taken, num_missing


def _sentences(found: object) -> list[str]:
    if not isinstance(found, list):
        raise SkipRow("document_layout", f"'text_list' is {type(found).__name__}, not a list of sentences")
    return [plain_text(sentence, f"sentence {place} of 'text_list'") for place, sentence in enumerate(found)]


def _is_missing(path: str) -> bool:
    """Whether there is no such file; what else is wrong with it is said where it is read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _check_matrix(found: object, num_pictures: int, num_sentences: int) -> None:
    """The matrix says nothing that is needed; one that does not fit shows that something is missing from the row."""
    if found is None:
        return
    rows = found if isinstance(found, list) else []
    sizes = {len(row) if isinstance(row, list) else -1 for row in rows}
    if len(rows) != num_pictures or not sizes <= {num_sentences} or not isinstance(found, list):
        raise SkipRow(
            "document_layout",
            f"'similarity_matrix' is not {num_pictures} pictures x {num_sentences} sentences",
        )
