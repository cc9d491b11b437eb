"""What the shared tests of model families run on each rank, and the cases that a family says it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_eve.config import CheckpointConfig, ParallelConfig, RunConfig
from tests.layouts import ONE, Layout
from tests.ranks import RankPool


@dataclass
class Trace:
    """What a run went through, on the last rank.

    Attributes:
        values: losses of each iteration, by the name of the objective.
        samples: of each iteration.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    samples: list[list[int]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Of the next token."""
        return self.values.get("lm loss", [])

    @property
    def aligning(self) -> list[float]:
        """Of EVE's aligning layer; zeros without one."""
        return self.values.get("align loss", [0.0] * len(self.losses))

    def hexadecimal(self) -> dict[str, list[str]]:
        """The losses bit for bit."""
        return {name: [loss.hex() for loss in losses] for name, losses in self.values.items()}


def run(config: RunConfig, stop: int | None = None, save: bool = False) -> Trace:
    """Runs on each rank: train to the end, or to iteration `stop`, and save there if asked."""
    import torch

    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    trace = Trace()
    with model_parallel(config):
        trainer = setup(config)
        while trainer.train_state.iteration < (stop or config.total_iterations):
            step = trainer.loader.step(trainer.train_state.consumed_samples)
            trace.samples.append(step.sample_ids.tolist())
            for name, loss in train_one(trainer).losses.items():
                trace.values.setdefault(name, []).append(float(loss))
        if save:
            CheckpointSaver(config).save(
                trainer.train_state,
                trainer.chunks,
                trainer.optimizer,
                trainer.data.fingerprint,
                trainer.frozen,
            )
        trainer.loader.close()
        torch.distributed.barrier()
    return trace


def saving_in(config: RunConfig, folder: Path) -> RunConfig:
    """The run, saved in a folder."""
    return replace(config, checkpoint=replace(config.checkpoint, save=str(folder)))


def loading_from(config: RunConfig, folder: Path) -> RunConfig:
    """The run, resumed from a folder."""
    return replace(config, checkpoint=CheckpointConfig(load=str(folder)))


@dataclass(frozen=True)
class FamilyCase:
    """A model family, and which of the shared tests it runs.

    Attributes:
        family: its name for `--family`.
        config: a small run on mock data, with all its objectives, under a layout and for so many iterations.
        learns: losses that are smaller after 20 iterations.
        layouts: under which losses agree with one process.
        slow_layouts: likewise, in `make test-slow`.
        resumed: under which a resumed run is the same bit for bit.
        saved: a layout to save under, and those to resume under.
        conversion: flags of the family's own for `tools/convert_checkpoint.py`, import and export.
        converts, answers: the family's models are converted, and answer questions about picture files.
    """

    family: str
    config: Callable[[ParallelConfig, int], RunConfig]
    learns: tuple[str, ...]
    layouts: tuple[Layout, ...]
    slow_layouts: tuple[Layout, ...]
    resumed: tuple[Layout, ...]
    slow_resumed: tuple[Layout, ...]
    saved: tuple[Layout, tuple[Layout, ...]]
    conversion: Callable[[], list[str]] = list
    converts: bool = True
    answers: bool = True

    @property
    def name(self) -> str:
        """Of the test."""
        return self.family.split(".")[-2] if "." in self.family else self.family


def with_weights(config: RunConfig, ranks: RankPool, folder: Path) -> RunConfig:
    """The run, begun from the weights that one process has after its first iteration, so that layouts begin alike.

    Where a run names weights already, it stays as it is.

    Args:
        config: of the run.
        ranks: to make the weights on.
        folder: where they are, or are to be.
    """
    if config.checkpoint.pretrained_checkpoint:
        return config
    if not any(folder.iterdir()):
        ranks.run(1, run, saving_in(replace(config, parallel=ONE.parallel), folder), 1, True)
    return replace(config, checkpoint=CheckpointConfig(pretrained_checkpoint=str(folder)))
