"""The frozen codebook of a decoder that reads and predicts codes, on the first pipeline stage and on the last one.

Shapes: V = positions, D = depth, K = size of a codebook, F = width of its vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint

from megatron_eve.models.vila_u.config import VILAUConfig

# Of both stages' copies in a checkpoint.
_KEY = "vision_model.codebook.weight"


class FrozenCodebook(MegatronModule):
    """The codebook of the tower, one for all depths or one for each: float32 whatever the model is, and never trained.

    Attributes:
        weight: [1 or D, K + 1, F]; the last row of each is zeros.
    """

    def __init__(self, config: TransformerConfig, vision: VILAUConfig, *, copy: bool = False) -> None:
        """Random vectors: the tower's come from its folder, or from a checkpoint.

        Args:
            config: the decoder's.
            vision: sizes.
            copy: this is the last stage's; a checkpoint holds the first's.
        """
        super().__init__(config=config)
        shape = vision.codebooks, vision.visual_codebook_size + 1, vision.code_vector_size
        # The same on both stages, and for every layout: no stream of random numbers moves.
        weight = (
            torch.randn(shape, generator=torch.Generator().manual_seed(0)) * vision.code_vector_size**-0.5
        )
        weight[:, -1] = 0
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        if not config.use_cpu_initialization:
            self.cuda()
        self.depth, self._copy = vision.codes_per_position, copy

    def embed(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """Sums of the vectors of codes: float32 [V, F].

        Args:
            codes: int64 [V, D], 0 .. K - 1.
            depth: codes of each position that count, from the first; None: all.
        """
        total = self.vectors(0, codes[:, 0])
        for level in range(1, self.depth if depth is None else depth):
            total = total + self.vectors(level, codes[:, level])
        return total

    def cumulative(self, codes: torch.Tensor) -> torch.Tensor:
        """Sums of the vectors of the first 1 .. D codes of each position: float32 [V, D, F]."""
        sums = [self.vectors(0, codes[:, 0])]
        for level in range(1, self.depth):
            sums.append(sums[-1] + self.vectors(level, codes[:, level]))
        return torch.stack(sums, dim=1)

    def vectors(self, level: int, codes: torch.Tensor) -> torch.Tensor:
        """Vectors of the codes of one depth, counted from 0: int64 [V] -> float32 [V, F]."""
        return torch.nn.functional.embedding(codes, self.weight[level if len(self.weight) > 1 else 0])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Both stages' under one key, of which the first stage's is saved."""
        replica = (
            int(self._copy),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        tensor = make_sharded_tensor_for_checkpoint(self.weight, _KEY, replica_id=replica)
        return {f"{prefix}weight": tensor}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrozenCodebook:
        """Move to another device, and stay float32: rounded vectors are other vectors."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)  # type: ignore[return-value]
