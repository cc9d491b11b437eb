"""Steps that go wrong: left out, stopped at, or run again to see whose fault they are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.checkpoint.files import write_checksums
from megatron_eve.config import TRACKER, FaultConfig, RunConfig
from megatron_eve.training.faults.bad_steps import (
    MAX_CONSECUTIVE_SKIPS,
    MIN_STEPS,
    bad_step_reason,
    relative_difference,
)
from tests.checkpoint.test_saver import config_of
from tests.layouts import DP2, PP2_VPP2, TP2_DP2, TP2_SP, Layout, layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

DP2_OVERLAP = layout("DP2+overlap", 2, overlap_grad_reduce=True, overlap_param_gather=True)
DP2_PLAIN = layout("DP2, optimizer not sharded", 2, use_distributed_optimizer=False)
ITERATIONS, BAD = 6, 4
FIRST, AGAIN, RESTARTED = "INITIAL_RUN", "RERUNNING_IN_PLACE", "RERUNNING_FROM_CHECKPOINT"
ALWAYS = (FIRST, AGAIN, RESTARTED)


@dataclass(frozen=True)
class Fault:
    """A gradient of one rank that is not a number: in these iterations, and in these runs of the step."""

    when: Sequence[str] = ALWAYS
    iterations: Sequence[int] = (BAD,)
    rank: int = 1


def endure(config: RunConfig, fault: Fault | None = None, node: str = "node1") -> tuple[int, str]:
    """Runs on each rank: the whole run with a fault in it, on a node of this name; its exit status and what it said."""
    import contextlib
    import io
    import os
    from unittest import mock

    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.runtime.signals import ExitSignals
    from megatron_eve.training.loop import train

    real, rank = train.setup, torch.distributed.get_rank()

    def setup(config: RunConfig) -> Any:
        trainer, machine = real(config), get_rerun_state_machine()

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            now = fault and machine.current_iteration in fault.iterations and machine.state.name in fault.when
            return gradient * math.nan if now else None

        if fault and rank == fault.rank:
            next(p for p in trainer.chunks[0].parameters() if p.requires_grad).register_hook(spoil)
        return trainer

    printed = io.StringIO()
    names = (os.uname()[0], node, *os.uname()[2:])
    with (
        model_parallel(config),
        ExitSignals() as signals,
        contextlib.redirect_stdout(printed),
        mock.patch("os.uname", return_value=names),
    ):
        return train.train(config, signals, setup), printed.getvalue()


def faulty(layout: Layout, save: Path, load: bool = False, **faults: Any) -> RunConfig:
    config = config_of(layout, save, iterations=ITERATIONS, load=load)
    return replace(config, faults=FaultConfig(**faults))


def lines(folder: Path, name: str = "losses.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def bits(folder: Path) -> dict[int, str]:
    """Loss of each iteration; of one that was done twice, the last."""
    return {line["iteration"]: line["lm_loss_hex"] for line in lines(folder)}


class Whole:
    """Losses of runs that nothing happens to, by layout; each is made when it is first asked for."""

    def __init__(self, ranks: RankPool, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._made: dict[str, dict[int, str]] = {}

    def __getitem__(self, layout: Layout) -> dict[int, str]:
        if layout.name not in self._made:
            folder = self._folder / layout.name
            assert self._ranks.run(2, endure, faulty(layout, folder))[0][0] == 0
            self._made[layout.name] = bits(folder)
        return self._made[layout.name]


@pytest.fixture(scope="module")
def whole(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(ranks, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("values", "factor", "reason"),
    [
        ({"lm loss": 2.0, "grad norm": 1.0}, None, None),
        ({"lm loss": math.nan, "grad norm": 1.0}, None, "the lm loss is nan"),
        ({"lm loss": 2.0, "grad norm": math.inf}, 10.0, "the grad norm is inf"),
        ({"lm loss": 2.0, "grad norm": 9.9}, 10.0, None),
        ({"lm loss": 2.0, "grad norm": 11.0}, None, None),
        ({"lm loss": 2.0, "grad norm": 11.0}, 10.0, "the grad norm is 11, more than 10 times 1, the median"),
        ({"lm loss": 30.0, "grad norm": 1.0}, 10.0, "the lm loss is 30, more than 10 times 2, the median"),
    ],
)  # fmt: skip
def test_what_is_bad(values: dict[str, float], factor: float | None, reason: str | None) -> None:
    recent = [{"lm loss": 2.0, "grad norm": 1.0}] * (MIN_STEPS - 1) + [{"lm loss": 99.0, "grad norm": 99.0}]
    found = bad_step_reason(values, recent, factor)
    assert (found is None and reason is None) or (reason and found and found.startswith(reason))


def test_too_few_steps_have_no_spikes() -> None:
    assert bad_step_reason({"lm loss": 1e6}, [{"lm loss": 1.0}] * (MIN_STEPS - 1), 10.0) is None


def test_steps_that_had_nothing_to_count_say_nothing_of_what_is_usual() -> None:
    """Text alone has an aligning loss of 0, and where only the image side is trained a gradient norm of 0."""
    text = [{"lm loss": 2.0, "align loss": 0.0, "grad norm": 0.0}] * (2 * MIN_STEPS)
    image = {"lm loss": 2.0, "align loss": 0.5, "grad norm": 3.0}
    assert bad_step_reason(image, text, 10.0) is None  # the first image
    assert bad_step_reason(image, [*text, *[image] * (MIN_STEPS - 1)], 10.0) is None
    spike = {**image, "align loss": 6.0}
    assert (
        bad_step_reason(spike, [*text, *[image] * (MIN_STEPS - 1)], 10.0) is None
    )  # too few to know what is usual
    found = bad_step_reason(spike, [*text, *[image] * MIN_STEPS], 10.0)
    assert found and found.startswith(
        "the align loss is 6, more than 10 times 0.5, the median of the last 20 steps"
    )
    # Steps with images and no label; a loss that earlier steps did not have at all.
    unlabelled = {"lm loss": 0.0, "align loss": 0.5, "grad norm": 3.0}
    assert bad_step_reason(image, [unlabelled] * MIN_STEPS, 10.0) is None
    assert bad_step_reason(image, [{"lm loss": 2.0, "grad norm": 3.0}] * MIN_STEPS, 10.0) is None
    assert bad_step_reason({**text[0], "lm loss": 21.0}, text, 10.0)  # text is still looked at
    assert bad_step_reason({**text[0], "align loss": math.nan}, text, 10.0) == "the align loss is nan"


def test_differences_between_two_runs_of_a_step() -> None:
    import torch

    def difference(first: list[float], second: list[float]) -> float:
        return relative_difference(torch.tensor(first), torch.tensor(second))

    assert difference([1.0, math.nan, math.inf], [1.0, math.nan, math.inf]) == 0
    assert difference([1.0, 0.0], [1.0, 0.0]) == 0
    assert difference([1.0, 2.0], [1.0, 2.002]) == pytest.approx(1e-3, rel=1e-2)
    for other in (1.0, math.inf, -math.inf):
        assert difference([math.nan], [other]) == math.inf
    assert difference([math.inf], [1.0]) == math.inf


@parametrize(PP2_VPP2, slow=(DP2_OVERLAP, TP2_SP))
def test_a_run_stops_before_the_update_and_goes_on(
    ranks: RankPool, tmp_path: Path, layout: Layout, whole: Whole
) -> None:
    status, printed = ranks.run(2, endure, faulty(layout, tmp_path), Fault())[0]
    assert status == 17
    assert f"stopped at iteration {BAD}: the " in printed and "is nan" in printed
    assert "--bad-step-policy skip" in (tmp_path / "outcome").read_text()
    assert (tmp_path / TRACKER).read_text() == str(BAD - 1)
    (bad,) = lines(tmp_path, "bad_steps.jsonl")
    assert (bad["iteration"], bad["update"], len(bad["samples"])) == (BAD, "stopped", 8)
    assert all("sample" in name for name in bad["samples"].values())
    assert ranks.run(2, endure, faulty(layout, tmp_path, load=True))[0][0] == 0
    assert bits(tmp_path) == whole[layout]


@parametrize(DP2_OVERLAP, slow=(PP2_VPP2, TP2_SP))
@pytest.mark.parametrize("rerun_mode", ["disabled", "validate_results"])
def test_a_bad_batch_is_left_out(
    ranks: RankPool, tmp_path: Path, layout: Layout, whole: Whole, rerun_mode: str
) -> None:
    """Nothing of it reaches the weights: the next step's loss is what it would have been without the update."""
    config = faulty(layout, tmp_path / "skip", bad_step_policy="skip", rerun_mode=rerun_mode)
    status, printed = ranks.run(2, endure, config, Fault())[-1]
    assert status == 0
    assert "update skipped" in printed
    found = lines(tmp_path / "skip")
    assert [line["iteration"] for line in found if line["skipped"]] == [BAD]
    assert all(math.isfinite(line["lm_loss"]) for line in found)
    assert bits(tmp_path / "skip") != whole[layout]
    (bad,) = lines(tmp_path / "skip", "bad_steps.jsonl")
    assert bad["update"] == "skipped" and "is nan" in bad["reason"]

    # The same without a fault, where the step's update is made at a rate of zero: no weights move either.
    frozen = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "frozen")))
    ranks.run(2, without_rate, frozen)
    assert bits(tmp_path / "frozen")[BAD + 1] == bits(tmp_path / "skip")[BAD + 1]


def without_rate(config: RunConfig) -> None:
    """Runs on each rank: the bad step is a good one, and the weights are put back after it."""
    import torch

    from megatron_eve.models.build import parameters_gathered
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop import train
    from megatron_eve.training.loop.step import holds_losses
    from megatron_eve.training.monitoring.monitor import Monitor

    with model_parallel(config):
        trainer = train.setup(config)
        monitor = Monitor(config, holds_losses(), 0)
        while trainer.train_state.iteration < BAD + 1:
            rate = trainer.optimizer.param_groups[0]["lr"]
            for group in trainer.optimizer.param_groups:
                group["lr"] = 0.0 if trainer.train_state.iteration == BAD - 1 else rate
            with parameters_gathered(config, trainer.chunks):
                before = [p.detach().clone() for chunk in trainer.chunks for p in chunk.parameters()]
            train.train_one(trainer, monitor)
            monitor.write(data_wait=0.0, peak_memory=0)
            with parameters_gathered(config, trainer.chunks):
                after = [p.detach() for chunk in trainer.chunks for p in chunk.parameters()]
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert same == (trainer.train_state.iteration == BAD or rate == 0)
        monitor.close()
        trainer.loader.close()


def test_bad_steps_in_a_row_are_not_left_out_for_ever(ranks: RankPool, tmp_path: Path) -> None:
    config = faulty(DP2, tmp_path, bad_step_policy="skip")
    config = replace(config, training=replace(config.training, train_iters=30))
    fault = Fault(iterations=range(3, 31))
    status, printed = ranks.run(2, endure, config, fault)[0]
    assert status == 17
    assert f"{MAX_CONSECUTIVE_SKIPS} bad steps in a row are not the batches' doing" in printed
    assert (tmp_path / TRACKER).read_text() == str(2 + MAX_CONSECUTIVE_SKIPS - 1)
    # The count goes on where it was: the very next bad step stops the run again.
    again = replace(
        config, checkpoint=replace(config.checkpoint, load=str(tmp_path), pretrained_checkpoint=None)
    )
    assert ranks.run(2, endure, again, fault)[0][0] == 17
    assert len(lines(tmp_path)) == 2 + MAX_CONSECUTIVE_SKIPS - 1


@parametrize(DP2_OVERLAP, slow=(PP2_VPP2,))
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_passing_fault_of_the_hardware(
    ranks: RankPool, tmp_path: Path, layout: Layout, whole: Whole, rank: int
) -> None:
    """Run again the step is good: with "skip" the run goes on as if nothing had been, with "stop" it names the rank."""
    passing = Fault(when=(FIRST,), rank=rank)
    config = faulty(layout, tmp_path / "skip", bad_step_policy="skip", rerun_mode="validate_results")
    assert ranks.run(2, endure, config, passing)[0][0] == 0
    assert bits(tmp_path / "skip") == whole[layout]
    assert not any(line["skipped"] for line in lines(tmp_path / "skip"))

    config = faulty(layout, tmp_path / "stop", rerun_mode="validate_results")
    status, printed = ranks.run(2, endure, config, passing)[0]
    assert status == 17
    assert "run again it gave another result, so the hardware is in doubt: " in printed
    assert f"rank {rank} on node1: found NaN in local grad norm" in printed
    assert f"rank {1 - rank} on node1" not in printed or layout is PP2_VPP2  # whose stages pass it on
    again = faulty(layout, tmp_path / "stop", load=True, rerun_mode="validate_results")
    assert ranks.run(2, endure, again)[0][0] == 0
    assert bits(tmp_path / "stop") == whole[layout]


def test_a_step_in_doubt_is_skipped_when_that_is_asked_for(ranks: RankPool, tmp_path: Path) -> None:
    """On the same GPU megatron-core's machine would ask for another restart, whatever the policy."""
    assert ranks.run(2, endure, faulty(DP2, tmp_path, rerun_mode="validate_results"), Fault())[0][0] == 16
    again = faulty(DP2, tmp_path, load=True, rerun_mode="validate_results", bad_step_policy="skip")
    assert ranks.run(2, endure, again, Fault())[0][0] == 0
    assert [line["iteration"] for line in lines(tmp_path) if line["skipped"]] == [BAD]
    assert (tmp_path / "outcome").read_text() == "done\n"


@pytest.mark.slow
def test_a_checkpoint_from_before_there_were_bad_steps(ranks: RankPool, tmp_path: Path, whole: Whole) -> None:
    """It lacks what a run remembers of its last steps, and resumes all the same."""
    import torch

    assert ranks.run(2, endure, faulty(DP2, tmp_path), Fault())[0][0] == 17
    folder = tmp_path / f"iter_{BAD - 1:07d}"
    common = torch.load(folder / "common.pt", weights_only=False)
    del common["recent"], common["skipped_in_a_row"]
    torch.save(common, folder / "common.pt")
    write_checksums(folder, "run", ["metadata.json", "common.pt", ".metadata", "config.yaml"])
    assert ranks.run(2, endure, faulty(DP2, tmp_path, load=True))[0][0] == 0
    assert bits(tmp_path) == whole[DP2]


@parametrize(DP2, slow=(PP2_VPP2, TP2_SP))
@pytest.mark.parametrize("hardware", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_fault_that_repeats_itself_is_tried_on_other_gpus(
    ranks: RankPool, tmp_path: Path, layout: Layout, whole: Whole, hardware: bool
) -> None:
    """The same twice on one GPU: a checkpoint, a restart, and the step again. On the same node that tells nothing."""
    first = faulty(layout, tmp_path, rerun_mode="validate_results")
    resumed = faulty(layout, tmp_path, load=True, rerun_mode="validate_results")
    for config in (first, resumed):
        status, printed = ranks.run(2, endure, config, Fault())[0]
        assert status == 16
        assert "It is run again when the job is restarted, on other GPUs if it gets some" in printed
        assert (tmp_path / TRACKER).read_text() == str(BAD - 1)
        assert not (tmp_path / "outcome").exists()
    status, _ = ranks.run(2, endure, resumed, None if hardware else Fault(), "node2")[0]
    assert status == 17
    why = (tmp_path / "outcome").read_text()
    if hardware:
        assert "bad before the restart and is not on these GPUs, so the hardware is in doubt: " in why
        assert "rank 1 on node1: found NaN in local grad norm" in why
    else:
        assert "other GPUs gave the same; its update was not made" in why
    # The question is answered: the next start does not ask it again.
    assert ranks.run(2, endure, resumed, None, "node2")[0][0] == 0
    assert bits(tmp_path) == whole[layout]


@parametrize(PP2_VPP2, slow=(TP2_DP2,))
def test_a_rerun_is_not_taken_up_by_other_ranks(
    ranks: RankPool, tmp_path: Path, layout: Layout, whole: Whole
) -> None:
    """Under another layout no rank has the work that was in doubt."""
    assert ranks.run(2, endure, faulty(DP2, tmp_path, rerun_mode="validate_results"), Fault())[0][0] == 16
    again = faulty(layout, tmp_path, load=True, rerun_mode="validate_results")
    assert ranks.run(layout.world_size, endure, again)[0][0] == 0
    losses = [float.fromhex(loss) for loss in bits(tmp_path).values()]
    assert losses == pytest.approx([float.fromhex(loss) for loss in whole[DP2].values()], abs=1e-5, rel=0)


@parametrize(DP2, slow=(DP2_PLAIN, PP2_VPP2))
def test_a_save_before_the_first_update(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    """The first step is left out and a checkpoint follows, when the optimizer has no state yet."""

    def config(folder: str, load: bool = False, **training: Any) -> RunConfig:
        found = faulty(layout, tmp_path / folder, load=load, bad_step_policy="skip")
        return replace(found, training=replace(found.training, **training))

    first = Fault(iterations=(1,))
    assert ranks.run(2, endure, config("whole"), first)[0][0] == 0
    assert ranks.run(2, endure, config("cut", exit_interval=1), first)[0][0] == 0
    assert (tmp_path / "cut" / TRACKER).read_text() == "1"
    assert ranks.run(2, endure, config("cut", load=True))[0][0] == 0
    assert lines(tmp_path / "whole")[0]["skipped"]
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
