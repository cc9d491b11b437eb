"""The head of VILA-U's visual loss: which rows predict codes, and the cross entropy of these codes.

Shapes: R = positions to be drawn whose row is on this rank, D = depth, K = size of the codebook, H = width of the
decoder, n = rows of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_eve.models.decoder.pack_rows import rows_on_rank
from megatron_eve.models.model_parts import Pack
from megatron_eve.models.vila_u.codebook import FrozenCodebook
from megatron_eve.models.vila_u.config import VILAUConfig
from megatron_eve.models.vila_u.depth_transformer import DepthCache, DepthTransformer
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device


@dataclass(frozen=True)
class VisualRows:
    """Positions to be drawn of a pack whose predicting row is on this rank; tensors on the host.

    Attributes:
        here: int64 [R], the rows among those of this context-parallel rank.
        positions: int64 [R], among the V rows of all images.
        rows: None: no intermediate features are taken.
    """

    here: torch.Tensor
    positions: torch.Tensor
    rows: None = None


@dataclass(frozen=True)
class VisualHeadInputs:
    """What the head gets, on the device.

    Attributes:
        here: int64 [R], see `VisualRows`.
        targets: int64 [R, D], codes.
    """

    here: torch.Tensor
    targets: torch.Tensor


def visual_rows(pack: Pack) -> VisualRows:
    """The rows of a pack that predict codes, on this rank: each position's is the row before it.

    So the first position of a picture is predicted by <im_start>, or in a video by the last row of the picture before.
    """
    counts = pack.image_rows
    images = torch.arange(len(counts)).repeat_interleave(counts)  # [V]
    within = torch.arange(len(images)) - (counts.cumsum(0) - counts)[images]
    positions = pack.drawn[images].nonzero()[:, 0]  # [drawn positions]
    predicting = pack.image_starts[images[positions]] + within[positions] - 1
    place = torch.full((len(pack.tokens),), -1)
    mine = rows_on_rank(pack, sequence_parallel=False)  # the head gets gathered rows
    place[mine] = torch.arange(len(mine))
    held = (place[predicting] >= 0).nonzero()[:, 0]
    return VisualRows(place[predicting][held], positions[held])


def visual_head_inputs(pack: Pack, rows: VisualRows) -> VisualHeadInputs:
    """Bring rows and codes to the device."""
    assert pack.codes is not None
    device = accelerator().device
    return VisualHeadInputs(to_device(rows.here, device), to_device(pack.codes[rows.positions], device))


class VisualHead(MegatronModule):
    """Depth transformer and codebook (`rqtransformer` of the published models), over the rows that predict codes."""

    def __init__(self, config: TransformerConfig, vision: VILAUConfig) -> None:
        """Build both; `config` is the decoder's."""
        super().__init__(config=config)
        self.codebook = FrozenCodebook(config, vision, copy=True)
        self.transformer = DepthTransformer(config, vision)
        self.chunk = vision.visual_loss_chunk

    def forward(
        self, hidden: torch.Tensor, features: None, rows: None, inputs: VisualHeadInputs
    ) -> torch.Tensor:
        """Cross entropy of each code.

        Args:
            hidden: [n, 1, H], all rows of this context-parallel rank.
            features, rows: not used.
            inputs: which rows, and the codes.

        Returns:
            float32 [R, D], the same on all tensor-parallel ranks.
        """
        picked = hidden[inputs.here, 0]
        codes = inputs.targets.reshape(-1, self.codebook.depth)
        count = len(codes)
        size = self.chunk or max(count, 1)
        if count == 0:
            # One row whose loss is left out: gradients reach every parameter, and all ranks take part in the
            # collectives. Fused attention refuses an empty batch (https://github.com/pytorch/pytorch/issues/133780).
            return self._losses(hidden[:1, 0], codes.new_zeros(1, codes.shape[1]))[:0]
        if count <= size:
            return self._losses(picked, codes)
        return torch.cat(
            [
                checkpoint(  # what a chunk needs for its gradient is computed again, with the same dropout
                    self._losses,
                    picked[first : first + size],
                    codes[first : first + size],
                    use_reentrant=False,
                )
                for first in range(0, count, size)
            ]
        )

    def logits(self, hidden: torch.Tensor, inputs: VisualHeadInputs) -> torch.Tensor:
        """Logits [R, D, K] of all classes, on every tensor-parallel rank; `forward`'s arguments."""
        codes = inputs.targets.reshape(-1, self.codebook.depth)
        logits = self._logits(hidden[inputs.here, 0], codes)
        return gather_from_tensor_model_parallel_region(logits)  # type: ignore[no-any-return]

    def draw_codes(
        self, hidden: torch.Tensor, choose: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """See `CodeHead.draw_codes`: each depth runs once, with a cache."""
        inputs, cache, codes, total = hidden, DepthCache(), [], None
        for depth in range(self.codebook.depth):
            logits = self.transformer.step(inputs, depth, cache)
            codes.append(choose(gather_from_tensor_model_parallel_region(logits).float(), depth))
            vectors = self.codebook.vectors(depth, codes[-1])
            inputs = total = vectors if total is None else total + vectors
        return torch.stack(codes, dim=1)

    def _losses(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(self._logits(hidden, codes).float(), codes)  # type: ignore[no-any-return]

    def _logits(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        sums = self.codebook.cumulative(codes)[:, :-1]
        return self.transformer(hidden, sums)  # type: ignore[no-any-return]
