"""megatron-core's optimizer and learning rate schedule, configured as in the published recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eve.config import ConfigError, RunConfig
from megatron_eve.models.build import unwrap
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.ranks import print_rank_0


class OptimizerPerNetwork(ChainedOptimizer):
    """megatron-core's optimizers of networks that need not be updated in the same steps, saved and scheduled as one.

    Attributes:
        chained_optimizers: one for each network.
    """

    def _synchronize_steps(self) -> None:
        """See `ChainedOptimizer._synchronize_steps`, which expects the same number of updates of all networks."""
        for optimizer in self.chained_optimizers:
            ChainedOptimizer([optimizer])._synchronize_steps()


def build_optimizer(
    config: RunConfig, chunks: Sequence[DistributedDataParallel], *, per_network: bool = False
) -> MegatronOptimizer:
    """AdamW over the parameters that train, with separate learning rates from `--lr-overrides`. Collective.

    Args:
        config: of the run.
        chunks: model chunks, or networks.
        per_network: an `OptimizerPerNetwork`, whose optimizers stand in the order of `chunks`.

    Raises:
        ConfigError: one of `--lr-overrides` matches no parameter, on all ranks alike.
    """
    settings = config.optimizer
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.training.bf16,
        params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(megatron)
    named = [pair for chunk in chunks for pair in unwrap(chunk).global_named_parameters()]
    trains = {name: parameter.requires_grad for name, parameter in named}
    _check_overrides(list(settings.lr_overrides), trains, config.training.stage)
    for number, (pattern, rate) in enumerate(settings.lr_overrides.items()):
        chosen = {id(parameter) for name, parameter in named if fnmatch(name, pattern)}
        key = ParamKey(predicate=ParamPredicate(name=pattern, fn=lambda p, chosen=chosen: id(p) in chosen))
        # megatron-core tells groups apart in a checkpoint by `lr_mult`, which it uses for nothing else.
        overrides[key] = {"max_lr": rate, "min_lr": min(settings.min_lr, rate), "lr_mult": 2.0 + number}
    if not per_network:
        return get_megatron_optimizer(megatron, list(chunks), config_overrides=overrides)
    built = [get_megatron_optimizer(megatron, [chunk], config_overrides=dict(overrides)) for chunk in chunks]
    return OptimizerPerNetwork([one for chain in built for one in chain.chained_optimizers])


def _check_overrides(patterns: Sequence[str], trains: Mapping[str, bool], stage: int) -> None:
    """Raise ConfigError for globs that match no parameter of the model, on all pipeline stages. Collective.

    A glob that matches only frozen parameters has no effect; a warning says so.

    Args:
        patterns: of `--lr-overrides`, the same on every rank.
        trains: this rank's parameters by name (layers numbered over all stages); True if the parameter trains.
        stage: of the training.
    """
    if not patterns:
        return
    # For each glob: 0 if it matches nothing, 1 if only frozen parameters, 2 if parameters that train.
    matches = torch.tensor(
        [
            max((1 + one for name, one in trains.items() if fnmatch(name, glob)), default=0)
            for glob in patterns
        ],
        dtype=torch.int32,
        device=accelerator().device,
    )
    torch.distributed.all_reduce(matches, op=torch.distributed.ReduceOp.MAX)
    matched = dict(zip(patterns, matches.tolist(), strict=True))
    for pattern in [pattern for pattern, one in matched.items() if one == 1]:
        print_rank_0(
            f"warning: --lr-overrides {pattern}: matches only parameters that stage {stage} does not train, so it has "
            "no effect"
        )
    unmatched = [pattern for pattern, one in matched.items() if not one]
    if not unmatched:
        return
    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, list(trains))
    everywhere = {name for part in gathered for name in part}
    raise ConfigError("\n".join(_no_match(pattern, everywhere) for pattern in unmatched))


def _no_match(pattern: str, names: Iterable[str]) -> str:
    """Hint for a glob that matches no name: the most similar names."""
    known = set(names)
    for name in names:
        parts = name.split(".")
        known |= {".".join(parts[:depth]) + ".*" for depth in range(1, len(parts))}
    near = get_close_matches(pattern, sorted(known), n=3) or sorted({f"{n.split('.')[0]}.*" for n in names})
    return f"--lr-overrides {pattern}: matches no parameter of the model; near to it are {', '.join(near)}"


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up from zero, then the decay; counted in samples, so a short last step counts as it should.

    As in the published runs (Hugging Face's cosine schedule) the first step has rate 0 when there is a warm-up,
    and the warm-up is a whole number of steps, rounded up.
    """
    settings = config.optimizer
    warmup_steps = math.ceil(config.total_iterations * settings.lr_warmup_fraction)
    warmup_samples = warmup_steps * config.training.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        # megatron-core requires a decay after the warm-up; a run of one or two steps may have none.
        lr_warmup_steps=min(warmup_samples, config.total_samples - 1),
        lr_decay_steps=max(config.total_samples, 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the parameters without an override, for the log."""
    from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    return max((group["lr"] for group in optimizer.param_groups), default=0.0) if rate is None else rate
