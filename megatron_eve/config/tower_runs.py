"""Settings that a run of a vision tower alone (`megatron_eve.train_tower`) has no use for, and what is wrong with them.

A tower has no decoder and is trained data parallel only. Its flags are those of any run, without these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_eve.config.schema import RunConfig

# By section: what is of use; sections that are not named are of use as a whole.
_OF_USE = {
    "model": (),
    "lora": (),
    "parallel": ("use_distributed_optimizer", "distributed_timeout_minutes"),
    "training": (
        "global_batch_size",
        "train_iters",
        "train_samples",
        "exit_interval",
        "eval_interval",
        "eval_iters",
        "seed",
        "bf16",
        "deterministic_mode",
    ),
    "data": (
        "data_path",
        "valid_data_path",
        "split",
        "data_cache_path",
        "tokenizer_model",
        "shuffle",
        "image_decoder",
        "num_workers",
        "mmap_bin_files",
    ),
    "faults": ("bad_step_policy", "spike_factor"),
    "logging": ("log_interval", "tensorboard_dir"),
}
_PARALLEL = "a tower is trained data parallel only: every rank holds all of it"
_REASONS = {
    "model": "is of a decoder, and a tower has none",
    "lora": "adapters are of a decoder, and a tower has none",
    "parallel": _PARALLEL,
}


def no_use_in_towers(section: str, name: str) -> bool:
    """Has a run of a tower no use for a setting?"""
    return section in _OF_USE and name not in _OF_USE[section]


def tower_run_errors(config: RunConfig, world_size: int) -> Iterator[str]:
    """A sentence for each setting that is not the default and that a run of a tower has no use for; and for a step
    with fewer pairs than ranks."""
    usual = RunConfig(family=config.family)
    for section in _OF_USE:
        ours, default = getattr(config, section), getattr(usual, section)
        for field in fields(ours):
            value = getattr(ours, field.name)
            # The stage is a number of the family's, and there is one.
            if not no_use_in_towers(section, field.name) or (section, field.name) == ("training", "stage"):
                continue
            if value != getattr(default, field.name):
                why = _REASONS.get(section, "is of no use to a tower")
                yield f"--{field.name.replace('_', '-')} {_written(value)}: {why}; leave it out"

    size = config.training.global_batch_size
    for pairs in {size, config.total_samples % size or size} if size > 0 else ():
        if 0 < pairs < world_size:
            yield (
                f"--global-batch-size {size}: a step of {pairs} pairs is too few for {world_size} ranks, each of which "
                "needs one; start fewer ranks, or change the batch size or the length of the run"
            )


def _written(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
