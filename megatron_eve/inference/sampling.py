"""How the next token is chosen: the most likely one, or one drawn at random by `--temperature`, `--top-k`, `--top-p`.

A random number depends on the seed, the prompt and the step alone. So a prompt gets the same answer under any layout
and batch size, and from a checkpoint as from a folder for transformers, as far as their logits agree.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_eve.config import ConfigError

if TYPE_CHECKING:
    import torch

MOST_TEMPERATURE = 10.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; by default greedily.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token, and what is below has no meaning then.
        top_k: draw from so many of the most likely tokens; 0 from all.
        top_p: draw from the most likely tokens whose probabilities add up to it; 1 from all.
        seed: of the random numbers, 0 or more.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Is the most likely token taken?"""
        return self.temperature == 0.0

    def problem(self) -> str | None:
        """What is wrong with these values, by flag; None if nothing is."""
        if not 0.0 <= self.temperature <= MOST_TEMPERATURE:  # not so for NaN
            return f"--temperature {self.temperature}: must lie between 0 (greedy) and {MOST_TEMPERATURE:g}"
        if self.top_k < 0:
            return f"--top-k {self.top_k}: must be 0 (all tokens) or more"
        if not 0.0 < self.top_p <= 1.0:
            return f"--top-p {self.top_p}: must lie above 0, and be 1 (all tokens) at most"
        if not 0 <= self.seed < 2**63:
            return f"--seed {self.seed}: must be 0 or more, and below 2^63"
        return None

    def to_metadata(self) -> dict[str, Any] | None:
        """As it stands with an answer; None where it is greedy."""
        return None if self.greedy else asdict(self)

    def key(self, text: str, images: Sequence[bytes]) -> int:
        """The key of a prompt's random numbers, of 128 bits."""
        told = hashlib.sha256(f"{self.seed} {text}".encode("utf-8", "surrogatepass"))
        for image in images:
            told.update(hashlib.sha256(image).digest())
        return int.from_bytes(told.digest()[:16], "little")


GREEDY = Sampling()
DRAWING = Sampling(temperature=1.0, top_k=900, top_p=0.96)
"""How codes of pictures are drawn, as the public code of published models has it."""
GUIDANCE = 3.0
"""How far the prompt of a picture counts, likewise."""


def add_guidance_flag(group: argparse._ArgumentGroup) -> None:
    """The flag that says how far the prompt of a picture counts."""
    group.add_argument(
        "--cfg",
        type=float,
        default=GUIDANCE,
        metavar="S",
        help="guidance: how far the prompt counts; 1 is without, 0 without the prompt (default: %(default)s)",
    )


def guidance_problem(guidance: float) -> str | None:
    """What is wrong with `--cfg`; None if nothing is."""
    if 0 <= guidance < math.inf:  # not so for NaN
        return None
    return f"--cfg {guidance:g}: must be 0 or more; 1 is without guidance"


def add_sampling_flags(
    group: argparse._ArgumentGroup, defaults: Sampling = GREEDY, thing: str = "token", gives: str = "answers"
) -> None:
    """The flags that say how tokens are chosen, or what else a model predicts, such as a code.

    Args:
        group: of the flags.
        defaults: of them.
        thing: what is chosen.
        gives: what it makes.
    """
    for name, kind, default, what in (
        (
            "temperature",
            float,
            defaults.temperature,
            f"draw {thing}s at random, the more freely the higher; 0 takes the most likely {thing}",
        ),
        (
            "top-p",
            float,
            defaults.top_p,
            f"draw from the most likely {thing}s whose probabilities add up to P; 1 is all",
        ),
        ("top-k", int, defaults.top_k, f"draw from the K most likely {thing}s; 0 is all"),
        ("seed", int, defaults.seed, f"seed of the random numbers; the same one gives the same {gives}"),
    ):
        group.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar={"temperature": "T", "top-p": "P", "top-k": "K", "seed": "N"}[name],
            help=f"{what} (default: %(default)s)",
        )


def sampling_of(flags: argparse.Namespace, *, draws: bool = False) -> Sampling:
    """What the flags of `add_sampling_flags` say.

    Args:
        flags: of the command.
        draws: the seed is that of drawings, too, which are random where answers are not.

    Raises:
        ConfigError: a value that cannot be, or one that has no effect.
    """
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    if problem := sampling.problem():
        raise ConfigError(problem)
    if draws and sampling.greedy:
        sampling = replace(sampling, seed=GREEDY.seed)
    if sampling.greedy and sampling != GREEDY:
        given = next(
            name for name in ("top_p", "top_k", "seed") if getattr(sampling, name) != getattr(GREEDY, name)
        )
        raise ConfigError(
            f"--{given.replace('_', '-')}: has no effect without --temperature above 0; add that, or leave it out"
        )
    return sampling


def next_tokens(logits: torch.Tensor, sampling: Sampling, keys: Sequence[int], step: int) -> torch.Tensor:
    """The next token of each sample.

    Args:
        logits: float32 [B, W].
        sampling: how to choose.
        keys: of each sample (see `Sampling.key`).
        step: tokens of the answer that came before.

    Returns:
        int64 [B].
    """
    if sampling.greedy:
        return logits.argmax(-1)
    import torch

    summed = kept_probabilities(logits, sampling).cumsum(-1)
    # Of 24 bits, so that its product with the sum lies below the sum, and some token above it.
    drawn = [
        np.random.Generator(np.random.Philox(key=key, counter=step)).random(dtype=np.float32) for key in keys
    ]
    wanted = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None] * summed[:, -1:]
    return torch.searchsorted(summed, wanted, right=True)[:, 0]


def kept_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities that are drawn from: of a sampling that is not greedy, float64 [B, W], 0 of what is left out.

    The `top_k` most likely tokens are kept, and all that are as likely as the last of them; of these the most likely
    ones up to the one with which their probabilities reach `top_p`.

    Args:
        logits: float32 [B, W].
        sampling: not greedy.
    """
    import torch

    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1.0:
        ordered, places = scores.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before >= sampling.top_p)
        scores = scores.masked_fill(cut, -math.inf)
    return scores.softmax(-1)
