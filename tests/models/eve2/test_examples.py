"""The toy run of `examples/eve2_tiny/`: its tokenizer, its questions, what it checks; the whole of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_eve.data.text.load_tokenizer import load_tokenizer
from tests.test_commands import ROOT, command

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

pytest.importorskip("skimage", reason="make install-dev installs it")

import photos  # noqa: E402
from eve2_tiny import inputs  # noqa: E402
from eve2_tiny.language_model import SPECIAL_TOKENS, save_tokenizer  # noqa: E402
from eve2_tiny.run import Result, check_claims  # noqa: E402
from launch import StepFailed  # noqa: E402


def captions() -> list[inputs.Row]:
    """The captions as `photos.export` writes them, without the pictures."""
    return [
        {"id": name, "image": f"{name}.jpg", "conversations": [{"from": "gpt", "value": caption}]}
        for name, caption in photos.load_captions().items()
    ]


def test_the_tokenizer_has_the_traits_of_qwen25(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, inputs.texts(captions()))
    ours = load_tokenizer(tmp_path / "tokenizer.json", legacy=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == 512 and ours.eos_id == 512 - len(SPECIAL_TOKENS) + 2
    assert theirs.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(512 - len(SPECIAL_TOKENS), 512))
    for text in [*photos.load_captions().values(), "in 1999, it's\n\n  a \N{GRINNING FACE}, naïve"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] and ours.decode(ids) == text


def test_what_is_asked_is_trained_on_and_two_photos_are_swapped() -> None:
    rows = captions()
    trained = {
        (row["image"], row["conversations"][0]["value"].removeprefix("<image>\n")): row["conversations"][1][
            "value"
        ]
        for row in inputs.questions(rows)
    }
    assert len(trained) == 2 * len(rows)
    learnt = inputs.learnt(rows)
    for (photo,), text, answer in learnt:
        assert trained[photo, text] == answer
    first, second, _, swapped_first, swapped_second = learnt
    assert first[1] == swapped_first[1] != second[1] == swapped_second[1]
    assert first[0] == swapped_second[0] != second[0] == swapped_first[0]
    assert first[2] == swapped_second[2] != second[2] == swapped_first[2]


def test_claims_of_the_toy_run_are_checked() -> None:
    first, last = {"lm_loss": 6.0}, {"lm_loss": 0.1}
    trained = ["a", "b", "c", "b", "a"]
    check_claims([first, last], Result(trained, trained, trained))
    for records, said, exported, message in (
        ([first, {"lm_loss": 1.0}], trained, trained, "did not fall to a tenth"),
        ([first, last], ["a", "b", "x", "b", "a"], trained, "not the one that the model was trained on"),
        ([first, last], ["a", "b", "c", "a", "b"], trained, "with its photos swapped"),
        ([first, last], trained, [*trained[:-1], "x"], "transformers gives another answer"),
    ):
        with pytest.raises(StepFailed, match=message):
            check_claims(records, Result(said, exported, trained))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_the_toy_run_from_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = command("examples/eve2_tiny/run.py", "--output", str(output), timeout=1100)
    assert found.returncode == 0, found.stdout + found.stderr
    for claim in (
        "30 losses equal bit for bit",
        "begin as copies of its weights",
        "| answers word for word       | 5 of 5",
        "| swapped photos swap answers | 2 of 2",
        "| the same from transformers  | 5 of 5",
    ):
        assert claim in found.stdout, claim
    assert json.loads((output / "export" / "config.json").read_text(encoding="utf-8"))["add_moe"]
