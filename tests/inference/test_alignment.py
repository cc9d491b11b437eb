"""Cosines of picture and text states by layer: against a computation by hand, and what the command writes."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_eve.config import ModelConfig, RunConfig
from megatron_eve.inference.alignment import cosines, layer_cosines
from megatron_eve.inference.alignment_curve import AlignmentCurve, Cosines, CurveError
from megatron_eve.inference.generate import generation_config
from tests.convert.test_conversion import convert
from tests.data.helpers import write_dataset
from tests.golden_dir import find_golden
from tests.inference.test_tools import tool
from tests.layouts import ONE, TP2_PP2, Layout
from tests.ranks import RankPool
from tests.test_commands import command

pytestmark = pytest.mark.distributed

WEIGHTS = "_shared/hf_mini224"
SAMPLES = [0, 2, 7]  # the third of five has two pictures


def cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def by_definition(pictures: list[list[float]], text: list[list[float]]) -> tuple[float, float]:
    pairs = [[cosine(one, other) for other in text] for one in pictures]
    mean = sum(map(sum, pairs)) / len(pictures) / len(text)
    of_pictures = sum(map(max, pairs)) / len(pictures)
    of_text = sum(max(row[i] for row in pairs) for i in range(len(text))) / len(text)
    return mean, (of_pictures + of_text) / 2


def test_two_sets_by_hand() -> None:
    pictures, text = (
        torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, -1.0]]),
        torch.tensor([[5.0, 0.0], [1.0, 1.0]]),
    )
    half = math.sqrt(0.5)
    # Nearest to the pictures: 1, half, 0; to the texts: 1, half.
    expected = ((1 + half + 0 + half + 0 - half) / 6, ((1 + half + 0) / 3 + (1 + half) / 2) / 2)
    assert cosines(pictures, text) == pytest.approx(expected)
    assert by_definition(pictures.tolist(), text.tolist()) == pytest.approx(expected)


def measured(prefix: str, layout: Layout, by_hand: bool) -> list[tuple[int, float, float]]:
    """Runs on each rank: the curve of the published test weights, or the same from layer to layer without a hook."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.data.opening import open_one
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel

    parallel = layout.parallel
    config = generation_config(
        RunConfig(model=ModelConfig()),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    dataset = open_one(config, prefix, None)
    with model_parallel(config):
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(find_golden(WEIGHTS), [model], config)
        if by_hand:
            return walk(model, dataset)
        seen: list[Any] = []
        found = layer_cosines(model, config, dataset, SAMPLES, seen.append)
        assert seen == [None] * len(SAMPLES)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        return [(depth, *some) for depth, some in found.items()]


@torch.no_grad()
def walk(model: Any, dataset: Any) -> list[tuple[int, float, float]]:
    from megatron_eve.data.batch import build_batch
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs

    model.eval()
    totals = torch.zeros(len(model.decoder.layers) + 1, 2, dtype=torch.float64)
    for sample in SAMPLES:
        batch = build_batch(dataset, [sample], tensor_parallel=1, context_parallel=1, views=["patches"])
        inputs = model_inputs(DevicePack(batch), model)
        tokens, _ = dataset.text(sample)
        kinds: list[bool] = []  # of each row: is it a picture's?
        rows = iter(batch.image_rows.tolist())
        for token in tokens.tolist():
            kinds += [True] * next(rows) if token < 0 else [False]
        hidden = model.embed(inputs)
        assert len(kinds) == len(hidden) and len(set(kinds)) == 2
        for depth in range(len(totals)):
            if depth:
                hidden, _ = model.decoder.layers[depth - 1](
                    hidden_states=hidden,
                    attention_mask=None,
                    rotary_pos_emb=model._rotary(inputs),
                    packed_seq_params=inputs.packed,
                )
            sets: tuple[list[Any], list[Any]] = ([], [])
            for row, is_picture in zip(hidden[:, 0].tolist(), kinds, strict=True):
                sets[not is_picture].append(row)
            totals[depth] += torch.tensor(by_definition(*sets), dtype=torch.float64)
    return [(depth, *some) for depth, some in enumerate((totals / len(SAMPLES)).tolist())]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    from megatron_eve.data.text.tokenizer import Tokenizer

    sha256 = Tokenizer(find_golden("tokenize") / "tokenizer.model").sha256
    return write_dataset(tmp_path_factory.mktemp("alignment") / "set", 10, 3, tokenizer_sha256=sha256)


def test_the_curve_is_that_of_a_computation_by_hand_under_any_layout(ranks: RankPool, dataset: str) -> None:
    (expected,) = ranks.run(1, measured, dataset, ONE, True)
    assert len(expected) == ModelConfig().num_layers + 1
    for layout in (ONE, TP2_PP2):
        for found in ranks.run(layout.world_size, measured, dataset, layout, False):
            assert [row[0] for row in found] == [row[0] for row in expected]
            for some, other in zip(found, expected, strict=True):
                assert some[1:] == pytest.approx(other[1:], abs=1e-5), some[0]


def test_the_command_writes_numbers_and_a_picture(dataset: str, tmp_path: Path) -> None:
    assert convert("import", "--source", find_golden(WEIGHTS), "--target", tmp_path / "run") == 0
    words = ["--model-path", str(tmp_path / "run"), "--data-path", dataset, "--samples", "3"]
    other = AlignmentCurve("other", "x", "y", 1, "z", 1, [0, 1], [0.0, 0.5], [0.1, 0.6])
    other.write(tmp_path / "other.json")
    found = command(
        "tools/alignment.py", *words, "--output", str(tmp_path / "curve.json"), "--with", str(tmp_path / "other.json")
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    curve = AlignmentCurve.read(tmp_path / "curve.json")
    assert (curve.name, curve.family, curve.samples, curve.data) == ("run", "eve", 3, dataset)
    assert curve.depths == list(range(ModelConfig().num_layers + 1))
    assert all(
        -1 <= mean < near <= 1 for mean, near in zip(curve.mean_cosine, curve.nearest_cosine, strict=True)
    )
    assert f"    0  {curve.nearest_cosine[0]:14.4f}  {curve.mean_cosine[0]:11.4f}" in found.stdout
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1000, 400)
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_curves_are_read_back_and_other_files_refused(tmp_path: Path) -> None:
    curve = AlignmentCurve.of({0: Cosines(0.5, 0.75), 1: Cosines(0.25, 0.5)}, **{
        "name": "a", "model": "b", "family": "c", "iteration": 7, "data": "d", "samples": 2
    })  # fmt: skip
    path = tmp_path / "curve.json"
    curve.write(path)
    assert AlignmentCurve.read(path) == curve
    good = asdict(curve)
    for bad in (
        "[]", "{", "7", json.dumps({}), json.dumps({**good, "depths": [0]}), json.dumps({**good, "depths": 1}),
        json.dumps({**good, "mean_cosine": ["a", "b"]}), json.dumps({**good, "other": 1}),
    ):  # fmt: skip
        path.write_text(bad)
        with pytest.raises(CurveError, match=r"curve\.json: not a curve"):
            AlignmentCurve.read(path)


def test_only_samples_with_pictures_and_text_that_fit_are_measured(dataset: str) -> None:
    """Always the same ones."""
    from megatron_eve.data.opening import open_one

    choose = tool("alignment").choose
    config = RunConfig(model=ModelConfig())
    opened = open_one(config, dataset, None)
    flags = Namespace(samples=99, data_path=dataset)
    assert sorted(choose(opened, config, flags)) == [0, 1, 2, 4, 5, 6, 7, 9]
    assert (
        choose(opened, config, Namespace(samples=3, data_path=dataset)) == choose(opened, config, flags)[:3]
    )
    longest = sorted(opened.samples["length"].tolist())[-3]
    small = RunConfig(model=ModelConfig(max_position_embeddings=longest))
    assert all(opened.samples[sample]["length"] <= longest for sample in choose(opened, small, flags))
