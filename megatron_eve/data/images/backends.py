"""Choose and build a backend that decodes pictures (`interface.py` says what one does).

Three backends give the same, to a few 8-bit levels:

- ``pillow``: the plain reference, bit-equal to the published preprocessing;
- ``threads``: a fast JPEG decoder and torch's antialiased resize of bytes, in threads; the default without a GPU;
- ``dali``: one DALI pipeline, on the GPU ("mixed", nvJPEG) or on the CPU; the default with a GPU.

What a backend cannot take goes to Pillow by itself. A picture that cannot be decoded is an answer (`ImageError`), never
the end of the others.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from megatron_eve.data.geometry import PATCH_SIZE
from megatron_eve.data.images.constants import PAD_COLOUR
from megatron_eve.data.images.interface import DecodeSettings, ImageDecoder, ImageTask, Prepared
from megatron_eve.data.images.pillow import PillowDecoder
from megatron_eve.runtime.dali import dali_is_installed

BackendName = Literal["auto", "dali", "threads", "pillow"]


def stand_in(task: ImageTask, settings: DecodeSettings) -> Prepared:
    """What replaces a picture that cannot be decoded: one of the pad colour, of the recorded shape.

    It depends on nothing but the shape, so both ends of a pipeline replace a picture by the same.
    """
    colour = torch.from_numpy(np.repeat(np.array(PAD_COLOUR, dtype=np.uint8), PATCH_SIZE * PATCH_SIZE))
    side = settings.teacher_side
    grey = torch.tensor(PAD_COLOUR, dtype=torch.uint8)
    return Prepared(
        colour.expand(task.geometry.patches, -1) if task.patches else None,
        grey.expand(side, side, 3) if task.teacher else None,
    )


def chosen_backend(name: BackendName, *, on_gpu: bool) -> BackendName:
    """The backend that a name stands for: "auto" takes DALI on a GPU where it is installed, else threads."""
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
        threads: that decode (DALI on a GPU: that feed it).
        gpu: index of the device that DALI decodes on, None without one.

    Raises:
        ImportError: ``dali`` where it is not installed.
    """
    name = chosen_backend(name, on_gpu=gpu is not None)
    if name == "dali":
        from megatron_eve.data.images.dali import DaliDecoder

        return DaliDecoder(settings, threads=threads, gpu=gpu)
    if name == "threads":
        from megatron_eve.data.images.threads import ThreadsDecoder

        return ThreadsDecoder(settings, threads=threads)
    return PillowDecoder(settings)
