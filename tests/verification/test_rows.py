"""`tools/verify_golden.py` compares ids and labels of every row of text, and finds a wrong template or tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from megatron_eve.models.registry import find_family
from megatron_eve.verification.rows import check_rows
from tests.golden_dir import find_golden


@pytest.mark.parametrize(("case", "count"), [("vila10_llm", 11), ("vila15_llm", 4)])
def test_every_row_of_a_case(case: str, count: int) -> None:
    found = list(check_rows(find_family("vila"), find_golden(f"golden/vila/{case}")))
    assert len(found) == 2 * count and all(one.ok for one in found)


def test_the_other_mode_of_the_tokenizer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, family = find_golden("golden/vila/vila10_llm"), find_family("vila")
    monkeypatch.setattr(
        type(family), "text_rules", replace(family.text_rules, tokenizer_legacy=True), raising=True
    )
    wrong = {one.name for one in check_rows(family, folder) if not one.ok}
    # Only a second turn stands behind a control token.
    assert wrong == {f"sample.sft_{name}: {what}" for name in ("image", "text") for what in ("ids", "labels")}


def test_rows_of_a_chat_template(tmp_path: Path) -> None:
    """The case here has no ids: they are those of transformers' tokenizer of the shown text."""
    case = find_golden("golden/vila/vila_main_embed")
    shutil.copytree(case / "model" / "llm", tmp_path / "model" / "llm")
    meta = json.loads((case / "meta.json").read_text())
    shutil.copyfile(case / "meta.json", tmp_path / "meta.json")
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "llm" / "tokenizer.json"))
    inputs = {}
    for name in ("multi", "multi_nosys", "text", "text_nosys", "interleaved", "interleaved_nosys", "video"):
        ids = fast.encode(meta[f"decoded.{name}"], add_special_tokens=False).ids
        # What trains are the tokens between "assistant\n" and the newline behind <|im_end|>.
        labels, trains = [], False
        role, end = fast.encode("assistant\n").ids, meta["special"]["eos"]
        for place, token in enumerate(ids):
            labels.append(token if trains else -100)
            trains = (trains and token != end) or ids[max(place + 1 - len(role), 0) : place + 1] == role
        inputs[f"sample.{name}.input_ids"] = torch.tensor(ids)
        inputs[f"sample.{name}.labels"] = torch.tensor(labels)
    save_file(inputs, tmp_path / "inputs.safetensors")
    found = list(check_rows(find_family("vila"), tmp_path))
    assert len(found) == 12 and all(one.ok for one in found)  # all but the video
