"""The language loss over logits whose vocabulary is split and padded: unfused, or by one of two fused kernels.

Shapes: R = rows with a label, W = vocabulary with its padding, tp = tensor-parallel size.
"""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig


def mask_padded_vocabulary(
    logits: torch.Tensor, vocab_size: int, group: torch.distributed.ProcessGroup, value: float = -torch.inf
) -> None:
    """Give the padding of the vocabulary no probability, in place, so that no loss depends on the tensor-parallel size.

    The gradient need not be masked: where the probability is 0, so is the gradient of a cross entropy.

    Args:
        logits: [..., W / tp], this rank's columns.
        vocab_size: columns that are real, over all ranks.
        group: the tensor-parallel ranks.
        value: what the others become.
    """
    width = logits.shape[-1]
    real = min(max(vocab_size - group.rank() * width, 0), width)
    logits.detach()[..., real:] = value


def language_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    config: TransformerConfig,
    group: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """Cross entropy of each labelled row.

    Args:
        logits: [R, 1, W / tp] as the output layer gives them; not to be used afterwards.
        labels: int64 [R].
        vocab_size: real columns of the vocabulary.
        config: says whether a fused kernel computes it, and whose (`cross_entropy_loss_fusion`).
        group: the tensor-parallel ranks.

    Returns:
        float32 [R], the same on all tensor-parallel ranks.
    """
    # No kernel starts over no rows at all; a pack without a label still takes part in the collectives.
    fused = config.cross_entropy_loss_fusion and len(labels) > 0
    if fused and config.cross_entropy_fusion_impl == "te":
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

        # Finite: its running maximum over a rank that holds nothing but padding would make -inf - -inf of it.
        mask_padded_vocabulary(logits, vocab_size, group, torch.finfo(logits.dtype).min)
        # It writes the gradient over the logits. "Graph capturable" leaves out a comparison that waits for the GPU.
        losses: torch.Tensor = te_parallel_cross_entropy(logits.transpose(0, 1), labels[None], group, True)
        return losses[0]
    mask_padded_vocabulary(logits, vocab_size, group)
    if fused:
        return fused_vocab_parallel_cross_entropy(logits, labels[:, None], group)[:, 0]
    return vocab_parallel_cross_entropy(logits.float(), labels[:, None])[:, 0]
