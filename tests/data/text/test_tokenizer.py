"""The Llama tokenizer, as Hugging Face's slow one with legacy=True."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_eve.config import DataConfig, ModelConfig, RunConfig
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import DatasetWriter
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.training.loop.data import open_data
from tests.data.helpers import MINI_SETTINGS, MakeConfig, caption_row, run
from tests.golden_dir import find_golden


def test_ids_and_digest(tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    assert (tokenizer.vocab_size, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (384, 0, 1, 2)
    assert tokenizer.sha256 == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()


def test_control_pieces_in_a_text_are_cut_out_first(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("One car."), 2, *tokenizer.encode("Two"), 0, *tokenizer.encode(" cars"), 1]
    assert tokenizer.encode("One car.</s>Two<unk> cars<s>") == ids
    assert tokenizer.encode("Two", bos=True) == [1, *tokenizer.encode("Two")]
    # Each stretch has its own leading piece, which a text in one go would have only at its start.
    assert ids.count(tokenizer.encode("Two")[0]) >= 1
    assert tokenizer.encode("TwoTwo") != tokenizer.encode("Two") * 2


def test_text_that_only_looks_like_a_control_piece(tokenizer: Tokenizer) -> None:
    for text in ("< s>", "<S>", "<0x0A>", "<image>", "<pad>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids) > 2


def test_what_was_encoded_is_decoded(tokenizer: Tokenizer) -> None:
    corpus = (find_golden("tokenize") / "corpus.txt").read_text(encoding="utf-8")
    for line in [*corpus.splitlines(), "猫 🐱 é", "two  spaces", " leading", "line\nbreak\t", ""]:
        assert tokenizer.decode(tokenizer.encode(line)) == line
        assert tokenizer.decode([1, *tokenizer.encode(line), 2]) == line


@pytest.mark.parametrize("token", [-200, -1, 384])
def test_only_text_is_decoded(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=str(token)):
        tokenizer.decode([300, token])


@given(st.text(alphabet="aé猫🐱 \n.▁", max_size=20), st.sampled_from(["<s>", "</s>", "<unk>"]))
def test_offsets_say_where_a_token_begins(text: str, special: str) -> None:
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    whole = text + special + text
    found = list(tokenizer.encode_with_offsets(whole))
    assert [token for token, _ in found] == tokenizer.encode(whole)
    begins = [begin for _, begin in found]
    assert begins == sorted(begins)
    half = len(tokenizer.encode(text))
    assert begins[half] == len(text)
    assert begins[half + 1 :] == [len(text + special) + begin for begin in begins[:half]]


def test_a_word_begins_with_its_space(tokenizer: Tokenizer) -> None:
    text = "é car  猫."
    found = list(tokenizer.encode_with_offsets(text))
    assert {begin for _, begin in found} >= {0, 1, 5, 6, 7, 8}
    before = [token for token, begin in found if begin < 1]
    assert tokenizer.decode(before) == "é"
    assert tokenizer.decode([token for token, begin in found if begin >= 5]) == " 猫."


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.model.*tokenizer\.model"):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text('{"model": {}}')
    with pytest.raises(DataError, match=r"text\.model is not a sentencepiece model"):
        Tokenizer(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.model"):
        Tokenizer(tmp_path / "empty.model")


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    corpus = find_golden("tokenize") / "corpus.txt"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "no_bos"),
        vocab_size=120,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DataError, match=r"no_bos\.model has the control pieces"):
        Tokenizer(tmp_path / "no_bos.model")


@pytest.fixture(params=["the default normalisation", "no byte pieces"])
def without_newlines(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A sentencepiece model that takes a newline for a space, or for an unknown piece."""
    path = tmp_path / "tokenizer.model"
    settings: dict[str, Any] = {"byte_fallback": True, "vocab_size": 300}
    if request.param == "no byte pieces":
        settings = {"normalization_rule_name": "identity", "vocab_size": 40}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red kite over the hill", "two blue boats"] * 20),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        **settings,
    )
    return path


def test_captions_want_a_tokenizer_with_newlines(
    tokenizer: Tokenizer, without_newlines: Path, make_config: MakeConfig
) -> None:
    tokenizer.check_newline()
    config = make_config([caption_row(1, "ok.jpg"), caption_row(2, "ok.jpg")])
    with pytest.raises(DataError, match=r"tokenizer\.model drops newlines, .*use Llama's") as error:
        run(replace(config, tokenizer_model=str(without_newlines)))
    assert not Path(config.output_prefix).parent.exists(), error

    # A dataset of an older version, made with such a tokenizer, is refused when a run is given the tokenizer.
    bad = Tokenizer(without_newlines)
    old = replace(MINI_SETTINGS, tokenizer_sha256=bad.sha256, vocab_size=bad.vocab_size)
    prefix = str(Path(config.output_prefix).parent / "old")
    with DatasetWriter(prefix, old) as writer:
        writer.add_sample([1, 5, 6], [-100, 5, 6], [])
        writer.finalise()
    model = replace(ModelConfig(), vocab_size=bad.vocab_size)
    data = DataConfig(data_path=(prefix,), tokenizer_model=str(without_newlines))
    with pytest.raises(DataError, match="drops newlines"):
        open_data(RunConfig(model=model, data=data))


@pytest.mark.parametrize("name", ["tokenizer_model", "input"])
def test_git_lfs_pointers_are_named(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    config = make_config([caption_row(1, "ok.jpg")])
    pointer = tmp_path / "pointer.json"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n")
    with pytest.raises(DataError, match=r"pointer\.json is a git-lfs pointer, .*: run git lfs pull"):
        run(replace(config, **{name: str(pointer)}))
