"""Streams, pooled rows, zig-zag cuts and the aligning layer itself, each against a loop that says the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from megatron_eve.models.decoder.context_parallel import gathered_order, zigzag_rows
from megatron_eve.models.decoder.intermediate_features import (
    FeatureRows,
    features_before,
    join_stream,
    split_stream,
    stream_rows,
)
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.patch_aligning import PatchAligningLayer, aligning_loss

CONFIG: Any = SimpleNamespace(hidden_size=12, params_dtype=torch.float64, sequence_parallel=True)


@given(n=st.integers(0, 9), features=st.integers(0, 4), rows=st.integers(0, 7), width=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_a_stream_comes_apart_as_it_was_joined(n: int, features: int, rows: int, width: int) -> None:
    hidden, carried = torch.randn(n, 1, 8), torch.randn(features, rows, width)
    stream = join_stream(hidden, carried)
    assert stream.shape == (n + -(-features * rows * width // 8), 1, 8)
    found = split_stream(stream, FeatureRows(n, torch.arange(0), rows), features, width)
    assert torch.equal(found[0], hidden) and torch.equal(found[1], carried)
    assert stream._base is None  # the schedules free the data of what they send
    # With room for features of all rows: of one size whatever the pack holds, and read back alike.
    fixed = stream_rows(n, features, width, 8, pooling=1)
    if rows <= n:
        padded = join_stream(hidden, carried, fixed)
        assert padded.shape == (fixed, 1, 8) and torch.equal(padded[: len(stream)], stream)
        again = split_stream(padded, FeatureRows(n, torch.arange(0), rows), features, width)
        assert torch.equal(again[0], hidden) and torch.equal(again[1], carried)


@pytest.mark.parametrize(
    ("layers", "interval", "counts"), [(8, 4, (0, 1, 2, 2)), (6, 4, (0, 0, 1, 1)), (3, 1, (0, 1, 2, 3))]
)
def test_features_before(layers: int, interval: int, counts: tuple[int, ...]) -> None:
    """Features that reach the first layer, the second, the one behind the next such depth, and the last."""
    depths = EVEConfig(tap_interval=interval).tap_depths(layers)
    assert depths[0] == layers
    layer_depths = (0, 1, interval + 1 if interval > 1 else 2, layers)
    assert tuple(features_before(depth, depths) for depth in layer_depths) == counts


def test_pooled_rows_are_means_of_merged_patches() -> None:
    hidden = torch.arange(10.0)[:, None, None].expand(10, 1, 3)
    rows, slots = torch.tensor([1, 2, 4, 5, 7, 8, 0, 3]), torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    taken = FeatureRows(10, rows, 2, pooling=2, slots=slots).take(hidden)
    assert taken[:, 0].tolist() == [(1 + 2 + 7 + 8) / 4, (4 + 5 + 0 + 3) / 4]
    assert FeatureRows(10, rows, 8).take(hidden)[:, 0].tolist() == rows.tolist()
    nothing = torch.zeros(0, dtype=torch.int64)
    assert FeatureRows(10, nothing, 0, pooling=2, slots=nothing).take(hidden.requires_grad_()).requires_grad


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5), size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_zigzag_gives_every_row_once_and_equal_work_to_all(chunks: list[int], size: int) -> None:
    lengths = [2 * size * chunk for chunk in chunks]
    shares = [zigzag_rows(lengths, size, rank) for rank in range(size)]
    assert torch.cat(shares).sort().values.tolist() == list(range(sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert len({int((positions[share] + 1).sum()) for share in shares}) == 1  # keys that the queries meet
    assert all((share.diff() > 0).all() for share in shares)
    assert torch.equal(torch.cat(shares)[gathered_order(lengths, size)], torch.arange(sum(lengths)))


def test_zigzag_refuses_lengths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="padded to 4"):
        zigzag_rows([8, 6], 2, 0)


def test_aligning_layer_against_a_loop_over_heads() -> None:
    """Scale by the full width, keys are values, the query's own depth is not among them."""
    torch.manual_seed(0)
    layer = PatchAligningLayer(CONFIG, EVEConfig(teacher_hidden_size=16, aligning_heads=4))
    last, features = torch.randn(5, 12, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)
    tap = layer.query_tap
    query = functional.layer_norm(last, (12,), tap.norm.weight, tap.norm.bias, 1e-5) @ tap.projection.weight.T
    expected = torch.empty(5, 16, dtype=torch.float64)
    for row in range(5):
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            logits = torch.stack(
                [(query[row, part] * features[j, row, part]).sum() / 16**0.5 for j in range(3)]
            )
            expected[row, part] = sum(p * features[j, row, part] for j, p in enumerate(logits.softmax(0)))  # type: ignore[assignment]
    expected = layer.input_layer(last) + layer.output_layer(expected)
    torch.testing.assert_close(layer.predict(last, features), expected)
    assert all(parameter.sequence_parallel for parameter in layer.parameters())


def test_loss_is_a_mean_over_each_image_and_a_sum_over_images() -> None:
    predictions, targets = torch.randn(5, 8), torch.randn(5, 8)
    cosine = functional.cosine_similarity(predictions, targets)
    weights = torch.tensor([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])
    expected = (1 - cosine[:2].mean()) + (1 - cosine[2:].mean())
    torch.testing.assert_close(aligning_loss(predictions, targets, weights), expected)
    # Rows that only fill up a rank's share have weight 0 and must not spoil a gradient.
    padding = torch.zeros(1, 8, requires_grad=True)
    aligning_loss(padding, targets[:1], torch.zeros(1)).backward()
    assert padding.grad is not None and not padding.grad.any()
