"""Copies tensors from host memory to the GPU, asynchronously."""

from __future__ import annotations

import torch

from megatron_eve.runtime.accelerator import accelerator


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of any shape and dtype to a device; for a GPU the copy is queued on its current stream.

    The tensor is pinned first: a copy from pageable memory blocks the host until the stream is idle.
    """
    if device.type == "cpu" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Uploader:
    """Copies pixels to the GPU on its own CUDA stream, in parallel with a step's kernels; for the loader's thread."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream(accelerator().device)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the GPU, ready for use on the default stream. The calling thread waits for the copy."""
        if tensor.is_cuda:
            return tensor
        # This also selects the device, which in a new thread is GPU 0 of the node.
        with torch.cuda.stream(self._stream):
            copied = tensor.pin_memory().to(self._stream.device, non_blocking=True)
        self._stream.synchronize()
        # The allocator must not reuse this memory before the default stream's kernels have finished with it.
        copied.record_stream(torch.cuda.default_stream(self._stream.device))
        return copied
