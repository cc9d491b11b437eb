"""Reads an image of a dataset as training decodes it."""

from __future__ import annotations

from PIL import Image

from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.data.images.decode import decode_image
from megatron_eve.data.images.patches import from_stored, picture_of


def read_picture(dataset: AnyDataset, image: int) -> Image.Image:
    """Image `image` of a dataset, decoded and upright: RGB, of the size it is stored in (see `IMAGE_STORAGES`).

    Raises:
        DataError: the row does not match its record.
        ImageError: the file does not decode.
    """
    info, stored = dataset.info, dataset.stored_pixels(image)
    if stored is not None:
        name, view = next(iter(dataset.image_plan(image).views.items()))
        return Image.fromarray(picture_of(from_stored(stored[name], view), view))
    return decode_image(dataset.image_bytes(image), apply_exif=info.apply_exif, max_pixels=info.max_pixels)


def stored_bytes(dataset: AnyDataset, image: int) -> bytes:
    """The stored bytes of image `image`: its file, or its pixels.

    Raises:
        DataError: the row does not match its record.
    """
    stored = dataset.stored_pixels(image)
    if stored is not None:
        return b"".join(view.tobytes() for view in stored.values())
    return dataset.image_bytes(image)


def stored_sizes(part: IndexedVisionDataset, image: int) -> list[tuple[int, int]]:
    """The (width, height) in pixels that `read_picture` may return: the recorded size, or the model's."""
    record = part.images[image]
    recorded = (int(record["width"]), int(record["height"]))
    if part.info.image_storage == "encoded":
        return [recorded]
    view = next(iter(part.image_plan(image).views.values()))
    model = (view.width, view.height)
    return [recorded, model] if part.info.image_storage == "jpeg" else [model]
