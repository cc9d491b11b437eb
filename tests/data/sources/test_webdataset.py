"""Tar shards as img2dataset writes them and as SA-1B is published, and what is wrong with others."""

from __future__ import annotations

import io
import json
import random
import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.tar import members
from megatron_eve.data.sources.webdataset import WebdatasetSource
from tests.data.helpers import encoded, picture

JPEG = encoded(picture(32, 24), "JPEG")
PNG = encoded(picture(20, 20), "PNG")
ANN = {"url": "https://example.com/ann.jpg", "caption": "a red car", "key": "000000000", "status": "success"}
ANN |= {"error_message": None, "width": 256, "height": 192, "original_width": 640, "original_height": 480}
ANN |= {
    "exif": "{}",
    "sha256": "ab" * 32,
    "NSFW": "UNLIKELY",
    "similarity": 0.31,
    "LICENSE": "?",
    "punsafe": 0.01,
}


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *found: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for info, data in found:
            archive.addfile(info, io.BytesIO(data))
    return path


def row_of(key: str, **meta: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [
        member(f"{key}.jpg", JPEG),
        member(f"{key}.txt", b"a red car"),
        member(f"{key}.json", json.dumps(ANN | {"key": key} | meta).encode()),
    ]


def read(*files: Path) -> list[Record | str]:
    """Records, and reasons of the rows that are none; read from another instance, as workers do."""
    worker = WebdatasetSource(files, None)
    found: list[Record | str] = []
    for row in WebdatasetSource(files, None).rows():
        try:
            found.append(worker.record(row))
        except SkipRow as skip:
            assert skip.reason in REASONS
            found.append(skip.reason)
    return found


def test_a_shard_of_img2dataset(tmp_path: Path) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    shard = write_tar(
        folder / "00000.tar", *row_of("000000000"), *row_of("000000001", url="https://example.com/b.jpg")
    )
    rows = list(WebdatasetSource([shard], None).rows())
    assert [(row.file, row.number, row.problem) for row in rows] == [
        (str(shard), 1, None),
        (str(shard), 2, None),
    ]
    first, second = read(shard)
    assert first == Record(
        id="000000000",
        source="laion/00000.tar",
        kind="pair",
        images=[ImageFile(JPEG, "000000000.jpg", None)],
        turns=[{"from": "gpt", "value": "<image>a red car"}],
        meta={
            "url": "https://example.com/ann.jpg",
            "width": 256,
            "height": 192,
            "original_width": 640,
            "original_height": 480,
            "sha256": "ab" * 32,
            "NSFW": "UNLIKELY",
            "similarity": 0.31,
            "LICENSE": "?",
            "punsafe": 0.01,
        },
    )
    assert isinstance(second, Record) and second.meta["url"] == "https://example.com/b.jpg"


def test_a_shard_of_sa1b_is_pictures_alone_and_its_masks_are_not_read(tmp_path: Path) -> None:
    image = {"image_id": 7, "width": 32, "height": 24, "file_name": "sa_7.jpg"}
    # A JSON that is broken in its masks, beyond any size that is read whole.
    text = json.dumps({"image": image, "annotations": []})[:-2].encode() + b'{"x": ' * 4_000_000
    shard = write_tar(tmp_path / "sa_000000.tar", member("sa_7.jpg", JPEG), member("sa_7.json", text))
    (record,) = read(shard)
    assert record == Record(
        id="sa_7",
        source=f"{tmp_path.name}/sa_000000.tar",
        kind="pair",
        images=[ImageFile(JPEG, "sa_7.jpg", None)],
        turns=[{"from": "gpt", "value": "<image>"}],
        meta=image,
    )


def test_names_directories_and_headers_of_every_kind(tmp_path: Path) -> None:
    long = "x" * 120 + "/" + "y" * 150
    found = [
        member("./", type=tarfile.DIRTYPE),
        member("LICENSE", b"CC"),
        member("./._one.jpg", b"resource fork"),
        member("./one.JPG", JPEG),
        member("./one.seg.png", PNG),
        member("./one.txt", "\ufeffä <image>".encode()),
        member(f"{long}.png", PNG, mtime=1.5, pax_headers={"comment": "ü"}),
        member(f"{long}.json", b'{"caption": "from the json", "similarity": NaN}'),
    ]
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        one, two = read(write_tar(tmp_path / f"{number}.tar", *found, form=form))
        assert isinstance(one, Record) and isinstance(two, Record)
        assert (one.id, one.images[0].path, one.turns[0]["value"]) == ("one", "one.JPG", "<image>ä <IMAGE>")
        assert (two.id, two.images[0].data, two.meta) == (long, PNG, {})
        assert two.turns == [{"from": "gpt", "value": "<image>from the json"}]
        # The very members that Python's own reader finds.
        with tarfile.open(tmp_path / f"{number}.tar") as archive:
            expected = [(info.name, info.offset_data, info.size) for info in archive if info.isfile()]
        ours = [(name, at, size) for name, at, size, _ in members(tmp_path / f"{number}.tar")]
        assert ours == [(name.removeprefix("./"), at, size) for name, at, size in expected]
    prefix = write_tar(
        tmp_path / "u.tar", member("d" * 90 + "/" + "f" * 50 + ".jpg", JPEG), form=tarfile.USTAR_FORMAT
    )
    assert [found.name for found in members(prefix)] == ["d" * 90 + "/" + "f" * 50 + ".jpg"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([member("a.txt", b"x"), member("a.json", b"{}")], ["key_without_picture"]),
        ([member("a.jpg", JPEG), member("a.png", PNG)], ["key_twice"]),
        ([member("a.jpg", JPEG), member("a.jpg", JPEG)], ["key_twice"]),
        ([member("a.jpg", JPEG), member("a.txt", b"x"), member("a.txt", b"y")], ["key_twice"]),
        (
            [member("a.jpg", JPEG), member("b.jpg", JPEG), member("a.txt", b"x"), member("b.txt", b"y")],
            [Record, Record, "key_without_picture", "key_without_picture"],
        ),
        ([member("/etc/a.jpg", JPEG)], ["member_outside"]),
        ([member("../a.jpg", JPEG)], ["member_outside"]),
        ([member("a/../../a.jpg", JPEG)], ["member_outside"]),
        (
            [member("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("a.txt", b"x")],
            ["member_not_a_file"],
        ),
        ([member("a.jpg", type=tarfile.LNKTYPE, linkname="b.jpg")], ["member_not_a_file"]),
        ([member("a.jpg", type=tarfile.CHRTYPE)], ["member_not_a_file"]),
        ([member("a.jpg", type=tarfile.FIFOTYPE)], ["member_not_a_file"]),
        ([member("latest", type=tarfile.SYMTYPE, linkname="a.jpg")], ["member_not_a_file"]),
        ([member("a.jpg", JPEG), member("a.txt", b"\xff\xfe")], ["text_not_unicode"]),
        ([member("a.jpg", JPEG), member("a.json", b'{"caption": "\\ud83d"}')], ["text_not_unicode"]),
        ([member("a.jpg", JPEG), member("a.json", b'{"caption": 7}')], ["value_not_text"]),
        ([member("a.jpg", JPEG), member("a.json", b"{")], ["broken_json"]),
        ([member("a.jpg", JPEG), member("a.json", b"[" * 100_000)], ["broken_json"]),
        ([member("a.jpg", JPEG), member("a.json", b'{"image": ' * 100_000)], ["broken_json"]),
        ([member("a.jpg", JPEG), member("a.json", b"")], ["broken_json"]),
        ([member("a.jpg", JPEG), member("a.json", b"[]")], ["not_an_object"]),
        ([member("a.jpg", JPEG), member("a.txt", b"x" * (1 << 24) + b"x")], ["member_too_large"]),
        ([member("a.jpg", JPEG), member("a.json", b" " * (1 << 24) + b"{}")], ["member_too_large"]),
        (row_of("a", status="failed_to_download", error_message="404"), ["download_failed"]),
        ([member("a.jpg", JPEG), member("a.json", b'{"status": "success", "caption": null}')], [Record]),
    ],
)
def test_rows_that_are_left_out_and_their_neighbours(
    tmp_path: Path, found: list[tuple[tarfile.TarInfo, bytes]], expected: list[object]
) -> None:
    shard = write_tar(tmp_path / "0.tar", *row_of("000"), *found, *row_of("zzz"))
    results = [Record if isinstance(result, Record) else result for result in read(shard)]
    assert results == [Record, *expected, Record]


def test_a_picture_of_2_gib_is_left_out_before_it_is_read(tmp_path: Path) -> None:
    size = 1 << 31
    info, _ = member("a.jpg")
    info.size = size
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + size + 1024)
    assert read(path) == ["image_file_too_large"]


def test_the_size_of_a_pax_header_counts(tmp_path: Path) -> None:
    """As it does for members of 8 GiB and more, whose own header has no room for it."""
    info, _ = member("a.jpg", pax_headers={"size": str(len(JPEG))})
    data = info.tobuf(format=tarfile.PAX_FORMAT) + JPEG + bytes(-len(JPEG) % 512 + 1024)
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    (record,) = read(path)
    assert isinstance(record, Record) and record.images[0].data == JPEG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"type": b"S"},
            "'a.jpg' is stored as a sparse or split file.*: make the archive again with tar --format",
        ),
        ({"pax_headers": {"GNU.sparse.major": "1"}}, "'a.jpg' is stored as a sparse or split file"),
        ({"type": b"M"}, "'a.jpg' is stored as a sparse or split file"),
        ({"pax_headers": {"comment": "x" * (1 << 20)}}, r"is damaged at byte 512 \(a header of \d+ bytes\)"),
        ({"pax_headers": {"size": "-1"}}, r"is damaged at byte \d+ \(a pax header has the size b'-1'\)"),
    ],
)
def test_headers_that_stop_the_command(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write_tar(tmp_path / "0.tar", *row_of("000"), form=tarfile.PAX_FORMAT)
    path.write_bytes(member("a.jpg", **fields)[0].tobuf(format=tarfile.PAX_FORMAT) + path.read_bytes())
    with pytest.raises(DataError, match=f"0.tar:? {message}"):
        read(path)


def broken(path: Path, change: str) -> None:
    """Damage a shard of two rows."""
    data = bytearray(write_tar(path, *row_of("a"), *row_of("b")).read_bytes())
    body = 512 + -(-len(JPEG) // 512) * 512
    if change == "1 TB":
        info, _ = member("a.jpg")
        info.size = 1 << 40
        data[:512] = info.tobuf(format=tarfile.GNU_FORMAT)
    elif change == "no end":
        data = data.rstrip(b"\0")
        data += bytes(-len(data) % 512)
        data += b"x" * 512
    elif change == "size":
        data[124:136] = b"-----------\0"
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    elif change == "header":
        data[body + 3] ^= 0x40
    elif change == "other":
        data = bytearray(b"PK\x03\x04" + bytes(2000))
    elif change == "empty":
        data = bytearray()
    else:
        data = data[: int(change)]
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("1 TB", r"breaks off: 'a.jpg' at byte 0 says that it has 1099511627776 bytes"),
        ("size", r"is damaged at byte 0 \(a member has the size "),
        ("header", r"is damaged at byte 1536 \(there is no header of a member\)"),
        ("no end", "breaks off: it does not end with the empty blocks"),
        ("700", "breaks off"),
        ("512", "breaks off"),
        ("100", "is not a tar archive"),
        ("other", "is not a tar archive"),
        ("empty", "is empty; copy or download it again"),
    ],
)
def test_an_archive_that_breaks_off_stops_the_command(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "0.tar"
    broken(path, change)
    with pytest.raises(DataError, match=f"0.tar {message}"):
        read(path)


def test_a_broken_shard_is_found_before_the_first_row(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "0.tar", *row_of("a"))
    broken(tmp_path / "1.tar", "700")
    with pytest.raises(DataError, match=r"1\.tar breaks off"):
        next(WebdatasetSource([whole, tmp_path / "1.tar"], None).rows())
    with pytest.raises(DataError, match=r"cannot open .*2\.tar \(No such file"):
        next(WebdatasetSource([whole, tmp_path / "2.tar"], None).rows())


def test_position_goes_to_the_end_and_a_changed_archive_is_a_row_problem(tmp_path: Path) -> None:
    files = [write_tar(tmp_path / f"{number}.tar", *row_of("a"), *row_of("b")) for number in range(2)]
    source = WebdatasetSource(files, None)
    places, rows = [], []
    for row in source.rows():
        places.append(source.position)
        rows.append(row)
    assert places == sorted(set(places)) and source.position == source.num_bytes
    assert [(row.file, row.number) for row in rows] == [(str(file), n) for file in files for n in (1, 2)]
    files[1].write_bytes(b"")
    with pytest.raises(SkipRow, match="image_unreadable"):
        source.record(rows[3])
    files[0].unlink()
    with pytest.raises(SkipRow, match="image_unreadable"):
        WebdatasetSource(files, None).record(rows[0])


@pytest.mark.parametrize("seed", range(8))
def test_any_damage_is_said_in_a_sentence(tmp_path: Path, seed: int) -> None:
    """Bytes changed at random, mostly in headers, whose checksums are then made right: never another exception."""
    rng = random.Random(seed)
    long = member("x" * 120 + "/" + "y" * 150 + ".jpg", JPEG, mtime=1.5)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) * 20:
        path = write_tar(tmp_path / "0.tar", *row_of("000"), long, *row_of("001"), form=form)
        data = bytearray(path.read_bytes())
        headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        for _ in range(rng.randint(1, 4)):
            fields = [(0, 100), (124, 136), (156, 157), (257, 265), (345, 500), (512, 600)]
            data[rng.choice(headers) + rng.randrange(*rng.choice(fields))] = rng.randrange(256)
        for at in headers:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
        try:
            read(path)
        except DataError as error:
            assert "0.tar" in str(error) and "\n" not in str(error)


def test_a_shard_of_one_key_does_not_fill_the_memory(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", *(member(f"a.{number}") for number in range(5000)), *row_of("b"))
    tracemalloc.start()
    found = read(shard)
    assert tracemalloc.get_traced_memory()[1] < 600_000
    tracemalloc.stop()
    assert found[0] == "key_without_picture" and isinstance(found[1], Record)


def test_the_parent_reads_headers_alone(tmp_path: Path) -> None:
    """No member is read in the parent, so its time and its memory do not grow with pictures or with rows."""
    data = [member(f"{number:09}.{suffix}", b"\0" * (40_000 if suffix == "jpg" else 300))
            for number in range(2000) for suffix in ("jpg", "txt", "json")]  # fmt: skip
    shard = write_tar(tmp_path / "0.tar", *data)
    source = WebdatasetSource([shard], None)
    begin = time.process_time()
    assert sum(1 for _ in source.rows()) == 2000
    cost = (time.process_time() - begin) / 2000
    assert cost < 0.4e-3, f"{cost * 1e3:.3f} ms a row"  # 0.026 on an idle core
    tracemalloc.start()
    for _ in source.rows():
        pass
    assert tracemalloc.get_traced_memory()[1] < 300_000
    tracemalloc.stop()
