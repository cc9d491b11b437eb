"""Generation with scaled rotary embeddings: each cached step has the angles that training gives its position."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_eve.checkpoint.hf.config import settings_of
from megatron_eve.config import RunConfig
from megatron_eve.inference.generate import Prompt, generation_config
from tests.convert.test_language_models import SAMPLES, transformers_model
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

COUNT = 5


def generated(config: RunConfig, folder: Path) -> tuple[list[list[int]], torch.Tensor]:
    """Runs on each rank: greedy ids of both samples, and the logits [COUNT, 2, W] that each was chosen from."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.inference.generate import generate
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(config):
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(folder, [model], config)
        steps: list[torch.Tensor] = []
        model.register_forward_hook(lambda _, __, logits: steps.append(logits.clone()))
        prompts = [Prompt(list(sample)) for sample in SAMPLES]
        return generate(model, prompts, config, max_new_tokens=COUNT, stop_ids=()), torch.stack(steps)


@pytest.mark.parametrize("kind", ["linear", "llama3.1"])
def test_a_cached_step_is_at_its_position(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    """Logits of every step are those of transformers on the whole text."""
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)
    sizes = settings_of(tmp_path, image_size=224, teacher_size=112)
    config = generation_config(RunConfig(**sizes._asdict()), 1, 1)
    ((answers, steps),) = ranks.run(1, generated, config, tmp_path)
    for number, (sample, answer) in enumerate(zip(SAMPLES, answers, strict=True)):
        with torch.no_grad():
            whole = theirs(torch.tensor([[*sample, *answer]])).logits[0]
        expected = whole[len(sample) - 1 : -1]
        torch.testing.assert_close(steps[:, number, : expected.shape[1]], expected, rtol=0, atol=1e-5)
        assert expected.argmax(1).tolist() == answer
