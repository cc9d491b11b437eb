"""Bytes to RGB to patches: bit-equal to the published preprocessing, and a counted reason for every bad file."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image, ImageOps, features

from megatron_eve.data.images import (
    DEFAULT_MAX_PIXELS,
    ImageError,
    cut_patches,
    decode_image,
    resize,
    view_of,
)
from megatron_eve.models.eve.geometry import image_geometry
from megatron_eve.models.towers.normalisation import CLIP_MEAN, CLIP_STD
from tests.data.helpers import encoded, picture, planner
from tests.golden_dir import find_golden


def decode(data: bytes, *, apply_exif: bool = True, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    return decode_image(data, apply_exif=apply_exif, max_pixels=max_pixels)


def refusal(data: bytes, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as error:
        decode(data, **options)
    return error.value


def canvas(pixels: NDArray[np.uint8], side: int, step: int) -> NDArray[np.uint8]:
    """The published square: the picture in the middle on the mean colour, an odd patch of padding after it."""
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(255 * mean) for mean in CLIP_MEAN]
    height, width, _ = pixels.shape
    top, left = ((side - height) // step // 2 * step, (side - width) // step // 2 * step)
    square[top : top + height, left : left + width] = pixels
    return square


@pytest.mark.parametrize("image_size", [672, 1344])
@pytest.mark.parametrize("size", ["640x427", "333x500", "448x449", "449x448", "1x1000"])
def test_pixels_equal_the_published_ones_bit_for_bit(size: str, image_size: int) -> None:
    folder = find_golden("preprocess")
    sizes = json.loads((folder / "sizes.json").read_text())["geometry"]
    golden = next(s for s in sizes if f"{s['width']}x{s['height']}" == size)[str(image_size)]
    image = decode((folder / "raw" / f"{size}.png").read_bytes())
    geometry = image_geometry(*image.size, image_size)
    model = canvas(resize(image, geometry.width, geometry.height), image_size, 14 * image_size // 336)
    teacher = canvas(resize(image, geometry.teacher_width, geometry.teacher_height), 336, 14)
    assert hashlib.sha256(model.tobytes()).hexdigest() == golden["sha256_u8_eve"]
    assert hashlib.sha256(teacher.tobytes()).hexdigest() == golden["sha256_u8_clip"]
    if image_size == 672:
        assert (model == np.asarray(Image.open(folder / "proc" / f"672_{size}_eve.png"))).all()
        assert (teacher == np.asarray(Image.open(folder / "proc" / f"{size}_clip.png"))).all()


@pytest.mark.parametrize(("number", "name"), [(0, "square"), (2, "wide"), (3, "tall")])
def test_pixels_of_the_golden_batch(number: int, name: str) -> None:
    folder = find_golden("mini224_mixed")
    image = decode((folder / "raw" / f"{number}_{name}.png").read_bytes())
    geometry = image_geometry(*image.size, 224, 112)
    model = canvas(resize(image, geometry.width, geometry.height), 224, 28)
    teacher = canvas(resize(image, geometry.teacher_width, geometry.teacher_height), 112, 14)
    assert (model == np.asarray(Image.open(folder / "proc" / f"{number}_eve.png"))).all()
    assert (teacher == np.asarray(Image.open(folder / "proc" / f"{number}_clip.png"))).all()


def test_constants_are_those_of_the_published_processor() -> None:
    path = find_golden("_shared/openai/eve-patch14-mini-224") / "preprocessor_config.json"
    processor = json.loads(path.read_text())
    assert list(CLIP_MEAN) == processor["image_mean"]
    assert list(CLIP_STD) == processor["image_std"]


def test_patches_come_in_cells_and_in_the_layout_of_a_convolution() -> None:
    geometry, view = image_geometry(300, 200, 224, 112), planner()(300, 200).views["patches"]
    pixels = resize(picture(300, 200), geometry.width, geometry.height)
    patches = view_of(picture(300, 200), view)
    assert patches.shape == view.shape
    assert (patches.shape, patches.dtype) == ((geometry.patches, 588), np.uint8)
    assert patches.flags.c_contiguous
    expected = []
    for row in range(geometry.rows):
        for column in range(geometry.columns):
            for below in range(2):
                for right in range(2):
                    top, left = 28 * row + 14 * below, 28 * column + 14 * right
                    patch = pixels[top : top + 14, left : left + 14]
                    expected.append(np.concatenate([patch[:, :, c].ravel() for c in range(3)]))
    assert (patches == np.stack(expected)).all()
    assert (cut_patches(pixels, 14, 2) == patches).all()


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("P", "BMP"),
        ("1", "PNG"),
        ("1", "PPM"),
        ("L", "JPEG"),
        ("RGB", "JPEG"),
        ("RGB", "PPM"),
        ("YCbCr", "JPEG"),
    ],
)
def test_every_mode_becomes_rgb_as_published(mode: str, image_format: str) -> None:
    image = picture(45, 31, mode)
    if mode in ("RGBA", "LA"):
        alpha = Image.linear_gradient("L").resize(image.size)
        image.putalpha(alpha)
    data = encoded(image, image_format)
    found = decode(data)
    assert (found.mode, found.size) == ("RGB", (45, 31))
    assert found.tobytes() == Image.open(BytesIO(data)).convert("RGB").tobytes()


def test_alpha_is_dropped_not_blended() -> None:
    image = picture(16, 16, "RGB")
    clear = image.copy()
    clear.putalpha(0)
    assert decode(encoded(clear, "PNG")).tobytes() == image.tobytes()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_transparent_palette_loses_its_transparency() -> None:
    image = picture(16, 16, "P")
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    assert decode(data).tobytes() == image.convert("RGB").tobytes()


def sixteen_bit(name: str, gray: NDArray[np.uint16]) -> bytes:
    """A 16-bit gray file of several kinds, each of which Pillow opens in a mode of its own."""
    if name == "PNG":
        return encoded(Image.fromarray(gray), "PNG")
    if name == "TIFF":
        return encoded(Image.fromarray(gray), "TIFF")
    if name == "big-endian TIFF":
        height, width = gray.shape
        image = Image.frombytes("I;16B", (width, height), gray.astype(">u2").tobytes())
        return encoded(image, "TIFF")
    return b"P5 %d %d 65535\n" % gray.shape[::-1] + gray.astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("name", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("big-endian TIFF", "I;16B"), ("PGM", "I")]
)
def test_sixteen_bit_gray_is_scaled_not_clipped(name: str, mode: str) -> None:
    gray = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    data = sixteen_bit(name, gray)
    assert Image.open(BytesIO(data)).mode == mode  # the case that is meant
    found = np.asarray(decode(data))
    assert found.shape == (30, 40, 3)
    assert (found == np.rint(gray / 257).astype(np.uint8)[:, :, None]).all()
    # A dark picture stays dark: the range is that of the type, not of the picture.
    dark = np.asarray(decode(sixteen_bit(name, gray // 256)))
    assert dark.max() == 1


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 1, 12, dtype=np.float32), 1.0),
        (np.linspace(0, 255, 12, dtype=np.float32), 255.0),
        (np.linspace(0, 65535, 12, dtype=np.float32), 65535.0),
        (np.array([0, 1000, 65535] * 4, dtype=np.int32), 65535.0),
    ],
)
def test_float_and_integer_gray_take_the_range_that_holds_them(values: NDArray[Any], white: float) -> None:
    found = np.asarray(decode(encoded(Image.fromarray(values.reshape(3, 4)), "TIFF")))
    assert (found[:, :, 0] == np.rint(values.reshape(3, 4) * 255.0 / white)).all()


def test_gray_outside_every_range_takes_its_own_span() -> None:
    for values in (np.array([-5.0, 0.0, 5.0]), np.array([0, 10**6, 2 * 10**6], dtype=np.int32)):
        image = Image.fromarray(
            values.reshape(1, 3).astype(values.dtype if values.dtype == np.int32 else "f4")
        )
        assert np.asarray(decode(encoded(image, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    odd = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 0.5]], dtype=np.float32))
    assert np.asarray(decode(encoded(odd, "TIFF")))[0, :, 0].tolist() == [0, 0, 0, 128]
    flat = Image.fromarray(np.full((2, 2), -7.0, dtype=np.float32))
    assert np.asarray(decode(encoded(flat, "TIFF"))).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(40, 24), image_format, exif=exif.tobytes())
    stored = Image.open(BytesIO(data)).convert("RGB")
    upright = decode(data, apply_exif=True)
    assert upright.size == ((40, 24) if orientation < 5 else (24, 40))
    assert upright.tobytes() == ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB").tobytes()
    assert decode(data, apply_exif=False).tobytes() == stored.tobytes()
    assert (upright.tobytes() == stored.tobytes()) == (orientation == 1)


def test_a_turned_tiff_is_turned_once() -> None:
    data = encoded(picture(40, 24), "TIFF", tiffinfo={0x0112: 6})
    for apply_exif in (True, False):  # Pillow turns TIFF by itself
        found = decode(data, apply_exif=apply_exif)
        assert found.tobytes() == picture(40, 24).transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
def test_a_broken_exif_block_does_not_lose_the_picture(exif: bytes) -> None:
    assert decode(encoded(picture(20, 10), "JPEG", exif=exif)).size == (20, 10)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (30000, 20), (20, 30000)])
def test_extreme_shapes(width: int, height: int) -> None:
    image = decode(encoded(picture(width, height), "PNG"))
    view = planner(672, 336)(*image.size).views["patches"]
    assert view_of(image, view).shape == view.shape == (image_geometry(*image.size, 672).patches, 588)


TRUNCATABLE = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")


@pytest.mark.parametrize("image_format", TRUNCATABLE)
@pytest.mark.parametrize("share", [0.35, 0.7, 0.97])
def test_truncated_files(image_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), image_format)
    assert decode(data).size == (64, 64)
    cut = refusal(data[: int(share * len(data))])
    assert cut.reason in ("image_damaged", "image_format" if image_format in ("WEBP", "AVIF") else "")
    assert cut.detail


def test_a_progressive_jpeg_cut_inside_its_later_scans_is_truncated() -> None:
    data = encoded(picture(64, 64), "JPEG", progressive=True)
    assert refusal(data[:-20]).reason == "image_damaged"


def ghostscript_bait() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_files_that_are_no_image_in_an_accepted_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    assert Image.open(BytesIO(ghostscript_bait())).format == "EPS"  # Pillow alone would take it
    icon = encoded(picture(32, 32), "ICO")
    for data in (ghostscript_bait(), b"%PDF-1.7\n", b"just a caption\n", b"<svg/>", b"\0" * 64, icon):
        assert refusal(data).reason == "image_format"
    assert refusal(b"").reason == "image_empty"
    assert "just a" in refusal(b"just a caption\n").detail


def png(width: int, height: int, rows: Iterator[bytes]) -> bytes:
    """A one-bit gray PNG from its raw rows, without holding the picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    deflate = zlib.compressobj(1)
    body = b"".join([deflate.compress(row) for row in rows] + [deflate.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    side = 20_000
    bomb = png(side, side, (bytes(1 + side // 8) for _ in range(side)))
    assert len(bomb) < 500_000
    tracemalloc.start()
    error = refusal(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.reason == "image_too_large"
    assert peak < 10_000_000
    # One that is within Pillow's own limit, so that the cap is what stops it. Its data is missing:
    # decoding it would say "damaged".
    headless = png(9_500, 9_500, iter([]))
    assert refusal(headless).reason == "image_too_large"
    assert refusal(headless, max_pixels=9_500**2).reason == "image_damaged"


def test_the_pixel_cap_is_exact() -> None:
    data = encoded(picture(40, 25), "PNG")
    assert decode(data, max_pixels=1000).size == (40, 25)
    error = refusal(data, max_pixels=999)
    assert error.reason == "image_too_large"
    assert "40 x 25" in error.detail
    assert "999" in error.detail


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_damage_never_ends_in_another_exception(image_format: str) -> None:
    random = np.random.default_rng(1)
    data = encoded(picture(24, 24), image_format)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), size=3):
            damaged[at] = random.integers(0, 256)
        try:
            assert decode(bytes(damaged), max_pixels=10_000).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 0


def test_animated_pictures_give_their_first_frame(tmp_path: Path) -> None:
    frames = [picture(20, 10, seed=seed).quantize() for seed in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).tobytes() == frames[0].convert("RGB").tobytes()
