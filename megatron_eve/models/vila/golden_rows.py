"""Rows of text of VILA's golden cases: what the public code made of conversations, documents and pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.models.golden_format import GoldenRow, read_case_file, read_case_rows
from megatron_eve.models.text_format import IMAGE_TOKEN

if TYPE_CHECKING:
    import torch

_SAMPLE = re.compile(r"sample\.(.+)\.input_ids")
_PICTURE, _IGNORED = -200, -100
# How meta.json shows a text: `<unk>` for a picture, and a space in front of the text behind it.
_SHOWN_PICTURE = re.compile("<unk> ?")
_TURN = re.compile(r"USER: (?P<question>.*?) ASSISTANT: (?P<answer>.*?)</s>", re.DOTALL)
_CHAT_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>\n", re.DOTALL)
_OF_NVILA = ("qwen2", "nvila_document")
_END_OF_DOCUMENT = re.compile(r"<\|(im_end|endoftext)\|>$")
_CHAT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def read_rows(folder: Path) -> Iterator[GoldenRow]:
    """The rows of a case whose text its meta.json shows. Conversations of `data/conversations.json` are read there.

    Args:
        folder: with inputs.safetensors, meta.json and model/.
    """
    meta_path, inputs_path = folder / "meta.json", folder / "inputs.safetensors"
    if not (meta_path.is_file() and inputs_path.is_file()):
        return
    from safetensors.torch import load_file

    meta = read_case_file(meta_path)
    inputs = load_file(inputs_path)
    raw = _raw_rows(folder)
    language = folder / "model" / "llm" if (folder / "model" / "llm").is_dir() else folder / "model"
    for key in sorted(inputs):
        if not (match := _SAMPLE.fullmatch(key)):
            continue
        name = match[1]
        shown = meta.get("decoded", {}).get(key) or meta.get(f"decoded.{name}")
        if not isinstance(shown, str) or "<vila/video>" in shown:
            continue
        is_nvila = "media_token_ids" in meta.get("special", {})
        template, kind, turns = _conversation(shown, language.name == "llm", is_nvila)
        ids, labels = _expanded(inputs[key], inputs[f"sample.{name}.labels"], meta)
        yield GoldenRow(
            name=f"sample.{name}",
            template=template,
            kind=kind,
            turns=raw.get(name, turns),
            pictures=ids.count(_PICTURE),
            tokenizer=language / ("tokenizer.json" if template in _OF_NVILA else "tokenizer.model"),
            tokens=ids,
            labels=labels,
        )


def _raw_rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Turns of conversations by the name of their sample, as the case's data has them."""
    found: dict[str, list[dict[str, str]]] = {}
    for file, names in (("conversations.json", ("sft_image", "sft_text")), ("plain.json", ("plain",))):
        path = folder / "data" / file
        if path.is_file():
            rows = read_case_rows(path)
            found |= {name: row["conversations"] for name, row in zip(names, rows, strict=False)}
    return found


def _conversation(shown: str, later: bool, is_nvila: bool) -> tuple[str, str, list[dict[str, str]]]:
    """Template, kind and turns of a text that meta.json shows.

    Args:
        shown: the text.
        later: of VILA-1.5 or NVILA, in whose turns pictures stay where they are.
        is_nvila: of NVILA, whose documents end in its tokenizer's EOS and have a newline behind each picture.
    """
    if shown.startswith("<|im_start|>"):
        found = _CHAT_TURN.findall(shown)
        return "qwen2", "conversation", [{"from": _CHAT_ROLES[role], "value": text} for role, text in found]
    if is_nvila:
        text = _END_OF_DOCUMENT.sub("", shown).replace(f"{IMAGE_TOKEN}\n", IMAGE_TOKEN)
        return "nvila_document", "interleaved", [{"from": "gpt", "value": text}]
    text = _SHOWN_PICTURE.sub(IMAGE_TOKEN, shown.removeprefix("<s>"))
    if "USER: " in text:
        turns = [{"from": "system", "value": text[: text.index("USER: ")].strip()}]
        for match in _TURN.finditer(text):
            turns += {"from": "human", "value": match["question"]}, {"from": "gpt", "value": match["answer"]}
        return "vila15_v1" if later else "vila_v1", "conversation", turns
    if text.endswith("\n"):
        caption = text.removeprefix(IMAGE_TOKEN).removesuffix("\n")
        return (
            "plain",
            "conversation",
            [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": caption}],
        )
    return "document", "interleaved", [{"from": "gpt", "value": text.removesuffix("</s>")}]


def _expanded(ids: torch.Tensor, labels: torch.Tensor, meta: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and labels with -200 for each picture. In NVILA a picture is a token, and a newline follows it."""
    special = meta.get("special", {})
    picture = special.get("media_token_ids", {}).get("image", _PICTURE)
    behind = special.get("newline_ids", []) if picture != _PICTURE else []
    tokens: list[int] = []
    trained: list[int] = []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        new = [_PICTURE, *behind] if token == picture else [token]
        tokens += new
        trained += [_IGNORED] * len(new) if token == picture else [label]
    return tokens, trained
