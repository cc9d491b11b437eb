"""What every decoder layer is told about a pack: where its samples begin and end, and the cache when generating.

Shapes: T = tokens of a pack (padding included), S = samples in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_eve.models.decoder.expert_rows import ExpertRows
from megatron_eve.models.decoder.intermediate_features import FeatureRows

# TransformerEngine looks for its best attention anew whenever the longest sample has another length; it may be told of
# a longer one.
_LONGEST_STEP = 256


class KeyValueCache:
    """Keys and values of earlier steps of a generation, a pair of tensors for each layer and sample.

    Holds this rank's heads only: [tokens so far, key/value heads, head dimension]. One cache serves all model
    chunks of a rank, since layer numbers are global.
    """

    def __init__(self) -> None:
        self._store: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(
        self, layer_number: int, sample: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append this step's keys and values ([new tokens, heads, dim]) and return all of them."""
        slot = (layer_number, sample)
        if slot in self._store:
            earlier_key, earlier_value = self._store[slot]
            key, value = torch.cat([earlier_key, key]), torch.cat([earlier_value, value])
        self._store[slot] = (key, value)
        return key, value

    def drop(self, sample: int) -> None:
        """Forget a finished sample."""
        for slot in [slot for slot in self._store if slot[1] == sample]:
            del self._store[slot]


@dataclass
class PackedParams(PackedSeqParams):
    """megatron-core's packed-sequence parameters with what the torch layers need beside them.

    Attributes:
        lengths: padded tokens of each sample, on the host, so that no layer has to ask the device. Like all bounds,
            they are of the whole pack also under context parallelism.
        gathered_order: int64 [T], where each row of the pack stands in the concatenation of what the
            context-parallel ranks hold (context parallelism only).
        feature_rows: which rows become intermediate features, None without any.
        expert_rows: which rows are of images, for a decoder with experts; None for others.
        cache: keys and values of earlier steps when generating, else None.
        samples: names of the pack's samples in the cache, in pack order (generation only).
    """

    lengths: list[int] = field(default_factory=list)
    gathered_order: torch.Tensor | None = None
    feature_rows: FeatureRows | None = None
    expert_rows: ExpertRows | None = None
    cache: KeyValueCache | None = None
    samples: list[int] = field(default_factory=list)


def packed_params(
    bounds: torch.Tensor,
    lengths: list[int],
    cache: KeyValueCache | None = None,
    samples: list[int] | None = None,
) -> PackedParams:
    """Describe a pack to the decoder.

    A sample's padding counts as part of it. It stands at the end, where causal attention of real tokens does not see
    it, and its rows carry no loss, so nothing comes of it. Told of padding between samples, TransformerEngine would
    compare both bounds on the device in every layer, which waits for it, and have no FlashAttention to choose.

    Args:
        bounds: int32 [S+1], where samples begin with their padding, on the device; the last entry is T.
        lengths: padded tokens of each sample.
        cache, samples: for generation, see `PackedParams`.
    """
    longest = -(-max(lengths) // _LONGEST_STEP) * _LONGEST_STEP
    return PackedParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        cache=cache,
        samples=samples or [],
    )
