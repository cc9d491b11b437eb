"""`Record`, one row of training data in the form that all sources produce and all stages of the data engine read.

Stages exchange records as parquet shards with these columns (`ARROW_SCHEMA` in `data/sources/parquet.py`):

    id      string
    source  string                                     where it came from: a data set, a shard
    kind    string                                     conversation | interleaved | pair | text | generation
    images  list<struct<bytes, path, sha256>>          in the order of their <image>
    draw    list<bool>                                 which of the images are to be drawn; null or absent: none
    turns   list<struct<from, value>>                  <image> marks the position of each picture
    meta    string                                     a JSON object: licence, URL, author, scores
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["conversation", "interleaved", "pair", "text", "generation"]
"""What the turns of a row are.

- ``conversation``: alternating turns from "human" and "gpt" (LLaVA), in front of which may be one from "system".
- ``interleaved``: one turn, the text of a document with its pictures in it (MMC4).
- ``pair``: one turn, ``<image>`` and a caption (LAION, COYO, SA-1B once it has captions); an ``<image>`` for each frame
  of a video (WebVid).
- ``text``: one turn, a text without pictures.
- ``generation``: two turns, from "human" what is to be drawn, and from "gpt" ``<image>``, or one for each frame of a
  video. Its pictures are to be drawn.

The one turn of the three kinds before it is from "gpt", so all of its text may train.
"""
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a row: the bytes of its file, or a path below `--image-root`.

    Attributes:
        data: the whole file; None where only its path is known.
        path: name in the source; None for bytes without a name.
        sha256: hex digest of the file's bytes, where the source gives it.
    """

    data: bytes | None = None
    path: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A video of a row, whose frames become its images: the bytes of its file, or a path below `--image-root`.

    Attributes:
        data: the whole file; None where only its path is known.
        path: name in the source.
    """

    data: bytes | None
    path: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row of training data.

    Attributes:
        id: of the row in its source; None where it has none.
        source: where the row came from.
        kind: what its turns are.
        images: its pictures, in the order of their placeholders.
        turns: list of `{"from": ..., "value": ...}`, not validated; `data/text/turns.py` validates it.
        meta: further metadata of the row, JSON values only.
        num_missing: images that the source names and that have no file; the row is kept without them.
        changes: what else was left out or changed of the row: counts by the names of `reasons.CHANGES`.
        video: a video whose frames have not been extracted yet; such a row has no images and no
            placeholder (`data/sources/frames.py`).
        drawn: True where all images, or the frames of the video, are to be drawn (predicted), False where none is; or
            one for each image.
        is_video: the images are the frames of one video.
    """

    id: str | None
    source: str
    kind: Kind
    images: list[ImageFile]
    turns: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    num_missing: int = 0
    video: VideoFile | None = None
    changes: Mapping[str, int] = field(default_factory=dict, compare=False)
    drawn: bool | tuple[bool, ...] = False
    is_video: bool = False

    @property
    def drawn_images(self) -> tuple[bool, ...]:
        """Of each image, is it to be drawn?"""
        if isinstance(self.drawn, tuple):
            return self.drawn
        return (self.drawn or self.kind == "generation",) * len(self.images)
