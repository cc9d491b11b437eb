"""Every reader of pictures sees the same in an odd file: Pillow, the fast decoders, and the exported processor."""

from __future__ import annotations

import base64
import inspect
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megatron_eve.data.images.decode as decode_module
import megatron_eve.models.eve.hf.image_processing_eve as hf_module
from megatron_eve.data.images import ImageError, decode_image
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.images.decode import upright
from megatron_eve.data.images.interface import DecodeSettings, ImageDecoder, ImageTask
from megatron_eve.data.images.patches import view_of
from megatron_eve.data.images.png import without_texts
from megatron_eve.hf import EVEImageProcessor
from megatron_eve.models.family import View
from megatron_eve.models.normalise import normalise
from tests.data.helpers import planner
from tests.data.odd_pictures import BASE, ODD, Odd, chunk, exif, itxt, jpeg, png, ztxt

MAX_PIXELS = 4_000_000
# Files of which Pillow warns.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
odd_pictures = pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())


@pytest.fixture(scope="module", params=["threads", "threads, as stored", "dali", "dali, as stored"])
def reader(request: pytest.FixtureRequest) -> Iterator[tuple[ImageDecoder, bool]]:
    """A fast decoder, and whether it turns pictures upright."""
    name, _, stored = request.param.partition(", ")
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    settings = DecodeSettings(apply_exif=not stored, max_pixels=MAX_PIXELS)
    decoder = open_decoder(name, settings, threads=1, gpu=None)
    yield decoder, not stored
    decoder.close()


def trained_on(data: bytes, apply_exif: bool = True) -> tuple[Image.Image, dict[str, View]]:
    """What a run without a fast decoder makes of a file: the picture and its views, patches first."""
    image = decode_image(data, apply_exif=apply_exif, max_pixels=MAX_PIXELS)
    return image, dict(planner()(*image.size).views)


def patches_of(views: dict[str, View]) -> dict[str, View]:
    return {"patches": views["patches"]}


@odd_pictures
def test_what_is_seen(odd: Odd) -> None:
    found, expected = trained_on(odd.data)[0], odd.upright()
    if expected is not None:
        assert found.size == expected.size
        distance = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
        assert distance.mean() < 2


@odd_pictures
def test_the_fast_decoders_see_the_same(reader: tuple[ImageDecoder, bool], odd: Odd) -> None:
    decoder, apply_exif = reader
    image, views = trained_on(odd.data, apply_exif)
    (found,) = decoder.prepare([ImageTask(odd.data, patches_of(views))])
    assert isinstance(found, dict)
    distance = (
        (found["patches"].int() - torch.from_numpy(view_of(image, views["patches"])).int()).abs().float()
    )
    assert distance.mean() < 0.5 and distance.max() <= 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with DALI")
@pytest.mark.parametrize("apply_exif", [True, False])
def test_dali_on_a_gpu_sees_the_same(apply_exif: bool) -> None:
    pytest.importorskip("nvidia.dali")
    settings = DecodeSettings(apply_exif=apply_exif, max_pixels=MAX_PIXELS)
    decoder = open_decoder("dali", settings, threads=2, gpu=0)
    for name, odd in ODD.items():
        image, views = trained_on(odd.data, apply_exif)
        (found,) = decoder.prepare([ImageTask(odd.data, patches_of(views))])
        assert isinstance(found, dict)
        expected = torch.from_numpy(view_of(image, views["patches"])).int()
        # nvJPEG's arithmetic is its own; a turn or other colours are off by 30 levels and more.
        assert (found["patches"].cpu().int() - expected).abs().float().mean() < 3, name
    decoder.close()


@odd_pictures
def test_the_exported_processor_sees_the_same(tmp_path: Path, odd: Odd) -> None:
    if not odd.pillow_opens:
        with pytest.raises((ValueError, OSError, SyntaxError)):
            Image.open(BytesIO(odd.data)).load()
        return
    image, views = trained_on(odd.data)
    expected = normalise(torch.from_numpy(view_of(image, views["patches"])), torch.float32)
    (tmp_path / "odd").write_bytes(odd.data)
    processor = EVEImageProcessor(image_size=224, image_size_clip=112)
    for given in (Image.open(BytesIO(odd.data)), str(tmp_path / "odd")):
        assert torch.equal(processor([given])["pixel_values"][0], expected)


def test_the_processor_reads_what_it_is_given(tmp_path: Path) -> None:
    """Paths, base64 with and without its head, arrays of 16 bits; a name that is nothing is said."""
    file = ODD["PNG, 16 bits, gray"].data
    (tmp_path / "gray.png").write_bytes(file)
    processor = EVEImageProcessor(image_size=224, image_size_clip=112)
    expected = processor([Image.open(BytesIO(file))])["pixel_values"]
    text = base64.b64encode(file).decode()
    levels = np.asarray(Image.open(BytesIO(file)))
    for given in (str(tmp_path / "gray.png"), text, f"data:image/png;base64,{text}", levels):
        assert torch.equal(processor([given])["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"'missing\.png'"):
        processor(["missing.png"])
    with pytest.raises(TypeError, match="int"):
        processor([3])


def test_the_exported_copy_of_the_rules_is_the_same() -> None:
    """The exported files import nothing of this project, so they have a copy; it must not drift."""
    for name in ("_orientation", "_to_rgb", "_scale", "_gray_to_rgb"):
        ours, theirs = (inspect.getsource(getattr(module, name)) for module in (decode_module, hf_module))
        assert ours == theirs, name
    assert decode_module._UPRIGHT == hf_module._UPRIGHT


@pytest.mark.parametrize("orientation", range(10))
def test_one_meaning_of_an_orientation(orientation: int) -> None:
    turn = decode_module._UPRIGHT.get(orientation)
    expected = BASE if turn is None else BASE.transpose(turn)
    assert (upright(np.asarray(BASE), orientation) == np.asarray(expected)).all()


def test_a_pack_of_pictures_turned_every_way(reader: tuple[ImageDecoder, bool]) -> None:
    decoder, apply_exif = reader
    files = [jpeg(exif(orientation)) for orientation in (*range(1, 9), 6, 1)]
    seen = [trained_on(data, apply_exif) for data in files]
    tasks = [ImageTask(d, v) for d, (_, v) in zip(files, seen, strict=True)]
    for found, (image, views) in zip(decoder.prepare(tasks), seen, strict=True):
        assert isinstance(found, dict)
        for ours, theirs in (
            (found["patches"], view_of(image, views["patches"])),
            (found["teacher"], view_of(image, views["teacher"])),
        ):
            assert (ours.int() - torch.from_numpy(theirs).int()).abs().float().mean() < 0.5


@pytest.mark.parametrize(
    "name", ["orientation in XMP", "YCbCr with Adobe's marker", "4:2:0", "progressive", "long comments"]
)
def test_what_is_usual_stays_fast(
    reader: tuple[ImageDecoder, bool], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, apply_exif = reader
    _, views = trained_on(ODD[name].data, apply_exif)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("went through Pillow")

    for module in ("pillow", "threads"):
        monkeypatch.setattr(f"megatron_eve.data.images.{module}.decode_image", refuse)
    (found,) = decoder.prepare([ImageTask(ODD[name].data, patches_of(views))])
    assert isinstance(found, dict)


@pytest.mark.parametrize(
    "texts",
    [
        [ztxt(b"x", bytes(50_000_000))],
        [itxt(b"XML:com.adobe.xmp", bytes(50_000_000), packed=True)] * 3,
        [ztxt(b"Raw profile type exif", b"00" * 25_000_000)] * 3,
        [chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000)))],
    ],
    ids=["text", "XMP", "EXIF", "profile"],
)
def test_a_bomb_of_text_is_left_unread(texts: list[bytes]) -> None:
    data = png(*texts)
    tracemalloc.start()
    image = decode_image(data, apply_exif=True, max_pixels=MAX_PIXELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image.tobytes() == BASE.tobytes()
    assert peak < 40_000_000


def test_the_fast_decoders_spend_no_time_on_a_bomb_of_text(reader: tuple[ImageDecoder, bool]) -> None:
    """libpng, with which DALI decodes, takes five seconds to unpack these 0.8 MB and throw them away."""
    data = png(*[ztxt(b"x", bytes(7_900_000))] * 100)
    task = ImageTask(data, patches_of(trained_on(data)[1]))
    start = time.process_time()  # of all threads
    (found,) = reader[0].prepare([task])
    assert isinstance(found, dict)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "name", ["PNG, a long text", "PNG, long XMP", "long comments", "4:2:0", "progressive", "two pictures"]
)
def test_a_file_cut_short_is_still_refused(
    reader: tuple[ImageDecoder, bool], name: str, share: float
) -> None:
    data = ODD[name].data
    pixels = data.rindex(b"IDAT" if name.startswith("PNG") else b"\xff\xda")
    cut = data[: pixels + int(share * (len(data) - pixels - 20))]
    _, views = trained_on(data, reader[1])
    task = ImageTask(cut, patches_of(views))
    answers = [reader[0].prepare([task])[0]]
    if name != "two pictures":  # the first of them is whole
        with pytest.raises(ImageError) as error:
            decode_image(cut, apply_exif=True, max_pixels=MAX_PIXELS)
        assert error.value.reason == "image_damaged"
        assert isinstance(answers[0], ImageError) and answers[0].reason == "image_damaged"


def test_texts_are_left_out_only_where_there_are_any() -> None:
    for name in ("PNG, alpha", "PNG, eXIf", "BMP", "4:2:0"):
        assert without_texts(ODD[name].data) is ODD[name].data
    assert without_texts(ODD["PNG, a long text"].data) == png()
    for length in range(len(png()) - 1):  # whatever is cut off is Pillow's to judge
        assert without_texts(png()[:length]) == png()[:length]
