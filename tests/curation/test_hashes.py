"""The hashes of a picture: against hashlib and imagehash, and what changes of a picture do to them."""

from __future__ import annotations

import hashlib
import io

import imagehash
import pytest
from PIL import Image

from megatron_eve.curation.hashes import perceptual_hash, sha256_of

skimage_data = pytest.importorskip("skimage.data")


def astronaut() -> Image.Image:
    return Image.fromarray(skimage_data.astronaut())


def encoded(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def distance(first: Image.Image, second: Image.Image) -> int:
    return (perceptual_hash(first) ^ perceptual_hash(second)).bit_count()


def test_sha256_is_of_all_bytes() -> None:
    assert sha256_of(b"abc").hex() == hashlib.sha256(b"abc").hexdigest()
    assert len(sha256_of(b"")) == 32


def test_the_number_is_the_one_imagehash_writes() -> None:
    picture = astronaut()
    assert f"{perceptual_hash(picture):016x}" == str(imagehash.phash(picture))
    assert perceptual_hash(picture).bit_count() == 32  # half of the coefficients lie above their median


def test_encoding_and_scaling_move_few_bits_and_another_picture_many() -> None:
    picture = astronaut()
    assert distance(picture, encoded(picture, 60)) == 0
    assert distance(picture, picture.resize((200, 200), Image.Resampling.BICUBIC)) == 0
    assert distance(picture, Image.fromarray(skimage_data.chelsea())) >= 16


@pytest.mark.parametrize("colour", ["white", "grey", "red"])
def test_a_picture_of_one_colour_has_one_bit(colour: str) -> None:
    assert perceptual_hash(Image.new("RGB", (64, 48), colour)) == 1 << 63
    assert perceptual_hash(Image.new("L", (300, 20), 0)) == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_is_taken(mode: str) -> None:
    assert 0 < perceptual_hash(astronaut().convert(mode)) < 1 << 64
