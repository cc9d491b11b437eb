"""The rules of the filter, one by one: what breaks one, what just does not."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_eve.curation.rules import PictureRules, padding
from megatron_eve.curation.text_rules import CaptionRules, repeated_share
from megatron_eve.data.errors import SkipRow
from tests.curation.shards import jpeg, photo


def reason(rules: PictureRules | CaptionRules, given: Image.Image | str) -> str | None:
    try:
        rules.check(given)  # type: ignore[arg-type]
    except SkipRow as skip:
        return skip.reason
    return None


@pytest.mark.parametrize(
    ("size", "expected"),
    [((449, 449), None), ((448, 449), "too_small"), ((900, 448), "too_small"), ((449, 900), None)],
)
def test_the_published_least_side_is_more_than_448(size: tuple[int, int], expected: str | None) -> None:
    assert reason(PictureRules(), photo(*size, seed=0)) == expected


def test_the_aspect_ratio_counts_in_both_directions() -> None:
    rules = PictureRules(min_side=0, max_aspect=2)
    for size in ((200, 100), (100, 200)):
        assert reason(rules, photo(*size, seed=0)) is None
    for size in ((201, 100), (100, 201)):
        assert reason(rules, photo(*size, seed=0)) == "aspect_ratio"


def as_img2dataset(picture: Image.Image, side: int, quality: int) -> Image.Image:
    """Shrunk to fit a square, centred on white, and written as JPEG, as --resize_mode border does."""
    padded = ImageOps.pad(picture, (side, side), color="white")
    return Image.open(BytesIO(jpeg(padded, quality))).convert("RGB")


@pytest.mark.parametrize("quality", [60, 95])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 420), (600, 500)])
def test_squares_of_img2dataset_are_found_by_their_bars(size: tuple[int, int], quality: int) -> None:
    """At its default side, for pictures of other colours."""
    for seed in range(4):
        bars = padding(np.asarray(as_img2dataset(photo(*size, seed=seed), 256, quality)))
        expected = 256 * (1 - min(size) / max(size)) / 2
        assert bars is not None
        assert all(abs(bar - expected) <= 16 for bar in bars)
    rules = PictureRules(min_side=0)
    assert reason(rules, as_img2dataset(photo(*size, seed=0), 512, quality)) == "padded"


def test_what_is_not_a_padded_square() -> None:
    picture = photo(640, 480, seed=0)
    assert padding(np.asarray(photo(256, 256, seed=0))) is None
    # White above and below, and not a square.
    assert padding(np.asarray(ImageOps.expand(picture, (0, 40), "white"))) is None
    # A thing on white ground, as in a shop: white on all sides.
    assert padding(np.asarray(ImageOps.expand(picture.resize((400, 300)), (56, 106), "white"))) is None
    # White on one side only, or with bars of two colours, or of two widths.
    square = photo(256, 256, seed=0)
    square.paste("white", (0, 0, 256, 60))
    assert padding(np.asarray(square)) is None
    square.paste("black", (0, 196, 256, 256))
    assert padding(np.asarray(square)) is None
    square.paste("white", (0, 156, 256, 256))
    assert padding(np.asarray(square)) is None
    square.paste("white", (0, 190, 256, 256))
    square.paste(photo(256, 6, seed=3), (0, 190))
    assert padding(np.asarray(square)) == (60, 60)
    # A thin frame, and a picture of one colour.
    assert padding(np.asarray(ImageOps.expand(photo(256, 244, seed=0), (0, 6), "white"))) is None
    assert padding(np.full((256, 256, 3), 255, np.uint8)) is None


@pytest.mark.parametrize(
    ("rules", "fine", "broken", "expected"),
    [
        (CaptionRules(min_words=3), "A black cat", "A cat", "caption_too_short"),
        (CaptionRules(min_words=1), "cat's", "?!", "caption_too_short"),
        (CaptionRules(max_words=3), "A black cat", "A big black cat", "caption_too_long"),
        (
            CaptionRules(max_repeated=0.2),
            "A man in a red hat and a woman in a red dress.",
            "A man and a man and a man and a man.",
            "caption_repetitive",
        ),
        (CaptionRules(complete_sentences=True), "A cat.", "A cat", "caption_without_end"),
        (CaptionRules(complete_sentences=True), 'It says "Stop!"', 'It says "Stop"', "caption_without_end"),
        (CaptionRules(complete_sentences=True), "他在笑。", "他在笑", "caption_without_end"),
        (CaptionRules(complete_sentences=True), "A cat (asleep). ", "A cat is sl-", "caption_cut_off"),
        (CaptionRules(complete_sentences=True), "Is it a cat?", "A cat with...", "caption_cut_off"),
        (CaptionRules(complete_sentences=True), "A cat with two tails!", "A cat with…", "caption_cut_off"),
    ],
)
def test_rules_for_captions(rules: CaptionRules, fine: str, broken: str, expected: str) -> None:
    assert reason(rules, fine) is None
    assert reason(rules, broken) == expected
    assert reason(CaptionRules(), broken) is None


def test_the_share_of_repeated_words() -> None:
    """Words that lie in a sequence of four that came before; the first time counts for none."""
    assert repeated_share(["a", "b", "c", "d", "e", "f", "g", "h"]) == 0
    assert repeated_share(["a", "b", "c", "d", "a", "b", "c", "d"]) == 4 / 8
    assert repeated_share(["a", "b", "c", "d", "x", "a", "b", "c", "d", "y"]) == 4 / 10
    assert repeated_share(["a", "a", "a", "a", "a"]) == 4 / 5
    assert repeated_share(["a", "b", "c", "a", "b", "c"]) == 0
    assert repeated_share([]) == 0


def test_the_share_may_be_reached() -> None:
    assert reason(CaptionRules(max_repeated=0.5), "a b c d a b c d") is None
    assert reason(CaptionRules(max_repeated=0.49), "A b, c d. A B C D!") == "caption_repetitive"
