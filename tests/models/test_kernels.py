"""Precision and kernels: what is refused on which machine, and that fused losses are the unfused ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_eve.config import PRESETS, ConfigError, ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.runtime.accelerator import Accelerator
from tests.layouts import ONE, TP2, Layout, parametrize
from tests.ranks import RankPool


def machine(
    capability: tuple[int, int] | None, cuda: tuple[int, int] = (12, 9), engine: bool = True
) -> Accelerator:
    if capability is None:
        return Accelerator("cpu", "gloo", torch.device("cpu"), False)
    return Accelerator("cuda", "nccl", torch.device("cpu"), engine, capability, cuda)


A100, ADA, H100 = machine((8, 0)), machine((8, 9)), machine((9, 0))
TE_LOSS = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}


@pytest.mark.parametrize(
    ("training", "found", "flag", "remedy"),
    [
        ({"fp8_format": "hybrid"}, A100, "--fp8-format hybrid", "this GPU has 8.0; leave it out"),
        ({"fp8_format": "e4m3"}, machine(None), "--fp8-format e4m3", "make install-gpu"),
        ({"fp8_format": "hybrid"}, machine((9, 0), engine=False), "--fp8-format", "TransformerEngine"),
        (
            {"fp8_format": "hybrid", "fp8_recipe": "blockwise"},
            ADA,
            "--fp8-recipe blockwise",
            "use tensorwise",
        ),
        (
            {"fp8_format": "hybrid", "fp8_recipe": "blockwise"},
            machine((9, 0), (12, 6)),
            "--fp8-recipe blockwise",
            "torch CUDA 12.6",
        ),
        (TE_LOSS, machine(None), "--cross-entropy-fusion-impl te", "use native"),
    ],
)
def test_what_a_machine_lacks_is_refused(
    training: dict[str, Any], found: Accelerator, flag: str, remedy: str
) -> None:
    from megatron_eve.models.kernels import check_kernels

    config = RunConfig(training=TrainingConfig(train_iters=1, bf16=True, **training))
    with pytest.raises(ConfigError) as error:
        check_kernels(config, found)
    assert flag in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize(
    ("training", "found"),
    [
        ({}, machine(None)),
        ({"fp8_format": "hybrid"}, ADA),
        ({"fp8_format": "e4m3", "fp8_recipe": "blockwise"}, H100),
        (TE_LOSS, A100),
    ],
)
def test_what_a_machine_has_is_taken(training: dict[str, Any], found: Accelerator) -> None:
    from megatron_eve.models.kernels import check_kernels

    check_kernels(RunConfig(training=TrainingConfig(train_iters=1, bf16=True, **training)), found)


OVERLAP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True)


def test_overlapped_communication_wants_transformer_engine() -> None:
    from megatron_eve.models.kernels import check_kernels

    config = RunConfig(parallel=OVERLAP, training=TrainingConfig(train_iters=1, bf16=True))
    check_kernels(config, A100)
    with pytest.raises(
        ConfigError, match=r"--tp-comm-overlap: needs a GPU and TransformerEngine.*leave it out"
    ):
        check_kernels(config, machine(None))


@pytest.mark.parametrize(("stage", "bulk"), [(1, False), (2, True), (3, True)])
def test_a_frozen_decoder_sends_nothing_under_products_that_it_lacks(stage: int, bulk: bool) -> None:
    """TransformerEngine would sum the input's gradient during the product for the weight's, which is not made."""
    from megatron_eve.models.kernels import kernel_settings

    training = TrainingConfig(train_iters=1, bf16=True, stage=stage)  # type: ignore[arg-type]
    settings = kernel_settings(RunConfig(parallel=OVERLAP, training=training))
    assert settings["tp_comm_overlap"] is True
    assert settings["tp_comm_bulk_wgrad"] is bulk and settings["tp_comm_bulk_dgrad"] is bulk
    assert "tp_comm_overlap" not in kernel_settings(RunConfig(training=training))


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (ParallelConfig(), None),  # on this CPU
        (ParallelConfig(variable_seq_lengths=True), None),
        (ParallelConfig(variable_seq_lengths=False), "step"),
        (OVERLAP, "seq_length"),
    ],
)
def test_what_packs_are_padded_to(parallel: ParallelConfig, expected: str | None) -> None:
    from megatron_eve.models.shapes import fixed_length

    assert fixed_length(RunConfig(parallel=parallel)) == expected


@pytest.mark.parametrize(
    ("found", "training", "engine"),
    [
        (H100, {"bf16": True}, True),
        (H100, {}, False),  # its attention over packs takes no float32
        (A100, {"bf16": True}, False),  # and there it has no fast one without flash-attn
        (A100, {"bf16": True, "transformer_impl": "transformer_engine"}, True),
        (ADA, {"bf16": True, "fp8_format": "hybrid"}, True),
        (machine((12, 0)), {"bf16": True}, False),
        (machine((9, 0), engine=False), {"bf16": True}, False),
    ],
)
def test_whose_layers_are_taken(
    monkeypatch: pytest.MonkeyPatch, found: Accelerator, training: dict[str, Any], engine: bool
) -> None:
    from megatron_eve.models import kernels

    monkeypatch.setattr(kernels, "accelerator", lambda: found)
    config = RunConfig(training=TrainingConfig(train_iters=1, **training))
    assert kernels.uses_transformer_engine(config) is engine
    if training == {"bf16": True} and found.transformer_engine:
        assert kernels.uses_transformer_engine(replace(config, parallel=OVERLAP))


def test_the_command_refuses_before_any_process_group() -> None:
    words = [
        sys.executable, "-m", "megatron_eve.pretrain", "--preset", "eve_tiny", "--mock-data", "--train-iters", "1",
        "--bf16", "--fp8-format", "hybrid",
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert found.returncode == 2
    assert "error: --fp8-format hybrid: needs a GPU and TransformerEngine" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("parallel", "found", "freed"),
    [
        ({"pipeline_model_parallel_size": 2}, H100, True),
        ({"pipeline_model_parallel_size": 2}, machine(None), False),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}, H100, False),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
            machine(None),
            False,
        ),
    ],
)
def test_outputs_of_a_stage_are_freed_where_nobody_sends_them_any_more(
    monkeypatch: pytest.MonkeyPatch, parallel: dict[str, Any], found: Accelerator, freed: bool
) -> None:
    """Under the interleaved schedule megatron-core frees a buffer that NCCL may still read (Megatron-LM issue 4047)."""
    from megatron_eve.models import build

    monkeypatch.setattr(build, "accelerator", lambda: found)
    config = RunConfig(**PRESETS["eve_mini"]._asdict(), parallel=ParallelConfig(**parallel))
    assert build.transformer_config(config).deallocate_pipeline_outputs is freed


ROWS, VOCAB, WIDTH = 12, 100, 256  # at TP 2 the second rank's columns are all padding


def fused_and_unfused(layout: Layout, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Runs on each rank: losses and gradient of this rank's logits, unfused and fused."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_eve.models.decoder.language_loss import language_losses
    from megatron_eve.models.process_groups import model_parallel

    found = []
    with model_parallel(RunConfig(parallel=layout.parallel)):
        group = parallel_state.get_tensor_model_parallel_group()
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(rows, 1, WIDTH, generator=generator) * 4
        labels = torch.randint(VOCAB, (rows,), generator=generator)
        mine = whole.chunk(group.size(), -1)[group.rank()].bfloat16()
        weights = torch.arange(1.0, rows + 1)
        for fusion in (False, True):
            config = TransformerConfig(
                num_layers=1, hidden_size=8, num_attention_heads=1, cross_entropy_loss_fusion=fusion
            )
            leaf = mine.clone().requires_grad_()
            losses = language_losses(leaf * 1, labels, VOCAB, config, group)
            (losses * weights).sum().backward()
            assert leaf.grad is not None
            found.append((losses.detach(), leaf.grad))
    expected = torch.nn.functional.cross_entropy(
        whole[:, 0, :VOCAB].bfloat16().float(), labels, reduction="none"
    )
    torch.testing.assert_close(found[0][0], expected)
    return found


@pytest.mark.distributed
@parametrize(TP2, slow=(ONE,))
@pytest.mark.parametrize("rows", [ROWS, 0], ids=["rows", "none"])
def test_a_fused_loss_is_the_loss(ranks: RankPool, layout: Layout, rows: int) -> None:
    """Padding of the vocabulary included, which fills a whole rank at TP 2."""
    for unfused, fused in ranks.run(layout.world_size, fused_and_unfused, layout, rows):
        assert fused[0].dtype == torch.float32 and fused[0].shape == (rows,)
        torch.testing.assert_close(fused[0], unfused[0])
        torch.testing.assert_close(fused[1], unfused[1], rtol=0.01, atol=1e-3)


def test_generation_takes_off_what_it_cannot_use() -> None:
    from megatron_eve.config import validate
    from megatron_eve.inference.generate import generation_config

    training = TrainingConfig(
        train_iters=1, bf16=True, fp8_format="hybrid", fp8_recipe="tensorwise", **TE_LOSS
    )  # type: ignore[arg-type]
    base = RunConfig()
    config = replace(base, training=training, data=replace(base.data, mock_data=True))
    taken = generation_config(config, 1, 1)
    validate(taken, 1)
    assert taken.row_multiple == 1


class LayerWithScales(torch.nn.Module):
    """A weight, and an extra state as TransformerEngine's layers have: bytes, whose loading is seen."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.seen = torch.tensor([seen], dtype=torch.uint8)

    def get_extra_state(self) -> torch.Tensor:
        return self.seen

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = state

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {"weight": self.weight, "_extra_state": self.seen}


@pytest.mark.parametrize(("recipe", "kept"), [("delayed", True), ("tensorwise", False)])
def test_what_delayed_scaling_has_seen_goes_into_a_checkpoint(recipe: str, kept: bool) -> None:
    from megatron_eve.checkpoint.state import _fp8_state, _model_state

    training = TrainingConfig(train_iters=1, bf16=True, fp8_format="hybrid", fp8_recipe=recipe)  # type: ignore[arg-type]
    config, layer = RunConfig(training=training).to_dict(), LayerWithScales(7)
    saved = _fp8_state([layer], config)
    assert saved == ({"scales0": {"_extra_state": layer.seen}} if kept else {})
    assert list(_model_state([layer])["model0"]) == ["weight"]
    assert _fp8_state([layer], RunConfig().to_dict()) == {}
    other = LayerWithScales(0)
    other.load_state_dict(saved.get("scales0", {}), strict=False)
    assert int(other.seen) == (7 if kept else 0)


@pytest.mark.parametrize(
    ("before", "now", "fit"),
    [
        (("hybrid", "delayed"), ("hybrid", "delayed"), True),
        (("e4m3", "delayed"), ("hybrid", "delayed"), False),
        (("hybrid", "tensorwise"), ("hybrid", "delayed"), False),
        (("hybrid", "delayed"), ("hybrid", "tensorwise"), False),
        ((None, "delayed"), ("hybrid", "delayed"), False),
    ],
)
def test_scales_are_taken_up_by_a_run_of_their_format(before: Any, now: Any, fit: bool) -> None:
    from megatron_eve.checkpoint import state as checkpoint

    def config(format_and_recipe: Any) -> dict[str, Any]:
        fp8_format, recipe = format_and_recipe
        training = TrainingConfig(train_iters=1, bf16=True, fp8_format=fp8_format, fp8_recipe=recipe)
        return RunConfig(training=training).to_dict()

    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "print_rank_0", told.append)
        assert checkpoint._fp8_state_fits(config(before), config(now)) is fit
    assert len(told) == (before == ("e4m3", "delayed"))


class EngineLinear(torch.nn.Linear):
    """A linear layer with the switch that TransformerEngine's have."""

    fuse_wgrad_accumulation = False


def test_weight_gradients_are_fused_in_the_decoder_alone() -> None:
    """Also inside the wrappers of a chunk; layers without the switch, and those outside the decoder, are left alone."""
    from megatron_eve.training.loop.wrap import fuse_weight_gradients

    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Sequential(
        EngineLinear(2, 2), torch.nn.Sequential(EngineLinear(2, 2), torch.nn.ReLU())
    )
    chunk.output_layer = EngineLinear(2, 2)
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = chunk
    fuse_weight_gradients([wrapped])  # type: ignore[list-item]
    assert chunk.decoder[0].fuse_wgrad_accumulation and chunk.decoder[1][0].fuse_wgrad_accumulation
    assert not hasattr(chunk.decoder[1][1], "fuse_wgrad_accumulation")
    assert not chunk.output_layer.fuse_wgrad_accumulation
