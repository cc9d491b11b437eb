"""A model is asked in the chat template of its tokenizer, and an export holds that template."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.checkpoint.tokenizer_record import TokenizerRecord
from megatron_eve.config import ConfigError
from megatron_eve.convert.transformers_folder import template_of_chat_template
from megatron_eve.data.text.chat_template import chat_template_sha256, own_template
from megatron_eve.data.text.conversation import encode_conversation
from megatron_eve.data.text.json_tokenizer import JsonTokenizer
from megatron_eve.data.text.prompts import prompt_text
from megatron_eve.data.text.templates import find_template
from megatron_eve.inference.conv_mode import check_conv_mode
from megatron_eve.inference.engine import PromptError
from megatron_eve.inference.export_template import unmarked
from megatron_eve.inference.opening import chat_template
from megatron_eve.models.chat_templates import CHATML_CHAT_TEMPLATE, chat_template_with_pictures
from tests.convert.test_conversion import convert
from tests.data.helpers import turns
from tests.data.text.chat_tokenizers import LLAMA31, QWEN3, QWEN25, QWEN_TOKENS, write_tokenizer
from tests.golden_dir import find_golden
from tests.test_commands import command
from tests.test_mistakes import write_run


def trained_run(place: Path, tokenizer: JsonTokenizer, template: str, *digests: str) -> Namespace:
    """Flags that name a run whose conversations were in a template."""
    dataset = {
        "samples": [9],
        "templates": [template],
        **({"chat_templates": list(digests)} if digests else {}),
    }
    checkpoint = write_run(place, dataset=dataset, tokenizer=TokenizerRecord.of(tokenizer).to_dict())
    return Namespace(model_path=checkpoint.parent, tokenizer_model=Path(tokenizer.path))


def test_the_template_that_a_model_is_asked_in(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN25)
    tokenizer = JsonTokenizer(folder / "tokenizer.json")
    flags = trained_run(tmp_path / "run", tokenizer, "chat_template", chat_template_sha256(tokenizer.path))
    assert chat_template(flags.model_path) == "chat_template"
    template = check_conv_mode(flags, "chat_template")
    assert prompt_text("Why?", template, 1) == (
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n<image>\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert check_conv_mode(flags, "chatml") is find_template("chatml")
    with pytest.raises(
        ConfigError, match=r"--conv-mode llama_3: it has the control token .* lacks; name the template"
    ):
        check_conv_mode(flags, "llama_3")
    # Another chat template beside the same tokenizer, one that raises, and none.
    for text, says in (
        (
            QWEN3,
            r"is another one than the one that .*run was trained with \(sha256 .*\); name the tokenizer's folder",
        ),
        ("{{ raise_exception('No.') }}", "is another one than the one"),
    ):
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises(ConfigError, match=says) as caught:
            check_conv_mode(flags, "chat_template")
        assert "\n" not in str(caught.value)
    imported = trained_run(tmp_path / "imported", tokenizer, "plain")
    with pytest.raises(ConfigError, match=r"--conv-mode chat_template: .* raises TemplateError: No\."):
        check_conv_mode(imported, "chat_template")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(ConfigError, match=r"--conv-mode chat_template: .*qwen has no chat template"):
        check_conv_mode(flags, "chat_template")


def messages_of(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of transformers: each `<image>` and its newline as a part of its own."""
    found = []
    for one in said:
        before, *others = one["value"].split("<image>\n")
        parts: list[dict[str, str]] = [{"type": "text", "text": before}] if before else []
        for text in others:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        roles = {"human": "user", "gpt": "assistant"}
        found.append({"role": roles.get(one["from"], one["from"]), "content": parts or one["value"]})
    return found


@pytest.mark.parametrize("kind", ["chatml", "qwen2.5", "qwen3"])
def test_the_chat_template_of_an_export_writes_the_texts_of_training(tmp_path: Path, kind: str) -> None:
    source = {"chatml": QWEN25, "qwen2.5": QWEN25, "qwen3": QWEN3}[kind]
    folder = write_tokenizer(tmp_path / "m", QWEN_TOKENS, source)
    tokenizer = JsonTokenizer(folder / "tokenizer.json")
    template = find_template("chatml") if kind == "chatml" else own_template(tokenizer)
    written = CHATML_CHAT_TEMPLATE if kind == "chatml" else chat_template_with_pictures(source)
    assert template_of_chat_template(written) == ("chatml" if kind == "chatml" else "chat_template")
    assert template_of_chat_template(source) is None and template_of_chat_template(LLAMA31) is None
    auto = AutoTokenizer.from_pretrained(folder)
    image = "<|endoftext|>"  # stands for `<image>`, which this tokenizer has not
    for said in (
        turns("<image>\nWhat is it?", "A cat.", "And <image>\nthis?", " A dog. "),
        [{"from": "system", "value": "Be brief."}, *turns("What?", "A cat.")],
    ):
        count = sum(one["value"].count("<image>") for one in said)
        ours = encode_conversation(said, tokenizer, template, count)
        text = auto.apply_chat_template(messages_of(said), chat_template=written, tokenize=False)
        ids = auto(text.replace("<image>", image), add_special_tokens=False)["input_ids"]
        assert [-200 if one == auto.convert_tokens_to_ids(image) else one for one in ids] == ours.tokens
        if kind == "chatml":
            masked = auto.apply_chat_template(
                messages_of(said), chat_template=written, return_dict=True, return_assistant_tokens_mask=True
            )
            assert sum(masked["assistant_masks"]) == sum(label >= 0 for label in ours.labels)


def test_transformers_cannot_tell_what_was_typed(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m", QWEN_TOKENS, QWEN25)
    auto, template = AutoTokenizer.from_pretrained(folder), find_template("chatml")
    text = prompt_text("a < b [c] |d|", template, 0)
    assert "a < b [c] |d|" not in text and "a < b [c] |d|" in unmarked(text, template, auto)
    with pytest.raises(PromptError, match="typed_control_token"):
        unmarked(prompt_text("<|im_end|>", template, 0), template, auto)
    plain = prompt_text("<|im_end|>", "vicuna_v1", 0)
    assert unmarked(plain, find_template("vicuna_v1"), auto) == plain


@pytest.mark.slow
def test_an_import_is_asked_and_exported_in_its_chat_template(tmp_path: Path) -> None:
    """The same answers from the checkpoint and from the exported folder, which is asked so by itself."""
    source = shutil.copytree(find_golden("eve_v2") / "_shared" / "hf_all", tmp_path / "source")
    (source / "chat_template.jinja").write_text(QWEN25)
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.png")
    questions = [
        {"question_id": 1, "image": "a.png", "text": "What is it?"},
        {"question_id": 2, "text": "Why < how?"},
        {"question_id": 3, "text": "Say <|im_end|> twice."},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))

    def answers(name: str, *words: str) -> dict[int, tuple[str, str]]:
        file = tmp_path / f"{name}.jsonl"
        flags = ("--question-file", tmp_path / "q.jsonl", "--image-folder", tmp_path, "--answers-file", file)
        done = command("tools/generate.py", *map(str, flags), "--max-new-tokens", "6", *words)
        assert done.returncode == (name == "hf"), done.stderr
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return {row["question_id"]: (row["text"], row["metadata"]["conv_mode"]) for row in rows}

    run = ("--model-path", str(tmp_path / "run"), "--tokenizer-model", str(source))
    asked = answers("run", *run, "--conv-mode", "chat_template")
    assert asked[1][1] == "chat_template" and len(asked) == 3
    (common,) = (tmp_path / "run").glob("iter_*/common.pt")
    saved = torch.load(common, weights_only=False)
    digest = chat_template_sha256(source / "tokenizer.json")
    saved["dataset"] = {"samples": [9], "templates": ["chat_template"], "chat_templates": [digest]}
    torch.save(saved, common)
    words = ("--source", tmp_path / "run", "--format", "transformers", "--tokenizer", source)
    assert convert("export", *words, "--target", tmp_path / "hf") == 0
    again = answers("hf", "--model-path", str(tmp_path / "hf"))
    assert {key: again[key] for key in (1, 2)} == {key: asked[key] for key in (1, 2)}
    (source / "chat_template.jinja").write_text(QWEN3)
    assert convert("export", *words, "--target", tmp_path / "other") == 2
