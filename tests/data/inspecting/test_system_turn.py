"""A row with a system prompt of its own, as `tools/inspect_data.py` shows it."""

from __future__ import annotations

from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.inspecting.layout import row_layout
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import MakeConfig, run, turns


def test_its_role_is_shown(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    said = turns("<image>\nA chat, USER: or not?", "Yes.")
    rows = [
        {"image": "ok.jpg", "conversations": [*first, *said]}
        for first in ([{"from": "system", "value": "Be brief."}], [])
    ]
    config = make_config(rows, template="vicuna_v1")
    run(config)
    for row, prompt in enumerate(("Be brief.", "answers to the user's questions.")):
        pieces = row_layout(open_dataset(config.output_prefix), row, tokenizer).pieces
        text = {
            role: "".join(one.text for one in pieces if one.role == role)
            for role in ("system", "user", "assistant")
        }
        assert text["system"].strip().endswith(prompt)
        assert text["user"].strip().startswith("USER: [image 1] \nA chat, USER: or not?")
        assert text["assistant"].strip() == "ASSISTANT: Yes.</s>"
