"""Pictures and videos that are to be drawn: which rows say so, what becomes of them, and what is left out."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import ParquetSource, write_records
from megatron_eve.data.text.conversation import Encoded
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.models.registry import find_family
from tests.data.clips import write_clip
from tests.data.drawn_rows import (
    BOTH,
    DRAW,
    IM_END,
    IM_START,
    READ,
    ROWS,
    TEXT,
    VI_END,
    VI_START,
    make_dataset,
    vila_u,
)
from tests.data.drawn_rows import row as conversation
from tests.data.helpers import MakeConfig, encoded, opened, picture, run, skipped_rows

IMG, NO = -200, -100


def test_a_row_says_what_is_to_be_drawn(make_config: MakeConfig) -> None:
    dataset = IndexedVisionDataset(make_dataset(make_config, [READ, DRAW, TEXT, BOTH]))
    assert [dataset.drawn(image) for image in range(4)] == [False, True, False, True]
    assert dataset.visual_labels(np.arange(4)).tolist() == [0, ROWS, 0, ROWS]
    assert dataset.info.parts["drawn"] == {"dtype": "bool", "images": 2, "visual_labels": 2 * ROWS}
    for number, row in enumerate((READ, DRAW, TEXT, BOTH)):
        tokens, labels = dataset.text(number)
        assert (tokens == IM_START).sum() == (tokens == IM_END).sum() == str(row).count("<image>")
        assert dataset.samples[number]["labels"] == (labels[1:] >= 0).sum()
        assert dataset.lengths(np.array([number]))[0] == len(tokens) + (tokens == IMG).sum() * (ROWS - 1)
    tokens, labels = dataset.text(1)
    assert tokens[-4:].tolist() == labels[-4:].tolist() == [IM_START, IMG, IM_END, 2]
    tokens, labels = dataset.text(3)
    assert labels[tokens == IMG].tolist() == [NO, IMG] and labels[tokens == IM_START].tolist() == [
        NO,
        IM_START,
    ]


def test_a_dataset_in_which_nothing_is_drawn_has_no_such_part(make_config: MakeConfig) -> None:
    never = [{**READ, "draw": False}, {**READ, "draw": [False]}, {**READ, "draw": None}, TEXT]
    prefix = make_dataset(make_config, never)
    assert (
        not Path(prefix + "_drawn.npy").exists() and "drawn" not in Path(prefix + "_dataset.json").read_text()
    )
    make_dataset(make_config, [DRAW], overwrite=True)
    assert Path(prefix + "_drawn.npy").exists()
    make_dataset(make_config, never, overwrite=True)
    assert not Path(prefix + "_drawn.npy").exists()
    assert IndexedVisionDataset(prefix).visual_labels(np.arange(4)).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**DRAW, "draw": "yes"}, "draw_field"),
        ({**DRAW, "draw": [True, False]}, "draw_field"),
        ({**BOTH, "draw": True}, "drawn_in_question"),
        (conversation("A car.", "Nothing.", image="ok.jpg", draw=True), "drawn_in_question"),
        ({**DRAW, "image": "gone.jpg"}, "image_missing"),
    ],
)
def test_rows_that_cannot_be_drawn(make_config: MakeConfig, row: dict[str, Any], reason: str) -> None:
    config = make_config([row, DRAW], **vila_u())
    run(config)
    assert [skipped["reason"] for skipped in skipped_rows(config)] == [reason]


def test_a_template_that_draws_nothing(make_config: MakeConfig) -> None:
    config = make_config([DRAW, READ], **vila_u(template="vicuna_v1"))
    run(config)
    assert [skipped["reason"] for skipped in skipped_rows(config)] == ["draw_template"]
    with pytest.raises(
        DataError, match=r"--draw: samples of --template plain are not drawn .* use one of v1"
    ):
        run(make_config([DRAW], **vila_u(template="plain", draw=True, overwrite=True)))
    with pytest.raises(
        DataError, match=r"--template v1: it has the control token <im_start>, which .* lacks"
    ):
        run(make_config([DRAW], family="eve", template="v1", overwrite=True))
    with pytest.raises(DataError, match="--image-storage jpeg: the family vila_u reads pictures as codes"):
        run(make_config([DRAW], **vila_u(image_storage="jpeg", overwrite=True)))


def test_what_does_not_fit_is_left_out_whole(make_config: MakeConfig) -> None:
    """With `<im_start>`; a row of kind generation without its picture teaches nothing."""
    two = conversation("One.", "<image>", images=["ok.jpg", "ok.jpg"], draw=True)
    two["conversations"] += conversation("Two.", "<image>")["conversations"]
    whole = IndexedVisionDataset(make_dataset(make_config, [two]))
    length = int(whole.samples["length"][0])
    assert whole.visual_labels(np.arange(1)).tolist() == [2 * ROWS]
    for shorter, images in ((0, 2), (2, 2), (3, 1), (3 + ROWS, 1)):
        prefix = make_dataset(make_config, [two], model_max_length=length - shorter, overwrite=True)
        dataset = IndexedVisionDataset(prefix)
        tokens, labels = dataset.text(0)
        assert (tokens == IMG).sum() == (labels == IMG).sum() == (tokens == IM_START).sum() == images
        assert dataset.info.num_images == images


def write_shard(path: Path, rows: list[dict[str, Any]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, fields in enumerate(rows):
            files = {
                "jpg": encoded(picture(40, 30, seed=number), "JPEG"),
                "json": json.dumps(fields).encode(),
            }
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{number:06}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def test_pairs_are_drawn_where_the_row_or_the_flag_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [
        {"prompt": "A red car."},
        {"sharegpt4v": "A sea.", "prompt": "unused"},
        {"other": 1},
        {"prompt": "", "draw": True},
    ]
    shard = str(write_shard(tmp_path / "00000.tar", rows))
    config = make_config([], **vila_u(input=shard, draw=True))
    info = run(config)
    dataset, tokenizer = opened(config), config.tokenizer()
    assert info.num_samples == 4 and [dataset.drawn(image) for image in range(4)] == [True] * 4
    said = [
        tokenizer.decode([token for token in dataset.text(n)[0].tolist() if token >= 0]) for n in range(4)
    ]
    for text, prompt in zip(said, ("A red car.", "A sea.", "An image.", "An image."), strict=True):
        assert text.rstrip().endswith(f"USER: {prompt} ASSISTANT:")
    config = make_config([], **vila_u(input=shard, overwrite=True))
    run(config)
    assert [skipped["reason"] for skipped in skipped_rows(config)] == ["kind_template"] * 3
    config = make_config([], **vila_u(input=shard, template="document", overwrite=True))
    run(config)
    assert sorted(skipped["reason"] for skipped in skipped_rows(config)) == [
        "kind_template",
        "nothing_to_train",
    ]
    tokens, labels = opened(config).text(0)
    assert tokens[:2].tolist() == [1, IMG] and labels[1] == NO  # to read: the picture, then its caption


@pytest.mark.parametrize("way", ["conversation", "flag", "row"])
def test_a_video_is_drawn_frame_by_frame(make_config: MakeConfig, tmp_path: Path, way: str) -> None:
    clips = tmp_path / "photos"
    config = make_config([conversation("A wave.", "<video>", video="long.mp4", draw=True)], **vila_u())
    write_clip(clips / "long.mp4", 20)
    if way != "conversation":
        (clips / "long.txt").write_text("A wave.")
        (clips / "long.json").write_text(json.dumps({"draw": way == "row"}))
        config = replace(config, input=str(clips / "long.mp4"), draw=way == "flag")
    info = run(config)
    dataset = opened(config)
    tokens, labels = dataset.text(0)
    assert tokens[-11:].tolist() == labels[-11:].tolist() == [VI_START, *[IMG] * 8, VI_END, 2]
    assert info.num_images == 8 and dataset.visual_labels(np.arange(1)).tolist() == [8 * ROWS]
    assert "A wave. ASSISTANT:" in config.tokenizer().decode([one for one in tokens.tolist() if one >= 0])
    # One frame that does not fit takes all with it.
    config = replace(config, overwrite=True, model_max_length=int(dataset.samples["length"][0]) - 3)
    if way == "conversation":
        run(config)
        assert opened(config).info.num_images == 0
    else:
        with pytest.raises(DataError, match="drawn_cut_off"):
            run(config)


def test_videos_that_are_not_drawn(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [
        conversation("A wave.", "<video>", video="short.mp4", draw=True),
        conversation("A wave.", "Here.", video="long.mp4", draw=True),
        conversation("<video>\nWhat is it?", "A wave.", video="long.mp4"),
    ]
    config = make_config(rows, **vila_u())
    write_clip(tmp_path / "photos" / "short.mp4", 5)
    write_clip(tmp_path / "photos" / "long.mp4", 20)
    run(config)
    assert [one["reason"] for one in skipped_rows(config)] == ["video_too_short", "drawn_without_place"]
    tokens, labels = opened(config).text(0)
    assert not (labels == IMG).any() and (tokens == IMG).sum() == 8
    assert not np.isin(tokens, (IM_START, VI_START)).any()  # nothing stands around frames that are read


def encode(record: Record, template: str, tokenizer_path: Path) -> Encoded:
    rules = find_family("vila_u").text_rules
    return encode_record(record, load_tokenizer(tokenizer_path, False, rules.added_tokens), template)


def test_documents_with_pictures_to_draw(tokenizer_path: Path) -> None:
    images = [ImageFile(b"")] * 3
    turns = [{"from": "gpt", "value": "<image>A cat.<image>A dog.<image>"}]
    record = Record(None, "", "interleaved", images, turns, drawn=(False, True, True))
    found = encode(record, "v1_document", tokenizer_path)
    pictures = [place for place, token in enumerate(found.tokens) if token == IMG]
    assert [found.labels[place] for place in pictures] == [NO, IMG, IMG]
    assert found.tokens[-4:] == found.labels[-4:] == [IM_START, IMG, IM_END, 2]
    assert found.tokens[1] == IMG and found.tokens.count(IM_START) == 2
    assert found.cut(len(found.tokens) - 2).tokens[-2:] == [IM_START, IMG]  # one to draw may end a document
    read = encode(replace(record, drawn=False), "v1_document", tokenizer_path)
    assert read == encode(replace(record, drawn=False), "document", tokenizer_path)
    assert read.num_images == 2 and set(read.labels) & {IMG} == set()
    with pytest.raises(SkipRow, match="draw_template"):
        encode(record, "document", tokenizer_path)


def test_records_in_parquet_keep_what_is_drawn(tmp_path: Path) -> None:
    data = encoded(picture(8, 8), "PNG")
    turns = [{"from": "human", "value": "A wave."}, {"from": "gpt", "value": "<image>" * 2}]
    records = [
        Record("a", "s", "conversation", [ImageFile(data)] * 2, turns, drawn=(True, False)),
        Record("b", "s", "generation", [ImageFile(data)] * 2, turns, drawn=True),
        Record("c", "s", "conversation", [ImageFile(data)] * 2, turns),
    ]
    write_records(tmp_path / "shard.parquet", records)
    source = ParquetSource([tmp_path / "shard.parquet"])
    read = [source.record(row) for row in source.rows()]
    assert [one.drawn_images for one in read] == [(True, False), (True, True), (False, False)]
    assert [one.is_video for one in read] == [False, True, False]


def test_generation_rows_have_a_prompt(tokenizer_path: Path) -> None:
    record = Record(None, "", "generation", [ImageFile(b"")], [{"from": "gpt", "value": "<image>"}])
    with pytest.raises(SkipRow, match="generation_turns"):
        encode(record, "v1", tokenizer_path)
    turns = [{"from": "human", "value": " "}, {"from": "gpt", "value": "<image>" * 2}]
    video = replace(record, turns=turns, images=[ImageFile(b"")] * 2, is_video=True)
    with pytest.raises(SkipRow, match="generation_prompt"):
        encode(video, "v1", tokenizer_path)
    named = replace(video, turns=[{"from": "human", "value": "A wave."}, turns[1]])
    assert encode(named, "v1", tokenizer_path).num_drawn == 2
