"""Several images in a sample, between the words; a video is the frames of its sample, one image after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_eve.data.batch import build_batch
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from tests.data.helpers import MakeConfig, opened, picture, run


def test_a_video_of_eight_frames(make_config: MakeConfig, tmp_path: Path) -> None:
    """From the row to the batch: eight images in order, each in its place, the labels those of the answer."""
    names = [f"frame{i}.png" for i in range(8)]
    for i, name in enumerate(names):
        picture(64, 36, seed=i).save(tmp_path / "photos" / name)
    question = "".join(f"<image>\nSecond {i}. " for i in range(8)) + "What happens?"
    row = {
        "image": names,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A car goes by."}],
    }
    config = make_config([row], template="vicuna_v1", image_size=224, teacher_size=112)
    info = run(config)
    assert (info.num_samples, info.num_images, info.skipped) == (1, 8, {})
    dataset = opened(config)
    tokens, _ = dataset.text(0)
    places = np.flatnonzero(tokens == IMAGE_TOKEN_ID)
    assert len(places) == 8
    batch = build_batch(dataset, [0], tensor_parallel=1, context_parallel=1, views=["patches"])
    rows = dataset.image_plan(0).rows
    assert batch.image_starts.tolist() == [int(place) + i * (rows - 1) for i, place in enumerate(places)]
    assert batch.image_grids.tolist() == [list(dataset.image_plan(0).grid)] * 8
    assert int((batch.labels != -100).sum()) == int(dataset.samples["labels"][0])
    frames = batch.pixels["patches"].unflatten(0, (8, -1))
    assert len({frame.numpy().tobytes() for frame in frames}) == 8  # eight different pictures
    one = build_batch(dataset, [0], tensor_parallel=1, context_parallel=1, views=["patches"])
    assert torch.equal(one.pixels["patches"], batch.pixels["patches"])
