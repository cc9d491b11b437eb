"""Texts and pictures to the model's inputs: each `<image>` of a text becomes as many tokens as its picture has rows."""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers import BatchFeature, ProcessorMixin

from .image_processing_eve2 import nested

IMAGE_TOKEN = "<image>"


class EVE2Processor(ProcessorMixin):
    """An `EVE2ImageProcessor` and a tokenizer that knows `<image>`.

    The chat template is eve2_qwen2 with the system prompt of training; a message's only picture goes in front of its
    text, as in training, and several stay where they are.
    """

    if transformers.__version__.startswith("4."):  # later versions read them off the arguments below
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: pictures in the order of the texts' `<image>`, of all texts in one list or a list for each text.
            text: a text or several.
            kwargs: for the tokenizer, such as `padding=True`. Texts are padded on the left, for generation.

        Returns:
            input_ids and attention_mask [B, L]; with pictures pixel_values and image_grids (see `EVE2ImageProcessor`).
            With `return_offsets_mapping` offset_mapping, in characters of the texts as they were given.

        Raises:
            ValueError: not as many pictures as `<image>`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        kwargs |= kwargs.pop("processor_kwargs", {})  # which transformers 4 hands on from apply_chat_template
        return_tensors = kwargs.pop("return_tensors", None)
        for unused in ("videos", "audio"):
            if kwargs.pop(unused, None) is not None:
                raise ValueError(f"EVE v2 takes no {unused}")
        # Of transformers' own processors; the offsets below are those of the given texts already.
        kwargs.pop("return_text_replacement_offsets", None)
        counts: list[list[int]] = [[] for _ in texts]  # rows of each picture
        pictures: dict[str, Any] = {}
        if images is not None:
            pictures = dict(self.image_processor(_share_out(texts, nested(images))))
            grids = pictures["image_grids"].tolist()
            counts = [[_rows(*grid) for grid in sample if grid[0]] for sample in grids]
        elif any(IMAGE_TOKEN in one for one in texts):
            raise ValueError(f"the text holds {IMAGE_TOKEN}, but there are no images")
        tokens = self.tokenizer([_expand(*one) for one in zip(texts, counts)], **kwargs)  # noqa: B905
        if "offset_mapping" in tokens:
            places = [_places(*one) for one in zip(texts, counts)]  # noqa: B905
            tokens["offset_mapping"] = [
                _given_offsets(*one)
                for one in zip(tokens["offset_mapping"], places)  # noqa: B905
            ]
        return BatchFeature({**tokens, **pictures}, tensor_type=return_tensors)

    def num_image_tokens(self, width: int, height: int) -> int:
        """Tokens that the `<image>` of a picture of this size, in pixels, becomes: the rows it gives the decoder."""
        return _rows(*self.image_processor.grid(width, height))

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _rows(rows: int, columns: int) -> int:
    """Rows of the decoder for a grid: the class row, and a split row after each row of the grid."""
    return 1 + rows * (columns + 1)


def _expand(text: str, counts: list[int]) -> str:
    """The text with `<image>` once for every row of a picture."""
    rows = iter(counts)
    return re.sub(re.escape(IMAGE_TOKEN), lambda _: IMAGE_TOKEN * next(rows), text)


def _places(text: str, counts: list[int]) -> list[int]:
    """For each character of the expanded text, and for its end, its place in the text."""
    places, start = list[int](), 0
    rows = iter(counts)
    for part in re.split(f"({re.escape(IMAGE_TOKEN)})", text):
        repeat = next(rows) if part == IMAGE_TOKEN else 1
        places += [*range(start, start + len(part))] * repeat
        start += len(part)
    return [*places, start]


def _given_offsets(offsets: list[tuple[int, int]], places: list[int]) -> list[tuple[int, int]]:
    """First character of each token, and the one behind its last, in a text before `_expand`.

    Tokens that stand for no text, such as padding, are empty: before the text at its begin, behind it at its end.
    """
    found: list[tuple[int, int]] = []
    begun = False
    for first, last in offsets:
        if last > first:
            begun = True
            found.append((places[first], places[last - 1] + 1))
        else:
            found.append((places[-1], places[-1]) if begun else (0, 0))
    return found


def _share_out(texts: list[str], images: list[list[Any]]) -> list[list[Any]]:
    """Pictures of each text. A flat list of pictures is dealt out by the texts' `<image>`."""
    wanted = [text.count(IMAGE_TOKEN) for text in texts]
    if [len(some) for some in images] != wanted:
        flat = [image for some in images for image in some]
        if len(flat) != sum(wanted) or any(len(some) != 1 for some in images):
            raise ValueError(
                f"{IMAGE_TOKEN} in the texts: {wanted}, images: {[len(some) for some in images]}; "
                "give each text as many images as it has of them"
            )
        left = iter(flat)
        images = [[next(left) for _ in range(count)] for count in wanted]
    return images
