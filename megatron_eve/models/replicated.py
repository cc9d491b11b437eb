"""Modules that every tensor-parallel rank holds whole."""

from __future__ import annotations

from typing import TypeVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

Module = TypeVar("Module", bound=torch.nn.Module)


def replicated(module: Module, config: TransformerConfig) -> Module:
    """Give a module its dtype and device.

    It was drawn on the CPU, where the tensor-parallel ranks are at the same random number, on GPUs too.
    """
    module.to(dtype=config.params_dtype)
    return module if config.use_cpu_initialization else module.cuda()
