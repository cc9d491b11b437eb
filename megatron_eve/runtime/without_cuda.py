"""Runs megatron-core 0.16.1 on a machine without CUDA: every replacement of its functions and torch's, with its reason.

megatron-core names CUDA in places where it only means "the device of this rank"; `install()` makes those use the CPU.
megatron-core is not forked, and with a GPU this module is not imported. Other versions than the tested one are refused,
because replacements that no longer match could change results without an error.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

TESTED_MEGATRON_CORE = "0.16.1"
CPU = torch.device("cpu")

# Factory calls in megatron-core pass device="cuda" or torch.cuda.current_device().
_FACTORIES = [
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "eye", "arange", "linspace"),
    *("rand", "randn", "randint", "empty_like", "zeros_like", "ones_like", "full_like"),
]
# Optimizer and DDP code compare Tensor.type() with these names and ask isinstance() of these types.
_TENSOR_TYPES = {
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "ByteTensor": torch.uint8,
}


@functools.cache
def install() -> None:
    """Replace the functions in this process, for CPU tensors and the gloo backend. Idempotent.

    Raises:
        RuntimeError: if the installed megatron-core is not the tested version.
    """
    version = importlib.metadata.version("megatron-core")
    if version != TESTED_MEGATRON_CORE:
        raise RuntimeError(
            f"running without CUDA was tested with megatron-core {TESTED_MEGATRON_CORE}, found {version}; "
            f"install megatron-core=={TESTED_MEGATRON_CORE} or run on a GPU"
        )
    _quiet()
    _map_devices()
    _map_random_state()
    _stub_streams()
    _name_tensor_types()
    _patch_megatron_core()


def _quiet() -> None:
    """Silence megatron-core's warnings about missing GPU libraries, which are expected without CUDA."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
    # megatron-core calls collectives by names that newer torch deprecates.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _to_cpu(device: Any) -> Any:
    """Map a CUDA device, given in any form, to the CPU; other devices are returned unchanged."""
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _map_devices() -> None:
    """Make the CPU the current device, and make factory functions create CUDA tensors there."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def build(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return build

    # `with torch.device("meta")`, which transformers uses to load models, recognises factory functions by a cached
    # list. Fill it before they are replaced: it must hold the original functions.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _map_random_state() -> None:
    """Make the model-parallel RNG tracker save and restore the CPU generator."""
    import torch.cuda.random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state  # type: ignore[assignment]
        module.set_rng_state = set_state  # type: ignore[assignment]
        module.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]


class _InertStream:
    """A stream or event that does nothing: CPU operations finish before they return."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _InertStream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


def _stub_streams() -> None:
    """Replace CUDA streams and events by ones that do nothing."""
    torch.cuda.Stream = _InertStream  # type: ignore[assignment, misc]
    torch.cuda.Event = _InertStream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_: _InertStream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda stream: stream  # type: ignore[assignment, return-value]


def _name_tensor_types() -> None:
    """Make CPU tensors report CUDA type names and pass isinstance() for them, which bf16 code checks."""

    class TensorType(type):
        dtype: torch.dtype

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, torch.Tensor) and instance.dtype == cls.dtype

    def construct(cls: Any, data: Any = 0) -> torch.Tensor:
        if isinstance(data, (list, tuple)):
            return torch.tensor(data, dtype=cls.dtype)
        return torch.empty(data, dtype=cls.dtype)

    for name, dtype in _TENSOR_TYPES.items():
        setattr(torch.cuda, name, TensorType(name, (), {"__new__": construct, "dtype": dtype}))

    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return f"torch.cuda.{answer.split('.')[-1]}" if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _patch_megatron_core() -> None:
    """Replace the RNG tracker's accessors, Adam (`runtime/adam.py`), and the fused norm and scale kernels."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
    import megatron.core.tensor_parallel.random as parallel_random
    import megatron.core.utils as core_utils

    from megatron_eve.runtime.adam import FusedAdam

    parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    parallel_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.Adam = FusedAdam
    # megatron-core uses TransformerEngine's kernels wherever it is installed, also where the GPUs are hidden.
    for module in (clip_grads, optimizer.optimizer):
        module.multi_tensor_applier = core_utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = core_utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = core_utils.local_multi_tensor_l2_norm
    # A rank on which everything is frozen saves an empty optimizer; megatron-core asserts, by these two flags, that
    # only a fused Adam can.
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_TE_OPTIMIZER = True
