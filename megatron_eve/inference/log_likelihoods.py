"""How likely texts are as continuations of a context: tokens of a pair, and log probabilities from one packed pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_eve.config import RunConfig
from megatron_eve.inference.engine import LogLikelihood, PromptError, check_text
from megatron_eve.inference.generate import Prompt, prompt_inputs, run_stages
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.text_format import IMAGE_TOKEN


@dataclass(frozen=True)
class Pair:
    """Tokens of a context and its continuation.

    Attributes:
        tokens: ids of both, one after the other.
        count: of the continuation.
    """

    tokens: list[int]
    count: int

    @property
    def continuation(self) -> list[int]:
        """Ids of the continuation."""
        return self.tokens[len(self.tokens) - self.count :]


def move_space(context: str, continuation: str) -> tuple[str, str]:
    """Both with the white space at the context's end in front of the continuation, as lm-eval's models have it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def encode_pair(
    context: str, continuation: str, encode: Callable[[str], list[int]], eos_id: int | None
) -> Pair:
    """Tokens of a context and its continuation, as lm-eval's models find them.

    Both are encoded as one text, and as many tokens as the context has alone are counted off: the others are the
    continuation's, and the context's are those that it has alone, even where a token of the whole spans the cut. An
    empty context is BOS, or EOS where there is no BOS. Source: `TemplateLM._encode_pair` and `loglikelihood` in
    lm_eval/api/model.py.

    Args:
        context: may be empty.
        continuation: what follows it, white space at the context's end included (see `move_space`).
        encode: text -> token ids, BOS in front where the model has one.
        eos_id: of the tokenizer.

    Raises:
        PromptError: a continuation without a token, with an `<image>`, or that is no text.
    """
    check_text(continuation)
    if IMAGE_TOKEN in continuation:
        raise PromptError(
            "image_in_continuation", f"a continuation is text, and this one holds {IMAGE_TOKEN}"
        )
    before = encode(context)
    after = encode(context + continuation)[len(before) :]
    if not after:
        raise PromptError("no_continuation", f"the continuation {continuation!r:.80} has no token of its own")
    if not before and eos_id is not None:
        before = [eos_id]
    return Pair([*before, *after], len(after))


class SharedRows:
    """Pairs by the rows that they need: those with the same tokens and pictures before the last token share a pass.

    Attributes:
        first: of each pass, the number of the pair that it is made from.
        rows: of each pass, how many rows at the end are needed, the last token's own not counted.
        members: of each pass, the numbers of its pairs.
    """

    def __init__(self, pairs: Sequence[Pair], pictures: Sequence[Hashable]) -> None:
        groups: dict[Hashable, list[int]] = {}
        for number, (pair, shown) in enumerate(zip(pairs, pictures, strict=True)):
            groups.setdefault((tuple(pair.tokens[:-1]), shown), []).append(number)
        self.members = list(groups.values())
        self.first = [some[0] for some in self.members]
        self.rows = [max(pairs[number].count for number in some) for some in self.members]

    def places(self, pairs: Sequence[Pair]) -> tuple[list[int], list[int], list[int]]:
        """Where each token's probability is: (rows of all passes one after the other, token ids, numbers of pairs)."""
        rows: list[int] = []
        tokens: list[int] = []
        numbers: list[int] = []
        end = 0
        for some, count in zip(self.members, self.rows, strict=True):
            end += count
            for number in some:
                pair = pairs[number]
                rows += range(end - pair.count, end)
                tokens += pair.continuation
                numbers += [number] * pair.count
        return rows, tokens, numbers


def token_log_probabilities(logits: torch.Tensor, rows: list[int], tokens: list[int]) -> torch.Tensor:
    """Of each token its log probability, and 1 where it is the most likely one, else 0.

    Args:
        logits: [R, W].
        rows: of each of n tokens.
        tokens: their ids.

    Returns:
        float32 [n, 2].
    """
    places = torch.tensor(rows, device=logits.device)
    wanted = torch.tensor(tokens, device=logits.device)
    logits = logits.float()
    normalizers, most_likely = logits.logsumexp(-1), logits.argmax(-1)
    found = logits[places, wanted] - normalizers[places]
    return torch.stack([found, (most_likely[places] == wanted).float()], dim=-1)


def summed(found: torch.Tensor, numbers: list[int], count: int) -> list[LogLikelihood]:
    """Of each pair what its tokens have together.

    Args:
        found: float32 [n, 2], of tokens (see `token_log_probabilities`).
        numbers: of each token, the number of its pair.
        count: of the pairs.
    """
    sums, greedy = [0.0] * count, [True] * count
    for number, (probability, is_greedy) in zip(numbers, found.tolist(), strict=True):
        sums[number] += probability
        greedy[number] &= bool(is_greedy)
    return [LogLikelihood(*one) for one in zip(sums, greedy, strict=True)]


class Passes(NamedTuple):
    """What one packed forward pass computes.

    Attributes:
        prompts: of the pack, each without the last token, of which no row is needed.
        needed: of each, how many rows at its end get logits.
        rows: of each of n tokens, its row among those.
        tokens: their ids.
    """

    prompts: list[Prompt]
    needed: list[int]
    rows: list[int]
    tokens: list[int]


@torch.no_grad()
def packed_log_probabilities(
    model: VisionLanguageModel,
    passes: Passes,
    config: RunConfig,
    apply_exif: bool = True,
) -> torch.Tensor:
    """Log probabilities from one packed forward pass. Collective over all ranks of the model.

    Args:
        model: this rank's stage, bare, built under `generation_config`.
        passes: what to compute.
        config: its model, and its family, which plans the images.
        apply_exif: turn pictures upright, as their dataset did.

    Returns:
        float32 [n, 2] (see `token_log_probabilities`), the same on every rank.
    """
    model.eval()
    inputs, lengths = prompt_inputs(model, passes.prompts, config, None, apply_exif)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    kept = [row for end, count in zip(ends, passes.needed, strict=True) for row in range(end - count, end)]
    inputs.output_rows = torch.tensor(kept, device=inputs.position_ids.device)
    return run_stages(
        model,
        inputs,
        lambda logits: token_log_probabilities(logits, passes.rows, passes.tokens),
        (len(passes.tokens), 2),
        torch.float32,
    )
