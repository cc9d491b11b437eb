"""One step in float64, under any layout, as the equivalence matrices of families run it on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from megatron_eve.config import ModelConfig, ParallelConfig, RunConfig

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


class Run(Protocol):
    """A cell of a matrix."""

    def config(self, parallel: ParallelConfig) -> RunConfig:
        """Of a run of this cell under a layout."""
        ...

    def case(self) -> Any:
        """The samples, in the form of a golden case (`ModelCase`)."""
        ...

    def spoil(self, chunk: Any) -> None:
        """Change a bare chunk for the worse, where a test is to notice that."""
        ...


def case_of(
    family: str,
    model: ModelConfig,
    vision: Any,
    inputs: Mapping[str, NDArray[Any]],
    images: Sequence[Sequence[bytes]],
    codes: torch.Tensor | None = None,
) -> Any:
    """Samples in the form of a golden case (`ModelCase`), without outputs."""
    import torch

    from megatron_eve.verification.cases import ModelCase

    return ModelCase(
        name="",
        folder=Path(),
        inputs={name: torch.from_numpy(values) for name, values in inputs.items()},
        outputs={},
        hf=Path(),
        family=family,
        model=model,
        vision=vision,
        images=images,
        stage=3,
        codes=codes,
    )


@dataclass
class Outcome:
    """Of a step: its losses by objective, and whole gradients by Hugging Face name."""

    losses: dict[str, float]
    gradients: Weights

    @property
    def loss(self) -> float:
        """Of the next token."""
        return self.losses["lm loss"]


def weights_of(run: Run) -> Weights:
    """Runs on one rank: weights, float64, by Hugging Face name, none of them 0."""
    import torch

    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.tensor_layouts import Sizes

    config = run.config(ParallelConfig())
    draw = torch.Generator().manual_seed(3)
    found: Weights = {}
    with model_parallel(config):
        (chunk,) = build_chunks(config, freeze=False)
        sizes = Sizes.of(config.model, chunk.vocab_size)
        for name, parameter in chunk.global_named_parameters():
            drawn = 0.2 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                drawn = drawn + 1
            rule, keys = _rule(name, config)
            found |= {
                key: part.clone()
                for key, part in zip(keys, rule.layout.split(drawn, sizes, len(keys)), strict=True)
            }
    return found


def _rule(name: str, config: RunConfig) -> Any:
    from megatron_eve.checkpoint.hf.rules import rules_of
    from megatron_eve.models.decoder.lora_names import adapter_rules
    from megatron_eve.models.name_rules import rule_for

    return rule_for(name, (*rules_of(config), *adapter_rules(config.lora)))


def one_step(run: Run, parallel: ParallelConfig, weights: Weights) -> Outcome | None:
    """Runs on each rank: forward and backward of all packs; the outcome is the last rank's."""
    import torch
    from megatron.core import parallel_state

    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.tensor_layouts import Sizes
    from megatron_eve.training.loop.data import build_loader, data_in_memory
    from megatron_eve.training.loop.loss import Normalizer, objectives_of
    from megatron_eve.training.loop.step import forward_backward
    from megatron_eve.training.loop.wrap import wrap_for_training
    from megatron_eve.verification.case_run import CaseDataset
    from tests.lora.runs import whole

    config = run.config(parallel)
    with model_parallel(config):
        bare = build_chunks(config)
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        for chunk in bare:
            chunk.double()
            chunk.config.params_dtype = chunk.config.pipeline_dtype = torch.float64
            sizes = Sizes.of(config.model, chunk.vocab_size)
            for name, parameter in chunk.global_named_parameters():
                rule, keys = _rule(name, config)
                merged = rule.layout.merge([weights[key] for key in keys], sizes)
                with torch.no_grad():
                    parameter.copy_(rule.layout.shard(merged, rank, size))
            run.spoil(chunk)
        chunks = wrap_for_training(config, bare)
        # What is frozen has no gradient buffer.
        trained = sum(p.numel() for chunk in bare for p in chunk.parameters() if p.requires_grad)
        assert sum(buffer.grad_data.numel() for chunk in chunks for buffer in chunk.buffers) == trained
        loader = build_loader(config, data_in_memory(config, CaseDataset(run.case())))
        step = loader.step(0)
        for wrapped in chunks:
            wrapped.zero_grad_buffer()
        losses = forward_backward(chunks, step, Normalizer.of(step, objectives_of(config)), {})
        loader.close()
        gradients = whole(chunks, config, "main_grad")
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    return Outcome({name: float(loss) for name, loss in losses.items()}, gradients) if last else None


def furthest(found: Outcome, expected: Outcome) -> tuple[float, str]:
    """The largest relative L2 distance of a gradient, and whose it is; absolute where there is none."""
    assert set(found.gradients) == set(expected.gradients)
    errors = []
    for name, golden in expected.gradients.items():
        assert found.gradients[name].isfinite().all(), name  # `max` may pass over what is no number
        scale, error = float(golden.norm()), float((found.gradients[name] - golden).norm())
        # Key biases have no gradient but rounding noise.
        errors.append((error / scale if scale > 1e-9 else error, name))
    return max(errors)
