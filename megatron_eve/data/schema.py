"""One row of training data, whatever source it came from: what every stage of the data engine reads and writes.

As parquet (`ARROW_SCHEMA` in `data/sources/parquet.py`) it is the exchange format between stages:

    id      string
    source  string                                     where it came from: a data set, a shard
    kind    string                                     conversation | interleaved | pair | text
    images  list<struct<bytes, path, sha256>>          in the order of their <image>
    turns   list<struct<from, value>>                  <image> stands at each picture's place
    meta    string                                     a JSON object: licence, URL, author, scores
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["conversation", "interleaved", "pair", "text"]
"""What the turns of a row are.

- ``conversation``: turns from "human" and "gpt" in turns (LLaVA).
- ``interleaved``: one turn, the text of a document with its pictures in it (MMC4).
- ``pair``: one turn, ``<image>`` and a caption (LAION, COYO, SA-1B once it has captions); an ``<image>`` for each frame
  of a video (WebVid).
- ``text``: one turn, a text without pictures.

The one turn of the last three is from "gpt": all of it may train.
"""
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture of a row: the bytes of its file, or a path to it below `--image-root`.

    Attributes:
        data: the whole file; None where only its path is known.
        path: as the source calls it; None for bytes without a name.
        sha256: hex digest of the file's bytes, where the source says so.
    """

    data: bytes | None = None
    path: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A video of a row, whose frames become its pictures: the bytes of its file, or a path to it below `--image-root`.

    Attributes:
        data: the whole file; None where only its path is known.
        path: as the source calls it.
    """

    data: bytes | None
    path: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Attributes:
        id: as the source calls it, if it does.
        source: where the row came from.
        kind: what its turns are.
        images: its pictures, in the order of their placeholders.
        turns: `{"from": ..., "value": ...}`; not checked yet, `data/text/conversation.py` does that.
        meta: what goes along beside the row; JSON values only.
        num_missing: pictures that the source names and that are not there, without which the row goes on.
        video: of which no frame has been taken yet; such a row has no pictures, and no
            placeholder (`data/sources/frames.py`).
    """

    id: str | None
    source: str
    kind: Kind
    images: list[ImageFile]
    turns: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    num_missing: int = 0
    video: VideoFile | None = None
