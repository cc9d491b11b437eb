"""What megatron-core 0.16.1 needs to run on a machine without CUDA, each thing with its reason.

megatron-core names CUDA in places where it only means "the device of this rank". `install()` answers those
places with the CPU; nothing of megatron-core is copied or forked, and nothing here is imported where a GPU is
present. A version other than the tested one is refused, because a silent mismatch would be worse than a stop.
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
    """Prepare this process for megatron-core on CPU tensors and the gloo backend. Idempotent.

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
    """Without CUDA, megatron-core warns once an import about every GPU library that is absent, as is expected."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
    # megatron-core calls collectives by names that newer torch renames.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _to_cpu(device: Any) -> Any:
    """CUDA devices, in any spelling, become the CPU; other devices stay."""
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _map_devices() -> None:
    """The current device is the CPU, and factory functions put CUDA tensors there."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def build(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return build

    # `with torch.device("meta")`, by which transformers loads models, knows factory functions by a list that is made
    # at its first use: it must hold the real ones, which are what it gets to see.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _map_random_state() -> None:
    """The model-parallel RNG tracker saves and restores the CPU generator."""
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
    """Streams order work on a GPU; CPU operations finish before they return, so there is nothing to order."""

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
    """Streams and events exist and do nothing."""
    torch.cuda.Stream = _InertStream  # type: ignore[assignment, misc]
    torch.cuda.Event = _InertStream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_: _InertStream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda stream: stream  # type: ignore[assignment, return-value]


def _name_tensor_types() -> None:
    """CPU tensors answer with the CUDA type names and pass isinstance() for them (bf16 code asks that)."""

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
    """The RNG tracker's private accessors, and our Adam and plain norms in place of those that GPUs bring."""
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
    # Where TransformerEngine is installed, its kernels are taken, on a machine whose GPUs are hidden too.
    for module in (clip_grads, optimizer.optimizer):
        module.multi_tensor_applier = core_utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = core_utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = core_utils.local_multi_tensor_l2_norm
    # A rank on which everything is frozen saves an empty optimizer; megatron-core asserts that
    # only a fused Adam can, and asks by these two names.
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_TE_OPTIMIZER = True
