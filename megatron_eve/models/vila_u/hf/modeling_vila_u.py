"""VILA-U on transformers' Llama (arXiv 2409.04429, mit-han-lab/vila-u): it answers about pictures, and draws them.

Pictures are codes: the decoder reads sums of codebook vectors, and a depth transformer behind it predicts the codes of
the next position, one after another. The tower between pictures and codes is `modeling_vila_u_tower.py`.

Shapes: B = samples, L = tokens with every position of a picture counted, n = pictures, S = side of a picture in pixels,
h x w = positions of a picture, D = codes of a position, K = size of a codebook, F = width of its vectors, H = width of
the decoder, W = vocabulary, R = positions that are predicted, E = width of the depth transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_vila_u import VILAUConfig
from .configuration_vila_u_tower import VILAUTowerConfig
from .modeling_vila_u_depth import DepthTransformer
from .modeling_vila_u_tower import VILAUTowerModel

_IGNORED = -100  # a label that no loss looks at


class VILAUProjector(nn.Module):
    """Sums of codebook vectors to rows of the decoder: [V, F] -> [V, H]. Its layers are numbered as published."""

    def __init__(self, vector: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(vector, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, sums: Tensor) -> Tensor:
        """See above."""
        return self.layers(sums.to(next(self.parameters()).dtype))


@dataclass
class VILAUOutput(CausalLMOutputWithPast):
    """What `VILAUForConditionalGeneration.forward` returns, beside Llama's.

    Attributes:
        lm_loss: mean cross entropy of the labels.
        visual_loss: mean cross entropy of the codes of drawn pictures, over positions and depths.
        visual_logits: [R, D, K], of these codes.
    """

    lm_loss: Tensor | None = None
    visual_loss: Tensor | None = None
    visual_logits: Tensor | None = None


class VILAUForConditionalGeneration(LlamaForCausalLM):
    """See above. Weights have their published names but for `rqtransformer`, which is published with the tower."""

    config_class = VILAUConfig
    # Codes that training read were made in float32, and other precisions give some other codes.
    _keep_in_fp32_modules_strict = ["vision_tower"]  # noqa: RUF012
    _no_split_modules = ["LlamaDecoderLayer", "VILAUTowerModel", "DepthTransformer"]  # noqa: RUF012

    def __init__(self, config: VILAUConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tower = VILAUTowerConfig(
            **{k: v for k, v in (config.vision_config or {}).items() if k != "model_type"}
        )
        (rows, columns, width), (self.code_rows, self.code_columns, self.depth) = (
            tower.latent_shape,
            tower.code_shape,
        )
        vector = rows // self.code_rows * (columns // self.code_columns) * width
        self.mm_projector = VILAUProjector(vector, config.hidden_size)
        self.vision_tower = VILAUTowerModel(tower)
        self.rqtransformer = DepthTransformer(config, vector, self.depth)
        self.image_token_id = (
            config.vocab_size if config.image_token_index is None else config.image_token_index
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        codes: Tensor | None = None,
        drawn: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> VILAUOutput:
        """Llama's forward, with pictures.

        Args:
            input_ids: [B, L], `image_token_index` for every position of a picture; made by `VILAUProcessor`.
            pixel_values: [n, 3, S, S], all pictures in the order of the samples. `generate` passes them with every
                step; once a cache holds the prompt they are not looked at.
            codes: int64 [n, h, w, D], in place of `pixel_values`.
            drawn: bool [n], pictures whose codes are to be predicted; the visual loss is theirs.
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep: as Llama's.
            labels: [B, L] of texts padded behind, -100 where no token is to be predicted; at pictures they are not
                looked at.

        Returns:
            With labels or `drawn` the loss, the sum of both. The visual loss is this batch's mean: a Trainer that
            accumulates gradients hands on `num_items_in_batch`, by which the loss of the labels alone is divided.
        """
        images: Any = None if input_ids is None else input_ids == self.image_token_id
        if inputs_embeds is None and input_ids is not None:
            cached = past_key_values is not None and past_key_values.get_seq_length() > 0
            if cached and not images.any():
                pixel_values = codes = drawn = None  # those of the prompt, which the cache holds
            if codes is None and pixel_values is not None:
                codes = self.vision_tower.encode(pixel_values)
            inputs_embeds = self._embed(input_ids, images, codes)
        outputs = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        found = VILAUOutput(
            logits=self.lm_head(hidden[:, kept, :]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if labels is not None:
            labels = labels if images is None else labels.masked_fill(images, _IGNORED)
            found.loss = found.lm_loss = self.loss_function(
                logits=found.logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if drawn is not None and codes is not None and drawn.any():
            targets = codes[drawn].flatten(0, 2)  # (R, D)
            found.visual_logits = self._code_logits(hidden, images, drawn, targets)
            found.visual_loss = F.cross_entropy(found.visual_logits.flatten(0, 1).float(), targets.flatten())
            visual = self.config.visual_loss_weight * found.visual_loss
            found.loss = visual if found.loss is None else found.loss + visual
        return found

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat each sample, as beams do, with all its pictures behind one another."""
        names = [name for name in ("pixel_values", "codes") if kwargs.get(name) is not None]
        pictures = {name: kwargs.pop(name) for name in names}
        found, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            input_ids=input_ids,  # type: ignore[arg-type]
            **kwargs,
        )
        if pictures and input_ids is not None:
            rows = torch.eq(input_ids, self.image_token_id).sum(1)
            counts = (rows // (self.code_rows * self.code_columns)).tolist()
            for name, value in pictures.items():
                parts = value.split(counts)
                kwargs[name] = torch.cat([part for part in parts for _ in range(expand_size)])
        return found, kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Those of `generate`; some look up the scores of the prompt's tokens, and the image token has none."""
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        missing = self.image_token_id + 1 - self.vocab_size
        if missing > 0:
            processors.insert(0, _Columns(missing))
            processors.append(_Columns(-missing))
        else:  # it has a row of an embedding that is larger than the tokenizer, and is no word of an answer
            image = [self.image_token_id]
            processors.append(SuppressTokensLogitsProcessor(image, device=str(self.device)))
        return processors

    def _embed(self, input_ids: Tensor, images: Tensor, codes: Tensor | None) -> Tensor:
        """[B, L, H], with the rows of pictures filled in."""
        hidden = self.model.embed_tokens(input_ids.masked_fill(images, 0))
        wanted = 0 if codes is None else codes.shape[0] * self.code_rows * self.code_columns
        if int(images.sum()) != wanted:
            raise ValueError(
                f"input_ids hold {int(images.sum())} image tokens, and the pictures have {wanted} positions; was a "
                "prompt cut (max_length), or not made by the processor?"
            )
        if codes is None:
            return hidden
        rows = self.mm_projector(self._sums(codes.flatten(0, 2))[:, -1])
        return hidden.masked_scatter(images[..., None], rows.to(hidden))

    def _vectors(self, level: int, codes: Tensor) -> Tensor:
        """Vectors of the codes of one depth, counted from 0: int64 [V] -> float32 [V, F]; the tower is frozen."""
        return F.embedding(codes, self.vision_tower.rqvaesiglip.quantizer.codebook(level).weight.detach())

    def _sums(self, codes: Tensor) -> Tensor:
        """Sums of the vectors of the first 1 .. D codes: int64 [V, D] -> float32 [V, D, F]."""
        sums = [self._vectors(0, codes[:, 0])]
        for level in range(1, self.depth):
            sums.append(sums[-1] + self._vectors(level, codes[:, level]))
        return torch.stack(sums, dim=1)

    def _code_logits(self, hidden: Tensor, images: Tensor, drawn: Tensor, targets: Tensor) -> Tensor:
        """Logits [R, D, K] of the positions of drawn pictures, each from the row before it."""
        places = images.nonzero()  # (V, 2)
        taken = drawn.repeat_interleave(self.code_rows * self.code_columns).to(places.device)
        samples, rows = places[taken].unbind(1)
        return self.rqtransformer(hidden[samples, rows - 1], self._sums(targets)[:, :-1])

    @torch.no_grad()
    def draw(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        unconditional: Tensor | None = None,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        frames: int = 1,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Draw pictures; `decode` makes pixels of them.

        Args:
            input_ids: [B, L], of `VILAUProcessor.drawing_inputs`: the prompts, padded on the left, and with guidance
                as many unconditional ones behind them.
            attention_mask: [B, L].
            unconditional: how many of these there are; None: as many as `guidance` wants.
            guidance: s of u + s (c - u), the logits that codes are chosen by at every depth; c are those of a prompt,
                u those of its unconditional one. At 1 there are no unconditional prompts.
            temperature: 0 takes the most likely code.
            top_k: draw from so many of the most likely codes, and those as likely as the last of them; 0: from all.
            top_p: draw from the most likely codes whose probabilities reach this.
            frames: 1 of a picture, 8 of a video.
            generator: of the random numbers.
            use_cache: keep keys and values; without, everything is computed again for each position and depth.

        Returns:
            int64 [n, frames, h, w, D].

        Raises:
            ValueError: values that cannot be, or no unconditional prompts where they are needed.
        """
        if not (guidance >= 0 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and frames >= 1):
            raise ValueError("guidance, temperature and top_k must be 0 or more, top_p above 0 and at most 1, frames "
                             "1 or more")  # fmt: skip
        steps, room = frames * self.code_rows * self.code_columns, self.config.max_position_embeddings
        if input_ids.shape[1] + steps - 1 > room:
            raise ValueError(f"the prompts take {input_ids.shape[1]} tokens and the drawing {steps}, and the model has "
                             f"{room} positions; shorten the prompts, or draw fewer frames")  # fmt: skip
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        behind = len(input_ids) // 2 if unconditional is None else int(unconditional)
        if guidance == 1:
            count = len(input_ids) - (0 if unconditional is None else behind)
            input_ids, mask = input_ids[:count], mask[:count]
        elif 2 * behind != len(input_ids):
            raise ValueError(f"guidance {guidance} needs an unconditional prompt for each prompt; make both by "
                             "drawing_inputs, or use guidance=1")  # fmt: skip
        else:
            count = behind
        hidden, cache = self.model.embed_tokens(input_ids), DynamicCache() if use_cache else None
        given, drawn = hidden, []
        for _ in range(steps):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
            last = self.model(
                inputs_embeds=given, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=use_cache,
            ).last_hidden_state[:, -1]  # fmt: skip

            def choose(logits: Tensor) -> Tensor:
                if guidance != 1:
                    conditional, unconditional = logits.float().chunk(2)
                    logits = unconditional + guidance * (conditional - unconditional)
                code = _chosen(logits.float(), temperature, top_k, top_p, generator)
                return code if guidance == 1 else code.repeat(2)

            codes = self._next_codes(last, choose, use_cache)
            drawn.append(codes[:count])
            row = self.mm_projector(self._sums(codes)[:, -1])[:, None].to(hidden)
            given = row if use_cache else torch.cat([given, row], dim=1)
            mask = F.pad(mask, (0, 1), value=1)
        return torch.stack(drawn, dim=1).unflatten(1, (frames, self.code_rows, self.code_columns))

    def _next_codes(self, hidden: Tensor, choose: Any, use_cache: bool) -> Tensor:
        """Codes int64 [B, D] of the next position from the hidden states [B, H] before it."""
        caches: list[list[Tensor]] = [[] for _ in self.rqtransformer.head_transformer.blocks]
        codes = hidden.new_zeros(len(hidden), self.depth, dtype=torch.int64)
        for depth in range(self.depth):
            if use_cache:
                inputs = self._sums(codes)[:, depth - 1] if depth else hidden
                logits = self.rqtransformer.step(inputs, depth, caches)
            else:
                logits = self.rqtransformer(hidden, self._sums(codes)[:, :-1])[:, depth]
            codes[:, depth] = choose(logits)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures [n, 3, P, P], about -1 .. 1, of codes [n, ..., h, w, D]; `VILAUProcessor.postprocess` takes them."""
        return self.vision_tower.decode(codes.flatten(0, -4))


class _Columns(LogitsProcessor):
    """Adds so many columns that are never chosen behind the scores [B, W], or takes them away again."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return F.pad(scores, (0, self.count), value=-torch.inf)


def _chosen(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Codes int64 [n], from logits float32 [n, K]."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.double() / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, places = scores.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(-1)
        cut = torch.zeros_like(shares, dtype=torch.bool)
        cut = cut.scatter(-1, places, shares.cumsum(-1) - shares >= top_p)
        scores = scores.masked_fill(cut, -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
