"""Drawing of pictures and videos: their codes, position by position, under tensor and pipeline parallelism.

With guidance each picture takes two rows of a pack: one goes on from its prompt, one from an unconditional prompt, and
both go on with the same codes. At every depth of a position these are chosen by the logits u + s (c - u), where c are
those of the first row, u those of the second, and s is the guidance. A position is a step of the pack with its
key-value cache, as a token of an answer is (`generate.py`).

Shapes: n = pictures (or videos), B = rows of the pack, f = frames (1 of a picture), h x w = positions of a frame,
D = codes of a position, K = size of the codebook.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_eve.config import ConfigError, RunConfig
from megatron_eve.inference.code_tower import drawn_sizes
from megatron_eve.inference.generate import Prompt, prompt_inputs, run_stages, step_inputs
from megatron_eve.inference.sampling import Sampling, next_tokens
from megatron_eve.models.decoder.model import ModelInputs, VisionLanguageModel
from megatron_eve.models.decoder.packed import KeyValueCache
from megatron_eve.models.model_parts import CodeHead, VisualInputs
from megatron_eve.runtime.accelerator import accelerator


@dataclass(frozen=True)
class Drawing:
    """A picture or video that is to be drawn.

    Attributes:
        tokens: ids of the prompt, up to what announces the picture.
        unconditional: ids of the prompt that asks for nothing, likewise.
        key: of its random numbers (see `drawing_key`).
    """

    tokens: list[int]
    unconditional: list[int]
    key: int = 0


def drawing_key(sampling: Sampling, text: str, number: int) -> int:
    """The key of the random numbers of a picture, of 128 bits: other numbers of one prompt give other pictures."""
    told = hashlib.sha256(f"{sampling.seed} {number} {text}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(told.digest()[:16], "little")


def draw(
    model: VisionLanguageModel,
    drawings: Sequence[Drawing],
    config: RunConfig,
    *,
    sampling: Sampling,
    guidance: float = 1.0,
    frames: int = 1,
) -> torch.Tensor:
    """Draw pictures. Collective over all ranks of the model; arguments are those of `drawing_steps`.

    Returns:
        Codes int64 [n, f, h, w, D] on the host, the same on every rank.
    """
    sizes = drawn_sizes(config)
    steps = list(drawing_steps(model, drawings, config, sampling=sampling, guidance=guidance, frames=frames))
    shape = len(drawings), frames, *sizes.grid, sizes.depth
    return torch.stack(steps, dim=1).reshape(shape) if drawings else torch.zeros(shape, dtype=torch.int64)


@torch.no_grad()
def drawing_steps(
    model: VisionLanguageModel,
    drawings: Sequence[Drawing],
    config: RunConfig,
    *,
    sampling: Sampling,
    guidance: float = 1.0,
    frames: int = 1,
) -> Iterator[torch.Tensor]:
    """Draw pictures, a position of each at a time. Collective: every rank takes all steps.

    Args:
        model: this rank's stage, bare, built under `generation_config`.
        drawings: what to draw.
        config: of the model.
        sampling: how codes are chosen; a picture's random numbers depend on its key, position and depth alone.
        guidance: s above; at 1 the unconditional prompts take no part.
        frames: pictures of each, one behind the other: 1, or those of a video.

    Yields:
        Codes int64 [n, D] on the host, f * h * w times, row by row within a frame.

    Raises:
        ConfigError: the model draws no pictures.
    """
    if not drawings:
        return
    model.eval()
    sizes, count = drawn_sizes(config), len(drawings)
    prompts = [Prompt(drawing.tokens) for drawing in drawings]
    if guidance != 1.0:
        prompts += [Prompt(drawing.unconditional) for drawing in drawings]
    cache, rows = KeyValueCache(), list(range(len(prompts)))
    inputs, positions = prompt_inputs(model, prompts, config, cache)
    keys = [drawing.key for drawing in drawings]
    steps = frames * sizes.grid[0] * sizes.grid[1]
    for step in range(steps):
        choose = partial(_choose, sampling, keys, guidance, step * sizes.depth)
        if model.post_process:
            inputs.output = partial(_head(model).draw_codes, choose=choose)
        codes = run_stages(model, inputs, torch.Tensor.long, (len(prompts), sizes.depth))
        yield codes[:count].cpu()
        if step + 1 < steps:
            inputs = _code_inputs(model, codes, [position + step for position in positions], rows, cache)


def _choose(
    sampling: Sampling,
    keys: Sequence[int],
    guidance: float,
    drawn_before: int,
    logits: torch.Tensor,
    depth: int,
) -> torch.Tensor:
    """Codes int64 [B] of one depth, for both rows of a picture the same, from logits [B, K]."""
    if len(logits) > len(keys):
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + guidance * (conditional - unconditional)
        return next_tokens(logits, sampling, keys, drawn_before + depth).repeat(2)
    return next_tokens(logits, sampling, keys, drawn_before + depth)


def _head(model: VisionLanguageModel) -> CodeHead:
    """The head that draws, on the last stage."""
    head = next((head for head in model.heads.values() if isinstance(head, CodeHead)), None)
    if head is None:
        raise ConfigError("--model-path: this model has no head that draws; name one that has")
    return head


def _code_inputs(
    model: VisionLanguageModel,
    codes: torch.Tensor,
    positions: list[int],
    samples: list[int],
    cache: KeyValueCache,
) -> ModelInputs:
    """A pack of one position of a picture a row, whose codes [B, D] have been drawn."""
    count, device = len(positions), accelerator().device
    inputs = step_inputs([0] * count, positions, samples, cache)
    if model.pre_process:
        inputs.visual = VisualInputs({}, torch.ones(count, 2, dtype=torch.int64), codes)
        inputs.image_rows = torch.arange(count, device=device)
    return inputs
