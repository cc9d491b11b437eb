"""Whether an adapter belongs to a model of the same sizes: a sample of that model's weights, kept beside the adapter.

It is in the metadata of the adapter's safetensors file, which peft passes over. A folder that peft wrote has none, and
then nothing is compared.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_eve.config import ConfigError

METADATA = "megatron_eve.base_weights"
"""Key of the sample: base64 of bfloat16 numbers."""

_PER_MATRIX = 256
# Numbers of the same model differ where it was rounded twice (to float16, then to bfloat16): a few in a hundred.
_ALIKE = 0.75


def sampled_names(num_layers: int) -> list[str]:
    """Matrices that the sample is of, by their names in `rules`: of the first, a middle and the last layer."""
    layers = sorted({0, num_layers // 2, num_layers - 1})
    return [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in layers]


def sample_of(tensor: Callable[[str], torch.Tensor], num_layers: int) -> str:
    """The sample of a model; whatever it is stored as, numbers are compared as bfloat16.

    Args:
        tensor: gives a matrix by its name.
        num_layers: of the decoder.
    """
    pieces = []
    for name in sampled_names(num_layers):
        flat = tensor(name).flatten()
        places = torch.linspace(0, len(flat) - 1, min(_PER_MATRIX, len(flat)), dtype=torch.float64).long()
        pieces.append(flat[places].to(torch.bfloat16).view(torch.int16))
    return base64.b64encode(torch.cat(pieces).numpy().tobytes()).decode()


def check_base(path: Path, flag: str, tensor: Callable[[str], torch.Tensor], num_layers: int) -> None:
    """Compare an adapter's sample, if its file has one, with a model.

    Args:
        path: the adapter's file.
        flag: that named its folder, for messages.
        tensor: gives a matrix of the model by its name.
        num_layers: of the decoder.

    Raises:
        ConfigError: the adapter was trained on other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kept = (file.metadata() or {}).get(METADATA)
    except SafetensorError:  # a pickle of older versions of peft
        return
    if kept is None:
        return
    samples = kept, sample_of(tensor, num_layers)
    try:
        before, now = (np.frombuffer(base64.b64decode(some), dtype=np.int16) for some in samples)
    except (binascii.Error, ValueError):  # the metadata of another program
        return
    if len(before) != len(now) or (before == now).mean() < _ALIKE:
        raise ConfigError(
            f"{flag}: was trained on a model of these sizes with other weights than --source; name the model that it "
            "was trained on as --source"
        )
