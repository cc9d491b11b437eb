"""The toy run and the memory experiment of `examples/vila_u_tiny/`: tower, rows, judgement; the whole of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eve.config.recipe import parse
from megatron_eve.models.vila_u.checks import check_tower
from megatron_eve.models.vila_u.tower import load_tower
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from megatron_eve.models.vila_u.tower_weights import fingerprint
from tests.test_commands import ROOT, command

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

pytest.importorskip("skimage", reason="make install-dev installs it")

from launch import StepFailed  # noqa: E402
from vila_tiny import shapes  # noqa: E402
from vila_u_tiny import inputs, placed_shapes  # noqa: E402
from vila_u_tiny.drawings import code_sums, equal_share  # noqa: E402
from vila_u_tiny.memory_experiment import PhotoResult, check_photos  # noqa: E402
from vila_u_tiny.placed_shapes import ALL, PlacedShape, named, nearest_combination, score  # noqa: E402
from vila_u_tiny.random_tower import SIDE, save_toy_tower  # noqa: E402
from vila_u_tiny.run import check_claims  # noqa: E402


def test_the_tower_fits_the_preset_and_tells_pictures_apart(tmp_path: Path) -> None:
    one, again, other = (
        save_toy_tower(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    flags = [
        "--preset",
        "vila_u_tiny",
        "--vision-tokenizer",
        str(one),
        "--data-path",
        "x",
        "--train-iters",
        "1",
    ]
    assert list(check_tower(parse(flags))) == []
    prints = [fingerprint(read_tower_folder(folder)) for folder in (one, again, other)]
    assert prints[0] == prints[1] != prints[2]
    tower = load_tower(read_tower_folder(one), torch.device("cpu"), torch.float32)
    pixels = [
        np.asarray(shapes.placed(*colour_shape, 20, 20, 56).resize((SIDE, SIDE)))
        for colour_shape in shapes.ALL
    ]
    codes = tower.encode(torch.from_numpy(np.stack(pixels))).numpy()
    assert codes.shape == (16, 4, 4, 4) and codes.max() < 1024
    shared = [equal_share(codes[i], codes[j]) for i in range(16) for j in range(i)]
    assert max(shared) < 1, "two pictures with the same codes"
    assert len(np.unique(codes)) > 100
    sums = code_sums(one, list(codes))
    assert sums.shape == (16, 4, 4, 32)
    np.testing.assert_array_equal(sums, tower.quantizer.embed(torch.from_numpy(codes)).numpy())


def test_every_picture_is_read_and_drawn(tmp_path: Path) -> None:
    pictures = [("cat", "cat.png", "A cat."), ("dog", "dog.png", "A dog.")]
    rows = json.loads(inputs.write_rows(pictures, tmp_path / "rows.json").read_text())
    assert [(row["image"], row.get("draw", False)) for row in rows] == [
        ("cat.png", False), ("cat.png", True), ("dog.png", False), ("dog.png", True),
    ]  # fmt: skip
    for number, (_, file, sentence) in enumerate(pictures):
        drawn = rows[inputs.image_to_draw(number)]
        assert drawn["draw"] and drawn["image"] == file
        assert [turn["value"] for turn in drawn["conversations"]] == [sentence, "<image>"]
        assert rows[2 * number]["conversations"][1]["value"] == sentence


def test_claims_of_the_toy_run_are_checked() -> None:
    first, last = {"lm_loss": 6.0, "visual_loss": 7.0}, {"lm_loss": 0.01, "visual_loss": 0.1}
    shares, without = [1.0, 0.97, 1.0], [0.0, 0.5, 0.1]
    same = [1.0, 1.0, 1.0]
    check_claims([first, last], 3, shares, without, same)
    with pytest.raises(StepFailed, match="transformers draws other codes from the export: 98 %"):
        check_claims([first, last], 3, shares, without, [1.0, 0.98, 1.0])
    for records, right, some, others, message in (
        ([first, {**last, "lm_loss": 3.0}], 3, shares, without, "the language loss did not fall to a tenth"),
        (
            [first, {**last, "visual_loss": 3.0}],
            3,
            shares,
            without,
            "the visual loss did not fall to a tenth",
        ),
        ([first, last], 2, shares, without, "a caption is not the one"),
        ([first, last], 3, [1.0, 0.94, 1.0], without, "only 94 % of a drawing's codes"),
        ([first, last], 3, shares, [0.0, 0.96, 0.1], "without its sentence"),
    ):
        with pytest.raises(StepFailed, match=message):
            check_claims(records, right, some, others, same)


def test_drawings_and_captions_that_follow_nothing_fail_the_experiment() -> None:
    check_photos(PhotoResult(follow=1.0, shared=0.3, captions=20, with_grey=1, asked=25))
    for result, message in (
        (PhotoResult(0.9, 0.3, 25, 0, 25), "90 % of the drawings follow"),
        (PhotoResult(1.0, 0.6, 25, 0, 25), "shares 60 % of its codes"),
        (PhotoResult(1.0, 0.3, 12, 0, 25), "12 of 25 captions"),
        (PhotoResult(1.0, 0.3, 25, 2, 25), "2 with a grey picture"),
    ):
        with pytest.raises(StepFailed, match=message):
            check_photos(result)


class TestPlacedShapes:
    """Made pictures, and what a drawing or an answer shows of them."""

    def test_a_picture_is_a_function_of_its_sentence(self, tmp_path: Path) -> None:
        pictures = placed_shapes.save_pictures(tmp_path)
        assert len({sentence for _, _, sentence in pictures}) == len(ALL) == 144
        assert len({(tmp_path / file).read_bytes() for _, file, _ in pictures}) == 144
        held_out = [one for one in ALL if one.held_out]
        assert len(held_out) == 36
        assert {one.colour for one in held_out} == set(shapes.COLOURS)
        assert {one.shape for one in held_out} == set(shapes.SHAPES)

    def test_scores(self) -> None:
        red = PlacedShape("red", "circle", "top left")
        found = [
            (red, named("a red circle, top left")),
            (red, named("a red square, top left")),
            (red, named("a red red circle")),
            (red, named("")),
        ]
        assert score(found) == placed_shapes.Score(4, 0.5, 0.5, 0.25)

    def test_a_drawing_shows_the_nearest_picture_at_its_place(self) -> None:
        here = [one for one in ALL if one.place == "top left"][:2]
        elsewhere = next(one for one in ALL if one.place == "middle centre" and one.colour == "blue")
        true = {
            one: np.full((4, 4, 32), value, np.float32)
            for one, value in zip((*here, elsewhere), (0, 2, 1), strict=True)
        }
        drawn = np.full((4, 4, 32), 1.2, np.float32)
        assert nearest_combination(drawn, true, "top left") == (here[1].colour, here[1].shape)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_the_toy_run_from_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = command("examples/vila_u_tiny/run.py", "--output", str(output), timeout=1100)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (
        "losses equal bit for bit" in found.stdout
        and "| captions word for word      | 3 of 3" in found.stdout
    )
    assert (output / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_memory_experiment_from_end_to_end(tmp_path: Path) -> None:
    """At a size at which little is learnt of made pictures; on photos all of it."""
    output = tmp_path / "out"
    words = ["--output", str(output), "--iterations", "20", "--seeds", "1"]
    found = command("examples/vila_u_tiny/memory_experiment.py", *words, timeout=1100)
    assert found.returncode == 0, found.stdout + found.stderr
    result = json.loads((output / "result.json").read_text())
    assert result["photos"]["captions"] > 12 and result["photos"]["shared"] <= 0.5
    (shape,) = result["shapes"]
    assert shape["drawn"]["held out"]["count"] == shape["named"]["held out"]["count"] == 36
