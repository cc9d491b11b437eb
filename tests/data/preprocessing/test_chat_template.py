"""A dataset in the tokenizer's own chat template: what the manifest says of it, and which tokenizer may train on it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.opening import open_datasets
from megatron_eve.data.text.chat_template import chat_template_sha256
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from tests.data.helpers import MakeConfig, run, turns
from tests.data.text.chat_tokenizers import LLAMA31, LLAMA_TOKENS, QWEN3, QWEN25, QWEN_TOKENS, write_tokenizer
from tests.families.eve import run_config
from tests.layouts import ONE

ROWS = [
    {"image": "ok.jpg", "conversations": turns("<image>\nWhat is it?", "A cat. <|im_end|>", "And?", "Two.")},
    {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Why?", "So.")]},
]


def test_a_dataset_in_the_chat_template_of_its_tokenizer(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN25)
    config = make_config(ROWS, template="chat_template", tokenizer_model=str(folder))
    info = run(config)
    assert (info.num_samples, info.template) == (2, "chat_template")
    assert info.chat_template_sha256 == chat_template_sha256(folder / "tokenizer.json") != ""
    tokenizer = load_tokenizer(folder, legacy=True)
    dataset = open_dataset(config.output_prefix)
    said = []
    for number in range(2):
        _, labels = dataset.text(number)
        said.append(b"".join(tokenizer.token_bytes(one) for one in labels.tolist() if one >= 0).decode())
    assert said == ["A cat. <|im_end|><|im_end|>Two.<|im_end|>", "So.<|im_end|>"]

    # Training on text with the same folder; with another chat template beside the same tokenizer; with none.
    text = make_config(
        ROWS[1:],
        template="chat_template",
        tokenizer_model=str(folder),
        output_prefix=str(tmp_path / "out" / "text"),
    )
    run(text)
    settings = run_config(ONE.parallel, iterations=1)
    data = replace(
        settings.data, mock_data=False, data_path=(text.output_prefix,), tokenizer_model=str(folder)
    )
    settings = replace(settings, data=data, model=replace(settings.model, vocab_size=tokenizer.vocab_size))
    opened = open_datasets(settings)
    assert opened.fingerprint["chat_templates"] == [info.chat_template_sha256]
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text(QWEN3)
    for says in ("another one", "none"):
        if says == "none":
            (other / "chat_template.jinja").unlink()
            (other / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        with pytest.raises(
            DataError, match=f"was made with the tokenizer's chat template .* has {says}.* beside it"
        ):
            open_datasets(replace(settings, data=replace(data, tokenizer_model=str(other))))


def test_datasets_of_two_chat_templates_are_not_merged(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN25)
    prefixes = []
    for name in ("one", "two"):
        config = make_config(
            ROWS[1:],
            template="chat_template",
            tokenizer_model=str(folder),
            output_prefix=str(tmp_path / "out" / name),
        )
        run(config)
        prefixes.append(config.output_prefix)
        (folder / "chat_template.jinja").write_text(QWEN3)
    with pytest.raises(DataError, match="name datasets of two chat templates side by side in --data-path"):
        merge_datasets(str(tmp_path / "out" / "both"), prefixes)


def test_what_cannot_be_used_is_said_before_a_row_is_read(make_config: MakeConfig, tmp_path: Path) -> None:
    llama = write_tokenizer(
        tmp_path / "llama", LLAMA_TOKENS, LLAMA31 + "{{ raise_exception('No.') }}", LLAMA_TOKENS[0]
    )
    bare = write_tokenizer(tmp_path / "bare", QWEN_TOKENS, None)
    for template, folder, says in (
        (
            "chat_template",
            llama,
            r"tokenizer_config\.json raises TemplateError: No\.: correct it",
        ),
        ("chat_template", bare, "bare has no chat template"),
        ("chat_template", None, r"is that of a tokenizer\.json, and .* is a tokenizer\.model"),
        ("chatml", llama, r"--template chatml: it has the control token <\|im_start\|>, which .* lacks"),
        ("chatml", None, r"--template chatml: it has the control token <\|im_start\|>, which .* lacks"),
    ):
        given = {} if folder is None else {"tokenizer_model": str(folder)}
        config = make_config(ROWS, template=template, **given)
        with pytest.raises(DataError, match=says) as caught:
            run(config)
        assert "\n" not in str(caught.value)
        assert not Path(config.output_prefix + "_dataset.json").exists()


def test_rows_that_the_template_refuses_are_counted(make_config: MakeConfig, tmp_path: Path) -> None:
    refuses = "{%- if messages[0].role == 'system' %}{{ raise_exception('No system here.') }}{% endif %}"
    folder = write_tokenizer(tmp_path / "qwen", QWEN_TOKENS, refuses + QWEN25)
    info = run(make_config(ROWS, template="chat_template", tokenizer_model=str(folder)))
    assert info.num_samples == 1 and info.skipped == {"chat_template": 1}
    assert "raises TemplateError: No system here." in info.skipped_first["chat_template"][0]["detail"]
