"""The three backends: the same pixels to a few levels, the same refusals, and no picture that takes others along."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.data.images import ImageError
from megatron_eve.data.images.backends import open_decoder, placeholder_image
from megatron_eve.data.images.interface import DecodeSettings, ImageDecoder, ImageTask, Views
from megatron_eve.models.family import View
from tests.data.helpers import encoded, picture, planner

SETTINGS = DecodeSettings(apply_exif=True, max_pixels=4_000_000)
# Mean and largest distance from Pillow in 8-bit levels that a backend may show on the pictures below.
MEAN, LARGEST = 0.3, 30


@pytest.fixture(params=["threads", "dali"])
def decoder(request: pytest.FixtureRequest) -> Any:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    some = open_decoder(request.param, SETTINGS, threads=2, gpu=None)
    yield some
    some.close()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Edges and noise on top of a smooth picture, as photos have them."""
    random = np.random.default_rng(seed)
    pixels = np.asarray(picture(width, height, seed=seed)).astype(np.int32)
    pixels[height // 3 :, : width // 2] //= 2
    pixels += random.normal(0, 6, pixels.shape).astype(np.int32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def task(data: bytes, size: tuple[int, int], patches: bool = True, teacher: bool = True) -> ImageTask:
    wanted = {"patches": patches, "teacher": teacher}
    return ImageTask(data, {name: view for name, view in planner()(*size).views.items() if wanted[name]})


def reference(tasks: list[ImageTask], settings: DecodeSettings = SETTINGS) -> list[Views | ImageError]:
    return open_decoder("pillow", settings, threads=1, gpu=None).prepare(tasks)


def assert_near(found: Views | ImageError, expected: Views | ImageError, mean: float = MEAN) -> None:
    assert isinstance(found, dict) and isinstance(expected, dict)
    assert list(found) == list(expected)
    for ours, theirs in zip(found.values(), expected.values(), strict=True):
        assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
        distance = (ours.int() - theirs.int()).abs().float()
        assert distance.mean() < mean and distance.max() <= LARGEST


@pytest.mark.parametrize(
    "size",
    [(320, 240), (240, 320), (200, 200), (500, 40), (37, 480), (33, 47), (1, 1), (1600, 1200), (113, 112)],
)
def test_sizes(decoder: ImageDecoder, size: tuple[int, int]) -> None:
    tasks = [task(encoded(photo(*size), "JPEG", quality=90), size)]
    assert_near(decoder.prepare(tasks)[0], reference(tasks)[0])


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize(
    "size", [(320, 240), (240, 320), (200, 200), (500, 40), (37, 480), (1600, 1200), (20, 13), (112, 260)]
)
def test_squares(decoder: ImageDecoder, size: tuple[int, int], fit: Any) -> None:
    """All pictures become squares of one side; turned ones too, and with another view beside."""
    view = View(112, 112, (122, 116, 104), fit=fit, pass_order="pillow13")
    exif = Image.Exif()
    exif[0x0112] = 6
    tasks = [
        ImageTask(encoded(photo(*size), "PNG"), {"tower": view}),
        ImageTask(
            encoded(photo(*size), "JPEG", exif=exif.tobytes()), {"tower": view, "icon": View(9, 9, (0, 0, 0))}
        ),
    ]
    for found, expected in zip(decoder.prepare(tasks), reference(tasks), strict=True):
        assert_near(found, expected, mean=0.35)  # shrunk, noise in tall pictures rounds a little more often


KINDS = [
    ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"subsampling": 2}), ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "LA", {}),
    ("PNG", "P", {}), ("PNG", "1", {}), ("PNG", "I;16", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {}),
    ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}), ("PPM", "RGB", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS, ids=str)
def test_kinds(decoder: ImageDecoder, kind: str, mode: str, options: dict[str, Any]) -> None:
    """Also those that a backend hands to Pillow."""
    image = photo(120, 90)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    tasks = [task(encoded(image, kind, **options), (120, 90))]
    assert_near(decoder.prepare(tasks)[0], reference(tasks)[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("apply_exif", [True, False])
def test_exif(decoder: ImageDecoder, orientation: int, apply_exif: bool) -> None:
    name = "threads" if "Threads" in type(decoder).__name__ else "dali"
    settings = DecodeSettings(apply_exif, 4_000_000)
    some = open_decoder(name, settings, threads=1, gpu=None)  # type: ignore[arg-type]
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = apply_exif and orientation > 4
    tasks = [task(encoded(photo(120, 90), "JPEG", exif=exif.tobytes()), (90, 120) if turned else (120, 90))]
    found, expected = some.prepare(tasks), reference(tasks, settings)
    some.close()
    assert_near(found[0], expected[0])


def test_a_pack_in_order_with_what_each_wants(decoder: ImageDecoder) -> None:
    """More pictures than one run of a DALI pipeline holds; patches, squares and both mixed; run twice."""
    sizes = [(60 + 7 * i % 50, 50 + 11 * i % 60) for i in range(70)]
    wants = [(True, True), (True, False), (False, True)]
    tasks = [task(encoded(photo(*s, seed=i), "JPEG"), s, *wants[i % 3]) for i, s in enumerate(sizes)]
    expected = reference(tasks)
    for _ in range(2):
        for found, reference_one in zip(decoder.prepare(tasks), expected, strict=True):
            assert_near(found, reference_one)
    assert decoder.prepare([]) == []


def test_bad_files_are_answers(decoder: ImageDecoder) -> None:
    """Empty, of no format, cut short, too large, a picture of something else; the good ones among them stay."""
    good = encoded(photo(80, 60), "JPEG")
    huge = encoded(Image.new("1", (4000, 4000)), "PNG")
    files = [good, b"", b"not a picture", good[: len(good) // 2], huge, good[:20], good]
    tasks = [task(data, (80, 60)) for data in files]
    expected = reference(tasks)
    reasons = [one.reason if isinstance(one, ImageError) else None for one in expected]
    assert reasons[0] is None and reasons[-1] is None
    assert reasons[1:6] == [
        "image_empty",
        "image_format",
        "image_damaged",
        "image_too_large",
        "image_format",
    ]
    for _ in range(2):  # a pipeline that broke is built anew
        for found, other, reason in zip(decoder.prepare(tasks), expected, reasons, strict=True):
            if reason is None:
                assert_near(found, other)
            else:
                assert isinstance(found, ImageError) and found.reason == reason
        assert_near(decoder.prepare(tasks[:1])[0], expected[0])


def test_noise_in_the_middle_breaks_nothing(decoder: ImageDecoder) -> None:
    """Whatever comes of it, it is a picture or an answer."""
    random = np.random.default_rng(0)
    good = encoded(photo(160, 120), "JPEG")
    tasks = []
    for _ in range(30):
        data = bytearray(good)
        for place in random.integers(2, len(data), 20):
            data[place] = int(random.integers(256))
        tasks.append(task(bytes(data), (160, 120)))
    for found in decoder.prepare(tasks):
        assert isinstance(found, ImageError) or found["patches"].shape[1] == 588


def test_a_placeholder_image_is_the_pad_colour_in_the_recorded_shape() -> None:
    some = task(b"", (120, 90))
    grey = task(encoded(Image.new("RGB", (120, 90), (122, 116, 104)), "PNG"), (120, 90))
    (expected,) = reference([grey])
    assert isinstance(expected, dict) and list(expected) == ["patches", "teacher"]
    for name, view in some.views.items():
        assert torch.equal(placeholder_image(view), expected[name])


ODD_VIEWS = {
    "resized alone": View(50, 30, (9, 8, 7)),
    "in a square, cut singly": View(20, 40, (9, 8, 7), square=40, margin_unit=5, patch_size=10),
    "cut in groups of nine": View(36, 18, (9, 8, 7), patch_size=6, merge=3),
    "another pad colour": View(20, 40, (1, 2, 3), square=40),
}


def test_any_views(decoder: ImageDecoder) -> None:
    """Not only those of one family: resized alone, cut singly or in larger groups, a cut square, other colours."""
    tasks = [ImageTask(encoded(photo(160, 120, seed=i), "JPEG"), ODD_VIEWS) for i in range(3)]
    for found, expected in zip(decoder.prepare(tasks), reference(tasks), strict=True):
        assert isinstance(found, dict)
        assert {name: tuple(one.shape) for name, one in found.items()} == {
            "resized alone": (30, 50, 3),
            "in a square, cut singly": (16, 300),
            "cut in groups of nine": (18, 108),
            "another pad colour": (40, 40, 3),
        }
        assert_near(found, expected)
        assert found["another pad colour"][:, 0].unique(dim=0).tolist() == [[1, 2, 3]]
    for view in ODD_VIEWS.values():
        assert placeholder_image(view).shape == view.shape


def test_auto_is_threads_without_a_gpu() -> None:
    some = open_decoder("auto", SETTINGS, threads=1, gpu=None)
    assert type(some).__name__ == "ThreadsDecoder"
    some.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with DALI")
def test_dali_on_a_gpu_is_near_pillow() -> None:
    pytest.importorskip("nvidia.dali")
    some = open_decoder("dali", SETTINGS, threads=2, gpu=0)
    tasks = [
        task(encoded(photo(w, h), "JPEG", quality=90), (w, h)) for w, h in [(320, 240), (90, 400), (800, 600)]
    ]
    for found, expected in zip(some.prepare(tasks), reference(tasks), strict=True):
        assert isinstance(found, dict) and all(one.is_cuda for one in found.values())
        assert_near({name: one.cpu() for name, one in found.items()}, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with DALI")
def test_dali_does_not_write_over_what_a_busy_gpu_has_not_read() -> None:
    pytest.importorskip("nvidia.dali")
    some = open_decoder("dali", SETTINGS, threads=2, gpu=0)
    tasks = [task(encoded(photo(320, 240, seed=i), "JPEG", quality=90), (320, 240)) for i in range(8)]
    calm = [found for one in tasks for found in some.prepare([one])]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second of the default stream
    busy = [found for one in tasks for found in some.prepare([one])]
    for found, expected in zip(busy, calm, strict=True):
        assert isinstance(found, dict) and isinstance(expected, dict)
        assert torch.equal(found["patches"], expected["patches"])


def test_usual_files_do_not_go_through_pillow(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("went through Pillow")

    tasks = [task(encoded(photo(64, 48, seed=i), "JPEG"), (64, 48)) for i in range(3)]
    expected = reference(tasks)
    for module in ("pillow", "threads"):
        monkeypatch.setattr(f"megatron_eve.data.images.{module}.decode_image", refuse)
    for found, other in zip(decoder.prepare(tasks), expected, strict=True):
        assert_near(found, other)
