"""What a step of training asks of a tower that makes codes of pictures, and pictures of codes.

A family's own tower implements `TrainableTower`; `training/tower/step.py` trains it.

Shapes: n = pictures of this rank, S = side of a picture in pixels, P = side of one that is made of codes, T = tokens of
a text, C = width of the features that pictures and texts are compared by, D = depth of the codes, K = their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from megatron_eve.models.image_codes import CodeModel

ContrastivePath = Literal["quantized", "unquantized"]


class TowerOutput(NamedTuple):
    """What a tower makes of pictures.

    Attributes:
        pictures: [n, 3, P, P], about -1 .. 1: made of the codes.
        commitment: scalar; how far the features are from their codes, a mean over this rank's pictures.
        images: [n, C] of unit length, to compare with texts; None where that was not asked for.
    """

    pictures: torch.Tensor
    commitment: torch.Tensor
    images: torch.Tensor | None


class TrainableTower(CodeModel, Protocol):
    """A tower in training, a `torch.nn.Module`. What does not train is frozen when it is built.

    As a `CodeModel` it makes codes, and pictures of codes, by the weights and codebooks that it has at the time.

    Attributes:
        config: megatron-core's, for its wrappers.
        has_texts: texts can be compared with pictures.
    """

    config: TransformerConfig
    has_texts: bool

    def train_forward(
        self,
        pixels: torch.Tensor,
        *,
        seed: int,
        iteration: int,
        group: ProcessGroup | None,
        contrast: ContrastivePath | None,
    ) -> TowerOutput:
        """Codes and pictures of a step, in which the codebooks are updated. Collective.

        Args:
            pixels: uint8 [n, S, S, 3], those of this rank, which follow those of the ranks before it.
            seed, iteration: choose the vectors that unused codes restart from.
            group: ranks that the batch is divided among; None: this process alone.
            contrast: what `images` are made of: features behind the quantiser, or in front of it; None for no `images`.
        """
        ...

    def forward(self, pixels: torch.Tensor, contrast: ContrastivePath | None) -> TowerOutput:
        """The same without an update of the codebooks."""
        ...

    def targets(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `TowerOutput.pictures` should be: uint8 [n, S, S, 3] -> [n, 3, P, P], -1 .. 1, at least float32."""
        ...

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Texts int64 [n, T] -> [n, C] of unit length, at least float32, without gradient."""
        ...

    def logit_scale_and_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the contrastive loss: a positive scale, and a bias; scalars of at least float32."""
        ...

    def last_weight(self) -> torch.Tensor:
        """The weight of the pixel decoder's last convolution, where gradients are compared."""
        ...

    def usage(self) -> torch.Tensor:
        """int64 [D, K]: how often the last `train_forward` took each code, over all ranks."""
        ...

    def global_named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters by name."""
        ...
