"""A JSON array and JSON lines are one reader: the same rows, and the same reasons, from both."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.sources import json_reader
from megatron_eve.data.sources.fields import parse_json
from megatron_eve.data.sources.json_reader import JsonReader
from tests.data.helpers import MakeConfig, caption_row, run


def read(path: Path) -> list[tuple[int, str, str | None]]:
    """Number, value and problem of each row; `repr` tells NaN and halves of surrogate pairs apart."""
    with JsonReader(path) as reader:
        return [(number, *parsed(text)) for number, text in reader.texts()]


def parsed(text: bytes) -> tuple[str, str | None]:
    try:
        return repr(parse_json(text)), None
    except SkipRow as skip:
        return "None", skip.detail


def both_ways(folder: Path, texts: list[str | bytes], between: str = ",", before: bytes = b"") -> Any:
    """The same rows as lines and as an array; the two answers must be one."""
    encoded = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in texts]
    lines, array = folder / "rows.jsonl", folder / "rows.json"
    lines.write_bytes(before + b"".join(text + b"\r\n" for text in encoded))
    array.write_bytes(before + b"[" + between.encode().join(encoded) + b"]\n")
    found = read(lines)
    assert read(array) == found
    return found


ODD = [
    '{"width": NaN, "score": -Infinity, "big": Infinity}',
    '{"n": 1e400, "m": -1e-400, "k": 123456789012345678901234567890}',
    "1" * 5000,  # more digits than Python takes
    '{"a": "\\ud83d", "b": "\\ude00 x", "c": "\\ud83d\\ude00", "d": "\\ude00\\ud83d"}',
    '{"a": "\ud83d", "b": "\U0001f600"}',  # half of a pair in the bytes
    '{"a": 1, "a": 2}',
    '{"a": "x]},[{\\"\\\\"}',
    '"\\\\\\""',
    "[" * 100_000 + "]" * 100_000,
    '{"": {}, "x": [[], {}, [1, [2]]]}',
    "null",
    "true",
    "-0.0",
    '{"a": b}',
    '{"a" 1}',
    '{"a": "\x01"}',
    '"\\x"',
    "tru",
    "1 2",
    '{"a": 1} {"b": 2}',
    '{"a": 1,}',
    "[1,]",
    "-",
    "+1",
    "01",
    "'x'",
    b'{"a": "\xff\xfe"}',
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
TEXTS = st.sampled_from(ODD) | st.builds(json.dumps, VALUES, ensure_ascii=st.booleans())


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(TEXTS, max_size=5),
    between=st.sampled_from([",", ",\n", " ,\r\n\t", ", , "]),
    before=st.sampled_from([b"", b"\xef\xbb\xbf", b" \n"]),
    chunk=st.sampled_from([1, 7, 1 << 16]),
)
def test_an_array_is_read_as_lines_are(
    texts: list[str | bytes], between: str, before: bytes, chunk: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_CHUNK", chunk)
        found = both_ways(Path(folder), texts, between, b"" if before == b" \n" else before)
    assert len(found) == len(texts)


def test_what_is_taken_and_what_is_not(tmp_path: Path) -> None:
    found = both_ways(tmp_path, ODD)
    taken = [number - 1 for number, _, problem in found if problem is None]
    assert taken == [0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    with JsonReader(tmp_path / "rows.json") as reader:
        values = [parse_json(text) if number - 1 in taken else None for number, text in reader.texts()]
    assert values[0] == {"width": None, "score": None, "big": None}
    assert values[1] == {"n": math.inf, "m": 0.0, "k": 123456789012345678901234567890}
    assert values[3] == {"a": "\ud83d", "b": "\ude00 x", "c": "\U0001f600", "d": "\ude00\ud83d"}
    assert values[4] == {"a": "\ud83d", "b": "\U0001f600"}
    assert values[5] == {"a": 2}


def test_blank_lines_and_commas_with_nothing_between_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n[1, , 2,\n]\n\n")
    (tmp_path / "b.jsonl").write_text("\n1\n \t\r\n2")
    assert [row[1] for row in read(tmp_path / "a.json")] == ["1", "2"]
    assert read(tmp_path / "b.jsonl") == [(2, "1", None), (4, "2", None)]


@pytest.mark.parametrize("name", ["a.json", "b.jsonl"])
def test_a_row_without_an_end_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(json_reader, "_MAX_TEXT", 1 << 20)
    path = tmp_path / name
    path.write_text('[1, "' + "x, " * 1_000_000 if name == "a.json" else "1\n" + "x" * 3_000_000)
    with pytest.raises(
        DataError, match=rf"{name}, row 2: .*more than 1 MiB; a quote or a bracket may be missing"
    ):
        read(path)


@pytest.mark.parametrize(
    ("change", "kept", "skipped"),
    [
        ([{"width": math.nan}], 3, {}),
        ([{"score": -math.inf}, {"big": math.inf}], 3, {}),
        (
            [{"conversations": "\ude00 on a lake"}, {"conversations": "a clock \ud83d"}],
            1,
            {"text_not_unicode": 2},
        ),
    ],
)
def test_both_make_the_same_dataset(
    make_config: MakeConfig, change: list[dict[str, Any]], kept: int, skipped: dict[str, int]
) -> None:
    """Rows as json.dump writes tables with gaps, and captions that were cut in the middle of an emoji."""
    made = [caption_row(number, "ok.jpg") for number in range(3)]
    for row, field in zip(made[1:], change, strict=False):
        if "conversations" in field:
            row["conversations"][1]["value"] = field["conversations"]
        else:
            row |= field
    found = []
    for lines in (True, False):
        config = make_config(
            made, lines=lines, output_prefix=str(Path(make_config([]).output_prefix)) + str(lines)
        )
        info = run(config)
        assert (info.num_samples, info.skipped) == (kept, skipped)
        found.append(Path(f"{config.output_prefix}_text.bin").read_bytes())
    assert found[0] == found[1]
