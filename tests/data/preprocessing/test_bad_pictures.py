"""Bad pictures under every image storage and decoder: the same ones are left out, for the same reasons."""

from __future__ import annotations

import struct
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eve.data.images import dali
from tests.data.helpers import MakeConfig, caption_row, encoded, opened, picture, run, skipped_rows
from tests.data.odd_pictures import chunk


def png_of_zeros(width: int, height: int, rows: int) -> bytes:
    """A gray PNG that says so many pixels and holds so many rows of them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes((width + 1) * rows)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def at(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


@cache
def pictures() -> dict[str, tuple[bytes, str | None]]:
    """Files by their names, each with the reason for which it is left out."""
    jpeg = encoded(picture(300, 200), "JPEG")
    frames = [picture(60, 40, seed=seed) for seed in range(20)]
    animated = {"save_all": True, "append_images": frames[1:]}
    gray = (np.arange(48 * 64) * 20 % 65536).astype(np.uint16).reshape(48, 64)
    bmp = encoded(picture(64, 48), "BMP")
    tiff = b"II*\0" + struct.pack("<IH", 8, 4)
    tiff += b"".join(struct.pack("<HHII", tag, 4, 10**8, 50) for tag in (256, 257, 273, 279)) + bytes(4)
    return {
        "a PNG bomb": (png_of_zeros(50_000, 50_000, 10), "image_too_large"),
        "a PNG with more rows than it says": (png_of_zeros(64, 64, 5000), None),
        "a JPEG of 65,535 x 65,535": (at(jpeg, jpeg.index(b"\xff\xc0") + 5, b"\xff" * 4), "image_too_large"),
        "a BMP of 2^31 x 2^31": (at(bmp, 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1)), "image_too_large"),
        "a PPM of 10^12 pixels": (b"P6 1000000 1000000 255\n", "image_too_large"),
        "a TIFF of 10^8 strips": (tiff, "image_format"),
        "1 x 100,000": (encoded(picture(1, 100_000), "PNG"), None),
        "100,000 x 1": (encoded(picture(100_000, 1), "PNG"), None),
        "1 x 65,500": (encoded(picture(1, 65_500), "JPEG"), None),
        "CMYK": (encoded(picture(64, 48).convert("CMYK"), "JPEG"), None),
        "16 bit": (encoded(Image.fromarray(gray), "PNG"), None),
        "an animated GIF": (encoded(frames[0], "GIF", **animated), None),
        "an animated WebP": (encoded(frames[0], "WEBP", **animated), None),
        "an animated PNG": (encoded(frames[0], "PNG", **animated), None),
        "a GIF without frames": (b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0) + b";", "image_format"),
        "a page named .jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "image_format"),
        "a drawing named .jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_format"),
        "PostScript named .jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "image_format"),
        "an icon named .jpg": (encoded(picture(32, 32), "ICO"), "image_format"),
        "a JPEG cut short": (jpeg[: len(jpeg) // 2], "image_damaged"),
        "a WebP cut short": (encoded(picture(300, 200), "WEBP")[:500], "image_damaged"),
        "a PNG cut short": (encoded(picture(300, 200), "PNG")[:900], "image_damaged"),
        "a file without bytes": (b"", "image_empty"),
    }


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize(
    ("storage", "decoder"),
    [
        ("encoded", "auto"),
        *((storage, d) for storage in ("jpeg", "pixels") for d in ("threads", "pillow", "dali")),
    ],
)
def test_the_same_pictures_are_left_out(
    make_config: MakeConfig, tmp_path: Path, storage: str, decoder: str
) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    rows = []
    for number, data in enumerate(data for data, _ in pictures().values()):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(data)
        rows.append(caption_row(number, f"{number}.jpg"))
    config = make_config(rows, image_storage=storage, image_decoder=decoder, image_size=224, teacher_size=112)
    run(config)
    left_out = {row["row"] - 1: row["reason"] for row in skipped_rows(config)}
    assert {name: left_out.get(number) for number, name in enumerate(pictures())} == {
        name: reason for name, (_, reason) in pictures().items()
    }
    kept = [Image.open(BytesIO(data)).size for data, reason in pictures().values() if reason is None]
    dataset = opened(config)
    assert len(dataset) == len(kept)
    for image, size in enumerate(kept):
        width, height, _ = dataset.images[image].tolist()
        # What jpeg makes smaller is recorded at the size that it has then.
        assert (width, height) == size or (storage == "jpeg" and width * height < size[0] * size[1])


def test_dali_decodes_few_large_pictures_at_a_time() -> None:
    """64 at the cap on pixels would take 17 GB; what a picture becomes does not depend on its neighbours."""
    photo, large = 1 << 20, 80 << 20
    assert list(dali._batches(range(130), [photo] * 130)) == [
        [*range(64)], [*range(64, 128)], [128, 129],
    ]  # fmt: skip
    assert list(dali._batches([3, 1, 2], [0, large, large, large])) == [[3], [1], [2]]
    assert list(dali._batches([0, 1, 2], [photo, large, photo])) == [[0, 1, 2]]
