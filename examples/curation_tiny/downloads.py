"""Three downloads of views of photos, in the layouts in which SA-1B, OpenImages and LAION are published.

Most rows are good. The others are known to be bad in one way each: too small, padded to a square as img2dataset does,
with a caption that is too short or repeats itself, copies of a picture of another download, or with a license that is
not wanted. `Row.fate` says what has to become of each.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import photos
from curation_tiny.views import KINDS, distinct_views, jpeg
from PIL import Image

VIEWS = 3
"""Views of each photo in each download."""
SMALL = 0.5
"""Scale of pictures that are too small."""
_EXTRA = 3  # views of each photo for bad rows
ROWS_PER_FILE = 24
WIDE = ("chelsea", "coffee", "motorcycle_left", "rocket")
"""Photos that are far from square, whose views serve as bad rows."""
GOOD, FAILED, UNWANTED = "good", "failed", "license_dropped"
"""Fates of rows: kept by all rules, not downloaded, dropped while preparing. The others are reasons of curation."""
SOURCES = ("sa1b", "openimages", "laion")
"""The downloads, in the order in which curation reads them: of copies, that of the first one is kept."""
_CSV = (
    "ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title",
    "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation",
)  # fmt: skip
_CC_BY = "https://creativecommons.org/licenses/by/2.0/"
_NOT_WANTED = "https://creativecommons.org/licenses/by-nc/2.0/"


@dataclass(frozen=True)
class Row:
    """A row of a download.

    Attributes:
        source: the download.
        id: of the row.
        kind: the photo that it is a view of.
        picture: the file; None where the download says that it failed.
        fate: what has to become of it: GOOD, FAILED, UNWANTED, or the reason for which curation has to drop it.
        caption: its text, where the download has texts.
        license: of the picture; None where the download names none.
    """

    source: str
    id: str
    kind: str
    picture: bytes | None
    fate: str = GOOD
    caption: str = ""
    license: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether all rules keep it."""
        return self.fate == GOOD

    @property
    def url(self) -> str:
        """Where the row says that its picture came from."""
        return f"https://example.org/{self.source}/{self.kind}/{self.id}.jpg"


def make_rows(views: int = VIEWS) -> list[Row]:
    """The rows of all downloads, in their order."""
    return [*_sa1b(views), *_openimages(views), *_laion(views)]


def _views(source: str, views: int) -> Iterator[tuple[str, Image.Image]]:
    """Photos and their views for a download, so that neighbours show different photos."""
    first = SOURCES.index(source) * views
    for number in range(first, first + views):
        for kind in KINDS:
            yield kind, distinct_views(kind, len(SOURCES) * views + _EXTRA)[number]


def _sa1b(views: int) -> list[Row]:
    return [
        Row("sa1b", f"sa_{number}", kind, jpeg(picture), license="SA-1B Research License")
        for number, (kind, picture) in enumerate(_views("sa1b", views), start=1)
    ]


def _openimages(views: int) -> list[Row]:
    rows = []
    for number, (kind, picture) in enumerate(_views("openimages", views)):
        unwanted = number % 20 == 7
        license, fate = (_NOT_WANTED, UNWANTED) if unwanted else (_CC_BY, GOOD)
        rows.append(Row("openimages", f"{number:016x}", kind, jpeg(picture), fate, license=license))
    return rows


def _laion(views: int) -> list[Row]:
    captions = photos.load_captions()
    found: list[tuple[str, bytes | None, str, str]] = [
        (kind, jpeg(picture), GOOD, captions[kind]) for kind, picture in _views("laion", views)
    ]
    for kind in WIDE:
        caption, pictures = captions[kind], distinct_views(kind, len(SOURCES) * views + _EXTRA)
        found += [
            (kind, jpeg(_resized(pictures[-1], SMALL)), "too_small", caption),
            (kind, jpeg(_padded(pictures[-1])), "padded", caption),
            (kind, jpeg(pictures[-2]), "caption_too_short", "photo"),
            (kind, jpeg(pictures[-3]), "caption_repetitive", "buy cheap photos now " * 8),
            (kind, None, FAILED, caption),
            # Copies of pictures of the other downloads, which stand before this one in the list.
            (kind, jpeg(pictures[0]), "duplicate_exact", caption),
            (kind, jpeg(pictures[views], quality=60), "duplicate_near", caption),
            (kind, jpeg(_resized(pictures[1], 0.9)), "duplicate_near", caption),
        ]
    rows = []
    for number, (kind, picture, fate, caption) in enumerate(found):
        key = f"{number // ROWS_PER_FILE:05d}{number % ROWS_PER_FILE:04d}"
        rows.append(Row("laion", key, kind, picture, fate, caption))
    return rows


def _padded(picture: Image.Image) -> Image.Image:
    """In the middle of a white square, as `img2dataset --resize_mode border` leaves it."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def write_downloads(rows: list[Row], folder: Path) -> None:
    """Write the rows below a folder, a download each: sa1b/, openimages/, laion/."""
    by_source = {source: [row for row in rows if row.source == source] for source in SOURCES}
    for source, write in (("sa1b", _write_sa1b), ("openimages", _write_openimages), ("laion", _write_laion)):
        (folder / source).mkdir(parents=True)
        write(by_source[source], folder / source)


def _write_sa1b(rows: list[Row], folder: Path) -> None:
    for number, some in enumerate(_chunks(rows)):
        members = []
        for row in some:
            assert row.picture is not None
            width, height = Image.open(io.BytesIO(row.picture)).size
            about = {
                "image_id": int(row.id[3:]),
                "width": width,
                "height": height,
                "file_name": f"{row.id}.jpg",
            }
            masks = json.dumps({"image": about, "annotations": []})
            members += [(f"{row.id}.jpg", row.picture), (f"{row.id}.json", masks.encode())]
        _write_tar(folder / f"sa_{number:06d}.tar", members)


def _write_openimages(rows: list[Row], folder: Path) -> None:
    (folder / "V6Train1").mkdir()
    with (folder / "train-images-boxable-with-rotation.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, _CSV)
        table.writeheader()
        for row in rows:
            assert row.picture is not None
            (folder / "V6Train1" / f"{row.id}.jpg").write_bytes(row.picture)
            table.writerow(
                {
                    "ImageID": row.id, "Subset": "train", "OriginalURL": row.url, "License": row.license,
                    "Author": f"Author of {row.id}", "Title": row.kind, "Rotation": "0.0",
                    "OriginalSize": len(row.picture),
                }
            )  # fmt: skip


def _write_laion(rows: list[Row], folder: Path) -> None:
    for number, some in enumerate(_chunks(rows)):
        members = []
        for row in some:
            if row.picture is None:
                continue
            width, height = Image.open(io.BytesIO(row.picture)).size
            about = {
                "url": row.url, "caption": row.caption, "key": row.id, "status": "success", "width": width,
                "height": height, "sha256": hashlib.sha256(row.picture).hexdigest(),
            }  # fmt: skip
            members.append((f"{row.id}.jpg", row.picture))
            members.append((f"{row.id}.txt", row.caption.encode()))
            members.append((f"{row.id}.json", json.dumps(about).encode()))
        _write_tar(folder / f"{number:05d}.tar", members)
        failed = sum(row.picture is None for row in some)
        counts = {
            "count": len(some),
            "successes": len(some) - failed,
            "failed_to_download": failed,
            "failed_to_resize": 0,
        }
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(counts))


def _chunks(rows: list[Row]) -> Iterator[list[Row]]:
    for first in range(0, len(rows), ROWS_PER_FILE):
        yield rows[first : first + ROWS_PER_FILE]


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
