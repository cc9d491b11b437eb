"""Drawings under any layout are those of a plain loop that keeps nothing: of one process, the whole sequence again for
every position, and all depths again for every code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eve.config import RunConfig
from megatron_eve.inference.drawing import Drawing, drawing_key
from megatron_eve.inference.generate import generation_config
from megatron_eve.inference.sampling import GREEDY, Sampling
from tests.families.suite import with_weights
from tests.families.vila_u import run_config
from tests.layouts import ONE, PP2, TP2, TP2_PP2, Layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

SAMPLED = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=7)
DRAWINGS = [
    Drawing([1, 40, 41, 42, 43, 508], [1, 44, 508], drawing_key(SAMPLED, "a", 0)),
    Drawing([1, 50, 51, 52, 53, 54, 55, 56, 57, 508], [1, 44, 508], drawing_key(SAMPLED, "b", 0)),
    Drawing([1, 50, 51, 52, 53, 54, 55, 56, 57, 508], [1, 44, 508], drawing_key(SAMPLED, "b", 1)),
]
Case = tuple[list[Drawing], Sampling, float, int]
CASES: dict[str, Case] = {
    "one": (DRAWINGS[:1], GREEDY, 3.0, 1),
    "several": (DRAWINGS, GREEDY, 3.0, 1),
    "unguided": (DRAWINGS[:2], GREEDY, 1.0, 1),
    "two frames": (DRAWINGS[:1], GREEDY, 3.0, 2),
    "sampled": (DRAWINGS, SAMPLED, 2.0, 1),
}


def config_of(layout: Layout) -> RunConfig:
    parallel = layout.parallel
    return generation_config(
        run_config(ONE.parallel),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )


def loaded(config: RunConfig, folder: Path) -> Any:
    from megatron_eve.checkpoint.state import load_weights
    from megatron_eve.models.build import build_chunks

    (model,) = build_chunks(config, freeze=False)
    load_weights(str(folder), [model], config)
    return model.eval()


def drawn(config: RunConfig, folder: Path) -> dict[str, np.ndarray]:
    """Runs on each rank: codes of all cases."""
    from megatron_eve.inference.drawing import draw
    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(config):
        model = loaded(config, folder)
        return {
            name: draw(model, drawings, config, sampling=sampling, guidance=guidance, frames=frames).numpy()
            for name, (drawings, sampling, guidance, frames) in CASES.items()
        }


def plainly_drawn(config: RunConfig, folder: Path) -> dict[str, list[np.ndarray]]:
    """Runs on one process: codes [positions, D] of each picture of the greedy cases, picture by picture."""
    import torch

    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(config), torch.no_grad():
        model = loaded(config, folder)
        return {
            name: [
                np.stack(list(plain_steps(model, config, drawing, guidance, frames))) for drawing in drawings
            ]
            for name, (drawings, sampling, guidance, frames) in CASES.items()
            if sampling.greedy
        }


def plain_steps(
    model: Any, config: RunConfig, drawing: Drawing, guidance: float, frames: int
) -> Iterator[np.ndarray]:
    import torch

    vision = config.vision
    depth, head = vision.codes_per_position, model.visual_head
    codes = torch.zeros(0, depth, dtype=torch.int64)
    for _ in range(frames * vision.rows):
        hidden = [last_hidden(model, tokens, codes) for tokens in (drawing.tokens, drawing.unconditional)]
        new = torch.zeros(1, depth, dtype=torch.int64)
        for level in range(depth):
            sums = head.codebook.cumulative(new)[:, :-1]  # what comes at or behind this depth is not seen
            conditional, unconditional = (head.transformer(row, sums)[0, level] for row in hidden)
            logits = (
                conditional if guidance == 1 else unconditional + guidance * (conditional - unconditional)
            )
            new[0, level] = logits.argmax()
        yield new[0].numpy()
        codes = torch.cat([codes, new])


def last_hidden(model: Any, tokens: list[int], codes: Any) -> Any:
    """Hidden state [1, H] of the last row of a prompt and the positions behind it."""
    import torch

    from megatron_eve.models.decoder.model import ModelInputs
    from megatron_eve.models.decoder.packed import packed_params
    from megatron_eve.models.model_parts import VisualInputs

    length = len(tokens) + len(codes)
    return model(
        ModelInputs(
            packed=packed_params(torch.tensor([0, length], dtype=torch.int32), [length]),
            position_ids=torch.arange(length),
            tokens=torch.tensor(tokens + [0] * len(codes)),
            visual=VisualInputs({}, torch.zeros(0, 2, dtype=torch.int64), codes),
            image_rows=torch.arange(len(tokens), length),
            output_rows=torch.tensor([length - 1]),
            output=lambda hidden: hidden,
        )
    )


@pytest.fixture(scope="module")
def weights(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with_weights(run_config(ONE.parallel), ranks, folder)
    return folder


@pytest.fixture(scope="module")
def expected(ranks: RankPool, weights: Path) -> dict[str, list[np.ndarray]]:
    (found,) = ranks.run(1, plainly_drawn, config_of(ONE), weights)
    return found


@pytest.fixture(scope="module")
def alone(ranks: RankPool, weights: Path) -> dict[str, np.ndarray]:
    (found,) = ranks.run(1, drawn, config_of(ONE), weights)
    return found


def test_a_plain_loop_draws_the_same(
    alone: dict[str, np.ndarray], expected: dict[str, list[np.ndarray]]
) -> None:
    for name, pictures in expected.items():
        for ours, plain in zip(alone[name], pictures, strict=True):
            assert ours.reshape(plain.shape).tolist() == plain.tolist(), name
    assert len(np.unique(alone["several"])) > 30, "codes differ, or nothing is tested"
    assert (alone["one"] != alone["unguided"][:1]).any(), "guidance changes codes"


@parametrize(TP2, PP2, TP2_PP2)
def test_a_layout_changes_nothing(
    ranks: RankPool, weights: Path, alone: dict[str, np.ndarray], layout: Layout
) -> None:
    for found in ranks.run(layout.world_size, drawn, config_of(layout), weights):
        for name, codes in alone.items():
            assert found[name].tolist() == codes.tolist(), name


def test_the_other_pictures_of_a_batch_change_nothing(alone: dict[str, np.ndarray]) -> None:
    assert alone["one"].tolist() == alone["several"][:1].tolist()
    assert alone["two frames"][:, :1].tolist() == alone["one"].tolist()


def test_pictures_of_one_prompt_differ_where_codes_are_drawn_at_random(alone: dict[str, np.ndarray]) -> None:
    assert (alone["several"][1] == alone["several"][2]).all()
    assert (alone["sampled"][1] != alone["sampled"][2]).mean() > 0.5
