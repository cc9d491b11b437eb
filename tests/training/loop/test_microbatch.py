"""A pack on its way to the device: moved once a rank, whatever the number of model chunks, and let go in time."""

from __future__ import annotations

import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from megatron_eve.config import RunConfig
from tests.families.eve import run_config
from tests.layouts import PP2, PP2_VPP2
from tests.ranks import RankPool


def moves(config: RunConfig) -> float:
    """Runs on each rank: tensors that a step moves to the device, per pack."""
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.runtime import transfer
    from megatron_eve.training.loop.train import setup, train_one

    original, count = transfer.to_device, 0

    def counted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        nonlocal count
        count += 1
        return original(tensor, device)

    with model_parallel(config):
        trainer = setup(config)
        train_one(trainer)  # imports what is imported when it is used
        users = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith("megatron_eve.") and getattr(module, "to_device", None) is original
        ]
        for module in users:
            module.to_device = counted  # type: ignore[attr-defined]
        try:
            packs = trainer.loader.step(trainer.train_state.consumed_samples).num_microbatches
            train_one(trainer)
        finally:
            for module in users:
                module.to_device = original  # type: ignore[attr-defined]
            trainer.loader.close()
        return count / packs


@pytest.mark.distributed
def test_a_pack_is_moved_once_for_all_model_chunks(ranks: RankPool) -> None:
    plain = ranks.run(2, moves, run_config(PP2.parallel))
    assert min(plain) >= 8
    assert ranks.run(2, moves, run_config(PP2_VPP2.parallel)) == plain


def test_model_chunks_share_packs_and_keep_none() -> None:
    """In the order of an interleaved schedule: the first chunk runs two packs, then the second chunk the same two."""
    from megatron_eve.training.loop.microbatch import DevicePack, pack_iterators

    hosts = [SimpleNamespace() for _ in range(4)]
    first, second = pack_iterators(map(DevicePack, hosts), 2)  # type: ignore[arg-type]
    taken = [next(first), next(first)]
    assert [pack.batch for pack in taken] == hosts[:2]
    held = [weakref.ref(pack) for pack in taken]
    assert next(second) is taken.pop(0)
    assert held[0]() is None, "kept after the last chunk had it"
    taken.clear()
    assert held[1]() is not None, "the second chunk has yet to ask for it"
    assert [pack.batch for pack in second] == hosts[1:]
    assert [pack.batch for pack in first] == hosts[2:]
