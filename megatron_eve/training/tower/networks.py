"""The networks of a tower's training: the tower, the discriminator, and the frozen one of the perceptual loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from megatron_eve.config import RunConfig
from megatron_eve.models.build import unwrap
from megatron_eve.models.towers.discriminator import Norm, PatchDiscriminator
from megatron_eve.models.towers.perceptual import PerceptualLoss
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.models.towers.trainable import TrainableTower
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.training.loop.wrap import wrap_for_training


class Discriminator(MegatronModule):
    """The discriminator as a chunk of a checkpoint, where its keys begin with `discriminator.`; always float32."""

    def __init__(self, norm: Norm, group: ProcessGroup | None, seed: int) -> None:
        """See `PatchDiscriminator`."""
        config = TransformerConfig(
            num_layers=1, hidden_size=1, num_attention_heads=1, use_cpu_initialization=True
        )
        super().__init__(config=config)
        self.discriminator = PatchDiscriminator(norm=norm, group=group, seed=seed)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """See `PatchDiscriminator.forward`."""
        return self.discriminator(pictures)  # type: ignore[no-any-return]

    def global_named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters by name."""
        return self.named_parameters()


@dataclass(frozen=True)
class TowerNetworks:
    """What a step of a tower's training runs.

    Attributes:
        chunks: tower and, where there is an adversarial loss, discriminator, each in megatron-core's DDP.
        perceptual: of the perceptual loss; None without one.
    """

    chunks: tuple[DistributedDataParallel, ...]
    perceptual: PerceptualLoss | None

    @property
    def tower(self) -> TrainableTower:
        """Bare."""
        return unwrap(self.chunks[0])  # type: ignore[return-value]

    @property
    def discriminator(self) -> Discriminator | None:
        """Bare."""
        return unwrap(self.chunks[1]) if len(self.chunks) > 1 else None  # type: ignore[return-value]

    def other_bytes(self) -> dict[str, int]:
        """Bytes of what is no parameter of the chunks, by name: codebooks with their running sums and statistics of the
        discriminator, and the network of the perceptual loss."""
        found = {"codebooks": sum(one.nbytes for one in self._buffers())}
        if self.perceptual is not None:
            found["perceptual loss"] = sum(one.nbytes for one in self.perceptual.buffers())
        return found

    def _buffers(self) -> list[torch.Tensor]:
        # A codebook may be that of several depths.
        return [*{id(one): one for chunk in self.chunks for one in unwrap(chunk).buffers()}.values()]

    def snapshot(self) -> Callable[[], None]:
        """Keep what a step changes beside the parameters: codebooks, and statistics of the discriminator.

        Returns:
            A function that restores them; it can be called several times.
        """
        kept = [(buffer, buffer.clone()) for buffer in self._buffers()]

        def restore() -> None:
            for buffer, before in kept:
                buffer.copy_(before)

        return restore


def wrap_networks(
    config: RunConfig, tower: TrainableTower, perceptual: PerceptualLoss | None, settings: TowerTraining
) -> TowerNetworks:
    """Put a tower on this rank's device and in DDP, with the other networks that its losses need. Collective.

    With --bf16 the tower alone is in bfloat16; its quantiser, and all networks of losses, stay float32.

    Args:
        config: of the run.
        tower: with its weights.
        perceptual: see `TowerNetworks`.
        settings: which losses there are.
    """
    assert isinstance(tower, torch.nn.Module)
    device = accelerator().device
    # Losses are in float32, or in the tower's float64.
    dtype = torch.promote_types(tower.last_weight().dtype, torch.float32)
    bare: Any = tower.to(device)
    chunks = wrap_for_training(config, [bare])
    if settings.reconstruction_weight and settings.adversarial_weight:
        group = parallel_state.get_data_parallel_group()
        discriminator: Any = Discriminator(settings.discriminator_norm, group, config.training.seed)
        exact = replace(config, training=replace(config.training, bf16=False))
        chunks += wrap_for_training(exact, [discriminator.to(device, dtype)])
    if perceptual is not None:
        perceptual.to(device, dtype)
    return TowerNetworks(tuple(chunks), perceptual)
