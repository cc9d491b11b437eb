"""Choose and build a backend that decodes pictures (`interface.py` says what one does).

Three backends give the same, to a few 8-bit levels:

- ``pillow``: the plain reference, bit-equal to the published preprocessing;
- ``threads``: a fast JPEG decoder and torch's antialiased resize of bytes, in threads; the default without a GPU;
- ``dali``: one DALI pipeline, on the GPU ("mixed", nvJPEG) or on the CPU; the default with a GPU.

Pictures that a backend cannot decode go to Pillow. A picture that cannot be decoded at all gives an `ImageError` as its
result; the others are not affected.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_eve.data.images.interface import DecodeSettings, ImageDecoder
from megatron_eve.data.images.pillow import PillowDecoder
from megatron_eve.models.family import View
from megatron_eve.runtime.dali import dali_is_installed

BackendName = Literal["auto", "dali", "threads", "pillow"]


def placeholder_image(view: View) -> torch.Tensor:
    """A view of the placeholder image, which replaces a picture that cannot be decoded: all of it is the pad colour.

    It depends on the view alone, so the first and the last pipeline stage use the same placeholder.

    Returns:
        uint8 of `view.shape`, expanded from a few values.
    """
    colour = torch.tensor(view.pad_colour, dtype=torch.uint8)
    if view.patch_size:
        colour = colour.repeat_interleave(view.patch_size**2)
    return colour.expand(view.shape)


def chosen_backend(name: BackendName, *, on_gpu: bool) -> BackendName:
    """The backend of a name: "auto" is DALI on a GPU if it is installed, else threads."""
    if name != "auto":
        return name
    return "dali" if on_gpu and dali_is_installed() else "threads"


def open_decoder(
    name: BackendName, settings: DecodeSettings, *, threads: int, gpu: int | None
) -> ImageDecoder:
    """Build a backend.

    Args:
        name: which, see `chosen_backend`.
        settings: of the dataset and rank.
        threads: number of decoding threads (DALI on a GPU: of threads that feed it).
        gpu: index of the device that DALI decodes on, None without one.

    Raises:
        ImportError: ``dali`` is not installed.
    """
    name = chosen_backend(name, on_gpu=gpu is not None)
    if name == "dali":
        from megatron_eve.data.images.dali import DaliDecoder

        return DaliDecoder(settings, threads=threads, gpu=gpu)
    if name == "threads":
        from megatron_eve.data.images.threads import ThreadsDecoder

        return ThreadsDecoder(settings, threads=threads)
    return PillowDecoder(settings)
