"""Which rows and pictures are kept, and the reason for each that is left out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eve.data.errors import DataError
from megatron_eve.data.images import decode_image
from megatron_eve.data.preprocessing.summary import format_summary
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.text.conversation import encode_conversation
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import (
    MakeConfig,
    caption_row,
    encoded,
    opened,
    picture,
    planner,
    run,
    skipped_rows,
    text_row,
)
from tests.golden_dir import find_golden


def bad_files(photos: Path) -> None:
    good = (photos / "ok.jpg").read_bytes()
    (photos / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("I am a caption")
    (photos / "lfs.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n")
    (photos / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (photos / "huge.png").write_bytes(encoded(Image.new("1", (1001, 1000)), "PNG"))
    (photos / "folder").mkdir()
    os.mkfifo(photos / "pipe.jpg")
    (photos.parent / "secret.jpg").write_bytes(good)
    (photos / "link.jpg").symlink_to(photos.parent / "secret.jpg")
    (photos / "out").symlink_to(photos.parent)
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    (photos.parent / "photos2").mkdir()
    (photos.parent / "photos2" / "ok.jpg").write_bytes(good)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("truncated.jpg", "image_damaged"),
        ("empty.jpg", "image_empty"),
        ("text.jpg", "image_format"),
        ("eps.jpg", "image_format"),
        ("lfs.jpg", "image_lfs_pointer"),
        ("huge.png", "image_too_large"),
        ("folder", "image_not_a_file"),
        ("pipe.jpg", "image_not_a_file"),
        ("missing.jpg", "image_missing"),
        ("ok.jpg/below.jpg", "image_missing"),
        ("x" * 300 + ".jpg", "image_unreadable"),
        ("loop.jpg", "image_unreadable"),
        ("link.jpg", "image_outside_root"),
        ("out/secret.jpg", "image_outside_root"),
        ("../secret.jpg", "image_outside_root"),
        ("../photos2/ok.jpg", "image_outside_root"),
        ("/etc/hostname", "image_outside_root"),
        ("file:///etc/hostname", "image_outside_root"),
        ("http://example.org/ok.jpg", "image_remote"),
        ("s3://bucket/ok.jpg", "image_remote"),
        ("file://host/ok.jpg", "image_remote"),
        ("data:image/png,ok", "image_data_uri"),
        ("data:image/png;base64,a?b", "image_data_uri"),
        ("data:image/png;base64,", "image_empty"),
        ("data:image/png;base64,aGVsbG8=", "image_format"),
        ("nul\0.jpg", "image_field"),
        ("half\ud83d.jpg", "image_field"),
        ("", "image_field"),
        (7, "image_field"),
        (["ok.jpg", None], "image_field"),
        ({"path": "ok.jpg"}, "image_field"),
        (None, "placeholder_without_image"),
        ([], "placeholder_without_image"),
        (["ok.jpg", "ok.jpg"], "image_count"),
    ],
)
def test_images_that_cannot_be_used(make_config: MakeConfig, image: object, reason: str) -> None:
    rows = [caption_row(1, image), caption_row(2, "ok.jpg")]
    config = make_config(rows, lines=True, max_image_pixels=1_000_000)
    bad_files(Path(config.image_root))
    info = run(config)
    assert info.skipped == {reason: 1}
    assert (info.num_rows, info.num_samples, len(opened(config))) == (2, 1, 1)
    (record,) = skipped_rows(config)
    assert (record["row"], record["reason"], record["id"]) == (1, reason, "id1")
    assert info.skipped_first == {reason: [record]}
    assert REASONS[reason].remedy


def test_links_and_detours_that_stay_inside_are_followed(make_config: MakeConfig) -> None:
    config = make_config(
        [caption_row(1, "link.jpg"), caption_row(2, "a/../ok.jpg"), caption_row(3, "./ok.jpg")]
    )
    photos = Path(config.image_root)
    (photos / "a").mkdir()
    (photos / "link.jpg").symlink_to("ok.jpg")
    (photos.parent / "root").symlink_to(photos)
    assert run(config).num_samples == 3
    through_link = replace(config, image_root=str(photos.parent / "root"), overwrite=True)
    assert run(through_link).num_samples == 3


def test_absolute_paths_inside_the_root(make_config: MakeConfig, tmp_path: Path) -> None:
    photos, linked = tmp_path / "photos", tmp_path / "linked"
    linked.symlink_to(photos)
    (tmp_path / "photos2").mkdir()
    (tmp_path / "photos2" / "ok.jpg").write_bytes((photos / "ok.jpg").read_bytes())
    (photos / "out.jpg").symlink_to(tmp_path / "photos2" / "ok.jpg")
    inside = [photos / "ok.jpg", linked / "ok.jpg", f"file://{photos}/a%20b.jpg", f"{photos}/a b.jpg"]
    outside = [tmp_path / "photos2" / "ok.jpg", f"{photos}/../photos2/ok.jpg", photos / "out.jpg"]
    (photos / "a b.jpg").write_bytes((photos / "ok.jpg").read_bytes())
    rows = [caption_row(n, str(name)) for n, name in enumerate([*inside, *outside, photos])]
    for root in (photos, linked):
        config = make_config(rows, image_root=str(root), output_prefix=str(tmp_path / f"of_{root.name}"))
        info = run(config)
        assert info.num_samples == 4
        assert info.skipped == {"image_outside_root": 3, "image_not_a_file": 1}
        config = replace(config, follow_links=True, overwrite=True)
        named = [one["detail"] for one in skipped_rows(config)]
        assert named[0] == f"{outside[0]} is not inside --image-root {root}"
        info = run(config)  # which takes the link
        assert info.skipped == {"image_outside_root": 2, "image_not_a_file": 1}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
def test_pictures_of_every_kind_are_kept(make_config: MakeConfig, image_format: str) -> None:
    pictures = {
        "JPEG": [picture(9, 7, "CMYK"), picture(9, 7, "L"), picture(1, 1)],
        "PNG": [picture(9, 7, "RGBA"), picture(9, 7, "P"), picture(30000, 20), picture(9, 7, "1")],
        "TIFF": [Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000), picture(9, 7, "CMYK")],
    }[image_format]
    rows = [caption_row(n, f"{n}.img") for n in range(len(pictures))]
    config = make_config(rows)
    for n, image in enumerate(pictures):
        (Path(config.image_root) / f"{n}.img").write_bytes(encoded(image, image_format))
    info = run(config)
    assert (info.num_samples, info.skipped) == (len(pictures), {})
    dataset = opened(config)
    for n, image in enumerate(pictures):
        assert dataset.image_plan(n) == planner(672, 336)(*image.size)


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        ([1, 2], "plain", "not_an_object"),
        (None, "plain", "not_an_object"),
        ({"image": "ok.jpg"}, "plain", "no_conversation"),
        ({"image": "ok.jpg", "conversations": {}}, "plain", "no_conversation"),
        (text_row(), "plain", "plain_without_image"),
        ({**text_row(), "image": "ok.jpg"}, "plain", "image_without_placeholder"),
        ({**text_row(), "image": "ok.jpg"}, "vicuna_v1", "image_without_placeholder"),
        (text_row("<image>"), "plain", "placeholder_without_image"),
        (text_row("<image>"), "vicuna_v1", "placeholder_without_image"),
        (text_row("x", ""), "vicuna_v1", "nothing_to_train"),
        (caption_row(1, "ok.jpg", ""), "plain", "nothing_to_train"),
        (caption_row(1, "ok.jpg", 5), "plain", "value_not_text"),  # type: ignore[arg-type]
        ({"conversations": [{"from": "tool", "value": "x"}]}, "vicuna_v1", "unknown_role"),
        (caption_row(1, "ok.jpg", " \n"), "plain", "nothing_to_train"),
        (caption_row(1, "ok.jpg", "\u200b"), "plain", "nothing_to_train"),
        (text_row("x", "\u200b\n"), "vicuna_v1", "nothing_to_train"),
        ({**text_row("<video>\nWhat?"), "video": "clips/7.mp4"}, "vicuna_v1", "image_missing"),
        ({**text_row(), "videos": ["7.mp4", "8.mp4"]}, "vicuna_v1", "video_field"),
        ({**text_row(), "video": {"path": "7.mp4"}}, "vicuna_v1", "video_field"),
        ({**text_row(), "audio": {"path": "7.wav"}}, "vicuna_v1", "other_media"),
        (text_row("<video>\nWhat?"), "vicuna_v1", "other_placeholder"),
        ({**text_row("<image1> What?"), "images": ["ok.jpg"]}, "vicuna_v1", "other_placeholder"),
        ({**text_row(), "images": ["ok.jpg"]}, "vicuna_v1", "image_without_placeholder"),
        ({**text_row(), "images": [{"bytes": "x", "path": None}]}, "vicuna_v1", "image_field"),
        ({**caption_row(1, "ok.jpg"), "images": ["no.jpg"]}, "plain", "image_field"),
        ({**text_row(), "image_path": "ok.jpg"}, "vicuna_v1", "image_field"),
        ({**text_row(), "IMG": ["ok.jpg"]}, "vicuna_v1", "image_field"),
    ],
)
def test_rows_that_cannot_be_used(make_config: MakeConfig, row: object, template: str, reason: str) -> None:
    config = make_config([row, caption_row(2, "ok.jpg")], template=template)
    info = run(config)
    assert info.skipped == {reason: 1}
    assert info.num_samples == 1


def test_text_without_an_image_is_a_sample_of_stage_3(make_config: MakeConfig) -> None:
    rows = [text_row(), {**text_row(), "image": None}, {**text_row(), "image": []}, caption_row(1, "ok.jpg")]
    config = make_config(rows, template="vicuna_v1")
    info = run(config)
    assert (info.num_samples, info.num_images, info.skipped) == (4, 1, {})
    assert opened(config).samples["num_images"].tolist() == [0, 0, 0, 1]


def test_images_are_taken_under_either_name_and_gaps_of_a_table_are_none(make_config: MakeConfig) -> None:
    two = text_row("<image> or <image>?")
    rows = [
        {**two, "images": ["ok.jpg", "ok.jpg"]},
        {**caption_row(1, "ok.jpg"), "images": ["ok.jpg"]},
        {**caption_row(1, "ok.jpg"), "video": "of/which/it/is/a/frame.mp4", "images": []},
        {**text_row(), "image": None, "images": [], "video": float("nan"), "image_path": "", "image_id": 7},
    ]
    config = make_config(rows, template="vicuna_v1")
    info = run(config)
    assert info.skipped == {}
    assert opened(config).samples["num_images"].tolist() == [2, 1, 1, 0]


def test_images_that_are_links_into_a_cache(make_config: MakeConfig) -> None:
    """The layout of Hugging Face's cache: each file of a snapshot is a link to ../../blobs."""
    names = ["a.jpg", "b.jpg", "../../blobs/x", "out/x", "gone.jpg", "ok.jpg\0", "c/../a.jpg"]
    config = make_config([caption_row(n, name) for n, name in enumerate(names)] + [caption_row(9, "ok.jpg")])
    photos = Path(config.image_root)
    snapshot, blobs = photos / "snapshots" / "0a1b", photos / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "x").write_bytes((photos / "ok.jpg").read_bytes())
    for name in ("a.jpg", "b.jpg"):
        (snapshot / name).symlink_to("../../blobs/x")
    (snapshot / "out").symlink_to("../../blobs")
    (snapshot / "gone.jpg").symlink_to("../../blobs/gone")
    (snapshot / "ok.jpg").write_bytes((photos / "ok.jpg").read_bytes())
    config = replace(config, image_root=str(snapshot))
    info = run(config)
    assert info.skipped == {"image_outside_root": 6, "image_field": 1}
    details = [record["detail"] for record in info.skipped_first["image_outside_root"]]
    assert details[0] == f"a.jpg is a link to {blobs / 'x'}, which --follow-links takes"
    assert "--follow-links" in format_summary(info, config.output_prefix)

    info = run(replace(config, follow_links=True, overwrite=True))
    assert info.skipped == {"image_outside_root": 1, "image_field": 1, "image_missing": 1}
    assert info.num_samples == 5


def test_a_row_with_two_images_keeps_each_at_its_place(make_config: MakeConfig) -> None:
    row = text_row("Is <image> like <image>?", "No.") | {"image": ["b.png", "ok.jpg"]}
    config = make_config([row, caption_row(2, "ok.jpg")], template="vicuna_v1")
    (Path(config.image_root) / "b.png").write_bytes(encoded(picture(10, 90), "PNG"))
    run(config)
    dataset = opened(config)
    tokens, _ = dataset.text(0)
    expected = encode_conversation(row["conversations"], Tokenizer(config.tokenizer_model), "vicuna_v1", 2)
    assert tokens.tolist() == expected.tokens
    assert dataset.samples[["first_image", "num_images"]].tolist() == [(0, 2), (2, 1)]
    assert [dataset.images[n].tolist()[:2] for n in range(3)] == [(10, 90), (40, 30), (40, 30)]
    tall, wide = dataset.image_plan(0), dataset.image_plan(1)
    assert dataset.samples[0]["length"] == len(tokens) - 2 + tall.rows + wide.rows


def test_text_is_cut_with_an_image_counted_as_one(make_config: MakeConfig) -> None:
    rows = [caption_row(1, "ok.jpg", "A long caption " * 20), caption_row(2, "ok.jpg", "Short.")]
    config = make_config(rows, model_max_length=30)
    info = run(config)
    assert info.num_cut == 1
    dataset = opened(config)
    tokens, labels = dataset.text(0)
    whole = encode_conversation(rows[0]["conversations"], Tokenizer(config.tokenizer_model), "plain", 1)
    assert (tokens.tolist(), labels.tolist()) == (whole.tokens[:30], whole.labels[:30])
    assert dataset.samples[0]["length"] == 29 + dataset.image_plan(0).rows


def test_what_is_cut_off_is_not_part_of_the_sample(make_config: MakeConfig) -> None:
    late = text_row("A?", "B.")["conversations"] + text_row("<image>\nC?", "D.")["conversations"]
    row = {"image": "ok.jpg", "conversations": late}
    length = len(
        encode_conversation(
            late[:2], Tokenizer(find_golden("tokenize") / "tokenizer.model"), "vicuna_v1", 0
        ).tokens
    )
    config = make_config([row], template="vicuna_v1", model_max_length=length)
    info = run(config)
    assert (info.num_samples, info.num_images, info.num_cut) == (1, 0, 1)
    assert (opened(config).text(0)[0] >= 0).all()
    before_the_answer = make_config(
        [row, text_row("", "x")], template="vicuna_v1", model_max_length=length - 30, overwrite=True
    )
    with pytest.raises(DataError, match="nothing_to_train"):
        run(before_the_answer)


@pytest.mark.parametrize("apply_exif", [True, False])
def test_orientation_is_recorded_and_obeyed(make_config: MakeConfig, apply_exif: bool) -> None:
    config = make_config([caption_row(1, "turned.jpg")], apply_exif=apply_exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 20).save(Path(config.image_root) / "turned.jpg", exif=exif)
    run(config)
    dataset = opened(config)
    assert dataset.info.apply_exif is apply_exif
    image = decode_image(
        dataset.image_bytes(0), apply_exif=dataset.info.apply_exif, max_pixels=dataset.info.max_pixels
    )
    assert image.size == tuple(dataset.images[0])[:2] == ((20, 60) if apply_exif else (60, 20))
    assert dataset.image_plan(0) == planner(672, 336)(*image.size)


def test_names_that_would_upset_a_terminal_are_escaped(make_config: MakeConfig) -> None:
    row = caption_row(1, "a\x1b[31m\nb\ud83d.jpg") | {"id": "é\ud83d"}
    config = make_config([row, caption_row(2, "ok.jpg")], lines=True)
    info = run(config)
    (record,) = info.skipped_first["image_field"]
    assert (record["id"], record["image"]) == ("é\\ud83d", "a\\x1b[31m\\nb\\ud83d.jpg")
    assert format_summary(info, "out").encode("utf-8")
