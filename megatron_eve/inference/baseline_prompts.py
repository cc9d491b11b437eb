"""Prompts of models that are none of ours, as transformers' processors write them, and of Fuyu, whose processor cannot.

Fuyu's processor drops the first token of a picture unless the tokenizer puts a word mark in front, and without
torchvision its image processor fails on tensors; so the ids are put together here, as the published code has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image

from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.chat_messages import messages_of
from megatron_eve.inference.engine import PromptError
from megatron_eve.models.text_format import IMAGE_TOKEN

Inputs = dict[str, torch.Tensor]
"""What a model's forward pass takes: `input_ids` int64 [1, L], and what belongs to them and to the pictures."""


class Prompts(Protocol):
    """How a kind of model is asked."""

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """The text of a prompt, with the model's placeholder for each picture."""

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, beginning-of-text in front as the tokenizer has it, placeholders as they are."""

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens that the placeholder of a picture of this size, in pixels, becomes."""

    def check_images(self, text: str, num_images: int) -> None:
        """Raise PromptError unless a text has a place for each picture."""

    def inputs(self, text: str, pictures: Sequence[Image.Image]) -> Inputs:
        """What the model takes for one prompt."""


class ProcessorPrompts:
    """Prompts of a model whose processor has a chat template and makes its inputs.

    Args:
        processor: of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._image_token = str(getattr(processor, "image_token", None) or IMAGE_TOKEN)

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """See `Prompts.prompt`: by the processor's chat template."""
        messages = messages_of(turns, num_images)
        try:
            found: str = self._processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:  # such as a system text that the template refuses
            raise PromptError(
                "chat_template", f"the model's chat template refuses the turns: {error}"
            ) from error
        return found

    def token_ids(self, text: str) -> list[int]:
        """See `Prompts.token_ids`."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=self._adds_special_tokens(text))[
            "input_ids"
        ]
        return ids

    def image_tokens(self, width: int, height: int) -> int:
        """See `Prompts.image_tokens`."""
        (count,) = self._processor._get_num_multimodal_tokens([(height, width)]).num_image_tokens
        return int(count)

    def check_images(self, text: str, num_images: int) -> None:
        """See `Prompts.check_images`."""
        found = self._own(text).count(self._image_token)
        if found != num_images:
            raise PromptError("image_count", f"images: {num_images}, places for them in the text: {found}")

    def inputs(self, text: str, pictures: Sequence[Image.Image]) -> Inputs:
        """See `Prompts.inputs`."""
        found = self._processor(
            text=[self._own(text)],
            images=[list(pictures)] if pictures else None,
            add_special_tokens=self._adds_special_tokens(text),
            return_tensors="pt",
        )
        inputs = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return inputs

    def _own(self, text: str) -> str:
        """A raw text with the model's placeholders for ours."""
        return text.replace(IMAGE_TOKEN, self._image_token)

    def _adds_special_tokens(self, text: str) -> bool:
        # As apply_chat_template with tokenize=True: a template may have written the beginning-of-text token.
        first = self._tokenizer.bos_token
        return not (first and text.startswith(first))


class FuyuPrompts:
    """Prompts of Fuyu: rows of `|SPEAKER|`, each with a `|NEWLINE|`, then `<s>`, the text and the token in front of
    an answer. One picture at most, always in front; there is no chat template, so turns are lines.

    Args:
        processor: of transformers.
        image_token_id: config.json's, where a patch of a picture goes.
    """

    ANSWER = "<0x04>"

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self._tokenizer, self._images = processor.tokenizer, processor.image_processor
        self._patch, self._row_end = image_token_id, self._tokenizer.convert_tokens_to_ids("|NEWLINE|")
        self._first = self._tokenizer.convert_tokens_to_ids("<s>")
        self._answer = self._tokenizer.convert_tokens_to_ids(self.ANSWER)

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """See `Prompts.prompt`."""
        found = messages_of(turns, num_images)  # also checks them
        lines = ["".join(part.get("text", "") for part in message["content"]) for message in found]
        return IMAGE_TOKEN * num_images + "\n".join(lines) + self.ANSWER

    def token_ids(self, text: str) -> list[int]:
        """See `Prompts.token_ids`; a picture is one id."""
        images, text = self._split(text)
        question, mark, answer = text.rpartition(self.ANSWER) if self.ANSWER in text else (text, "", "")
        ids = [self._patch] * images + [self._first, *self._plain(question)]
        if mark:
            # The tokenizer puts a word mark in front, which stands for the space that the answer begins with.
            ids += [self._answer, *self._plain(answer.removeprefix(" "))]
        return ids

    def image_tokens(self, width: int, height: int) -> int:
        """See `Prompts.image_tokens`."""
        rows, columns = self._grid(*self._fitted(width, height))
        return rows * (columns + 1)

    def check_images(self, text: str, num_images: int) -> None:
        """See `Prompts.check_images`."""
        if num_images > 1:
            raise PromptError("too_many_images", f"{num_images} pictures; Fuyu takes one in a prompt")
        if text.count(IMAGE_TOKEN) != num_images:
            found = text.count(IMAGE_TOKEN)
            raise PromptError("image_count", f"images: {num_images}, places for them in the text: {found}")

    def inputs(self, text: str, pictures: Sequence[Image.Image]) -> Inputs:
        """See `Prompts.inputs`."""
        ids = self.token_ids(text)
        found: Inputs = {}
        if pictures:
            (picture,) = pictures
            processed = self._images(
                [[picture]]
            )  # arrays: of tensors it cannot make patches without torchvision
            rows, columns = self._grid(
                processed["image_unpadded_heights"][0][0], processed["image_unpadded_widths"][0][0]
            )
            size = self._images.patch_size
            pixels = np.asarray(processed["images"][0][0])[
                :, : rows * size["height"], : columns * size["width"]
            ]
            found["pixel_values"] = torch.from_numpy(
                np.ascontiguousarray(self._images.patchify_image(pixels))
            )
            ids = ([self._patch] * columns + [self._row_end]) * rows + ids[1:]
        found["input_ids"] = torch.tensor([ids])
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        return found

    def _split(self, text: str) -> tuple[int, str]:
        """Number of placeholders in front of a text, and the text; the picture is always in front."""
        images = text.count(IMAGE_TOKEN)
        return images, text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "") if images else text

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels that a picture is brought to, as the image processor does: never larger."""
        most = self._images.size
        if width <= most["width"] and height <= most["height"]:
            return height, width
        scale = min(most["height"] / height, most["width"] / width)
        return int(height * scale), int(width * scale)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches; the last ones may reach into the padding."""
        size = self._images.patch_size
        return math.ceil(height / size["height"]), math.ceil(width / size["width"])


def prompts_of(config: Any, processor: Any) -> Prompts:
    """How the model of a folder is asked."""
    if config.model_type == "fuyu":
        return FuyuPrompts(processor, config.image_token_id)
    return ProcessorPrompts(processor)


def padded(rows: Sequence[Inputs], pad_id: int) -> Inputs:
    """Several prompts' inputs as one batch: what has a value for each token is padded on the left, what belongs to
    pictures is concatenated.
    """
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch: Inputs = {}
    for name in {name for row in rows for name in row}:
        parts = []
        for row in rows:
            if name not in row:
                continue  # a prompt without pictures
            value, length = row[name], row["input_ids"].shape[1]
            if value.dim() == 2 and value.shape == (1, length) and name != "pixel_values":
                fill = pad_id if name == "input_ids" else 0
                value = torch.nn.functional.pad(value, (longest - length, 0), value=fill)
            parts.append(value)
        batch[name] = torch.cat(parts)
    return batch
