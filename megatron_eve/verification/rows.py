"""Checks ids and labels of rows of text against those of golden cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from megatron_eve.data.schema import ImageFile, Kind, Record
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.models.family import ModelFamily
from megatron_eve.verification.results import CheckResult, equal


def check_rows(family: ModelFamily, folder: Path) -> Iterator[CheckResult]:
    """Rows of text of a case: ids and labels, the number that differ. The first label is never predicted.

    Args:
        family: whose golden cases have the form of this folder.
        folder: the case.
    """
    for row in family.golden().rows(folder):
        tokenizer = load_tokenizer(row.tokenizer, family.text_rules.tokenizer_legacy)
        images = [ImageFile(b"")] * row.pictures
        record = Record(row.name, "", cast(Kind, row.kind), images, row.turns)
        encoded = encode_record(record, tokenizer, row.template)
        yield equal(f"{row.name}: ids", _differences(encoded.tokens, row.tokens))
        yield equal(f"{row.name}: labels", _differences(encoded.labels[1:], row.labels[1:]))


def _differences(ours: list[int], golden: list[int]) -> int:
    return abs(len(ours) - len(golden)) + sum(a != b for a, b in zip(ours, golden, strict=False))
