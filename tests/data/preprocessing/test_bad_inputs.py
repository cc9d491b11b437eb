"""Bad inputs of every layout: rows that are skipped and counted, files that are refused in a sentence."""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
import json
import os
import random
import re
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pyarrow.parquet import encryption

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.sources.parquet import ParquetSource
from megatron_eve.data.sources.recognise import open_source
from tests.data.helpers import MakeConfig, caption_row, encoded, picture, run, skipped_rows, text_row
from tests.data.preprocessing.test_preprocess_command import flags, load_tool

JPEG = encoded(picture(40, 30), "JPEG")
CAPTIONS = ["A car.", "A cat.", "A dog."]


def strings(*values: bytes, kind: Any = None) -> pyarrow.Array:
    """A column of text whose bytes nobody has checked, as C++ and Java write them."""
    ends = [sum(map(len, values[:number])) for number in range(len(values) + 1)]
    buffers = [
        None,
        pyarrow.py_buffer(struct.pack(f"<{len(ends)}i", *ends)),
        pyarrow.py_buffer(b"".join(values)),
    ]
    return pyarrow.Array.from_buffers(kind or pyarrow.string(), len(values), buffers)


def record_columns(**change: Any) -> dict[str, Any]:
    """Three rows of the exchange format."""
    images = [[{"bytes": JPEG, "path": None, "sha256": None}]] * 3
    turns = [[{"from": "gpt", "value": "<image>A car."}]] * 3
    return {"kind": ["pair"] * 3, "images": images, "turns": turns, "source": ["coyo"] * 3} | change


def deep(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


def of_parquet(make_config: MakeConfig, tmp_path: Path, columns: Any, **options: Any) -> PreprocessConfig:
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "a.parquet", **options)
    return make_config([], input=str(tmp_path / "a.parquet"), image_root=None)


@pytest.mark.parametrize(
    ("change", "skipped"),
    [
        ({"caption": strings(b"A car.", b"caf\xe9", b"A dog.")}, {"text_not_unicode": 1}),
        ({"url": strings(b"http://a", b"\xff", b"http://c")}, {"text_not_unicode": 1}),
        ({"id": pyarrow.array([0, 2**62, 1], pyarrow.timestamp("us"))}, {"parquet_row": 1}),
        ({"id": pyarrow.array([0, 2**62, 1], pyarrow.duration("s"))}, {"parquet_row": 1}),
        ({"caption": pyarrow.array(["A car.", "x" * 10_000_000, "A dog."])}, {"text_too_long": 1}),
        ({"caption": pyarrow.array(["A car.", None, "A dog."])}, {"nothing_to_train": 1}),
        ({"image": [JPEG, None, JPEG]}, {"parquet_row": 1}),
        ({"image": [[JPEG], [], [JPEG]]}, {"parquet_row": 1}),
        ({"image": [JPEG, b"<!DOCTYPE html><html>404</html>", JPEG]}, {"image_format": 1}),
        ({"image": [{"bytes": JPEG}, {"bytes": b""}, {"bytes": JPEG}]}, {"image_empty": 1}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_rows_of_parquet_that_are_left_out_and_their_neighbours(
    make_config: MakeConfig, tmp_path: Path, change: dict[str, Any], skipped: dict[str, int]
) -> None:
    config = of_parquet(make_config, tmp_path, {"image": [JPEG] * 3, "caption": CAPTIONS} | change)
    info = run(config)
    assert (info.num_samples, info.skipped) == (2, skipped)
    assert [row["row"] for row in skipped_rows(config)] == [2]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": [[[JPEG]]] * 3, "caption": CAPTIONS}, "parquet_row"),
        ({"image": [{"bytes": {"x": JPEG}}] * 3, "caption": CAPTIONS}, "parquet_row"),
        ({"image": [5] * 3, "caption": CAPTIONS}, "parquet_row"),
        ({"image": [JPEG] * 3, "caption": [datetime.date(2020, 1, 1)] * 3}, "value_not_text"),
        ({"image": [JPEG] * 3, "caption": [["A car."]] * 3}, "value_not_text"),
        ({"conversations": CAPTIONS}, "no_conversation"),
        ({"conversations": [[1]] * 3}, "no_conversation"),
        (
            {"conversations": pyarrow.array([[("from", "gpt")]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.string()))},
            "no_conversation",
        ),
        ({"kind": [1] * 3, "images": [1] * 3, "turns": [1] * 3}, "parquet_row"),
        (record_columns(meta=[b"{}"] * 3), "parquet_row"),
        (record_columns(meta=[deep(10_000)] * 3), "broken_json"),
        (record_columns(source=[7] * 3), "parquet_row"),
        (record_columns(images=[[{"bytes": JPEG, "sha256": 7}]] * 3), "parquet_row"),
        (record_columns(images=[None] * 3), "parquet_row"),
        (record_columns(turns=[None] * 3), "no_conversation"),
    ],
)  # fmt: skip
def test_columns_of_other_types_are_said(
    make_config: MakeConfig, tmp_path: Path, columns: dict[str, Any], reason: str
) -> None:
    with pytest.raises(
        DataError, match=rf"no row of .*a.parquet can be used \(3 skipped\).*\n +3  {reason}: "
    ):
        run(of_parquet(make_config, tmp_path, columns))


def test_struct_fields_of_one_name_are_said(make_config: MakeConfig, tmp_path: Path) -> None:
    image = pyarrow.StructArray.from_arrays([pyarrow.array([JPEG] * 3)] * 2, names=["bytes", "bytes"])
    with pytest.raises(
        DataError, match=r"3  parquet_row: [^\n]*\n +to do: [^\n]*\n[^\n]*image: .*duplicate field names"
    ):
        run(of_parquet(make_config, tmp_path, {"image": image, "caption": CAPTIONS}))


@pytest.mark.parametrize("kind", ["dictionary", "large", "view"])
def test_columns_of_other_encodings_are_read(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    images, captions, licenses = (
        pyarrow.array([JPEG] * 3),
        pyarrow.array(CAPTIONS),
        pyarrow.array(["cc0"] * 3),
    )
    if kind == "dictionary":
        images, captions, licenses = (column.dictionary_encode() for column in (images, captions, licenses))
    else:
        binary = {"large": pyarrow.large_binary(), "view": pyarrow.binary_view()}[kind]
        text = {"large": pyarrow.large_string(), "view": pyarrow.string_view()}[kind]
        images, captions, licenses = images.cast(binary), captions.cast(text), licenses.cast(text)
    info = run(of_parquet(make_config, tmp_path, {"image": images, "caption": captions, "license": licenses}))
    assert (info.num_samples, info.licenses) == (3, {"cc0": 3})


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_parquet_is_said_in_a_sentence(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    table = pyarrow.table({"image": [JPEG[:200]] * 50, "caption": ["A car."] * 50, "url": ["x"] * 50})
    for _ in range(60):
        parquet.write_table(table, tmp_path / "a.parquet", compression=rng.choice(["none", "snappy", "zstd"]))
        data = bytearray((tmp_path / "a.parquet").read_bytes())
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(rng.choice([0, footer]), len(data))] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(data)
        source = ParquetSource([tmp_path / "a.parquet"])
        try:
            for row in source.rows():
                with contextlib.suppress(SkipRow):
                    source.record(row)
        except DataError as error:
            assert "a.parquet" in str(error) and "\n" not in str(error)


def test_parquet_without_rows(make_config: MakeConfig, tmp_path: Path) -> None:
    table = pyarrow.table({"image": [JPEG], "caption": ["A car."]})
    config = of_parquet(make_config, tmp_path, table.slice(0, 0))
    for groups in (1, 0):
        assert parquet.read_metadata(tmp_path / "a.parquet").num_row_groups == groups
        with pytest.raises(DataError, match=r"no row of .*\(0 skipped\); no dataset was written.$"):
            run(config)
        parquet.ParquetWriter(tmp_path / "a.parquet", table.schema).close()


class Keys(encryption.KmsClient):  # type: ignore[misc]
    """Keeps keys as they are."""

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_encrypted_parquet(make_config: MakeConfig, tmp_path: Path, plaintext_footer: bool) -> None:
    table = pyarrow.table({"image": [JPEG], "caption": ["A car."]})
    asked = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["caption"]}, plaintext_footer=plaintext_footer
    )
    factory = encryption.CryptoFactory(lambda _: Keys())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), asked)
    config = of_parquet(make_config, tmp_path, table, encryption_properties=properties)
    with pytest.raises(DataError, match=r"a.parquet.*decrypt.* it is encrypted, write it again without that"):
        run(config)


@pytest.mark.parametrize(
    ("change", "reason", "workers"),
    [
        ({"deep": json.loads(deep(900))}, None, 1),
        ({"id": 10**4000}, None, 1),
        ({"id": "a\0b", "license": "\ud83d", "\ud83d": 1}, None, 1),
        ({"id": {"a": [1]}}, None, 1),
        ({"image": "\ud83d.jpg"}, "image_field", 1),
        ({"image": "ok.jpg\0"}, "image_field", 1),
        ({"image": "x" * 5000}, "image_unreadable", 1),
        ({"image": "."}, "image_not_a_file", 1),
        ({"conversations": [{"from": ["human"], "value": {}}]}, "unknown_role", 1),
        ({"conversations": caption_row(0, "", "x" * 10_000_000)["conversations"]}, "text_too_long", 2),
        ({"conversations": caption_row(0, "", "A\0car.")["conversations"]}, None, 1),
        ({"conversations": caption_row(0, "", "half \ud83d")["conversations"]}, "text_not_unicode", 1),
    ],
)  # fmt: skip
def test_rows_of_json_and_their_neighbours(
    make_config: MakeConfig, tmp_path: Path, change: dict[str, Any], reason: str | None, workers: int
) -> None:
    (tmp_path / "out.txt").write_text("nothing\n")  # so that all of the metadata is looked at
    good = caption_row(1, "ok.jpg")
    config = make_config(
        [good, good | change, good], lines=True, opt_out=str(tmp_path / "out.txt"), workers=workers
    )
    info = run(config)
    assert (info.num_samples, info.skipped) == ((3, {}) if reason is None else (2, {reason: 1}))


@pytest.mark.parametrize(
    "text", [b'{"a":' * 10_000, b"[" * 10_000 + b"]" * 10_000, b'{"id": ' + b"1" * 5000 + b"}"]
)
@pytest.mark.parametrize("lines", [True, False])
def test_json_that_python_cannot_hold(make_config: MakeConfig, text: bytes, lines: bool) -> None:
    good = json.dumps(text_row()).encode()
    config = make_config([], lines=lines, template="vicuna_v1")
    whole = good + b"\n" + text + b"\n" + good if lines else b"[" + good + b"," + text + b"," + good + b"]"
    Path(config.input).write_bytes(whole)
    if not lines and text.startswith(b'{"a":'):
        with pytest.raises(DataError, match=r"data.json, row 2: broken JSON"):
            run(config)
        return
    info = run(config)
    assert (info.num_samples, info.skipped) == (2, {"broken_json": 1})


def test_the_last_of_equal_keys_counts(make_config: MakeConfig) -> None:
    row = json.dumps(caption_row(1, "ok.jpg"))
    config = make_config(
        [row[:-1] + ', "image": "no.jpg"}\n', '{"image": "no.jpg", ' + row[1:] + "\r\n"], lines=True
    )
    info = run(config)
    assert (info.num_samples, info.skipped) == (1, {"image_missing": 1})


def tar_of(path: Path, *keys: str) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name in (f"{key}.{end}" for key in keys for end in ("jpg", "txt")):
            content = JPEG if name.endswith("jpg") else b"A car."
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def test_archives_that_cat_joined_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """tar itself stops at the end of the first, and half of the rows would be lost without a word."""
    both = tar_of(tmp_path / "0.tar", "a") + tar_of(tmp_path / "1.tar", "b")
    (tmp_path / "both.tar").write_bytes(both)
    config = make_config([], input=str(tmp_path / "both.tar"), image_root=None)
    with pytest.raises(
        DataError, match=r"both.tar has something behind its end at byte \d+, .*joined by cat: give"
    ):
        run(config)
    (tmp_path / "both.tar").write_bytes(tar_of(tmp_path / "0.tar", "a") + bytes(3 << 20))
    assert run(config).num_samples == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.tar", "a.csv", "a.parquet"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"<!DOCTYPE html><html><body>Log in</body></html>",
            "is a web page, such as a site shows instead of a file",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "is a git-lfs pointer, .*run git lfs pull",
        ),
        (b"", ""),
        (os.mkfifo, "is a pipe: give it files, which are read more than once"),
        (os.mkdir, "is a folder: name its files"),
        (lambda path: os.symlink("/dev/zero", path), "is a device: give it files"),
        (lambda path: os.symlink("/proc/self/mem", path), r"cannot open .* \(Input/output error\)"),
    ],
    ids=["page", "pointer", "empty", "pipe", "folder", "device", "unreadable"],
)
def test_files_that_no_source_reads(
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | Callable[[Path], object],
    message: str,
) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    config = make_config([])
    with pytest.raises(DataError, match=rf"{name}|no row of .*/\*"):
        run(make_config([], input=str(path.parent / "*")))
    assert load_tool().main(["--input", str(path), *flags(config)[2:]]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and name in said and "Traceback" not in said
    assert re.search(message, said), said


def test_files_that_change_while_they_are_read(make_config: MakeConfig, tmp_path: Path) -> None:
    """Cut short or gone after they were looked at: what was not read yet is said."""
    tar_of(tmp_path / "a.tar", *map(str, range(40)))
    with (tmp_path / "a.jsonl").open("w") as lines:
        lines.writelines(json.dumps(text_row()) + "\n" for _ in range(20_000))
    table = pyarrow.table({"image": [os.urandom(1 << 20)] * 64, "caption": ["A car."] * 64})
    parquet.write_table(
        table, tmp_path / "a.parquet", write_batch_size=4, use_dictionary=False, compression="none"
    )
    for name in ("a.tar", "a.jsonl", "a.parquet"):
        source = open_source([str(tmp_path / name)], None, None)
        rows = source.rows()
        next(rows)
        os.truncate(tmp_path / name, 3000)
        if name == "a.jsonl":
            (*_, last) = rows
            with pytest.raises(SkipRow, match="broken_json"):
                source.record(last)
            continue
        with pytest.raises(DataError, match=rf"{name}"):
            for row in rows:
                if name == "a.parquet":  # read by the workers
                    source.record(row)


@pytest.mark.parametrize("name", [b"a\xff.jsonl", b"a\nb.jsonl", "\u732b.jsonl".encode()])
def test_names_that_a_terminal_cannot_show(
    make_config: MakeConfig, tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_text(json.dumps(caption_row(1, "ok.jpg")) + "\n5\n")
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    config = make_config([])
    assert load_tool().main(["--input", str(path), *flags(config)[2:]]) == 0
    sys.stdout.flush()
    assert b"row 2 of " in shown.getvalue() and skipped_rows(config)[0]["file"] == str(path)
    (row,) = parquet.read_table(config.output_prefix + "_meta.parquet").to_pylist()
    assert row["source"] == f"{tmp_path.name}/" + name.decode("utf-8", "backslashreplace")


def test_a_csv_that_is_one_line(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"x," * 3_000_000)
    with pytest.raises(
        DataError, match=r"a.csv is not a CSV of OpenImages: it has a line of more than 4 MiB"
    ):
        run(make_config([], input=str(tmp_path / "a.csv")))
