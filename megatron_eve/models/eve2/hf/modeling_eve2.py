"""EVE v2 on transformers' current Qwen2: several images a sample, batches of unequal lengths, cached generation.

Rows of images go through a second set of weights in each layer (`modeling_eve2_layers.py`); the model of stage 0 has
one set. Parameters have their published names (baaivision/EVE, `EVEv2`), so published folders load as they are.

Shapes: B = samples, L = tokens with every image row counted, N = patches of a sample at most, M = images of a sample at
most, C = width between the convolutions, D = decoder width, W = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .configuration_eve2 import EVE2Config
from .modeling_eve2_layers import EVE2DecoderLayer, Rows

_EXPERT_PARTS = "layernorm-self_attn-mlp"  # `moe_part` of the published model: all of a layer
_PATCH, _MERGE = 16, 2  # pixels of a patch's side, and patches of a cell's side
_IGNORED = -100  # a label that no loss looks at

logger = logging.get_logger(__name__)


class EVE2VisionTower(nn.Module):
    """The patch embedding layer: a class row, then the cells of each row of the grid with a split row behind them."""

    def __init__(self, between: int, width: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.split_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Sequential(
            nn.Conv2d(3, between, _PATCH, stride=_PATCH),
            nn.GELU(),
            nn.Conv2d(between, width, _MERGE, stride=_MERGE),
        )

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """
        Args:
            patches: [P, 768], cell by cell, four patches each, in a patch (channel, y, x).
            grids: rows and columns of cells of each image.

        Returns:
            [V, D]; 1 + rows * (columns + 1) vectors an image.
        """
        # Kernels are as large as their strides, so that each convolution is a matrix product over patches.
        first, activation, second = cast("tuple[nn.Conv2d, nn.GELU, nn.Conv2d]", tuple(self.patch_embedding))
        embedded = activation(F.linear(patches, first.weight.flatten(1), first.bias))  # (P, C)
        weight = second.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 4 C), patch by patch
        cells = F.linear(embedded.reshape(-1, weight.shape[1]), weight, second.bias)  # (P / 4, D)
        rows_out = []
        for image, (rows, columns) in zip(cells.split([rows * columns for rows, columns in grids]), grids):  # noqa: B905
            ends = self.split_embedding.expand(rows, 1, -1)
            grid = torch.cat([image.unflatten(0, (rows, columns)), ends], 1)
            rows_out += [self.class_embedding[None], grid.flatten(0, 1)]
        return torch.cat(rows_out)


class EVE2PreTrainedModel(Qwen2PreTrainedModel):
    """What both models below have in common."""

    config_class = EVE2Config
    # The tower reads the weights of its own modules, so all of it lies on one device.
    _no_split_modules = ["Qwen2DecoderLayer", "EVE2DecoderLayer", "EVE2VisionTower"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EVE2VisionTower):
            nn.init.normal_(module.class_embedding)
            nn.init.normal_(module.split_embedding)


class EVE2Model(EVE2PreTrainedModel, Qwen2Model):
    """Qwen2 with two sets of weights, and the patch embedding layer in front."""

    def __init__(self, config: EVE2Config) -> None:
        super().__init__(config)
        # A tokenizer may pad with the token behind each answer, whose embedding trains.
        self.embed_tokens.padding_idx = None
        if config.image_token_index is None:
            # Kept, so that a vocabulary that grows later (`resize_token_embeddings`) does not move it.
            config.image_token_index = config.vocab_size
        self.image_token_id = config.image_token_index
        if config.add_moe:
            if config.moe_part != _EXPERT_PARTS:
                raise ValueError(f"moe_part is {config.moe_part!r}, and only {_EXPERT_PARTS!r} is known here")
            layers = [EVE2DecoderLayer(config, number) for number in range(config.num_hidden_layers)]
            self.layers = nn.ModuleList(layers)
        self.vision_tower = EVE2VisionTower(config.mm_hidden_size, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Qwen2's forward, with images.

        Args:
            input_ids: [B, L], `image_token_id` for every image row; made by `EVE2Processor`.
            inputs_embeds: [B, L, D] in their place: all of these rows are text.
            pixel_values: [B, N, 768], image_grids: [B, M, 2]; see `embed`. `generate` passes them with every step; once
                a cache holds the prompt they are not looked at.

        Returns:
            As Qwen2's; last_hidden_state [B, L, D].
        """
        if inputs_embeds is None and input_ids is not None:
            cached = past_key_values is not None and past_key_values.get_seq_length() > 0
            if cached and not (input_ids == self.image_token_id).any():
                pixel_values = image_grids = None  # those of the prompt, which the cache holds
            inputs_embeds = self.embed(input_ids, pixel_values, image_grids)
            if (rows := self._rows(input_ids == self.image_token_id)) is not None:
                kwargs["rows"] = rows  # which goes on to every layer
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_grids: Tensor | None) -> Tensor:
        """Token embeddings, image rows filled in.

        Args:
            input_ids: [B, L], `image_token_id` for every image row.
            pixel_values: [B, N, 768] normalised patches, unused ones at the end of a sample.
            image_grids: int64 [B, M, 2], rows and columns of cells, zeros for images a sample lacks.

        Raises:
            ValueError: image rows in `input_ids` and images that do not belong together.
        """
        images = input_ids == self.image_token_id
        hidden = self.embed_tokens(input_ids.masked_fill(images, 0))  # (B, L, D)
        if pixel_values is None or image_grids is None:
            if images.any():
                raise ValueError("input_ids hold image tokens, but there are no pixel_values and image_grids")
            return hidden
        grids = [[(rows, columns) for rows, columns in sample if rows] for sample in image_grids.tolist()]
        wanted = [sum(1 + rows * (columns + 1) for rows, columns in sample) for sample in grids]
        found = images.sum(1).tolist()
        if wanted != found:
            raise ValueError(
                f"image tokens in input_ids: {found} a sample, but image_grids ask for {wanted}; "
                "was a prompt cut (max_length), or not made by the processor?"
            )
        if not any(wanted):
            return hidden
        patches = torch.cat(
            [
                pixels[: sum(4 * rows * columns for rows, columns in sample)]
                for pixels, sample in zip(pixel_values, grids)  # noqa: B905
            ]
        ).to(hidden.dtype)
        rows = self.vision_tower(patches, [grid for sample in grids for grid in sample])
        return hidden.masked_scatter(images[..., None], rows.to(hidden))

    def _rows(self, images: Tensor) -> Rows | None:
        """The set of weights of each row, from bool [B, L], rows of images; None where all take the first."""
        if not self.config.add_moe or not images.any():
            return None
        flat = images.flatten()
        return Rows((~flat).nonzero()[:, 0], flat.nonzero()[:, 0])


class EVEQwen2ForCausalLM(EVE2PreTrainedModel, Qwen2ForCausalLM):
    """EVE v2, under the name that its config.json gives it."""

    def __init__(self, config: EVE2Config) -> None:
        Qwen2PreTrainedModel.__init__(self, config)  # Qwen2ForCausalLM's would build a plain Qwen2 first
        self.model = EVE2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # For trainers that put a forward of their own on the model and take its labels as they are (TRL, Liger).
        self.register_forward_pre_hook(_hide_image_labels, with_kwargs=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Qwen2's forward, with images.

        Args:
            input_ids: [B, L], `image_token_id` for every image row; made by `EVE2Processor`.
            inputs_embeds: [B, L, D] in their place: all of these rows are text.
            pixel_values: [B, N, 768], image_grids: [B, M, 2]; see `EVE2Model.forward`.
            labels: [B, L], -100 where nothing is to be predicted; at image rows they are not looked at, so `input_ids`
                themselves will do.

        Returns:
            As Qwen2's; logits [B, L, W].
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grids=image_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=self._text_labels(labels, input_ids, kwargs),
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _text_labels(
        self, labels: Tensor | None, input_ids: Tensor | None, loss_settings: Mapping[str, Any]
    ) -> Tensor | None:
        """Labels [B, L] with -100 at image rows."""
        if labels is None or input_ids is None or labels.shape != input_ids.shape:
            return labels
        images = input_ids == self.model.image_token_id
        counted = loss_settings.get("num_items_in_batch") is not None
        if counted and (labels[images] != _IGNORED).any():
            logger.warning_once(
                "labels at image tokens are ignored, but the trainer counted them (num_items_in_batch), so the loss "
                "and its gradients are too small by their share: give it labels that are -100 there, such as the "
                "assistant_masks of the processor's apply_chat_template(..., return_assistant_tokens_mask=True)"
            )
        return labels.masked_fill(images, _IGNORED)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Those of `generate`; some look up the scores of the prompt's tokens, and the image token has none."""
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        missing = self.model.image_token_id + 1 - self.vocab_size
        if missing > 0:
            processors.insert(0, _Columns(missing))
            processors.append(_Columns(-missing))
        else:  # it has a row of an embedding that is larger than the tokenizer, and is no word of an answer
            image = [self.model.image_token_id]
            processors.append(SuppressTokensLogitsProcessor(image, device=str(self.device)))
        return processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Of `generate`; what is looked up in the prompt (`prompt_lookup_num_tokens`) may be an image token."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        processors = getattr(generator, "logits_processor", None)
        if isinstance(generator, PromptLookupCandidateGenerator) and processors:
            # Without the last, which takes the image token's column away: by its score it is known as forbidden.
            generator.logits_processor = LogitsProcessorList(
                some for some in processors if not (isinstance(some, _Columns) and some.count < 0)
            )
        return generator


def _hide_image_labels(model: EVEQwen2ForCausalLM, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before every forward: see `EVEQwen2ForCausalLM._text_labels`."""
    if kwargs.get("labels") is not None:
        found = kwargs.get("input_ids", args[0] if args else None)
        kwargs["labels"] = model._text_labels(kwargs["labels"], found, kwargs)
    return args, kwargs


class _Columns(LogitsProcessor):
    """Adds so many columns that are never chosen behind the scores [B, W], or takes them away again."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return F.pad(scores, (0, self.count), value=-torch.inf)
