"""The residual quantiser in training: the public code's steps, the definition, and any number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_eve.models.vila_u import quantizer as module
from megatron_eve.models.vila_u.golden_towers import RecordedDraw, quantizer_of
from megatron_eve.models.vila_u.quantizer import Quantizer
from megatron_eve.models.vila_u.restart import KeyedDraw
from tests.golden_dir import find_golden
from tests.ranks import RankPool

PICTURES, STEPS = 7, 3
# Features and codes of a picture, sizes of the codebooks, and is there one for all depths?
Sizes = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, ...], bool]
SHARED: Sizes = ((4, 2, 3), (2, 2, 3), (16, 16, 16), True)  # blocks of 2 x 1, more vectors than codes
SEPARATE: Sizes = ((2, 2, 4), (2, 2, 2), (40, 16), False)  # fewer vectors than codes of the first depth
SLICES = ([7], [3, 4], [1, 4, 2])


def fresh(sizes: Sizes) -> Quantizer:
    """In float64, with counts around 1, so that some codes restart and some do not."""
    quantizer = Quantizer(*sizes).double()
    generator = torch.Generator().manual_seed(1)
    quantizer.reset(generator)
    for codebook in dict.fromkeys(quantizer.codebooks):
        codebook.cluster_size_ema.uniform_(0.9, 1.3, generator=generator)
        codebook.embed_ema.mul_(codebook.cluster_size_ema[:, None])
    return quantizer


def batch(sizes: Sizes, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of all pictures, and the weights of their quantised features in a loss."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = PICTURES, *sizes[0]
    features, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return features, weights


def run_slice(sizes: Sizes, slices: list[int], mutation: str = "", restart: bool = True) -> dict[str, Any]:
    """Three steps of this rank's slice: what they give of its pictures, and the codebooks after each."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    group = dist.group.WORLD if dist.is_initialized() else None
    start, whole = sum(slices[:rank]), module.sum_over_ranks
    if mutation == "sums of a rank":
        module.sum_over_ranks = lambda values, group: values
    quantizer = fresh(sizes)
    found: dict[str, Any] = {}
    try:
        for step in range(STEPS):
            features, weights = (one[start : start + slices[rank]] for one in batch(sizes, step))
            features = features.clone().requires_grad_()
            draw = KeyedDraw(3 if mutation != "draws of a rank" else rank, step) if restart else None
            quantized = quantizer.train_forward(features, draw, group)
            share = quantized.commitment_loss * len(features) / PICTURES
            (0.25 * share + (quantized.features * weights).sum()).backward()
            found |= {
                f"codes {step}": quantized.codes,
                f"features {step}": quantized.features.detach(),
                f"gradient {step}": features.grad,
                f"loss {step}": share.detach(),
                f"usage {step}": quantizer.last_usage,
            } | {f"{step} {key}": tensor.clone() for key, tensor in quantizer.state_dict().items()}
    finally:
        module.sum_over_ranks = whole
    return found


def differences(ranks: list[dict[str, Any]], one: dict[str, Any]) -> set[str]:
    """Names of what differs between the ranks, put together, and one process."""
    wrong = set()
    for key, wanted in one.items():
        parts = [rank[key] for rank in ranks]
        if key.startswith(("codes", "features", "gradient")):
            parts = [torch.cat(parts)]
        elif key.startswith("loss"):
            parts = [torch.stack(parts).sum()]
        if not all(torch.allclose(part, wanted, rtol=1e-11, atol=1e-12) for part in parts):
            wrong.add(key)
    return wrong


def plain_step(
    state: dict[str, torch.Tensor],
    vectors: torch.Tensor,
    draw: KeyedDraw | None,
    depth: int,
    new_lookup: bool,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A step by the definition, a vector at a time: codes [V, D], sums [V, F], restarts. Changes the state dict."""
    left, total, codes, restarts = vectors.clone(), torch.zeros_like(vectors), [], 0
    for level in range(depth):
        weight, counts, sums = (
            state[f"codebooks.{level}.{name}"] for name in ("weight", "cluster_size_ema", "embed_ema")
        )
        old, size = weight.clone(), len(counts)
        code = torch.stack([(vector - old[:-1]).square().sum(1).argmin() for vector in left])
        counts *= 0.99
        sums *= 0.99
        for vector, number in zip(left, code, strict=True):
            counts[number] += 0.01
            sums[number] += 0.01 * vector
        if draw is not None:
            pool = left
            if len(left) < size:
                pool = left.repeat(-(-size // len(left)), 1)
                pool = pool + draw.noise(level, tuple(pool.shape)).double() * 0.01 / pool.shape[1] ** 0.5
            pool = pool[draw.draw(level, len(pool))]
            for number in range(size):
                if counts[number] < 1:
                    counts[number], sums[number] = 1, pool[number]
                    restarts += 1
        smoothed = counts.sum() * (counts + 1e-5) / (counts.sum() + size * 1e-5)
        weight[:-1] = sums / smoothed[:, None]
        found = (weight if new_lookup else old)[code]
        left, total = left - found, total + found
        codes.append(code)
    return torch.stack(codes, 1), total, restarts


@pytest.mark.parametrize(
    "name", ["shared_norestart", "shared_restart_smallbatch", "separate_restart", "shared_norestart_spatial2"]
)
def test_steps_of_the_public_code(name: str) -> None:
    case = load_file(find_golden(f"vila/vilau_quantizer/{name}.safetensors"))
    quantizer = quantizer_of(case)
    for step in range(2):
        draw = RecordedDraw(case, step) if f"train{step}_randperm_call0" in case else None
        found = quantizer.train_forward(case[f"train{step}_x"], draw)
        assert torch.equal(found.codes, case[f"train{step}_codes"])
        torch.testing.assert_close(found.features, case[f"train{step}_z_q"], rtol=0, atol=1e-6)
        torch.testing.assert_close(found.commitment_loss, case[f"train{step}_loss"], rtol=1e-6, atol=0)
        for key, tensor in quantizer.state_dict().items():
            torch.testing.assert_close(tensor, case[f"after{step}.{key}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [SHARED, SEPARATE])
@pytest.mark.parametrize("restart", [True, False])
def test_steps_are_those_of_the_definition(sizes: Sizes, restart: bool) -> None:
    found, quantizer = run_slice(sizes, [PICTURES], restart=restart), fresh(sizes)
    state, restarts = copy.deepcopy(quantizer.state_dict()), 0
    if sizes[3]:  # one set of tensors under the names of all depths
        state = {key: state["codebooks.0." + key.split(".", 2)[2]] for key in state}
    for step in range(STEPS):
        vectors = quantizer.fold(batch(sizes, step)[0]).flatten(0, 2)
        draw = KeyedDraw(3, step) if restart else None
        wrong_order = plain_step(copy.deepcopy(state), vectors, draw, sizes[1][2], new_lookup=True)
        codes, sums, restarted = plain_step(state, vectors, draw, sizes[1][2], new_lookup=False)
        assert torch.equal(found[f"codes {step}"].flatten(0, 2), codes)
        ours = quantizer.fold(found[f"features {step}"]).flatten(0, 2)
        torch.testing.assert_close(ours, sums, rtol=0, atol=1e-12)
        assert not torch.allclose(ours, wrong_order[1], atol=1e-3)
        for key, tensor in state.items():
            torch.testing.assert_close(found[f"{step} {key}"], tensor, rtol=1e-12, atol=1e-12)
        restarts += restarted
        usage = found[f"usage {step}"]
        assert usage.sum(1).tolist() == [len(vectors)] * sizes[1][2]
        assert torch.equal(usage[1, : sizes[2][1]], torch.bincount(codes[:, 1], minlength=sizes[2][1]))
    assert bool(restarts) == restart


@pytest.mark.parametrize("sizes", [SHARED, SEPARATE])
def test_ranks_with_unequal_slices_give_what_one_process_gives(ranks: RankPool, sizes: Sizes) -> None:
    one = run_slice(sizes, [PICTURES])
    for slices in SLICES:
        assert differences(ranks.run(len(slices), run_slice, sizes, slices), one) == set()


@pytest.mark.parametrize("mutation", ["sums of a rank", "draws of a rank"])
def test_sums_or_draws_of_a_rank_alone_are_seen(ranks: RankPool, mutation: str) -> None:
    one = run_slice(SHARED, [PICTURES])
    wrong = differences(ranks.run(2, run_slice, SHARED, [3, 4], mutation), one)
    assert "0 codebooks.0.weight" in wrong and "codes 2" in wrong


def test_draws_depend_on_seed_step_and_depth_alone() -> None:
    first = KeyedDraw(5, 9).draw(1, 50)
    assert sorted(first.tolist()) == list(range(50))
    torch.rand(3)
    assert torch.equal(KeyedDraw(5, 9).draw(1, 50), first)
    for other in (KeyedDraw(6, 9).draw(1, 50), KeyedDraw(5, 10).draw(1, 50), KeyedDraw(5, 9).draw(2, 50)):
        assert not torch.equal(other, first)
    noise = KeyedDraw(5, 9).noise(1, (50, 4))
    assert noise.min() >= 0 and noise.max() < 1 and torch.equal(KeyedDraw(5, 9).noise(1, (50, 4)), noise)


def test_codebooks_begin_random_and_the_first_step_fills_them_from_its_batch() -> None:
    quantizer = Quantizer((4, 2, 3), (2, 2, 1), (16,), True)
    quantizer.reset(torch.Generator().manual_seed(0))
    codebook: Any = quantizer.codebooks[0]
    assert codebook.cluster_size_ema.count_nonzero() == 0 and codebook.weight[-1].count_nonzero() == 0
    assert torch.equal(codebook.embed_ema, codebook.weight[:-1]) and 0.7 < codebook.weight[:-1].std() < 1.3
    features = 5 + batch(SHARED, 0)[0].float()
    quantizer.train_forward(features, KeyedDraw(0, 0))
    assert (codebook.cluster_size_ema == 1).all()
    vectors = quantizer.fold(features).flatten(0, 2)
    assert torch.equal(codebook.embed_ema, vectors[KeyedDraw(0, 0).draw(0, len(vectors))[:16]])
    quantizer.eval()
    state = copy.deepcopy(quantizer.state_dict())
    quantizer(features)
    assert all(torch.equal(tensor, state[key]) for key, tensor in quantizer.state_dict().items())


def test_features_in_bfloat16_are_searched_in_float32() -> None:
    quantizer = Quantizer(*SHARED)
    quantizer.reset(torch.Generator().manual_seed(0))
    features = batch(SHARED, 0)[0].bfloat16()
    wanted = copy.deepcopy(quantizer).train_forward(features.float(), KeyedDraw(0, 0))
    found = quantizer.to(torch.bfloat16).train_forward(features, KeyedDraw(0, 0))
    assert torch.equal(found.codes, wanted.codes) and found.features.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in quantizer.state_dict().values())
