"""LAION: pictures of the web with their captions, downloaded by img2dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_eve.curation.preparing.img2dataset import LAYOUT, Img2datasetPreparer, Img2datasetSource
from megatron_eve.data.sources.source import Source


@dataclass
class Laion(Img2datasetPreparer):
    """A pair a row; `meta` has all keys of its JSON but for the caption, exif and the state of the download.

    Among them are url, LICENSE, similarity, NSFW, punsafe, pwatermark and aesthetic where img2dataset was asked for
    them (--save_additional_columns).
    """

    name: ClassVar[str] = "laion"
    what: ClassVar[str] = "LAION (also any other download of img2dataset), pictures with captions"
    layout: ClassVar[str] = LAYOUT

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the archives."""
        return Img2datasetSource(files, self.folder, self.name)
