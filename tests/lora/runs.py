"""What the tests of LoRA run on each rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_eve.config import (
    CheckpointConfig,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.models.registry import DEFAULT_FAMILY
from tests.layouts import ONE

if TYPE_CHECKING:
    import torch

# Grouped queries, so that the rows of q, k and v are interleaved unevenly.
MODEL = ModelConfig(num_layers=4, num_query_groups=2)
FULL: dict[str, Any] = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
}  # fmt: skip
# Optimizer steps of `steps_of`.
STEPS = 5
LORA = LoRAConfig(lora_rank=3, lora_alpha=6.0, lora_dropout=0.0)


def lora_config(
    parallel: ParallelConfig = ONE.parallel,
    iterations: int = 4,
    lora: LoRAConfig = LORA,
    family: str = DEFAULT_FAMILY,
    **training: Any,
) -> RunConfig:
    """A small run on mock data with adapters."""
    return RunConfig(
        family=family,
        model=MODEL,
        parallel=parallel,
        training=TrainingConfig(global_batch_size=8, train_iters=iterations, **training),
        lora=lora,
        optimizer=OptimizerConfig(lr=4e-3, lr_warmup_fraction=0.0),
        data=DataConfig(mock_data=True, seq_length=512),
    )


def starting_from(config: RunConfig, folder: Any) -> RunConfig:
    """The run, with the weights of a folder."""
    return replace(config, checkpoint=CheckpointConfig(pretrained_checkpoint=str(folder)))


@dataclass
class Learned:
    """What a run learned, on the last rank: losses, and by Hugging Face name the whole gradients of the first step and
    the whole parameters that train behind the last."""

    losses: list[str] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)


def learn(config: RunConfig, forget_marks: bool = False) -> Learned:
    """Runs on each rank: train to the end.

    Args:
        config: of the run.
        forget_marks: take the marks of sequence parallelism from the adapters' parameters, which must show.
    """
    from megatron_eve.models.build import unwrap
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    found = Learned()
    with model_parallel(config):
        trainer = setup(config)
        if forget_marks:
            for chunk in trainer.chunks:
                for name, parameter in unwrap(chunk).named_parameters():
                    if ".lora." in name:
                        parameter.sequence_parallel = False  # type: ignore[attr-defined]
        while trainer.train_state.iteration < config.total_iterations:
            found.losses.append(float(train_one(trainer).losses["lm loss"]).hex())
            if not found.gradients:
                found.gradients = whole(trainer.chunks, config, "main_grad")
        found.parameters = whole(trainer.chunks, config, "data")
        trainer.loader.close()
    return found


def whole(chunks: Any, config: RunConfig, what: str) -> dict[str, Any]:
    """The parameters that train, or their gradients, as Hugging Face tensors, from all ranks of the model. Collective.

    Args:
        chunks: wrapped.
        config: of the run.
        what: the attribute: main_grad (reduced over data-parallel ranks by the step) or data.
    """
    import torch
    from megatron.core import parallel_state

    from megatron_eve.checkpoint.hf.rules import rules_of
    from megatron_eve.models.build import unwrap
    from megatron_eve.models.decoder.lora_names import adapter_rules
    from megatron_eve.models.name_rules import rule_for
    from megatron_eve.models.tensor_layouts import Sizes

    rules = (*rules_of(config), *adapter_rules(config.lora))
    group = parallel_state.get_tensor_model_parallel_group()
    found: dict[str, Any] = {}
    for chunk in map(unwrap, chunks):
        sizes = Sizes.of(config.model, chunk.vocab_size)
        for name, parameter in chunk.global_named_parameters():
            if not parameter.requires_grad:
                continue
            mine = getattr(parameter, what).detach().clone().contiguous()
            shards = [torch.empty_like(mine) for _ in range(group.size())]
            torch.distributed.all_gather(shards, mine, group=group)
            rule, names = rule_for(name, rules)
            parts = rule.layout.split(rule.layout.unshard(shards), sizes, len(names))
            found.update({key: part.clone() for key, part in zip(names, parts, strict=True)})
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    return {name: tensor for part in gathered for name, tensor in part.items()}


def logits_of(config: RunConfig, folder: str, ids: list[int]) -> torch.Tensor:
    """Runs on each rank: logits [tokens, vocabulary] of a checkpoint's model for a text."""
    import torch

    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.decoder_run import load_pretrained

    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        load_pretrained(folder, [model], config)
        model.eval()
        logits: torch.Tensor = model(text_inputs(ids))
        return logits[:, : config.model.vocab_size]


def steps_of(config: RunConfig, folder: str, ids: list[int]) -> dict[str, torch.Tensor]:
    """Runs on each rank: optimizer steps on one text, and the adapters behind them."""
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.decoder_run import load_pretrained
    from megatron_eve.training.loop.optimizer import build_optimizer
    from megatron_eve.training.loop.wrap import wrap_for_training

    with model_parallel(config):
        bare = build_chunks(config)
        load_pretrained(folder, bare, config)
        (chunk,) = wrap_for_training(config, bare)
        optimizer = build_optimizer(config, [chunk])
        for _ in range(STEPS):
            chunk.zero_grad_buffer()
            optimizer.zero_grad()
            chunk(text_inputs(ids[:-1], ids[1:]))["lm loss"].mean().backward()
            chunk.finish_grad_sync()
            optimizer.step()
        return {name: tensor for name, tensor in whole([chunk], config, "data").items() if ".lora_" in name}


def text_inputs(ids: list[int], labels: list[int] | None = None) -> Any:
    """One text without pictures, as the model takes it."""
    import torch

    from megatron_eve.models.decoder.model import ModelInputs
    from megatron_eve.models.decoder.packed import packed_params

    rows = torch.arange(len(ids))
    packed = packed_params(torch.tensor([0, len(ids)], dtype=torch.int32), [len(ids)])
    wanted = torch.tensor(labels) if labels is not None else None
    return ModelInputs(packed, rows, tokens=torch.tensor(ids), output_rows=rows, labels=wanted)
