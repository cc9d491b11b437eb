"""Looking at a dataset: what a row shows, its drawing, the page, and the check of all of it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont

from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.format.manifest import IMAGE_DTYPE, MANIFEST, SAMPLE_DTYPE
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.inspecting import drawing
from megatron_eve.data.inspecting.drawing import (
    MOST_LINES,
    OTHER_COLOUR,
    PLACEHOLDER_COLOUR,
    TRAINS_COLOUR,
    WIDTH,
    draw_row,
    wrap,
)
from megatron_eve.data.inspecting.inspection import draw_sample
from megatron_eve.data.inspecting.layout import Piece, RowLayout, row_layout
from megatron_eve.data.inspecting.statistics import read_statistics
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import ROOT, picture, text_row, turns

SCRIPT = "<script>alert(1)</script>"
FOREIGN = "مرحبا שלום 你好 한국 😀 👩‍👧 a\u200bb"
ROWS = [
    {"image": "a.jpg", "conversations": turns("<image>\nWhat is it?", "A red car.", "Sure?", "Yes.")},
    text_row("Say it.", FOREIGN),
    {"images": ["a.jpg", "b.png"], "conversations": turns("<image> or <image>?", f"The first {SCRIPT}.")},
    {"conversations": turns("First?", "", "Second?", "An answer with USER: in it.")},
    {"image": "b.png", "conversations": turns("<image>\nTell all.", "It is a long story. " * 300)},
    {"image": "no.png", "conversations": turns("<image>", "Nothing.")},
]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_data", ROOT / "tools" / "inspect_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """The prefix of a small dataset: a.jpg lies turned by EXIF, b.png has 20,000 bytes."""
    folder = tmp_path_factory.mktemp("inspect")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(120, 80).save(folder / "a.jpg", exif=exif)
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "b.png")
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    prefix = folder / "whole" / "set"
    config = PreprocessConfig(
        input=str(folder / "rows.json"), image_root=str(folder), tokenizer_model=str(tokenizer_path),
        output_prefix=str(prefix), template="vicuna_v1", workers=1,
    )  # fmt: skip
    preprocess(config, progress=False)
    return prefix


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The prefix of a copy that a test may damage."""
    shutil.copytree(whole.parent, tmp_path / "copy")
    return tmp_path / "copy" / "set"


def laid_out(prefix: Path, row: int, tokenizer: Tokenizer | None) -> RowLayout:
    return row_layout(open_dataset(prefix), row, tokenizer)


def said(row: RowLayout) -> list[tuple[str, bool, str]]:
    """Role, whether it trains, and text of each stretch."""
    stretches: list[tuple[str, bool, str]] = []
    for piece in row.pieces:
        if stretches and stretches[-1][:2] == (piece.role, piece.trains):
            stretches[-1] = (piece.role, piece.trains, stretches[-1][2] + piece.text)
        else:
            stretches.append((piece.role, piece.trains, piece.text))
    return stretches


class TestLayout:
    def test_roles_and_what_trains(self, whole: Path, tokenizer: Tokenizer) -> None:
        row = laid_out(whole, 0, tokenizer)
        stretches = said(row)
        assert stretches[0][0] == "system" and stretches[0][2].endswith("user's questions.")
        assert [(role, trains, text.strip(" ")) for role, trains, text in stretches[1:]] == [
            ("user", False, "USER: [image 1] \nWhat is it?"),
            ("assistant", False, "ASSISTANT:"),
            ("assistant", True, "A red car.</s>"),
            ("user", False, "USER: Sure?"),
            ("assistant", False, "ASSISTANT:"),
            ("assistant", True, "Yes.</s>"),
        ]
        assert [piece.image for piece in row.pieces if piece.image is not None] == [0]
        assert sum(piece.tokens for piece in row.pieces if piece.trains) == row.labels
        assert sum(piece.tokens for piece in row.pieces) == row.text_length
        assert row.length == row.text_length - 1 + row.image_tokens[0]

    def test_an_empty_answer_and_a_role_inside_an_answer(self, whole: Path, tokenizer: Tokenizer) -> None:
        stretches = [(role, text.strip()) for role, _, text in said(laid_out(whole, 3, tokenizer))]
        assert stretches[1:] == [
            ("user", "USER: First?"),
            ("assistant", "ASSISTANT:"),
            ("user", "USER: Second?"),
            ("assistant", "ASSISTANT:"),
            ("assistant", "An answer with USER: in it.</s>"),
        ]

    def test_characters_of_several_tokens_are_one_piece(self, whole: Path, tokenizer: Tokenizer) -> None:
        row = laid_out(whole, 1, tokenizer)
        text = "".join(piece.text for piece in row.pieces if piece.trains)
        expected = FOREIGN.replace("\u200b", "\\u200b").replace("\u200d", "\\u200d")
        assert text.strip() == f"{expected}</s>"
        assert any(piece.text == "😀" and piece.tokens == 4 for piece in row.pieces)

    def test_bytes_that_are_no_text_are_escapes(self, whole: Path, tokenizer: Tokenizer, copy: Path) -> None:
        names = [name for name, _ in tokenizer.pieces()]
        path = Path(f"{copy}_text.bin")
        content = np.fromfile(path, dtype=np.int32)
        length = int(np.load(f"{copy}_samples.npy")["text_length"][0])
        content[[length - 1, 2 * length - 1]] = names.index("<0xFF>")
        content.tofile(path)
        assert laid_out(copy, 0, tokenizer).pieces[-1].text == "\\xff"

    def test_without_a_tokenizer_there_are_ids(self, whole: Path) -> None:
        row = laid_out(whole, 0, None)
        tokens, labels = open_dataset(whole).text(0)
        assert [piece.text.strip() for piece in row.pieces if piece.image is None] == [
            str(token) for token in tokens if token >= 0
        ]
        assert [piece.trains for piece in row.pieces] == (labels >= 0).tolist()


class TestDrawing:
    def test_each_token_has_the_colour_of_what_it_does(self, whole: Path, tokenizer: Tokenizer) -> None:
        row = laid_out(whole, 0, tokenizer)
        boxes, roles = wrap(row, drawing.load_font(16))
        assert [roles[line] for line in sorted(roles)] == ["system", "user", "assistant", "user", "assistant"]
        page = draw_row(row, [picture(80, 120)])
        pixels = np.asarray(page)
        bottom = page.height - 32 - 24 * (max(box.line for box in boxes) + 1)
        for box in boxes:
            piece = row.pieces[box.piece]
            ground = TRAINS_COLOUR if piece.trains else OTHER_COLOUR
            if piece.image is not None:
                ground = PLACEHOLDER_COLOUR
            corner = pixels[bottom + 24 * box.line - 1, box.x]
            assert tuple(corner) == ground, piece

    def test_the_picture_stands_upright(self, whole: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
        assert load_tool().main([str(whole), "--sample", "9", "--output-dir", str(tmp_path)]) == 0
        found = np.asarray(Image.open(tmp_path / "row_0.png"))
        turned = np.asarray(picture(120, 80).transpose(Image.Transpose.ROTATE_270)).astype(int)
        assert np.abs(found[84:204, 16:96].astype(int) - turned).mean() < 3

    @pytest.mark.parametrize("pillows_own_font", [False, True])
    def test_scripts_that_a_font_lacks_are_escapes(
        self, whole: Path, tokenizer: Tokenizer, pillows_own_font: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if pillows_own_font:
            font = ImageFont.load_default(16)
            assert isinstance(font, ImageFont.FreeTypeFont)
            monkeypatch.setattr("megatron_eve.data.inspecting.drawing.load_font", lambda size: font)
            assert drawing.shown("\u4f60a", font) == "\\u4f60a"
        assert draw_row(laid_out(whole, 1, tokenizer), []).width == WIDTH

    def test_a_long_text_wraps_at_words(self, whole: Path, tokenizer: Tokenizer) -> None:
        row = laid_out(whole, 4, tokenizer)
        assert row.text_length == 2048
        boxes, _ = wrap(row, drawing.load_font(16))
        assert max(box.x + box.width for box in boxes) <= WIDTH
        lines: dict[int, str] = {}
        for box in boxes:
            lines[box.line] = lines.get(box.line, "") + box.text
        answer = [lines[line] for line in sorted(lines)][4:]
        assert len(answer) > 10
        assert all(one[-1] == " " or other[0] == " " for one, other in pairwise(answer))

    def test_a_text_of_too_many_lines_is_cut_with_a_note(self, tokenizer: Tokenizer) -> None:
        pieces = [Piece(f"line {number}\n", "assistant", True) for number in range(2 * MOST_LINES)]
        row = RowLayout(0, "row 0", pieces, [], [], 500, 500, 500)
        pieces_that_fit = replace(row, pieces=pieces[:MOST_LINES])
        cut, fits = draw_row(row, []), draw_row(pieces_that_fit, [])
        assert cut.height == fits.height + 24
        assert (np.asarray(cut)[-60:] == (170, 0, 0)).all(-1).any()

    def test_many_pictures_and_a_damaged_one(self) -> None:
        row = RowLayout(0, "row 0", [], list(range(20)), [5] * 20, 20, 100, 0)
        page = np.asarray(draw_row(row, [picture(400, 300)] * 11 + ["image_damaged: JPEG does not decode"]))
        assert (page == (200, 200, 200)).all(-1).any() and (page == (170, 0, 0)).all(-1).any()


class TestPage:
    def test_it_is_one_file_that_escapes_what_it_shows(
        self, whole: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [str(whole), "--tokenizer-model", str(tokenizer_path), "--output-dir", str(tmp_path / "look")]
        assert load_tool().main(words) == 0
        page = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
        assert str(tmp_path / "look" / "index.html") in capsys.readouterr().out
        assert "<script" not in page and "The first &lt;script&gt;alert(1)&lt;/script&gt;.&lt;/s&gt;" in page
        assert not re.search(r"""(?:src|href)=["'](?!data:)""", page) and "http://" not in page
        for text in ("5 of 6 rows read", "vicuna_v1", "image_missing", "مرحبا", '<span class="trains"> Yes.'):
            assert text in page, text
        assert page.count("<svg") == 7 and page.count("data:image/png;base64,") == 5
        assert "Licences" not in page

    def test_without_a_tokenizer_it_says_how_to_see_text(self, whole: Path, tmp_path: Path) -> None:
        assert load_tool().main([str(whole), "--output-dir", str(tmp_path), "--sample", "1"]) == 0
        assert "give --tokenizer-model" in (tmp_path / "index.html").read_text(encoding="utf-8")

    def test_figures_are_those_of_the_records(self, whole: Path) -> None:
        dataset = open_dataset(whole)
        found = read_statistics(dataset)
        assert found.lengths.counts.sum() == found.images.counts.sum() == 5
        assert (found.lengths.total, found.lengths.high) == (
            dataset.info.num_tokens,
            dataset.info.longest_length,
        )
        assert found.images.counts.tolist() == [2, 2, 1]
        assert found.sizes.sum() == 4 and (found.widths.low, found.widths.high) == (80, 90)
        assert found.picture_bytes.total == dataset.info.image_bytes

    def test_licences_of_a_table_beside_the_dataset(self, copy: Path, tmp_path: Path) -> None:
        table = pa.table({"row": [0, 1, 2], "license": ["cc0", "<b>by</b>", "cc0"]})
        pq.write_table(table, f"{copy}_meta.parquet")
        assert load_tool().main([str(copy), "--output-dir", str(tmp_path / "look"), "--sample", "0"]) == 0
        page = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
        assert '<td class="number">2</td><td>cc0</td>' in page and "&lt;b&gt;by&lt;/b&gt;" in page

    def test_rows_are_drawn_by_the_seed(self, whole: Path) -> None:
        dataset = open_dataset(whole)
        assert draw_sample(dataset, 9, 0) == [0, 1, 2, 3, 4]
        drawn = [tuple(draw_sample(dataset, 2, seed)) for seed in range(20)]
        assert drawn == [tuple(draw_sample(dataset, 2, seed)) for seed in range(20)]
        assert len(set(drawn)) > 3 and all(len(set(rows)) == 2 for rows in drawn)

    def test_damage_is_shown_where_it_is(self, copy: Path, tokenizer_path: Path, tmp_path: Path) -> None:
        flip(copy, "_image.bin", 0, 4)
        change_record(copy, "_samples.npy", 3, "labels", 1)
        words = [str(copy), "--tokenizer-model", str(tokenizer_path), "--output-dir", str(tmp_path / "look")]
        assert load_tool().main(words) == 0
        page = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
        assert (np.asarray(Image.open(tmp_path / "look" / "row_0.png")) == (200, 200, 200)).all(-1).any()
        assert re.search(r'class="wrong">Row 3: record 3 of .*_samples.npy says', page)


def flip(prefix: Path, part: str, at: int, count: int = 1) -> None:
    """Change bytes of a file."""
    path = Path(f"{prefix}{part}")
    content = bytearray(path.read_bytes())
    for byte in range(at, at + count):
        content[byte] ^= 0xFF
    path.write_bytes(content)


def change_record(prefix: Path, part: str, row: int, name: str, by: int) -> None:
    """Change a field of a record."""
    path = Path(f"{prefix}{part}")
    records = np.load(path)
    assert records.dtype in (SAMPLE_DTYPE, IMAGE_DTYPE)
    records[name][row] += by
    np.save(path, records)


def checked(prefix: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    """Exit status of a check, its lines about damage, and all it printed."""
    status = load_tool().main([str(prefix), "--check", "--workers", "2", *words])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("damaged ")]
    return status, lines, out


class TestCheck:
    def test_a_whole_dataset(self, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
        info = open_dataset(whole).info
        status = load_tool().main([str(whole), "--check", "--workers", "2"])
        out, progress = capsys.readouterr()
        assert status == 0 and "damaged" not in out and "check: 100%" in progress
        assert f"checked   5 samples, 4 images, {info.text_bytes + info.image_bytes:,} bytes in" in out
        assert "MB/s" in out and out.splitlines()[-1] == f"result    {whole} is whole"

    def test_a_merged_dataset(
        self, whole: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = shutil.copytree(copy.parent, tmp_path / "other") / "set"
        merge_datasets(str(tmp_path / "all"), [str(copy), str(other)])
        status, lines, out = checked(tmp_path / "all", capsys)
        assert (status, lines) == (0, []) and "checked   10 samples, 8 images" in out
        assert load_tool().main([str(tmp_path / "all"), "--output-dir", str(tmp_path / "look")]) == 0
        change_record(other, "_samples.npy", 1, "labels", 1)
        status, lines, _ = checked(tmp_path / "all", capsys)
        assert status == 1 and f"row 1 of {other}" in lines[0]

    def test_a_flipped_byte_of_a_picture(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = np.load(f"{copy}_images.npy")["num_bytes"]
        flip(copy, "_image.bin", int(sizes[:2].sum()) + 10_000)  # in b.png of row 2
        status, lines, out = checked(copy, capsys)
        assert status == 1 and len(lines) == 1 and out.endswith(f"{copy} has damage: 1 found\n")
        assert f"row 2 of {copy}, image 2: image_damaged" in lines[0]

    def test_a_picture_cut_short(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = np.load(f"{copy}_images.npy")["num_bytes"]
        path = Path(f"{copy}_image.bin")
        content = path.read_bytes()
        path.write_bytes(content[: sizes[0] - 300] + bytes(300) + content[sizes[0] :])
        status, lines, _ = checked(copy, capsys)
        assert status == 1 and any("row 0 of" in line or "content_sha256" in line for line in lines)

    def test_bytes_that_still_decode(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = Path(f"{copy}_text.bin")
        content = np.fromfile(path, dtype=np.int32)
        content[5] += 1  # a token that does not train: any id is as good
        content.tofile(path)
        status, lines, _ = checked(copy, capsys)
        assert status == 1 and len(lines) == 1 and "content_sha256 is" in lines[0]

    @pytest.mark.parametrize(
        ("part", "row", "name", "by", "says"),
        [
            ("_samples.npy", 1, "labels", 1, "row 1 of {prefix}"),
            (
                "_samples.npy",
                2,
                "first_image",
                -1,
                "row 2 of {prefix}: its record says that its images begin at 0",
            ),
            ("_samples.npy", 2, "num_images", -1, "row 2 of {prefix}"),
            ("_images.npy", 3, "width", 1, "image 3: it has 90 x 80 pixels and its record says 91 x 80"),
            ("_images.npy", 0, "num_bytes", 1, "row 0 of {prefix}"),
        ],
    )
    def test_a_changed_record(
        self,
        copy: Path,
        capsys: pytest.CaptureFixture[str],
        part: str,
        row: int,
        name: str,
        by: int,
        says: str,
    ) -> None:
        change_record(copy, part, row, name, by)
        status, lines, _ = checked(copy, capsys)
        assert status == 1 and any(says.format(prefix=copy) in line for line in lines), lines
        # No row but the damaged one, and the one that owns a damaged image, is named.
        named = {int(found) for line in lines for found in re.findall(r"damaged +row (\d+)", line)}
        assert len(named) <= 1, lines

    def test_totals_of_the_manifest(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = Path(f"{copy}{MANIFEST}")
        info = json.loads(path.read_text())
        path.write_text(json.dumps({**info, "num_labels": info["num_labels"] + 1}))
        status, lines, _ = checked(copy, capsys)
        assert status == 1 and len(lines) == 1 and "num_labels is" in lines[0]

    def test_a_dataset_of_an_older_version_has_no_digest(
        self, copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = Path(f"{copy}{MANIFEST}")
        path.write_text(json.dumps({**json.loads(path.read_text()), "content_sha256": ""}))
        status, _, out = checked(copy, capsys)
        assert status == 0 and "has no content_sha256" in out

    def test_the_page_beside_a_check(
        self, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        checked(whole, capsys)
        assert list(tmp_path.iterdir()) == []
        checked(whole, capsys, "--output-dir", "look")
        assert (tmp_path / "look" / "index.html").exists()
        assert load_tool().main([str(whole), "--sample", "0"]) == 0
        assert (tmp_path / "inspect_set" / "index.html").exists()
