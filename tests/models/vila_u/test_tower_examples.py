"""The toy run and the experiment of VILA-U's tower: stamps, their split, scores, claims; the whole of both."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.config.errors import ConfigError
from tests.test_commands import ROOT, command

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

pytest.importorskip("skimage", reason="make install-dev installs it")

from launch import StepFailed  # noqa: E402
from vila_u_tiny import stamps  # noqa: E402
from vila_u_tiny.crops import photo_centres, photo_crops  # noqa: E402
from vila_u_tiny.pairs import MOST_SHIFT, SIDE, Pair, square, variants, varied  # noqa: E402
from vila_u_tiny.tower import check_claims  # noqa: E402
from vila_u_tiny.tower_scores import Score, mean_colours, mean_score, psnr  # noqa: E402
from vila_u_tiny.toy_siglip import (  # noqa: E402
    TEXT_LENGTH,
    Retrieval,
    retrieval,
    save_toy_siglip,
    siglip_retrieval,
    token_ids,
    train_tokenizer,
)

STAMPS = (
    ("animals/birds/parrot", "A parrot."),
    ("animals/birds/cartoon/parrot2", "A green parrot!"),
    ("symbols/money/us/coins/001penny", "A penny"),
    ("symbols/money/us/coins/001penny_back", "The back of a penny."),
    ("symbols/alphabets/a", "The letter a."),
    ("vehicles/bus_mirror", "A bus."),
    ("vehicles/bus", "– A bus."),
    ("plants/copy", "A copy of the bus."),
    ("plants/rose", "A rose."),
    ("plants/nothing", "White on white."),
)


def make_stamps(folder: Path) -> Path:
    """A folder as the package has it; two stamps have the same picture."""
    for number, (name, sentence) in enumerate(STAMPS):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number if "copy" not in name else 6).integers(
            0, 256, (20, 30, 4), np.uint8
        )
        if "nothing" in name:
            pixels[:] = 255
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"{sentence}\nde.utf8=Etwas\n", encoding="utf-8")
    return folder


class TestStamps:
    """Which stamps there are, and which are held out."""

    def test_sentences_and_what_is_left_out(self, tmp_path: Path) -> None:
        found = {pair.name: pair for pair in stamps._pairs(make_stamps(tmp_path))}
        assert {name: pair.sentence for name, pair in found.items()} == {
            "animals.birds.parrot": "A parrot. Animals, birds.",
            "animals.birds.cartoon.parrot2": "A green parrot! Animals, birds.",
            "symbols.money.us.coins.001penny": "A penny. Money, United States, coins.",
            "symbols.money.us.coins.001penny_back": "The back of a penny. Money, United States, coins.",
            "vehicles.bus": "A bus. Vehicles.",
            "plants.copy": "A copy of the bus. Plants.",
            "plants.rose": "A rose. Plants.",
        }
        assert {pair.pixels.shape for pair in found.values()} == {(SIDE, SIDE, 3)}

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_no_copy_is_on_both_sides(self, tmp_path: Path, count: int) -> None:
        pairs = list(stamps._pairs(make_stamps(tmp_path)))
        held = stamps.held_out_names(pairs, count)
        assert 0 < len(held) <= count
        for alike in ("parrot", "penny", "bus copy"):
            group = {pair.name for pair in pairs if any(word in pair.name for word in alike.split())}
            assert len(group) == 2 and len(group & held) in (0, 2)
        assert stamps.held_out_names(pairs[::-1], count) == held, "it depends on the order"

    def test_a_folder_without_stamps(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"7 pictures with a sentence.* apt-get install tuxpaint-stamps-default"
        ):
            stamps.read_stamps(make_stamps(tmp_path))


def test_transparent_becomes_white_and_variants_stay_pictures() -> None:
    image = Image.new("RGBA", (20, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (5, 10, 15, 30))
    pixels = square(image)
    assert (
        pixels.shape == (SIDE, SIDE, 3) and (pixels[0] == 255).all() and tuple(pixels[32, 32]) == (255, 0, 0)
    )
    some = variants([Pair("a", pixels, "A.")], 5, seed=1)
    assert [pair.name for pair in some] == ["a-0", "a-1", "a-2", "a-3", "a-4"]
    assert (some[0].pixels == pixels).all() and len({pair.pixels.tobytes() for pair in some}) == 5
    generator = np.random.default_rng(0)
    for _ in range(20):
        red = np.argwhere(varied(pixels, generator)[..., 1] < 128)
        moved = np.abs(red.mean(0) - np.argwhere(pixels[..., 1] < 128).mean(0))
        assert moved.max() <= MOST_SHIFT + 1, "more than moved and mirrored"


def test_crops_are_of_their_photo() -> None:
    crops, centres = photo_crops(2, seed=0), photo_centres()
    assert len(crops) == 2 * len(centres) == len({pair.name for pair in crops})
    sentences = {pair.name: pair.sentence for pair in centres}
    assert all(sentences[pair.name.rsplit("-", 1)[0]] == pair.sentence for pair in crops)
    assert {pair.pixels.shape for pair in (*crops, *centres)} == {(SIDE, SIDE, 3)}


def test_a_toy_siglip_learns_its_pairs(tmp_path: Path) -> None:
    pairs = photo_centres()[:6]
    tokenizer = train_tokenizer([pair.sentence for pair in pairs], tmp_path / "tokenizer.model", 200)
    ids = token_ids(["Word!", pairs[0].sentence], tokenizer)
    assert ids.shape == (2, TEXT_LENGTH) and ids[0].tolist() == [0, 2, *[1] * (TEXT_LENGTH - 2)]
    losses = save_toy_siglip(pairs, tokenizer, tmp_path / "siglip", 25)
    again = save_toy_siglip(pairs, tokenizer, tmp_path / "again", 25)
    assert losses == again and losses[-1] < losses[0]
    assert (tmp_path / "siglip" / "spiece.model").read_bytes() == tokenizer.read_bytes()
    found = siglip_retrieval(tmp_path / "siglip", pairs, tokenizer)
    assert found.chance == pytest.approx(1 / 6) and found.picture > found.chance


def test_retrieval_takes_equal_sentences_as_right() -> None:
    pictures, texts = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    assert retrieval(pictures, texts, ["a", "b", "c"]) == Retrieval(1 / 3, 1 / 3, pytest.approx(1 / 3))
    assert retrieval(pictures, texts, ["a", "a", "c"]) == Retrieval(1.0, 1.0, pytest.approx(5 / 9))


def test_mean_colours_are_the_best_picture_of_one_colour_for_each_square() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    best = mean_colours(pictures, 4)
    assert best.shape == pictures.shape and len(np.unique(best[0].reshape(-1, 3), axis=0)) == 16
    np.testing.assert_allclose(best[1, 16:32, 48:].mean((0, 1)), pictures[1, 16:32, 48:].mean((0, 1)))
    assert psnr(best, pictures) > psnr(best + 3, pictures)
    assert psnr(pictures, pictures) == 100
    assert psnr(np.zeros((1, 4, 4, 3)), np.full((1, 4, 4, 3), 255, np.uint8)) == 0


SCORE = Score([14.0, 15.0], 13.0, 0.9, [0.5, 0.8], [20.0, 30.0], Retrieval(0.2, 0.4, 0.04))


def test_means_of_scores() -> None:
    other = {**_json(SCORE), "psnr": [16.0, 17.0], "in_use": 0.7}
    other["retrieval"] = {"picture": 0.4, "text": 0.4, "chance": 0.04}
    found = mean_score([_json(SCORE), other])
    assert found.psnr == [15.0, 16.0] and found.in_use == pytest.approx(0.8)
    assert found.retrieval == Retrieval(pytest.approx(0.3), 0.4, 0.04)


def test_claims_of_the_toy_run_are_checked() -> None:
    records = [
        {
            "iteration": number,
            "reconstruction_loss": 1 / number,
            **({"discriminator_loss": 1.0} if number > 24 else {}),
        }
        for number in range(1, 41)
    ]
    check_claims(records, SCORE)
    for some, score, message in (
        ([*records[:-1], {**records[-1], "reconstruction_loss": 0.6}], SCORE, "did not fall to a half"),
        (records[:24] + records[25:], SCORE, "not trained from iteration 25 on"),
        ([{**one, "discriminator_loss": 1.0} for one in records], SCORE, "not trained from iteration 25 on"),
        (records, replace(SCORE, psnr=[14.0, 13.9]), "no better picture"),
        (records, replace(SCORE, retrieval=Retrieval(0.5, 0.1, 0.04)), "the texts of 10 % of the photos"),
    ):
        with pytest.raises(StepFailed, match=message):
            check_claims(some, score)


def _json(score: Score) -> dict[str, object]:
    from dataclasses import asdict

    found: dict[str, object] = json.loads(json.dumps(asdict(score)))
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_the_toy_run_from_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = command("examples/vila_u_tiny/tower.py", "--output", str(output), timeout=1100)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "40 losses equal bit for bit" in found.stdout
    assert (output / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_experiment_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """With few stamps and steps, of which nothing is learnt."""
    for number in range(2 * stamps.HELD_OUT):
        # A number at the end would not tell names apart.
        letters = "".join("abcdefghij"[int(digit)] for digit in str(number))
        path = tmp_path / "stamps" / f"group{number % 7}" / f"thing_{letters}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.with_suffix(".txt").write_text(f"A thing {number}.\n")
    output = tmp_path / "out"
    flags = ["--stamps", tmp_path / "stamps", "--output", output, "--iterations", 2, "--siglip-steps", 2]
    words = [str(one) for one in (*flags, "--seeds", 1, "--ranks", 1)]
    found = command("examples/vila_u_tiny/tower_experiment.py", *words, timeout=1000)
    assert found.returncode == 0, found.stdout + found.stderr
    result = json.loads((output / "result.json").read_text())
    assert set(result["towers"]) == {"full", "no_contrast", "no_reconstruction"}
    assert (output / "result.png").read_bytes().startswith(b"\x89PNG")
    again = output / "scores" / "no_contrast_0.json"
    before = again.stat().st_mtime_ns
    (output / "scores" / "full_0.json").unlink()
    found = command("examples/vila_u_tiny/tower_experiment.py", *words, timeout=1000)
    assert found.returncode == 0, found.stdout + found.stderr
    assert json.loads((output / "result.json").read_text())["towers"] == result["towers"]
    assert again.stat().st_mtime_ns == before, "scored again"
    found = command("examples/vila_u_tiny/tower_experiment.py", *words, "--iterations", "3", timeout=100)
    assert found.returncode == 2 and "name another folder with --output" in found.stderr
