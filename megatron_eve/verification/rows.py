"""Checks ids and labels of rows of text against those of golden cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from megatron_eve.data.schema import ImageFile, Kind, Record
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.data.text.prompts import drawing_prompt, encode_prompt, encode_text
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.family import ModelFamily
from megatron_eve.models.golden_format import GoldenRow
from megatron_eve.verification.results import CheckResult, equal


def check_rows(family: ModelFamily, folder: Path) -> Iterator[CheckResult]:
    """Rows of text of a case: ids and labels, the number that differ. The first label is never predicted.

    Args:
        family: whose golden cases have the form of this folder.
        folder: the case.
    """
    for row in family.golden().rows(folder):
        rules = family.text_rules
        tokenizer = load_tokenizer(row.tokenizer, rules.tokenizer_legacy, rules.added_tokens)
        if row.prompt:
            yield equal(f"{row.name}: ids", _differences(_prompt_ids(row, tokenizer), row.tokens))
            continue
        images = [ImageFile(b"")] * row.pictures
        kind = cast(Kind, row.kind)
        record = Record(
            row.name, "", kind, images, row.turns, drawn=row.drawn or False, is_video=row.is_video
        )
        encoded = encode_record(record, tokenizer, row.template)
        yield equal(f"{row.name}: ids", _differences(encoded.tokens, row.tokens))
        yield equal(f"{row.name}: labels", _differences(encoded.labels[1:], row.labels[1:]))


def _prompt_ids(row: GoldenRow, tokenizer: TextTokenizer) -> list[int]:
    [turn] = row.turns
    if row.prompt == "text":
        return encode_prompt(turn["value"], tokenizer, row.template, row.pictures)
    text = drawing_prompt(turn["value"], row.template, video=row.prompt == "video")
    return encode_text(text, tokenizer, row.template)


def _differences(ours: list[int], golden: list[int]) -> int:
    return abs(len(ours) - len(golden)) + sum(a != b for a, b in zip(ours, golden, strict=False))
