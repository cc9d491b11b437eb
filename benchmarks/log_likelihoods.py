"""How many log-likelihoods of continuations an engine computes per second, with a shared context and without.

    python benchmarks/log_likelihoods.py --model-path quickstart/reference \
        --tokenizer-model quickstart/data/tokenizer.model --picture quickstart/data/images/*.jpg

Requests are those of a multiple choice task: a context, and four continuations of one token. Either the four of one
context come in a batch, or each request has a context of its own, of the same length. Both are checked and encoded anew
each time. With --picture a picture stands in front of each context.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.inference.engine import Engine, LogLikelihood
from megatron_eve.inference.opening import add_model_flags, chat_template, check_model_flags, run_with_engine

CHOICES = (" a", " b", " c", " d")
_WORDS = ["a", "photo", "of", "some", "people", "on", "the", "street", "with", "one", "dog", "beside"]


def context(number: int, words: int) -> str:
    """A text of so many words, which begins with a number of its own."""
    return " ".join([f"{number}:", *(_WORDS[place % len(_WORDS)] for place in range(words))])


def requests(
    count: int, words: int, shared: bool, pictures: Sequence[bytes]
) -> list[tuple[str, list[bytes], str]]:
    """(context, pictures, continuation) of so many requests; four follow each other with one context if `shared`."""
    found = []
    for number in range(count):
        chosen = number // len(CHOICES) if shared else number
        images = [pictures[chosen % len(pictures)]] if pictures else []
        text = "<image>\n" * len(images) + context(1000 + chosen, words)
        found.append((text, images, CHOICES[number % len(CHOICES)]))
    return found


def answered(
    engine: Engine, asked: Sequence[tuple[str, list[bytes], str]], batch: int
) -> tuple[list[LogLikelihood], int, float]:
    """What was found, tokens of all requests, and seconds."""
    found: list[LogLikelihood] = []
    tokens, began = 0, time.perf_counter()
    for start in range(0, len(asked), batch):
        queries = [engine.prepare_continuation(*one) for one in asked[start : start + batch]]
        tokens += sum(query.length for query in queries)
        found += engine.log_likelihoods(queries)
    return found, tokens, time.perf_counter() - began


def measure(engine: Engine, flags: argparse.Namespace) -> int:
    """Measure in turns, print the best of each; returns the exit status."""
    pictures = [path.read_bytes() for path in flags.picture]
    answered(engine, requests(2 * flags.batch_size, flags.words, False, pictures), flags.batch_size)
    print("| contexts | pictures | words | tokens a request | requests/s, shared | one each | ratio |")
    print("|---|---|---|---|---|---|---|")
    for some in ([], pictures) if pictures else ([],):
        best: dict[bool, tuple[float, int]] = {}
        for _ in range(flags.times):
            for shared in (True, False):
                asked = requests(flags.requests, flags.words, shared, some)
                found, tokens, seconds = answered(engine, asked, flags.batch_size)
                assert len(found) == flags.requests and all(one.sum < 0 for one in found)
                best[shared] = min(best.get(shared, (float("inf"), 0)), (seconds, tokens))
        rates = {shared: flags.requests / seconds for shared, (seconds, _) in best.items()}
        print(
            f"| {flags.requests // len(CHOICES)} / {flags.requests} | {'one each' if some else 'none'} | {flags.words} "
            f"| {best[False][1] / flags.requests:.0f} | {rates[True]:.1f} | {rates[False]:.1f} | "
            f"{rates[True] / rates[False]:.2f} |",
            flush=True,
        )
    return 0


def main() -> int:
    """Open the model, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument("--picture", type=Path, nargs="+", default=[], help="files of pictures")
    parser.add_argument("--words", type=int, default=60, help="words of a context")
    parser.add_argument("--requests", type=int, default=128, help="of each kind")
    parser.add_argument("--batch-size", type=int, default=32, help="requests in a batch")
    parser.add_argument("--times", type=int, default=3, help="the shortest of so many counts")
    flags = parser.parse_args()
    flags.max_new_tokens = 1
    check_model_flags(flags)
    return run_with_engine(flags, chat_template(flags.model_path), lambda engine: measure(engine, flags))


if __name__ == "__main__":
    sys.exit(main())
