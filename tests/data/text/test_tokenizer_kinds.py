"""The kinds of tokenizers: a tokenizer.model with `legacy=False`, and a tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.conversation import IGNORE_INDEX, encode_conversation
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.json_tokenizer import JsonTokenizer
from megatron_eve.data.text.load_tokenizer import load_kind, load_tokenizer
from megatron_eve.data.text.prompts import encode_prompt
from megatron_eve.data.text.text_tokenizer import KINDS, SENTENCEPIECE_NOT_LEGACY, TOKENIZERS, TextTokenizer
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.models.text_format import DOCUMENT
from tests.data.text.test_documents import record
from tests.golden_dir import find_golden

# Byte-level BPE whose words hold their space, as in Llama 3 and Qwen2.
SPECIALS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def json_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json and its tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("json")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a red car over the hill", "two blue boats"] * 20, trainer)
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)  # as Llama 3's
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def both(json_path: Path) -> dict[str, TextTokenizer]:
    model = find_golden("tokenize") / "tokenizer.model"
    return {
        SENTENCEPIECE_NOT_LEGACY: load_tokenizer(model, legacy=False),
        TOKENIZERS: load_tokenizer(json_path, legacy=True),
    }


def test_ids_and_labels_of_the_mode_legacy_false() -> None:
    """As Hugging Face's slow tokenizer with that setting gave them to the published code."""
    folder = find_golden("tokenize")
    tokenizer = Tokenizer(folder / "tokenizer.model", legacy=False)
    groups = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["legacy_false"]
    for template, name in (("v1", "vicuna_v1"), ("plain", "plain")):
        for case in groups[template]:
            said = case["conversations"]
            images = sum(turn["value"].count("<image>") for turn in said)
            encoded = encode_conversation(said, tokenizer, name, images)
            assert encoded.tokens == case["input_ids"], case["name"]
            if case["n_trained"]:  # where lengths do not match, the published code drops all labels
                assert encoded.labels == case["labels"], case["name"]
    for case in groups["eval_prompts"]:
        system = case["prompt"].split(" USER:")[0]
        assert encode_prompt(case["question"], tokenizer, "vicuna_v1", 1, system=system) == case["input_ids"]


def test_only_the_beginning_of_a_text_has_a_dummy_prefix(tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.path, legacy=False)
    assert (other.kind, other.sha256, other.vocab_size) == (
        SENTENCEPIECE_NOT_LEGACY,
        tokenizer.sha256,
        tokenizer.vocab_size,
    )
    for text in ("One car.", " One", "a\nb", ""):
        assert other.encode(text) == tokenizer.encode(text)
    assert other.encode("One car.</s> car") == [*tokenizer.encode("One car."), 2, *tokenizer.encode("car")]
    legacy, new = tokenizer.encode("One.</s>One."), other.encode("One.</s>One.")
    assert legacy != new and other.decode(new) == "One.One."
    assert other.encode("</s>One.") == new[new.index(2) :]


@given(text=st.text(alphabet="aé猫🐱 \n.▁", max_size=20), special=st.sampled_from(["</s>", "<|end|>", ""]))
@pytest.mark.parametrize("kind", [SENTENCEPIECE_NOT_LEGACY, TOKENIZERS])
def test_offsets_and_bytes_of_tokens(
    both: dict[str, TextTokenizer], kind: str, text: str, special: str
) -> None:
    tokenizer = both[kind]
    whole = text + special + text
    found = list(tokenizer.encode_with_offsets(whole))
    assert [token for token, _ in found] == tokenizer.encode(whole)
    begins = [begin for _, begin in found]
    assert begins == sorted(begins) and all(0 <= begin < len(whole) for begin in begins)
    written = b"".join(tokenizer.token_bytes(token) for token, _ in found).decode()
    if kind == SENTENCEPIECE_NOT_LEGACY:
        whole = whole.replace("▁", " ")
        written = written.removeprefix(" ") if text or special != "</s>" else written
    assert written == whole
    plain = text.replace("▁", " ") if kind == SENTENCEPIECE_NOT_LEGACY else text
    assert tokenizer.decode(tokenizer.encode(text)) == plain


def test_a_tokenizer_json(json_path: Path, both: dict[str, TextTokenizer]) -> None:
    tokenizer = both[TOKENIZERS]
    assert tokenizer.sha256 == hashlib.sha256(json_path.read_bytes()).hexdigest()
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eos_id) == (TOKENIZERS, 0, 1)
    assert tokenizer.vocab_size == len(json.loads(json_path.read_text())["model"]["vocab"])
    ids = tokenizer.encode("a red car<|im_end|>\n", bos=True)
    assert ids[0] == 0 and ids[-2] == SPECIALS.index("<|im_end|>")
    assert tokenizer.decode(ids) == "a red car\n"
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=str(token)):
            tokenizer.decode([token])
    tokenizer.check_newline()
    # A file of another kind than is asked for is opened as what it is.
    assert load_kind(json_path, SENTENCEPIECE_NOT_LEGACY).kind == TOKENIZERS
    assert set(KINDS) >= {tokenizer.kind}


def test_a_tokenizer_without_bos_begins_with_the_text(json_path: Path, tmp_path: Path) -> None:
    path = shutil.copyfile(json_path, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|end|>"}')
    tokenizer = JsonTokenizer(path)
    assert tokenizer.bos == [] and tokenizer.encode("a", bos=True) == tokenizer.encode("a")
    ids = tokenizer.encode("a red car")
    encoded = encode_record(record("text", "a red car"), tokenizer, DOCUMENT)
    assert encoded.tokens == encoded.labels == [*ids, 1]
    caption = encode_record(record("pair", "<image>a red car", 1), tokenizer, "plain")
    assert caption.tokens[0] == -200 and caption.labels[0] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("content", "config", "says"),
    [
        ("{}", {}, r"tokenizer\.json is not a tokenizer\.json \(.+\): use the one that comes with"),
        (None, None, r"tokenizer_config\.json is missing: it names the tokens BOS and EOS; copy it"),
        (None, [], r"tokenizer_config\.json is not a JSON object"),
        (
            None,
            {"bos_token": "<|begin|>"},
            r"tokenizer_config\.json names no eos_token, which ends every answer",
        ),
        (
            None,
            {"eos_token": "</s>"},
            r"tokenizer_config\.json: eos_token is '</s>', which .+ does not have: copy",
        ),
        (None, {"eos_token": 7}, r"eos_token is 7, which"),
    ],
)
def test_files_that_are_no_tokenizer(
    json_path: Path, tmp_path: Path, content: str | None, config: Any, says: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(json_path.read_text() if content is None else content)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=says) as caught:
        load_tokenizer(tmp_path / "tokenizer.json", legacy=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cannot read the tokenizer .+none\.json"):
        load_tokenizer(tmp_path / "none.json", legacy=True)
