"""What only a GPU can tell: TransformerEngine against torch, packs against samples, FP8, fused losses, checkpoints.

Each skips here with a reason, and runs by `pytest -m gpu` on a machine with a GPU and TransformerEngine. Tolerances are
those of bfloat16 (8 bits) and of FP8's E4M3 (4 bits) over two layers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.config import DataConfig, ModelConfig, RunConfig, TrainingConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with TransformerEngine"),
]

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(num_layers=2, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4, vocab_size=300)


def config(**training: Any) -> RunConfig:
    pytest.importorskip("transformer_engine.pytorch")
    return RunConfig(
        model=MODEL,
        training=TrainingConfig(train_iters=10, global_batch_size=4, **{"bf16": True, **training}),
        data=DataConfig(mock_data=True, seq_length=1024),
    )


def supported(some: RunConfig) -> RunConfig:
    """The configuration, or a skip that says what this GPU lacks."""
    from megatron_eve.config import ConfigError
    from megatron_eve.models.kernels import check_kernels
    from megatron_eve.runtime.accelerator import accelerator

    try:
        check_kernels(some, accelerator())
    except ConfigError as error:
        pytest.skip(str(error))
    return some


@contextmanager
def bare_chunk(some: RunConfig) -> Iterator[Any]:
    """The model alone, with weights that follow from their names and are the same whichever layers hold them."""
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    # Bare modules have no buffer to which a matrix product could add a gradient.
    some = replace(some, training=replace(some.training, gradient_accumulation_fusion=False))
    with distributed(some):
        (chunk,) = build_chunks(some)
        for name, parameter in sorted(chunk.named_parameters()):
            if parameter.dim() > 1:
                seeded = torch.Generator().manual_seed(_seed(name))
                values = torch.randn(parameter.shape, generator=seeded) * 0.02
                parameter.data.copy_(values.to(parameter.dtype))
        yield chunk


def inputs_of(some: RunConfig, chunk: Any, pack: Sequence[int], length: int | None = None) -> Any:
    """A pack of mock samples on the GPU, as the model takes it."""
    from megatron_eve.data.batch import build_batch
    from megatron_eve.training.loop.data import open_data
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs

    batch = build_batch(
        open_data(some).dataset,
        pack,
        tensor_parallel=1,
        context_parallel=1,
        row_multiple=some.row_multiple,
        length=length,
        views=["patches"],
    )
    return model_inputs(DevicePack(batch), chunk)


def gradients_of(chunk: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().cpu() for name, p in chunk.named_parameters() if p.grad is not None}


def pack_losses(some: RunConfig, packs: Sequence[Sequence[int]], length: int | None = None) -> Any:
    """(losses of all labelled rows, pack after pack; gradients by name) from seeded weights."""
    losses = []
    with bare_chunk(some) as chunk:
        for pack in packs:
            found = chunk(inputs_of(some, chunk, pack, length))["lm loss"]
            found.sum().backward()
            losses.append(found.detach().float().cpu())
        return torch.cat(losses), gradients_of(chunk)


def _seed(name: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name))


def test_transformer_engine_is_float32_to_rounding() -> None:
    expected, exact = pack_losses(config(bf16=False, transformer_impl="local"), [[0, 1]])
    found, gradients = pack_losses(config(transformer_impl="transformer_engine"), [[0, 1]])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    for name in ("output_layer.weight", "embedding.word_embeddings.weight"):
        assert (gradients[name] - exact[name]).norm() < 0.05 * exact[name].norm(), name


def test_a_pack_is_its_samples() -> None:
    """Packed, alone, and with samples of padding behind."""
    together, gradients = pack_losses(config(), [[2, 0, 1]])
    alone, apart = pack_losses(config(), [[2], [0], [1]])
    padded, filled = pack_losses(config(), [[2, 0, 1]], length=3072)
    torch.testing.assert_close(alone, together, rtol=0.02, atol=0.02)
    torch.testing.assert_close(padded, together, rtol=0.02, atol=0.02)
    for name, gradient in gradients.items():
        for other in (apart[name], filled[name]):
            assert (gradient - other).norm() <= 0.05 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("impl", ["native", "te"])
def test_a_fused_loss_is_the_loss_on_a_gpu(impl: str) -> None:
    expected, exact = pack_losses(config(), [[0, 1]])
    fused = supported(config(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl=impl))
    found, gradients = pack_losses(fused, [[0, 1]])
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    name = "output_layer.weight"
    assert (gradients[name] - exact[name]).norm() < 0.02 * exact[name].norm()
    assert not gradients[name][MODEL.vocab_size :].any()


def test_a_pack_never_waits_for_the_gpu() -> None:
    """From the copies of its inputs to the last gradient, with other lengths than the pack before."""
    some = config()
    with bare_chunk(some) as chunk:
        chunk(inputs_of(some, chunk, [0, 1]))["lm loss"].sum().backward()  # what is compiled or cached once
        torch.cuda.set_sync_debug_mode("error")
        try:
            chunk(inputs_of(some, chunk, [2, 3, 4]))["lm loss"].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_pack_can_be_captured_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vision, merge, layers and loss; torch's layers, since those of TransformerEngine fork random states, with the
    fused rotary embedding, since megatron-core's other one asks the device for the lengths of samples."""
    from megatron_eve.models import build

    settings = build.kernel_settings
    monkeypatch.setattr(build, "kernel_settings", lambda some: {**settings(some), "apply_rope_fusion": True})
    some = config(transformer_impl="local")
    with bare_chunk(some) as chunk:
        inputs = inputs_of(some, chunk, [0, 1])

        def step() -> torch.Tensor:
            losses: torch.Tensor = chunk(inputs)["lm loss"]
            losses.sum().backward()
            return losses

        expected, exact = step().detach().clone(), gradients_of(chunk)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):  # as torch.cuda.graph wants it
                chunk.zero_grad(set_to_none=True)
                step()
        torch.cuda.current_stream().wait_stream(beside)
        chunk.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = step()
        graph.replay()
        torch.testing.assert_close(losses.detach(), expected)
        for name, gradient in gradients_of(chunk).items():
            assert (gradient - exact[name]).norm() <= 0.01 * exact[name].norm() + 1e-6, name


def test_the_compiled_activation_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of it, for packs of two lengths."""
    from megatron_eve.models import build

    settings = build.kernel_settings
    compiled, gradients = pack_losses(config(), [[0, 1], [2]])
    assert settings(config())["bias_activation_fusion"]
    monkeypatch.setattr(
        build, "kernel_settings", lambda some: {**settings(some), "bias_activation_fusion": False}
    )
    plain, exact = pack_losses(config(), [[0, 1], [2]])
    torch.testing.assert_close(compiled, plain, rtol=0.01, atol=0.01)
    for name, gradient in gradients.items():
        assert (gradient - exact[name]).norm() <= 0.02 * exact[name].norm() + 1e-6, name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_fused_gradients_are_the_gradients(stage: int, recompute: bool) -> None:
    """In the float32 buffers, over two packs, whichever layers add them in the matrix product."""
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.training.loop.loss import Normalizer, objectives_of
    from megatron_eve.training.loop.step import forward_backward
    from megatron_eve.training.loop.train import setup

    found = []
    for fused in (False, True):
        some = config(stage=stage, gradient_accumulation_fusion=fused, **(FULL if recompute else {}))
        with distributed(some):
            trainer = setup(some)
            step = trainer.loader.step_of(np.arange(16))
            assert step.num_microbatches > 1
            for chunk in trainer.chunks:
                chunk.zero_grad_buffer()
            forward_backward(trainer.chunks, step, Normalizer.of(step, objectives_of(some)))
            trainer.loader.close()
            trained = [(n, p) for n, p in trainer.chunks[0].named_parameters() if p.requires_grad]
            found.append({name: parameter.main_grad.clone() for name, parameter in trained})
    for name, gradient in found[0].items():
        assert gradient.norm() > 0, name
        assert (found[1][name] - gradient).norm() <= 0.01 * gradient.norm(), name


FULL: dict[str, Any] = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_fp8_learns_what_bfloat16_learns(recipe: str, recompute: bool) -> None:
    """Ten steps: finite, and near the losses of bfloat16."""
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.training.loop.train import setup, train_one

    losses = []
    for fp8 in ({}, {"fp8_format": "hybrid", "fp8_recipe": recipe}):
        some = supported(config(**fp8, **(FULL if recompute else {})))
        with distributed(some):
            trainer = setup(some)
            losses.append([train_one(trainer).losses["lm loss"] for _ in range(10)])
            trainer.loader.close()
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_run_in_fp8_resumes_as_if_it_had_gone_on(tmp_path: Path, recipe: str) -> None:
    """The scales that delayed scaling carries from step to step are in the checkpoint."""
    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.config import CheckpointConfig
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.training.loop.train import setup, train_one

    some = supported(config(fp8_format="hybrid", fp8_recipe=recipe))
    losses = []
    for checkpoint in (CheckpointConfig(save=str(tmp_path)), CheckpointConfig(load=str(tmp_path))):
        run = replace(some, checkpoint=checkpoint)
        with distributed(run):
            trainer = setup(run)
            while trainer.train_state.iteration < 6:
                if trainer.train_state.iteration == 3 and checkpoint.save:
                    CheckpointSaver(run).save(
                        trainer.train_state, trainer.chunks, trainer.optimizer, trainer.data.fingerprint, None
                    )
                losses.append(train_one(trainer).losses["lm loss"])
            trainer.loader.close()
    assert losses[6:] == pytest.approx(losses[3:6], rel=2e-3)


def pretrain(folder: Path, steps: int, gpu: bool) -> list[float]:
    """The command, on a GPU or with all of them hidden; its losses of this call."""
    words = [
        sys.executable, "-m", "megatron_eve.pretrain", "--preset", "eve_tiny", "--mock-data", "--seq-length", "1024",
        "--global-batch-size", "4", "--train-iters", "6", "--exit-interval", str(steps), "--lr", "1e-4",
        "--transformer-impl", "local", "--save", str(folder), "--load", str(folder),
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run(words, cwd=ROOT, env=environment, check=True, timeout=500)
    import json

    lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["lm_loss"] for line in lines]


def test_a_checkpoint_goes_to_a_gpu_and_back(tmp_path: Path) -> None:
    """Two steps on the CPU, two on the GPU, two on the CPU: the losses of six on the CPU, in float32."""
    for steps, gpu in ((2, False), (4, True), (6, False)):
        mixed = pretrain(tmp_path / "mixed", steps, gpu)
    assert len(mixed) == 6
    assert mixed == pytest.approx(pretrain(tmp_path / "cpu", 6, False), rel=1e-3)


def test_generation_from_a_run_in_fp8_needs_no_fp8() -> None:
    from megatron_eve.inference.generate import generation_config

    taken = generation_config(replace(config(fp8_format="hybrid"), model=MODEL), 1, 1)
    assert taken.row_multiple == 1 and taken.parallel.variable_seq_lengths is True
