"""The picture of an image row, as the model's pictures are made of it."""

from __future__ import annotations

from PIL import Image

from megatron_eve.data.images.decode import decode_image
from megatron_eve.data.joined import AnyDataset


def read_picture(dataset: AnyDataset, image: int) -> Image.Image:
    """Image `image` of a dataset, decoded and upright: RGB, of its recorded size.

    Raises:
        DataError: the row does not match its record.
        ImageError: the file does not decode.
    """
    info = dataset.info
    return decode_image(dataset.image_bytes(image), apply_exif=info.apply_exif, max_pixels=info.max_pixels)
