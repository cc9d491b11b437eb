"""Several optimizers of megatron-core, each of a network of its own, as the one that schedule and checkpoints see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer


class NetworkOptimizers:
    """The optimizers of a run with several networks.

    megatron-core's `ChainedOptimizer` is for parts of one network: when it saves, it gives all parts the same count of
    updates. A discriminator that begins later has fewer.

    Attributes:
        chained_optimizers: megatron-core's, one for each network.
    """

    def __init__(self, optimizers: Sequence[MegatronOptimizer]) -> None:
        """``optimizers``, in an order that is the same when the run resumes."""
        self.chained_optimizers = list(optimizers)

    @property
    def config(self) -> Any:
        """Settings, which are the same of all."""
        return self.chained_optimizers[0].config

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all, one after another."""
        return [group for one in self.chained_optimizers for group in one.param_groups]

    def sharded_state_dict(self, model: dict[str, Any], **settings: Any) -> dict[int, Any]:
        """The state of each by its number, as megatron-core's sharded state.

        Args:
            model: sharded weights of all networks, whose keys are different.
            settings: of megatron-core's `sharded_state_dict`.
        """
        return {
            number: one.sharded_state_dict(model, **settings)
            for number, one in enumerate(self.chained_optimizers)
        }

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Load what `sharded_state_dict` gave."""
        for number, one in enumerate(self.chained_optimizers):
            one.load_state_dict(state[number])
