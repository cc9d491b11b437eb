"""Pictures, and what a tower's codes keep of them: reconstructions at each depth, their PSNR, and a sheet of all.

Shapes: S = side in pixels of a picture that is read, P = of one that is made of codes, D = codes of a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megatron_eve.data.images.resizing import Pixels
from megatron_eve.data.inspecting.drawing import load_font, shown
from megatron_eve.models.image_codes import CodeModel

_LEAST_CELL = 96  # pixels of a picture on the sheet: smaller ones are enlarged, so that the figures have room
_WIDEST_SHEET = 6000
_GAP, _LINE = 8, 22
_INK, _GROUND = (28, 28, 28), (255, 255, 255)


@dataclass(frozen=True)
class Reconstruction:
    """A picture, and what its codes give.

    Attributes:
        name: of the picture.
        square: as the tower reads it, uint8 [P, P, 3]; resized where P is not S.
        pictures: of its codes, by depth from 1 to D: uint8 [P, P, 3] each.
    """

    name: str
    square: Pixels
    pictures: tuple[Pixels, ...]

    @property
    def psnr(self) -> list[float]:
        """Peak signal-to-noise ratio in dB by depth; infinite where all bytes are equal."""
        return [peak_signal_to_noise(self.square, picture) for picture in self.pictures]


def peak_signal_to_noise(picture: Pixels, other: Pixels) -> float:
    """10 log10(255^2 / mean squared difference) in dB, of uint8 pictures of one shape."""
    error = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def decoded_pictures(
    model: CodeModel, codes: torch.Tensor, device: torch.device, depth: int | None = None
) -> Pixels:
    """Pictures of codes, uint8 [n, P, P, 3].

    On a CPU one thread makes them: other numbers of threads sum in another order, and a pixel may round otherwise.

    Args:
        model: the tower.
        codes: int64 [n, h, w, D].
        device: of the tower.
        depth: codes of each position that count, from the first; None: all.
    """
    with torch.inference_mode(), one_thread(device):
        pixels = model.decode(codes.to(device), depth=depth)
        found: Pixels = pixels.float().round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return found


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """torch has one thread on a CPU here, whose sums do not depend on how many there are outside."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def reconstruct(model: CodeModel, name: str, square: Pixels, device: torch.device) -> Reconstruction:
    """Encode a picture, and decode its codes at each depth.

    Args:
        model: the tower.
        name: of the picture.
        square: uint8 [S, S, 3].
        device: of the tower.
    """
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(square)[None].to(device))
    depths = range(1, codes.shape[-1] + 1)
    pictures = [decoded_pictures(model, codes, device, depth=depth)[0] for depth in depths]
    if (side := len(pictures[0])) != len(square):
        square = np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC))
    return Reconstruction(name, square, tuple(pictures))


def draw_sheet(found: Sequence[Reconstruction]) -> Image.Image:
    """A row for each picture: itself, then its reconstructions at depths 1 to D, with their PSNR below."""
    columns, side = 1 + len(found[0].pictures), len(found[0].square)
    cell = min(side * -(-_LEAST_CELL // side), (_WIDEST_SHEET - _GAP) // columns - _GAP)
    font = load_font(13)
    row = _LINE + cell + _LINE
    sheet = Image.new("RGB", (_GAP + columns * (cell + _GAP), _LINE + len(found) * row + _GAP), _GROUND)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        text = "original" if column == 0 else f"depth {column}"
        draw.text((_GAP + column * (cell + _GAP), 4), text, _INK, font)
    for number, one in enumerate(found):
        top = _LINE + number * row
        draw.text((_GAP, top + 4), shown(one.name, font), _INK, font)
        figures = ["", *(shown_psnr(value) for value in one.psnr)]
        for column, (pixels, figure) in enumerate(zip((one.square, *one.pictures), figures, strict=True)):
            left = _GAP + column * (cell + _GAP)
            sheet.paste(_at_size(pixels, cell), (left, top + _LINE))
            draw.text((left, top + _LINE + cell + 3), figure, _INK, font)
    return sheet


def _at_size(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """A picture at the size of a cell; enlarged by whole pixels."""
    image = Image.fromarray(pixels)
    return image.resize(
        (side, side), Image.Resampling.NEAREST if side >= len(pixels) else Image.Resampling.LANCZOS
    )


def shown_psnr(value: float) -> str:
    """A PSNR as text."""
    return "equal" if value == float("inf") else f"{value:.2f} dB"
