"""Ids and labels of VILA-U's public data sets, and its control tokens behind a tokenizer's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.load_tokenizer import load_kind, load_tokenizer
from megatron_eve.data.text.prompts import drawing_prompt
from megatron_eve.models.registry import find_family
from megatron_eve.models.vila_u.golden_rows import read_rows
from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS, TEXT_RULES
from megatron_eve.verification.rows import check_rows
from tests.golden_dir import find_golden

ROWS = {
    *(f"json_{name}" for name in "abcdef"),
    *(f"mmc4_{number}" for number in range(4)),
    *(f"vflan_{number}" for number in range(4)),
    *(f"t2i_{number}" for number in range(4)),
    *(f"collate.{number}" for number in range(4)),
    "t2v",
}
PROMPTS = {
    f"infer_{name}" for name in ("understand", "image_gen", "video_gen", "uncond_image", "uncond_video")
}


def test_every_row_of_the_public_data_sets() -> None:
    found = {
        one.name: one for one in check_rows(find_family("vila_u"), find_golden("golden/vila/vilau_data"))
    }
    wanted = {f"{row}: {what}" for row in ROWS for what in ("ids", "labels")} | {
        f"{row}: ids" for row in PROMPTS
    }
    assert found.keys() == wanted
    assert [name for name, one in found.items() if not one.ok] == []


def test_what_is_drawn_and_the_order_of_pictures_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of which nothing is to be drawn, and a template without anything around pictures, must differ."""
    folder, family = find_golden("golden/vila/vilau_data"), find_family("vila_u")
    golden = type(family.golden())
    rows = list(read_rows(folder))
    drawn = {row.name: len(row.drawn) for row in rows if any(row.drawn) and "." not in row.name}
    assert drawn == {**{f"t2i_{number}": 1 for number in range(4)}, "t2v": 8}
    wrong = [
        row._replace(kind="conversation", drawn=(), is_video=False) if any(row.drawn)
        else row._replace(template="v1_flan") for row in rows if row.name.startswith(("t2", "json_a"))
    ]  # fmt: skip
    monkeypatch.setattr(golden, "rows", lambda *_: iter(wrong))
    failed = {one.name.split(":")[0] for one in check_rows(family, folder) if not one.ok}
    assert failed == {row.name for row in wrong}


def test_control_tokens_stand_behind_the_vocabulary(tmp_path: Path) -> None:
    path = Path(shutil.copyfile(find_golden("tokenize") / "tokenizer.model", tmp_path / "tokenizer.model"))
    plain, tokenizer = load_tokenizer(path, False), load_tokenizer(path, False, SPECIAL_TOKENS)
    assert (plain.vocab_size, tokenizer.vocab_size) == (384, 388)
    text = "A car. <im_start><im_end>\nAnd <vi_start> a sea <vi_end></s>"
    ids = tokenizer.encode(text)
    assert [token for token in ids if token >= 384] == [384, 385, 386, 387] and ids[-1] == 2
    assert tokenizer.encode("A car.") == plain.encode("A car.") and len(plain.encode("<im_start>")) > 1
    for token, begin in tokenizer.encode_with_offsets(text):
        assert token < 384 or text[begin:].startswith(SPECIAL_TOKENS[token - 384])
    assert [tokenizer.token_bytes(token).decode() for token in range(384, 388)] == list(SPECIAL_TOKENS)
    assert tokenizer.decode([384, *plain.encode("A car."), 385]) == "A car."
    again = load_kind(path, tokenizer.kind)
    assert (again.kind, again.vocab_size) == (tokenizer.kind, 388) and tokenizer.kind != plain.kind
    # A published folder says the same ids, and one that says others is refused.
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": 384, "<pad>": 400}))
    assert load_tokenizer(path, False, SPECIAL_TOKENS).encode("<im_start>") == [384]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": 399}))
    with pytest.raises(
        DataError, match=r"added_tokens.json gives <im_start> the id 399, and behind the 384 pieces"
    ):
        load_tokenizer(path, False, SPECIAL_TOKENS)
    assert load_tokenizer(path, False).vocab_size == 384  # other families do not look


@pytest.mark.parametrize("has", [True, False])
def test_control_tokens_of_a_tokenizer_json(tmp_path: Path, has: bool) -> None:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "car": 2}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>", *(SPECIAL_TOKENS if has else [])])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", False, SPECIAL_TOKENS)
    assert tokenizer.vocab_size == 7 and tokenizer.encode("car<im_start><vi_end>") == [2, 3, 6]
    assert load_kind(tmp_path / "tokenizer.json", tokenizer.kind).kind == tokenizer.kind


def test_prompts_that_draw() -> None:
    template = TEXT_RULES.templates["v1"]
    assert drawing_prompt("A car.", template).endswith(" USER: A car. ASSISTANT: <im_start>")
    assert drawing_prompt("", template, video=True).endswith(" USER:ASSISTANT: <vi_start>")
    with pytest.raises(ValueError, match="draws no pictures"):
        drawing_prompt("A car.", replace(template, around_drawn=None))
