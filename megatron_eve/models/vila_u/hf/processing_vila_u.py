"""Texts and pictures to VILA-U's inputs: prompts with pictures to read, and prompts that draw one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import BatchFeature, ProcessorMixin

IMAGE_TOKEN = "<image>"


class VILAUProcessor(ProcessorMixin):
    """A `VILAUImageProcessor` and a tokenizer that knows `<image>` and the control tokens around pictures.

    Args:
        image_processor, tokenizer, chat_template: as of every processor; the template is that of training, v1.
        image_rows: positions of a picture.
    """

    if transformers.__version__.startswith("4."):  # later versions read them off the arguments below
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_rows: int = 256,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.image_rows = image_rows
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, fit: str = "stretch", **kwargs: Any
    ) -> BatchFeature:
        """
        Args:
            images: pictures in the order of the texts' `<image>`, of all texts in one list or a list for each text.
            text: a text or several.
            fit: how a picture becomes a square: "stretch", as of pictures that are read, or "square", which cuts the
                largest one out, as of pictures that are drawn.
            kwargs: for the tokenizer, such as `padding=True`. Texts are padded on the left, for generation. A text that
                begins with `<s>`, as the chat template writes it, gets no second one.

        Returns:
            input_ids and attention_mask [B, L]; with pictures pixel_values [n, 3, S, S].

        Raises:
            ValueError: no text, or not as many pictures as `<image>`.
        """
        if not text:
            raise ValueError("no text; a prompt has one")
        texts = [text] if isinstance(text, str) else list(text)
        kwargs |= kwargs.pop("processor_kwargs", {})  # which transformers 4 hands on from apply_chat_template
        return_tensors = kwargs.pop("return_tensors", None)
        for unused in ("videos", "audio"):
            if kwargs.pop(unused, None) is not None:
                raise ValueError(f"VILA-U reads no {unused}")
        kwargs.pop("return_text_replacement_offsets", None)
        if kwargs.get("add_special_tokens", True):
            texts = [one.removeprefix(self.tokenizer.bos_token) for one in texts]
        shown = _flat(images)
        wanted = sum(one.count(IMAGE_TOKEN) for one in texts)
        if wanted != len(shown):
            raise ValueError(
                f"the texts hold {IMAGE_TOKEN} {wanted} times, and there are {len(shown)} images"
            )
        expanded = [one.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.image_rows) for one in texts]
        tokens = self.tokenizer(expanded, **kwargs)
        pictures = dict(self.image_processor(shown, fit=fit)) if shown else {}
        return BatchFeature({**tokens, **pictures}, tensor_type=return_tensors)

    def drawing_inputs(
        self, texts: str | Sequence[str], guidance: bool = True, video: bool = False
    ) -> BatchFeature:
        """What `VILAUForConditionalGeneration.draw` takes.

        Args:
            texts: what is to be drawn.
            guidance: with as many unconditional prompts behind them; without, for `guidance=1`.
            video: eight frames (`frames=8`) and not a picture.

        Raises:
            ValueError: no text.
        """
        wanted = [texts] if isinstance(texts, str) else list(texts)
        if not wanted:
            raise ValueError("no text; say what to draw")
        begin = "<vi_start>" if video else "<im_start>"
        prompts = []
        for one in (*wanted, *([""] * len(wanted) if guidance else [])):
            message: Any = {"role": "user", "content": [{"type": "text", "text": one}]}
            prompt = self.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            prompts.append(f"{prompt} {begin}")
        found = self(text=prompts, padding=True, return_tensors="pt")
        found["unconditional"] = torch.tensor(len(wanted) if guidance else 0)
        return found

    def postprocess(self, pictures: Any) -> Any:
        """PIL images of pictures of `decode`, [n, 3, P, P]."""
        return self.image_processor.postprocess(pictures)

    def num_image_tokens(self, width: int, height: int) -> int:
        """Tokens that the `<image>` of a picture becomes, of any size."""
        return self.image_rows

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [one for some in images for one in (some if isinstance(some, list | tuple) else [some])]
