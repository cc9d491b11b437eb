"""What preprocessing leaves out or changes of the rows that it keeps, and where samples are cut: each is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.joined import JoinedDataset, open_dataset
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.preprocessing.summary import format_summary
from megatron_eve.data.reasons import CHANGES
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from megatron_eve.data.text.text_tokenizer import SENTENCEPIECE, SENTENCEPIECE_NOT_LEGACY
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import MakeConfig, caption_row, run, text_row
from tests.data.sources.test_mmc4_and_text import document

# A family that cuts samples at their rows once images are expanded: 16 for a picture of this size.
VILA: dict[str, Any] = {"family": "vila", "image_settings": {"image_size": 28, "vision_patch_size": 7}}
ROWS = 16


def web_page(sentences: list[str], *places: int) -> dict[str, Any]:
    """A document of MMC4 all of whose pictures are the same file."""
    line = document(sentences, *places)
    return line | {"image_info": [{**one, "image_name": "ok.jpg"} for one in line["image_info"]]}


def tokens_of(config: PreprocessConfig) -> list[list[int]]:
    dataset = open_dataset(config.output_prefix)
    return [dataset.text(row)[0].tolist() for row in range(len(dataset))]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_change_of_a_document_is_counted(make_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    lines = [
        web_page(["A <image> b.", "C <image><image>."], *[0] * 8),
        web_page(["A.", "", ""], 0, 1, 2),
        web_page(["A."]),
    ]
    config = make_config(lines, lines=True, template="document", workers=workers, **VILA)
    info = run(config)
    assert info.changes == {"images_at_end": 2, "images_over_limit": 2, "literal_image": 3}
    assert (info.num_samples, info.num_images) == (3, 7)
    summary = format_summary(info, config.output_prefix)
    for name, count in info.changes.items():
        assert f"changed           {count} {CHANGES[name]}" in summary
    other = make_config(
        lines[:1], lines=True, template="document", output_prefix=str(tmp_path / "other"), **VILA
    )
    run(other)
    both = merge_datasets(str(tmp_path / "both"), [config.output_prefix, other.output_prefix])
    assert both.changes == {"images_at_end": 2, "images_over_limit": 4, "literal_image": 6}
    assert open_dataset(str(tmp_path / "both")).info.changes == both.changes
    # A manifest of an older version counts none of them.
    manifest = Path(config.output_prefix + "_dataset.json")
    content = json.loads(manifest.read_text())
    del content["changes"], content["tokenizer_kind"]
    manifest.write_text(json.dumps(content))
    old = open_dataset(config.output_prefix).info
    assert (old.changes, old.tokenizer_kind) == ({}, SENTENCEPIECE)


@pytest.mark.parametrize("image_storage", ["encoded", "jpeg"])
def test_a_picture_that_does_not_fit_whole_goes_with_what_follows(
    make_config: MakeConfig, tokenizer: Tokenizer, image_storage: str
) -> None:
    one, two = (tokenizer.encode(text) for text in ("A red car.", "Why?"))
    lines = [{"text": "A red car. <image> Why? <image>A red car.", "images": ["ok.jpg", "ok.jpg"]}]
    whole = [1, *one, IMAGE_TOKEN_ID, *two, IMAGE_TOKEN_ID, *one, 2]
    length = len(whole) - 2 + 2 * ROWS

    def made(limit: int, **more: Any) -> tuple[list[int], dict[str, int], int]:
        config = make_config(lines, lines=True, template="document", model_max_length=limit, overwrite=True)
        config = replace(config, **VILA | more, image_storage=image_storage)
        info = run(config)
        return tokens_of(config)[0], info.changes, info.longest_length

    assert made(length) == (whole, {}, length)
    assert made(length - 1) == (whole[:-1], {}, length - 1)
    # Cut inside the second picture: it goes, and the document ends in the text before it.
    until = len(one) + len(two) + 2
    assert made(until + 2 * ROWS - 2) == (whole[:until], {"images_cut_off": 1}, until + ROWS - 1)
    # Cut in the first: the document ends before it.
    assert made(len(one) + ROWS) == (whole[: 1 + len(one)], {"images_cut_off": 2}, 1 + len(one))
    # Other families count a picture as one.
    assert made(until, family="eve", image_settings={})[:2] == (whole[:until], {"images_cut_off": 1})
    assert made(len(whole), family="eve", image_settings={})[:2] == (whole, {})


def test_documents_in_json_lines_with_image_files(make_config: MakeConfig) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 7, "text": "<image> A cat. <image>Why?", "images": ["ok.jpg", "ok.jpg"], "url": "x"},
        {"text": "A cat.", "images": []},
        {"text": "A <image> cat."},
        {"text": "A cat.", "image": "ok.jpg"},
        {"text": "<image>", "image": "ok.jpg"},
        {"text": 7, "image": "ok.jpg"},
        {"text": "<image>A cat.", "image": "ok.jpg", "images": ["no.jpg"]},
        {"text": "<image>A cat.", "image": "no.jpg"},
    ]
    config = make_config(rows, lines=True, template="document")
    info = run(config)
    assert (info.num_samples, info.num_images, info.changes) == (3, 2, {"literal_image": 1})
    assert info.skipped == {
        "image_without_placeholder": 1, "nothing_to_train": 1, "value_not_text": 1, "image_field": 1,
        "image_missing": 1,
    }  # fmt: skip
    tokenizer = Tokenizer(config.tokenizer_model)
    cat, why = (tokenizer.encode(text) for text in ("A cat.", "Why?"))
    assert tokens_of(config)[:2] == [[1, IMAGE_TOKEN_ID, *cat, IMAGE_TOKEN_ID, *why, 2], [1, *cat, 2]]


def test_the_mode_of_the_tokenizer_is_the_familys_and_goes_into_the_manifest(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = [text_row()]
    kinds, prefixes = {}, {}
    for name, settings in {
        "eve": {},
        "vila": VILA,
        "eve, not legacy": {"tokenizer_legacy": False},
        "vila, legacy": VILA | {"tokenizer_legacy": True},
    }.items():
        prefixes[name] = str(tmp_path / name.replace(", ", "_"))
        kinds[name] = run(
            make_config(rows, template="vicuna_v1", output_prefix=prefixes[name], **settings)
        ).tokenizer_kind
    assert kinds == {
        "eve": SENTENCEPIECE,
        "vila": SENTENCEPIECE_NOT_LEGACY,
        "eve, not legacy": SENTENCEPIECE_NOT_LEGACY,
        "vila, legacy": SENTENCEPIECE,
    }
    alike, others = ((prefixes["eve"], prefixes["vila, legacy"]), (prefixes["eve"], prefixes["vila"]))
    merge_datasets(str(tmp_path / "alike"), alike)
    JoinedDataset([open_dataset(prefix) for prefix in alike])
    with pytest.raises(
        DataError, match=r"has tokenizer_kind 'sentencepiece legacy=False' and .+: preprocess all"
    ):
        merge_datasets(str(tmp_path / "others"), others)
    with pytest.raises(
        DataError, match=r"tokenizer mode 'sentencepiece legacy=False' and .+ 'sentencepiece', which"
    ):
        JoinedDataset([open_dataset(prefix) for prefix in others])


def test_tokenizers_that_a_template_does_not_fit(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config([caption_row(1, "ok.jpg")])
    with pytest.raises(DataError, match=r"--template qwen2: it has the control token <\|im_start\|>, which"):
        run(replace(config, template="qwen2"))
    with pytest.raises(DataError, match=r"--no-tokenizer-legacy: says how a tokenizer\.model is read, and"):
        run(replace(config, tokenizer_model=str(tmp_path / "tokenizer.json"), tokenizer_legacy=False))
