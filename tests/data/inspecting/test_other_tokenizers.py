"""Rows of a dataset that was made with a tokenizer.json: roles of a chat template, and characters of several tokens."""

from __future__ import annotations

from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.inspecting.layout import row_layout
from megatron_eve.data.text.load_tokenizer import load_kind
from tests.data.helpers import MakeConfig, run, turns
from tests.golden_dir import find_golden


def test_a_row_of_a_chat_template(make_config: MakeConfig) -> None:
    path = str(find_golden("golden/vila/vila_main_embed") / "model" / "llm" / "tokenizer.json")
    said = turns("Compare <image> with 猫.", "Yes 🙂.", "Why?", "So.")
    config = make_config(
        [{"image": "ok.jpg", "conversations": said}], template="qwen2", family="vila", tokenizer_model=path
    )
    run(config)
    dataset = open_dataset(config.output_prefix)
    row = row_layout(dataset, 0, load_kind(path, dataset.info.tokenizer_kind))
    stretches: list[tuple[str, bool, str]] = []
    for piece in row.pieces:
        if stretches and stretches[-1][:2] == (piece.role, piece.trains):
            piece_text = stretches.pop()[2] + piece.text
            stretches.append((piece.role, piece.trains, piece_text))
        else:
            stretches.append((piece.role, piece.trains, piece.text))
    assert stretches == [
        ("system", False, "<|im_start|>system\nYou are a helpful assistant"),
        ("user", False, "<|im_end|>\n<|im_start|>user\nCompare [image 1]\n with 猫.<|im_end|>\n"),
        ("assistant", False, "<|im_start|>assistant\n"),
        ("assistant", True, "Yes 🙂.<|im_end|>"),
        ("user", False, "\n<|im_start|>user\nWhy?<|im_end|>\n"),
        ("assistant", False, "<|im_start|>assistant\n"),
        ("assistant", True, "So.<|im_end|>"),
        ("user", False, "\n"),
    ]
    assert sum(piece.tokens for piece in row.pieces) == row.text_length
    assert sum(piece.tokens for piece in row.pieces if piece.trains) == row.labels
