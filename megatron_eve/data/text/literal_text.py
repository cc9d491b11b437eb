"""Control tokens that a user types stay text, in templates that say so (`Template.literal`).

A prompt is one text until it is tokenised, so what was typed is marked in it: MARK in front of a control token says
that the token is text. A MARK that was typed itself becomes two. MARK is a character that Unicode keeps free for such
uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.text_format import IMAGE_TOKEN

MARK = "\ufdd0"

# What a control token of any tokenizer may begin with; a MARK too many does no harm.
_MAY_BEGIN = re.compile(rf"{MARK}|(?!{re.escape(IMAGE_TOKEN)})[<\[|]")


def mark_typed(text: str, control_tokens: Sequence[str] | None = None) -> str:
    """A text that was typed, with MARK in front of what could be a control token; `<image>` stays as it is.

    Args:
        text: of a turn, or a system prompt.
        control_tokens: of the tokenizer; None where it is not known, for all that a control token may begin with.
    """
    begins = _MAY_BEGIN if control_tokens is None else _pattern(tuple(control_tokens))
    return begins.sub(lambda found: MARK + found[0], text)


def without_marks(text: str, control_tokens: Sequence[str]) -> str | None:
    """A marked text as a tokenizer takes it that knows no MARK; None if a control token in it was typed."""
    marks = _marks(tuple(control_tokens))
    plain = marks.sub(lambda found: found["control"] or found["typed"] or "", text)
    meant, there = (
        sum(found["control"] is not None for found in marks.finditer(one))
        for one in (text, plain.replace(MARK, ""))
    )
    return plain if meant == there else None


def encode_marked_text(tokenizer: TextTokenizer, text: str) -> Iterator[tuple[int, int]]:
    """`TextTokenizer.encode_with_offsets`, but that control tokens behind MARK are text.

    Yields:
        (token id, index in `text` of the first character of the token); a MARK is in no token.
    """
    if MARK not in text:
        yield from tokenizer.encode_with_offsets(text)
        return
    characters: list[str] = []
    places: list[int] = []

    def put(begin: int, end: int) -> None:
        characters.append(text[begin:end])
        places.extend(range(begin, end))

    def literal() -> Iterator[tuple[int, int]]:
        if places:
            yield from [(token, places[at]) for token, at in tokenizer.encode_literally("".join(characters))]
        characters.clear()
        places.clear()

    done = 0
    for found in _marks(tuple(tokenizer.control_tokens)).finditer(text):
        put(done, found.start())
        done = found.end()
        if found["control"]:
            yield from literal()
            yield from ((token, found.start()) for token, _ in tokenizer.encode_with_offsets(found[0]))
        elif found["typed"]:
            put(*found.span("typed"))
    put(done, len(text))
    yield from literal()


@cache
def _pattern(control_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Matches MARK, or one of the control tokens but `<image>`; the longest first."""
    tokens = sorted((one for one in control_tokens if one != IMAGE_TOKEN), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, [MARK, *tokens])))


@cache
def _marks(control_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Matches MARK with what it says is text, `typed`, behind it, and a control token that is one."""
    tokens = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or "(?!)"
    return re.compile(f"{MARK}(?P<typed>{MARK}|{tokens})?|(?P<control>{tokens})")
