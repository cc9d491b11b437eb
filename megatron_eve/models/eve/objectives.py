"""EVE's objective beside the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve.geometry import PATCH_SIZE
from megatron_eve.models.model_parts import IntermediateFeatures, Pack, SampleCounts

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_eve.models.eve.aligned_rows import AlignedRows
    from megatron_eve.models.eve.patch_aligning import AligningInputs, PatchAligningLayer
    from megatron_eve.models.eve.teacher import TeacherTargets


@dataclass(frozen=True)
class Aligning:
    """The aligning layer's distance from the teacher's features; see `FamilyObjective`.

    Each tensor-parallel rank aligns its own rows under sequence parallelism.
    """

    config: RunConfig
    name: ClassVar[str] = "align loss"
    module: ClassVar[str] = "aligning_layer"
    columns: ClassVar[tuple[str, ...]] = ()
    adds_over_tensor_parallel: ClassVar[bool] = True
    gathers_rows: ClassVar[bool] = False

    @property
    def weight(self) -> float:
        """Of this loss in the sum of all."""
        weight: float = self.config.vision.align_loss_weight
        return weight

    @property
    def features(self) -> IntermediateFeatures:
        """All depths but the last, which the head itself takes behind the final norm."""
        layers, vision = self.config.model.num_layers, self.config.vision
        depths = tuple(depth for depth in vision.tap_depths(layers) if depth < layers)
        return IntermediateFeatures(depths, vision.teacher_hidden_size, vision.pooling)

    def count(self, counts: SampleCounts) -> int:
        """One for each image."""
        return counts.images

    def head(self, transformer: TransformerConfig) -> PatchAligningLayer:
        """The aligning layer."""
        from megatron_eve.models.eve.patch_aligning import PatchAligningLayer

        return PatchAligningLayer(transformer, self.config.vision)

    def target_model(self) -> TeacherTargets:
        """The teacher."""
        import torch

        from megatron_eve.models.eve.teacher import Teacher, TeacherTargets
        from megatron_eve.runtime.accelerator import accelerator

        dtype = torch.bfloat16 if self.config.training.bf16 else torch.float32
        return TeacherTargets(Teacher(self.config.vision, dtype=dtype, device=accelerator().device))

    def rows(self, pack: Pack, sequence_parallel: bool) -> AlignedRows:
        """Visual tokens of this rank, or its share of the teacher patches."""
        from megatron_eve.models.eve.aligned_rows import aligned_rows

        return aligned_rows(pack, self.config.vision.pooling, sequence_parallel)

    def inputs(self, pack: Pack, rows: AlignedRows, targets: torch.Tensor | None) -> AligningInputs | None:
        """Targets and weights of this rank's rows; None without a teacher.

        Args:
            pack: on the host.
            rows: from `rows`.
            targets: [I * G * G, K], the teacher's features.
        """
        if targets is None:
            return None
        from megatron_eve.models.eve.patch_aligning import AligningInputs
        from megatron_eve.runtime.accelerator import accelerator
        from megatron_eve.runtime.transfer import to_device

        device = accelerator().device
        index = to_device(rows.teacher_index(self.config.vision.teacher_size // PATCH_SIZE), device)
        return AligningInputs(targets[index], to_device(rows.weights(), device))
