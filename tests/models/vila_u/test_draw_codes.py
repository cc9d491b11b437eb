"""Codes of a position by the depth transformer, with its cache: those of the public code, and of a run without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import ParallelConfig, RunConfig
from megatron_eve.inference.sampling import Sampling
from tests.golden_dir import find_golden
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def drawn(case: Path, tensor_parallel: int, folder: Path, golden: bool) -> list[tuple[str, float]]:
    """Runs on each rank: how far from a plain run of the golden head the comparisons of its family are.

    Without a generate.safetensors in the case, one of the plain run has its place: all depths again for every code.
    """
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from megatron_eve.models.golden_format import Comparison
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila_u.golden_head import case_head, head_comparisons

    config = RunConfig(parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel))
    with model_parallel(config):
        if not golden:
            hidden = load_file(case / "inputs.safetensors")["embed_from_body"].flatten(0, 1)[:6]
            head, _ = case_head(case, hidden.shape[-1])
            tensors = {"embed_from_body": hidden[:, None]}
            for guidance in (1, 3):
                codes, logits = plainly(head, hidden, guidance)
                tensors |= {
                    f"argmax_cfg{guidance}.code": codes,
                    f"argmax_cfg{guidance}.guided_logits": logits,
                }
            mine = folder / f"{torch.distributed.get_rank()}" / "case"
            shutil.copytree(case, mine)
            for beside in case.parent.iterdir():
                if beside != case:
                    (mine.parent / beside.name).symlink_to(beside)
            save_file(tensors, mine / "generate.safetensors")
            case = mine

        def distance(one: Comparison) -> float:
            if one.kind == "exact":
                return float((one.ours != one.golden).sum())
            return float((one.ours - one.golden).norm() / one.golden.norm())

        return [(one.name, distance(one)) for one in head_comparisons(case) if one.name.startswith("argmax")]


def plainly(head: Any, hidden: Any, guidance: float) -> tuple[Any, Any]:
    """Codes [R, 1, D] and guided logits [R / 2, D, K], without a cache."""
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    codes = torch.zeros(len(hidden), head.codebook.depth, dtype=torch.int64)
    found = []
    with torch.no_grad():
        for depth in range(head.codebook.depth):
            logits = head.transformer(hidden, head.codebook.cumulative(codes)[:, :-1])[:, depth]
            conditional, unconditional = gather_from_tensor_model_parallel_region(logits).chunk(2)
            found.append(unconditional + guidance * (conditional - unconditional))
            codes[:, depth] = found[-1].argmax(-1).repeat(2)
    return codes[:, None], torch.stack(found, dim=1)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_most_likely_codes_are_those_of_a_plain_run(
    ranks: RankPool, tmp_path: Path, tensor_parallel: int
) -> None:
    case = find_golden("vila/vilau_rqtransformer")
    for found in ranks.run(tensor_parallel, drawn, case, tensor_parallel, tmp_path, False):
        assert len(found) == 4
        for name, distance in found:
            assert distance <= (0 if name.endswith("code") else 5e-6), name


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_most_likely_codes_are_those_of_the_public_code(
    ranks: RankPool, tmp_path: Path, tensor_parallel: int
) -> None:
    case = find_golden("vila/vilau_rqtransformer/generate.safetensors").parent
    for found in ranks.run(tensor_parallel, drawn, case, tensor_parallel, tmp_path, True):
        assert found
        for name, distance in found:
            assert distance <= (0 if name.endswith("code") else 5e-6), name


def test_probabilities_are_those_of_the_public_sampler() -> None:
    from safetensors.torch import load_file

    from megatron_eve.inference.sampling import kept_probabilities

    case = load_file(find_golden("vila/vilau_rqtransformer") / "sampler.safetensors")
    sampling = Sampling(temperature=1.0, top_k=900, top_p=0.96)
    found = kept_probabilities(case["logits"], sampling)
    assert ((found > 0).sum(-1) == case["n_kept"]).all()
    assert float((found - case["probs_topk900_topp096"]).abs().max()) < 1e-6
    other = kept_probabilities(case["logits"], replace(sampling, top_p=0.9))
    assert ((other > 0).sum(-1) < case["n_kept"]).all()


def test_draws_follow_the_probabilities() -> None:
    import torch

    from megatron_eve.inference.sampling import kept_probabilities, next_tokens

    sampling, draws = Sampling(temperature=0.8, top_k=12, top_p=0.95), 20_000
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    expected = kept_probabilities(logits, sampling)[0] * draws
    codes = next_tokens(logits.expand(draws, -1), sampling, range(draws), step=5)
    counts = torch.bincount(codes, minlength=40).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0 and 5 < int(kept.sum()) <= 12
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    # The 99.9th percentile of chi-square at 11 degrees of freedom, which is above those of fewer.
    assert statistic < 31.3
