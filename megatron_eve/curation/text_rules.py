"""Rules for captions: their length, repetition, and whether they end. A word is a run of letters or digits.

They are made for texts that write words with spaces between them and end sentences with a mark.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from megatron_eve.data.errors import SkipRow
from megatron_eve.runtime.command_line import whole_number

SEQUENCE = 4
"""Words of a sequence; one that came before in the caption is repetition."""
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_FINAL_MARKS = (".", "!", "?", "。", "！", "？")
_CUT_OFF = ("-", "...", "…")
# What may follow the final mark of a sentence.
_CLOSING = "\"'”’»)]*"


@dataclass(frozen=True)
class CaptionRules:
    """Which captions are kept; None turns a rule off.

    Attributes:
        min_words: least number of words.
        max_words: largest number of words.
        max_repeated: largest share of words that repeat a sequence of four words of the same caption.
        complete_sentences: the last sentence must have a final mark, and not be cut off.
    """

    min_words: int | None = None
    max_words: int | None = None
    max_repeated: float | None = None
    complete_sentences: bool = False

    def check(self, caption: str) -> None:
        """Check a caption.

        Raises:
            SkipRow: it breaks a rule, with the reason (`reasons.py`) of the first that it breaks.
        """
        words = _WORD.findall(caption.lower())
        if self.min_words is not None and len(words) < self.min_words:
            raise SkipRow("caption_too_short", f"{len(words)} words")
        if self.max_words is not None and len(words) > self.max_words:
            raise SkipRow("caption_too_long", f"{len(words)} words")
        if self.max_repeated is not None and (share := repeated_share(words)) > self.max_repeated:
            raise SkipRow("caption_repetitive", f"{share:.0%} of the words repeat others")
        if self.complete_sentences:
            _check_end(caption)


def repeated_share(words: list[str]) -> float:
    """Share of the words that lie in a sequence of four words that came before, 0 to 1."""
    seen: set[tuple[str, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(words) - SEQUENCE + 1):
        sequence = tuple(words[start : start + SEQUENCE])
        if sequence in seen:
            repeated.update(range(start, start + SEQUENCE))
        seen.add(sequence)
    return len(repeated) / max(len(words), 1)


def _check_end(caption: str) -> None:
    """Raise SkipRow unless the last sentence has a final mark."""
    end = caption.rstrip().rstrip(_CLOSING).rstrip()
    said = f"it ends in {caption.rstrip()[-20:]!r}"
    if end.endswith(_CUT_OFF):
        raise SkipRow("caption_cut_off", said)
    if not end.endswith(_FINAL_MARKS):
        raise SkipRow("caption_without_end", said)


def add_caption_flags(parser: argparse.ArgumentParser, defaults: CaptionRules, what: str) -> None:
    """Flags of the rules.

    Args:
        parser: that gets them.
        defaults: of the flags.
        what: a sentence about the captions to which they apply.
    """
    group = parser.add_argument_group("rules for captions", what)
    group.add_argument(
        "--min-words",
        type=whole_number(0),
        default=defaults.min_words,
        metavar="N",
        help="drop captions of fewer words",
    )
    group.add_argument(
        "--max-words",
        type=whole_number(1),
        default=defaults.max_words,
        metavar="N",
        help="drop captions of more words",
    )
    group.add_argument(
        "--max-repeated",
        type=_share,
        default=defaults.max_repeated,
        metavar="X",
        help="drop captions in which more than this share of the words, 0 to 1, lies in sequences of four words that "
        "came before in the caption",
    )
    group.add_argument(
        "--complete-sentences",
        action=argparse.BooleanOptionalAction,
        default=defaults.complete_sentences,
        help="drop captions whose last sentence has no final mark or is cut off (default: "
        f"{'they are dropped' if defaults.complete_sentences else 'they are kept'})",
    )


def caption_rules(flags: argparse.Namespace) -> CaptionRules:
    """The rules of the command line."""
    return CaptionRules(flags.min_words, flags.max_words, flags.max_repeated, flags.complete_sentences)


def _share(word: str) -> float:
    """The `type` of a flag that takes a share."""
    try:
        value = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word}: must be a number") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{word}: must lie between 0 and 1")
    return value
