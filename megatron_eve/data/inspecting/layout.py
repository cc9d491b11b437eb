"""The contents of a dataset row for display: its pieces of text, the role of each, and whether it trains.

Drawing (`drawing`) and the page (`page`) both show this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.data.format.manifest import MANIFEST
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.data.text.templates import templates
from megatron_eve.data.text.text_tokenizer import TextTokenizer

Role = Literal["system", "user", "assistant"]

_MAX_TOKENS_OF_CHARACTER = 4


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several tokens that form one character.

    Attributes:
        text: its text; unprintable characters are escaped, such as \\u200b, except newlines.
        role: system, user or assistant.
        trains: its label is the token itself; of an image placeholder, the image is to be drawn.
        image: for an image placeholder, the number of the image within the row, from 0; None for text.
        tokens: number of its tokens.
    """

    text: str
    role: Role
    trains: bool
    image: int | None = None
    tokens: int = 1


@dataclass(frozen=True)
class RowLayout:
    """The contents of one row.

    Attributes:
        row: its number in the dataset.
        name: its name in messages.
        pieces: its text.
        images: indices of its images in the dataset.
        image_tokens: number of tokens of each image.
        text_length: tokens with an image counted as one.
        length: tokens once images are expanded.
        labels: number of tokens that train.
        drawn: of each image, is it to be drawn?
    """

    row: int
    name: str
    pieces: list[Piece]
    images: list[int]
    image_tokens: list[int]
    text_length: int
    length: int
    labels: int
    drawn: list[bool] = field(default_factory=list)


def check_tokenizer(dataset: AnyDataset, prefix: str, tokenizer: TextTokenizer) -> None:
    """Raise DataError if the tokenizer is not the one that the dataset was made with.

    Raises:
        DataError: naming both files.
    """
    made_with = dataset.info.tokenizer_sha256
    if tokenizer.sha256 != made_with:
        raise DataError(
            f"{prefix}{MANIFEST} was made with another tokenizer (sha256 {made_with[:12]}..., that of {tokenizer.path} "
            f"is {tokenizer.sha256[:12]}...): give that one as --tokenizer-model, or none to see token ids"
        )


def row_layout(dataset: AnyDataset, row: int, tokenizer: TextTokenizer | None) -> RowLayout:
    """Lay out one row. Without a tokenizer its text is token ids.

    Raises:
        DataError: the row is damaged.
    """
    tokens, labels = dataset.text(row)
    record = dataset.samples[row]
    first, count = int(record["first_image"]), int(record["num_images"])
    images = list(range(first, first + count))
    plans = [dataset.image_plan(image) for image in images]
    owners = [number for number, plan in enumerate(plans) for _ in range(plan.tiles)]
    if tokenizer is None:
        pieces = _ids(tokens, labels, owners)
    else:
        pieces = _with_roles(list(_decoded(tokens, labels, owners, tokenizer)), dataset.info.template)
    return RowLayout(
        row=row,
        name=dataset.sample_name(row),
        pieces=pieces,
        images=images,
        image_tokens=[plan.rows for plan in plans],
        text_length=int(record["text_length"]),
        length=int(record["length"]),
        labels=int(record["labels"]),
        drawn=[dataset.drawn(image) for image in images],
    )


def escaped(text: str) -> str:
    """A text with its unprintable characters as escapes."""
    return "".join(one if one.isprintable() or one == "\n" else _escape(one) for one in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _ids(tokens: NDArray[np.int64], labels: NDArray[np.int64], owners: list[int]) -> list[Piece]:
    """Pieces that show token ids. Roles need the text, so tokens that train get the role assistant, and others user.

    `owners` has the image of each placeholder.
    """
    pieces, image = [], 0
    for token, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        trains = label != IGNORE_INDEX
        role: Role = "assistant" if trains else "user"
        if token == IMAGE_TOKEN_ID:
            pieces.append(Piece(_placeholder(owners[image], trains), role, trains, owners[image]))
            image += 1
        else:
            pieces.append(Piece(f"{token} ", role, trains))
    return pieces


def _placeholder(image: int, drawn: bool) -> str:
    return f"[image {image + 1}{', to draw' if drawn else ''}]"


def _decoded(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], owners: list[int], tokenizer: TextTokenizer
) -> Iterator[tuple[str, bool, int | None, int]]:
    """Text, whether it trains, image and number of tokens of each piece."""
    data, data_tokens, data_trains, image = b"", 0, False, 0
    for token, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        trains = label != IGNORE_INDEX
        if data and (token == IMAGE_TOKEN_ID or trains != data_trains):
            yield _broken(data), data_trains, None, data_tokens
            data, data_tokens = b"", 0
        if token == IMAGE_TOKEN_ID:
            yield _placeholder(owners[image], trains), trains, owners[image], 1
            image += 1
            continue
        # A character may be spread over several tokens: they are one piece.
        one = tokenizer.token_bytes(token)
        if data and (_text(data + one) is None and _text(one) is not None):
            yield _broken(data), data_trains, None, data_tokens
            data, data_tokens = b"", 0
        data, data_tokens, data_trains = data + one, data_tokens + 1, trains
        text = _text(data)
        if text is not None or data_tokens == _MAX_TOKENS_OF_CHARACTER:
            yield _broken(data) if text is None else escaped(text), trains, None, data_tokens
            data, data_tokens = b"", 0
    if data:
        yield _broken(data), data_trains, None, data_tokens


def _text(data: bytes) -> str | None:
    """The text of bytes, if they are UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _broken(data: bytes) -> str:
    """Bytes that are not UTF-8: whole characters of them, and \\xff byte by byte."""
    text = data.decode("utf-8", errors="surrogateescape")
    return "".join(
        f"\\x{ord(one) - 0xDC00:02x}" if "\udc80" <= one <= "\udcff" else escaped(one) for one in text
    )


def _with_roles(pieces: list[tuple[str, bool, int | None, int]], template: str) -> list[Piece]:
    """Add the role to each piece. It follows from which tokens train; a "USER:" inside an answer is plain text."""
    roles: list[Role] = ["assistant" if trains else "user" for _, trains, _, _ in pieces]
    found = templates().get(template)
    if found is not None and found.question is not None and found.answer is not None:
        question, answer = (form.header.rstrip() for form in (found.question, found.answer))
        behind = re.escape(found.answer.empty + found.question.header)
        answer_header = re.compile(f"{re.escape(found.answer.header)}(?={behind})|{re.escape(answer)}\\s*$")
        starts = np.cumsum([0, *(len(text) for text, _, _, _ in pieces)]).tolist()
        whole = "".join(text for text, _, _, _ in pieces)
        end = _system_end(whole, found.default_system, question)
        begin = 0
        while begin < len(pieces):  # runs of pieces that all train, or all do not
            stop = begin
            while stop < len(pieces) and pieces[stop][1] == pieces[begin][1]:
                stop += 1
            if not pieces[begin][1]:
                text = whole[starts[begin] : starts[stop]]
                for match in answer_header.finditer(text):
                    low, high = starts[begin] + match.start(), starts[begin] + match.end()
                    for number in range(begin, stop):
                        if low < starts[number + 1] and starts[number] < high:
                            roles[number] = "assistant"
            begin = stop
        for number, start in enumerate(starts[:-1]):
            if start < end:
                roles[number] = "system"
    return [
        Piece(text, role, trains, image, tokens)
        for (text, trains, image, tokens), role in zip(pieces, roles, strict=True)
    ]


def _system_end(text: str, default: str, header: str) -> int:
    """Where the system prompt of a row ends: the template's default one, or the row's own, up to its question."""
    published, question = text.find(default), text.find(header)
    if published >= 0 and not 0 <= question < published:
        return published + len(default)
    return max(question, 0)
