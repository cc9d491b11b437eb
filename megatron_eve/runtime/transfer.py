"""From the host's memory to where a rank computes, without making either wait."""

from __future__ import annotations

import torch

from megatron_eve.runtime.accelerator import accelerator


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of any shape and dtype on a device; to a GPU the copy is queued behind its work.

    From pageable memory CUDA would let the stream run dry before it copies, and the host wait for that.
    """
    if device.type == "cpu" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Uploader:
    """Copies pixels to the GPU on a stream of its own, beside the kernels of a step; for the loader's thread."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream(accelerator().device)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the GPU, ready to be used on its default stream. The calling thread waits for the copy."""
        if tensor.is_cuda:
            return tensor
        # The stream also chooses the device, which in a new thread is the first one of the node.
        with torch.cuda.stream(self._stream):
            copied = tensor.pin_memory().to(self._stream.device, non_blocking=True)
        self._stream.synchronize()
        # Its memory may be given away again only when the step is done with it.
        copied.record_stream(torch.cuda.default_stream(self._stream.device))
        return copied
