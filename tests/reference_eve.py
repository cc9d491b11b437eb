"""EVE v1 training on one device, as plain as it can be said: what parallel layouts are compared with.

A second opinion, so it takes nothing from megatron_eve. The language model and the teacher are those of transformers,
called per sample without padding; the patch embedding layer (PEL), the projector and the patch aligning layer (PAL)
are loops over images that follow the public model (baaivision/EVE). tests/test_reference_eve.py holds it against the
golden tensors of that model. Letters: S side of the padded square in pixels, C width of the PEL, D of the language
model, K of the teacher, h x w the merged patches (2 x 2) that the picture covers, T rows of a sample with its image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

IMAGE_TOKEN = -200
IGNORED = -100
PATCH = 14  # pixels a side, for the model and for the teacher
HEADS = 8  # of the PEL and of the PAL
DEPTH_STEP = 4  # the PAL reads every 4th layer, from the last one down
GREY = (122, 116, 104)  # int(255 * mean)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
LLAMA_FIELDS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
LLAMA_FIELDS += ["num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"]


@dataclass
class ReferenceSample:
    """One conversation: ids with one -200 where the image goes, if any; labels not shifted, -100 ignored."""

    input_ids: list[int]
    labels: list[int]
    image: Image.Image | None


@dataclass
class ReferenceResult:
    """Both losses (scalars) and, per sample, None for one without an image, else what the PAL compares.

    `align_losses` are scalars, `predictions` the PAL's output and `targets` the teacher's, both [teacher patches, K]
    in row-major order.
    """

    language_loss: Tensor
    align_loss: Tensor
    align_losses: list[Tensor | None]
    predictions: list[Tensor | None]
    targets: list[Tensor | None]


def build_llama(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> LlamaForCausalLM:
    """The language model of a published folder; all but its rotary angles computes in `dtype`.

    The angles stay a float32 table, as in the published model: they are worth 1e-6 of the loss at these lengths.
    """
    fields = {field: config[field] for field in LLAMA_FIELDS}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    fields["tie_word_embeddings"] = False
    fields["attn_implementation"] = "sdpa"  # "eager" has its softmax in float32
    llama: Any = LlamaForCausalLM(LlamaConfig(**fields))
    llama.to(dtype)
    for name, module in list(llama.named_modules()):
        if isinstance(module, LlamaRMSNorm):  # computes in float32 whatever its weight is
            parent, _, last = name.rpartition(".")
            norm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"], dtype=dtype)
            setattr(llama.get_submodule(parent), last, norm)
    llama.load_state_dict(weights, strict=True)
    return llama


def padded_square(image: Image.Image, size: int, teacher_size: int) -> tuple[Tensor, slice, slice]:
    """The picture on a grey square [3, size, size] float32, and the rows and columns of patches that it covers.

    The grid is laid out in patches of the teacher for both, so that the model's is a multiple of the teacher's.
    """
    grid, ratio = teacher_size // PATCH, size // teacher_size
    width, height = image.size
    short = -(-grid * min(width, height) // max(width, height))  # rounded up, so at least 1
    rows, columns = (short, grid) if width > height else (grid, short)
    top, left = (grid - rows) // 2, (grid - columns) // 2  # an odd rest goes after the picture
    cell = PATCH * ratio
    square = Image.new("RGB", (size, size), GREY)
    # Rows first, then columns, as every Pillow before 13 does by itself.
    resized = image.convert("RGB").resize((columns * cell, height)).resize((columns * cell, rows * cell))
    square.paste(resized, (left * cell, top * cell))
    pixels = ((np.asarray(square) * (1 / 255)).astype(np.float32) - MEAN) / STD  # [size, size, 3]
    across = slice(left * ratio, (left + columns) * ratio)
    return torch.from_numpy(pixels).permute(2, 0, 1), slice(top * ratio, (top + rows) * ratio), across


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each query [N, width] over the M keys and values [N, M, width] of its own; [N, width]."""
    width = query.shape[-1]
    query, key, value = (rows.unflatten(-1, (HEADS, width // HEADS)) for rows in (query, key, value))
    scores = torch.einsum("nhd,nmhd->nmh", query, key) * width**-0.5  # of the full width, not of a head
    return torch.einsum("nmh,nmhd->nhd", scores.softmax(dim=1), value).flatten(1)  # [N, width]


class ReferenceEVE:
    """The published model in `hf_folder` with its teacher, in training.

    `parameters` are the leaf tensors that train, by their published key; those of the language model are its own, so
    that gradients are in `.grad` and a change in place is a change of the model. Pixels are prepared in float32, as
    the public preprocessing does; all else but rotary angles is computed in `dtype`. Raises ValueError if
    `image_size` is no even multiple of `teacher_size`, and RuntimeError if weights are missing.
    """

    parameters: dict[str, Tensor]

    def __init__(
        self,
        hf_folder: Path,
        teacher_folder: Path,
        *,
        image_size: int,
        teacher_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if image_size % (2 * teacher_size) or teacher_size % PATCH:
            raise ValueError(f"image_size {image_size} is no even multiple of a teacher's {teacher_size}")
        self.image_size, self.teacher_size, self.dtype = image_size, teacher_size, dtype
        self.pooling = image_size // (
            2 * teacher_size
        )  # merged patches of the PEL per teacher patch and side
        stored = load_file(hf_folder / "model.safetensors")
        ours: dict[str, Tensor] = {}
        language: dict[str, Tensor] = {}
        for key, weight in stored.items():
            if "vision_clip" in key or "clip_layer" in key or key.endswith("inv_freq"):
                continue  # the teacher comes from its own folder
            part = ours if "vision_tower" in key or "mm_projector" in key else language
            part[key] = weight.to(dtype)
        config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
        self.llama = build_llama(config, language, dtype)
        self.depths = range(config["num_hidden_layers"], -1, -DEPTH_STEP)  # 8 layers: 8, 4, 0
        loaded: Any = CLIPVisionModel.from_pretrained(
            teacher_folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
        self.teacher, report = loaded
        if report["missing_keys"]:
            raise RuntimeError(f"{teacher_folder}: not there: {sorted(report['missing_keys'])}")
        self.parameters = dict(self.llama.named_parameters())
        self.parameters |= {key: weight.clone().requires_grad_() for key, weight in ours.items()}

    def freeze_for(self, stage: int) -> None:
        """Stage 1 trains PEL, projector and PAL; stages 2 and 3 all but the teacher."""
        for key, parameter in self.parameters.items():
            # "vision_tower" is also in the PAL's "vision_tower_compressor".
            parameter.requires_grad_(stage != 1 or "vision_tower" in key or "mm_projector" in key)

    def forward(self, samples: Sequence[ReferenceSample]) -> ReferenceResult:
        """Language loss: mean over the labels of all samples. Alignment: per image, then over images."""
        summed, labels = torch.zeros((), dtype=self.dtype), 0
        result = ReferenceResult(summed, summed, [], [], [])
        for sample in samples:
            rows, targets, start, grid = self._splice(sample)
            output = self.llama(inputs_embeds=rows[None], output_hidden_states=True, use_cache=False)
            summed = summed + F.cross_entropy(
                output.logits[0, :-1], targets[1:], ignore_index=IGNORED, reduction="sum"
            )
            labels += int((targets[1:] != IGNORED).sum())
            prediction = target = loss = None
            if sample.image is not None:
                prediction = self._align([state[0] for state in output.hidden_states], start, grid)
                target = self._teach(sample.image)
                loss = 1 - F.cosine_similarity(prediction, target, dim=-1, eps=1e-8).mean()
            result.predictions.append(prediction)
            result.targets.append(target)
            result.align_losses.append(loss)
        losses = [loss for loss in result.align_losses if loss is not None]
        result.language_loss = summed / max(labels, 1)
        result.align_loss = torch.stack(losses).mean() if losses else torch.zeros((), dtype=self.dtype)
        return result

    def _splice(self, sample: ReferenceSample) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
        """Embeddings [T, D], labels [T], the row where the image starts, its (h, w); (-1, (0, 0)) without one."""
        embedding = self.parameters["model.embed_tokens.weight"]
        ids, targets = torch.tensor(sample.input_ids), torch.tensor(sample.labels)
        places = sample.input_ids.count(IMAGE_TOKEN)
        if places != (sample.image is not None):
            raise ValueError(f"a sample with {places} {IMAGE_TOKEN} and image {sample.image}")
        if sample.image is None:
            return F.embedding(ids, embedding), targets, -1, (0, 0)
        start = sample.input_ids.index(IMAGE_TOKEN)
        image, grid = self._embed(sample.image)
        before, after = F.embedding(ids[:start], embedding), F.embedding(ids[start + 1 :], embedding)
        ignored = torch.full((len(image),), IGNORED)
        spliced = torch.cat([targets[:start], ignored, targets[start + 1 :]])
        return torch.cat([before, image, after]), spliced, start, grid

    def _embed(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """PEL and projector: [1 + h * (w + 1), D], CLS and merged patches with a split row at each line's end."""
        own = self.parameters
        pixels, down, across = padded_square(image, self.image_size, self.teacher_size)
        kernel = own["model.vision_tower.patch_embedding.weight"]
        patches = F.conv2d(pixels[None].to(self.dtype), kernel, stride=PATCH)[0]  # [C, S / 14, S / 14]
        patches = patches[:, down, across]  # [C, 2 * h, 2 * w]
        width, h, w = patches.shape[0], patches.shape[1] // 2, patches.shape[2] // 2
        pooled = F.avg_pool2d(patches, 2).flatten(1).T  # [h * w, C]
        four = patches.reshape(width, h, 2, w, 2).permute(1, 3, 2, 4, 0).reshape(h * w, 4, width)
        local = self._attention("local_attention", pooled, four)  # [h * w, C]
        query = own["model.vision_tower.class_embedding"][None]  # [1, C]
        cls = self._attention("global_attention", query, local[None])
        split = own["model.vision_tower.split_embedding"].expand(h, 1, width)
        lines = torch.cat([local.reshape(h, w, width), split], dim=1)  # [h, w + 1, C]
        rows = torch.cat([cls, lines.flatten(0, 1)])
        hidden = F.gelu(self._linear("model.mm_projector.0", rows))  # the exact one, by erf
        return self._linear("model.mm_projector.2", hidden), (h, w)

    def _attention(self, name: str, query: Tensor, context: Tensor) -> Tensor:
        """One attention of the PEL: query [N, C] over context [N, M, C]; the residual is not normalised."""
        name = f"model.vision_tower.{name}"
        key, value = self._normed_linear(f"{name}.kv", context).chunk(2, dim=-1)
        mixed = attend(self._normed_linear(f"{name}.q", query), key, value)
        return query + self._linear(f"{name}.proj", mixed)

    def _align(self, states: list[Tensor], start: int, grid: tuple[int, int]) -> Tensor:
        """PAL: hidden states [T, D] of all layers (0: the embeddings, last: after the norm) to [patches, K]."""
        h, w = grid
        name = "model.vision_tower_compressor"
        features = []
        for layer in self.depths:
            lines = states[layer][start + 1 : start + 1 + h * (w + 1)].reshape(h, w + 1, -1)  # without CLS
            states_2d = lines[:, :-1].permute(2, 0, 1)  # [D, h, w], without split rows
            features.append(F.avg_pool2d(states_2d, self.pooling).flatten(1).T)  # [patches, D]
        fused, *rest = [
            self._normed_linear(f"{name}.norm_layer.{j}", feature) for j, feature in enumerate(features)
        ]
        below = torch.stack(rest, dim=1)  # [patches, depths - 1, K], keys and values alike
        output = self._linear(f"{name}.output_layer", attend(fused, below, below))
        return self._linear(f"{name}.input_layer", features[0]) + output

    @torch.no_grad()
    def _teach(self, image: Image.Image) -> Tensor:
        """The teacher's last hidden state but one on the patches inside the picture, [patches, K]; no post-norm."""
        pixels, down, across = padded_square(image, self.teacher_size, self.teacher_size)
        output = self.teacher(pixel_values=pixels[None].to(self.dtype), output_hidden_states=True)
        grid = self.teacher_size // PATCH
        patches = output.hidden_states[-2][0, 1:].reshape(grid, grid, -1)  # without CLS
        return patches[down, across].flatten(0, 1)

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def _normed_linear(self, name: str, rows: Tensor) -> Tensor:
        """A published pair: `name`.0 a LayerNorm, `name`.1 a Linear without bias."""
        scale, shift = self.parameters[f"{name}.0.weight"], self.parameters[f"{name}.0.bias"]
        return self._linear(f"{name}.1", F.layer_norm(rows, rows.shape[-1:], scale, shift, eps=1e-5))
