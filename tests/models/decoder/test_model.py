"""The model's own properties: samples of a pack do not see each other, and logits are where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from tests.layouts import ONE, PP2, TP2, TP2_SP, Layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

# Small, and with a vocabulary that has to be padded: 300 to 384 at TP 1, to 512 at TP 2.
MODEL = ModelConfig(num_layers=2, vocab_size=300, num_attention_heads=4, num_query_groups=2)


def config(parallel: ParallelConfig = ONE.parallel) -> RunConfig:
    return RunConfig(
        model=MODEL,
        parallel=parallel,
        training=TrainingConfig(train_iters=1, transformer_impl="local"),
        data=DataConfig(mock_data=True, seq_length=1024),
    )


def pack_logits(
    some: RunConfig, packs: Sequence[Sequence[int]], edit: int | None = None
) -> dict[int, torch.Tensor]:
    """Runs on each rank: logits of all real rows, by sample, with samples packed as given.

    Args:
        some: configuration.
        packs: samples of the mock dataset in each pack.
        edit: change the last token of this sample.
    """
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs

    with model_parallel(some), torch.no_grad():
        (model,) = build_chunks(some)
        found = {}
        for pack in packs:
            batch = mock_batch(some, pack)
            ends = (batch.cu_seqlens_padded[:-1] + batch.cu_seqlens.diff()).tolist()
            if edit in pack:
                batch.tokens[ends[list(pack).index(edit)] - 1] = 7
            inputs = model_inputs(DevicePack(batch), model)
            inputs.labels = None
            inputs.output_rows = torch.arange(len(batch.tokens))
            logits = model(inputs)
            starts = batch.cu_seqlens_padded.tolist()
            found.update({s: logits[a:b].clone() for s, a, b in zip(pack, starts, ends, strict=False)})
    return found


def mock_batch(some: RunConfig, pack: Sequence[int]) -> Any:
    from megatron_eve.data.batch import build_batch
    from megatron_eve.training.loop.data import open_data

    return build_batch(
        open_data(some).dataset,
        pack,
        tensor_parallel=some.parallel.tensor_model_parallel_size,
        context_parallel=1,
        views=["patches"],
    )


def test_samples_of_a_pack_do_not_see_each_other(ranks: RankPool) -> None:
    alone = ranks.run(1, pack_logits, config(), [[0], [1], [2]])[0]
    together = ranks.run(1, pack_logits, config(), [[2, 0, 1]])[0]
    for sample, logits in alone.items():
        torch.testing.assert_close(together[sample], logits, rtol=1e-5, atol=1e-5)
    edited = ranks.run(1, pack_logits, config(), [[2, 0, 1]], 0)[0]
    assert torch.equal(edited[1], together[1]) and torch.equal(edited[2], together[2])
    assert torch.equal(edited[0][:-1], together[0][:-1])  # causal
    assert not torch.equal(edited[0][-1], together[0][-1])


def test_padded_vocabulary_has_no_probability(ranks: RankPool) -> None:
    logits = ranks.run(1, pack_logits, config(), [[0]])[0][0]
    assert logits.shape[1] == 384
    assert torch.isneginf(logits[:, 300:]).all() and torch.isfinite(logits[:, :300]).all()


def losses_and_gradients(some: RunConfig, pack: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
    """Runs on each rank: summed loss of a pack, and the norm of each gradient."""
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs

    with model_parallel(some):
        (model,) = build_chunks(some)
        losses = model(model_inputs(DevicePack(mock_batch(some, pack)), model))["lm loss"]
        losses.sum().backward()
        norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
        assert len(norms) == len(list(model.parameters())), "a parameter got no gradient"
    return losses.detach(), norms


def test_losses_are_given_for_labelled_rows_only(ranks: RankPool) -> None:
    batch_labels = ranks.run(1, labels_of, config(), [0, 1])[0]
    losses, _ = ranks.run(1, losses_and_gradients, config(), [0, 1])[0]
    assert losses.shape == (batch_labels,) and losses.dtype == torch.float32


def labels_of(some: RunConfig, pack: Sequence[int]) -> int:
    """Runs on each rank: labels of a pack."""
    return int((mock_batch(some, pack).labels >= 0).sum())


def text_only_sample(some: RunConfig) -> int:
    """Runs on each rank: a sample of the mock dataset without an image."""
    from megatron_eve.training.loop.data import open_data

    return int(np.flatnonzero(open_data(some).dataset.samples["num_images"] == 0)[0])


@parametrize(ONE, TP2, TP2_SP)
@pytest.mark.parametrize("empty", [False, True], ids=["text", "padding"])
def test_a_pack_without_images_or_samples(ranks: RankPool, layout: Layout, empty: bool) -> None:
    """Every parameter still gets a gradient (zero for the front end), so no reduction waits for it."""
    some = config(layout.parallel)
    sample = ranks.run(1, text_only_sample, config())[0]
    losses, norms = ranks.run(layout.world_size, losses_and_gradients, some, [] if empty else [sample])[0]
    assert (losses.numel() == 0) == empty
    assert all(norm == 0 for name, norm in norms.items() if empty or name.startswith("vision_model."))
    assert empty or norms["embedding.word_embeddings.weight"] > 0


def parameter_names(some: RunConfig) -> list[str]:
    """Runs on each rank."""
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(some):
        return [name for chunk in build_chunks(some) for name, _ in chunk.named_parameters()]


def test_stages_hold_their_part_only(ranks: RankPool) -> None:
    first, last = ranks.run(2, parameter_names, config(PP2.parallel))
    assert any(name.startswith("vision_model.") for name in first)
    assert not any(name.startswith(("vision_model.", "embedding.")) for name in last)
    assert {"final_layernorm.weight", "output_layer.weight"} <= set(last)
    assert not {"final_layernorm.weight", "output_layer.weight"} & set(first)


def test_transformer_engine_is_refused_where_it_cannot_run(ranks: RankPool) -> None:
    if torch.cuda.is_available():
        pytest.skip("TransformerEngine may run here")
    some = config()
    some = replace(some, training=replace(some.training, transformer_impl="transformer_engine"))
    with pytest.raises(AssertionError, match="needs a GPU and TransformerEngine"):
        ranks.run(1, parameter_names, some)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with TransformerEngine")
def test_transformer_engine_layers_build_and_run() -> None:
    """One pack through TransformerEngine's layers in bfloat16, close to the torch layers from the same weights."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron_eve.models.process_groups import process_group
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    some = replace(config(), model=replace(MODEL, hidden_size=256, num_attention_heads=4, num_query_groups=4))
    found = {}
    with process_group(some.parallel):
        for choice in ("local", "transformer_engine"):
            # Bare modules have no buffer to which a matrix product could add a gradient.
            training = replace(
                some.training, bf16=True, transformer_impl=choice, gradient_accumulation_fusion=False
            )
            run = replace(some, training=training)
            torch.manual_seed(0)
            found[choice], _ = losses_and_gradients(run, [0, 1])
    torch.testing.assert_close(
        found["local"].float(), found["transformer_engine"].float(), rtol=0.05, atol=0.05
    )
