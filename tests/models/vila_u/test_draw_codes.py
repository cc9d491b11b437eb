"""Codes of a position by the depth transformer, with its cache: those of the public code, and of a run without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import RunConfig
from megatron_eve.inference.generate import generation_config
from megatron_eve.inference.sampling import Sampling
from tests.golden_dir import find_golden
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def golden_model() -> Path:
    return find_golden("vila/vilau_model")


def golden_config(tensor_parallel: int = 1, pipeline_parallel: int = 1) -> RunConfig:
    """For generation with the golden model."""
    from megatron_eve.checkpoint.hf.config import settings_of

    settings = settings_of(golden_model())
    config = RunConfig(family=settings.family, model=settings.model, vision=settings.vision)
    return generation_config(config, tensor_parallel, pipeline_parallel)


def drawn(config: RunConfig, folder: Path, case: Path, guidance: float) -> dict[str, float]:
    """Runs on each rank: how far the codes and guided logits of the case are from ours."""
    import torch
    from safetensors.torch import load_file

    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel

    golden = load_file(case)
    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(folder, [model], config)
        found = []

        def choose(logits: torch.Tensor, depth: int) -> torch.Tensor:
            conditional, unconditional = logits.chunk(2)
            found.append(unconditional + guidance * (conditional - unconditional))
            return found[-1].argmax(-1).repeat(2)

        (head,) = model.heads.values()
        codes = head.eval().draw_codes(golden["embed_from_body"][:, 0], choose)
    name = f"argmax_cfg{guidance:g}"
    theirs, ours = golden[f"{name}.guided_logits"], torch.stack(found, 1)
    features = golden[f"{name}.out_features"][:, 0]
    summed = head.codebook.embed(codes)
    return {
        "codes": int((codes != golden[f"{name}.code"][:, 0]).sum()),
        "logits": float((ours - theirs).norm() / theirs.norm()),
        "features": float((summed - features).norm() / features.norm()),
    }


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_argmax_codes_are_those_of_the_public_code(
    ranks: RankPool, tensor_parallel: int, guidance: float
) -> None:
    case = find_golden("vila/vilau_rqtransformer/generate.safetensors")
    config = golden_config(tensor_parallel)
    for found in ranks.run(tensor_parallel, drawn, config, golden_model(), case, guidance):
        assert found["codes"] == 0
        assert found["logits"] < 5e-6
        assert found["features"] < 1e-6


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
