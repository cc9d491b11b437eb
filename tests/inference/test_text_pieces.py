"""Text that comes token by token: nothing is taken back, no half of a character, and joined it is the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.inference.engine import REPLACEMENT, TextPieces
from tests.golden_dir import find_golden


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(find_golden("tokenize") / "tokenizer.model")


def pieces(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    growing = TextPieces(tokenizer.decode)
    return [*(growing.add(token) for token in tokens), growing.rest()]


def test_a_character_comes_when_its_last_byte_is_there(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a 猫🙂b")
    found = pieces(tokens, tokenizer)
    assert len(tokens) > 7, "the bytes of these characters are tokens of their own"
    assert "".join(found) == "a 猫🙂b" and REPLACEMENT not in "".join(found)
    # White space at the end waits for what follows it, and a lone byte for the end.
    assert pieces(tokenizer.encode("end  \n"), tokenizer)[-1] == ""
    (byte,) = {tokenizer.encode("猫")[-1]}
    assert pieces([byte], tokenizer) == ["", REPLACEMENT]


@given(st.lists(st.integers(0, 383), max_size=40) | st.text(max_size=20))
def test_pieces_join_to_the_text_of_all_tokens(content: list[int] | str) -> None:
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    tokens = tokenizer.encode(content) if isinstance(content, str) else content
    found = pieces(tokens, tokenizer)
    assert "".join(found) == tokenizer.decode(tokens).strip()
