"""The quickstart's data: the pictures that scikit-image carries in its wheel, each with a true caption.

Left out are the files that hold no picture to caption (a disparity map, 25-pixel face crops, two pages of noise, an
animation of 14 x 25 pixels) and the second copy of the chessboard. Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import skimage
from PIL import Image

CAPTIONS = Path(__file__).with_name("captions.json")
LONG_SIDE = 448
"""Pixels; twice what the toy model sees, so that decoding stays cheap on two cores."""


def export(folder: Path) -> Path:
    """Write the pictures and their captions in the LLaVA layout.

    Colour pictures become JPEG files and the others PNG files, scaled down to a long side of 448 pixels.

    Args:
        folder: gets `images/` and `captions.json`.

    Returns:
        The JSON file: a list of `{"id", "image", "conversations"}`, the image relative to `folder/images`.

    Raises:
        FileNotFoundError: this release of scikit-image lacks one of the pictures.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    rows = []
    for name, caption in load_captions().items():
        with Image.open(find(name)) as image:
            colour = image.mode == "RGB"
            path = images / f"{name}.{'jpg' if colour else 'png'}"
            image.thumbnail((LONG_SIDE, LONG_SIDE))
            image.save(path, quality=95)  # which PNG, being exact, does not heed
        turns = [
            {"from": "human", "value": "<image>\nDescribe the picture."},
            {"from": "gpt", "value": caption},
        ]
        rows.append({"id": name, "image": path.name, "conversations": turns})
    target = folder / "captions.json"
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target


def load_captions() -> dict[str, str]:
    """Captions by picture, the picture named as in scikit-image's data folder without its suffix."""
    captions: dict[str, str] = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    return captions


def find(name: str) -> Path:
    """The file of a picture inside the installed scikit-image."""
    folder = Path(skimage.__file__).parent / "data"
    for suffix in (".png", ".jpg"):
        path = folder / f"{name}{suffix}"
        if path.exists():
            return path
    raise FileNotFoundError(
        f"no picture {name} in {folder}: the quickstart needs the scikit-image of constraints/"
    )
