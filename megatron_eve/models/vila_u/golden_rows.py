"""Rows of text of VILA-U's golden cases: what the public code made of conversations, documents, pairs and prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.golden_format import GoldenRow, read_case_file, read_case_rows
from megatron_eve.models.text_format import IMAGE_TOKEN
from megatron_eve.models.vila_u.templates import IMAGE_TOKENS, VIDEO_TOKENS

if TYPE_CHECKING:
    import torch

_ROW = re.compile(r"(\w+)\.input_ids")
_SHOWN_PICTURE = re.compile(
    "<unk> ?"
)  # how meta.json shows a picture, and a space in front of the text behind it
_TURN = re.compile(r"USER: (?P<question>.*?) ASSISTANT: (?P<answer>.*?)</s>", re.DOTALL)
_PROMPT = re.compile(r"USER: ?(?P<question>.*?) ?ASSISTANT:(?P<announced>.*)", re.DOTALL)
_PICTURE, _IGNORED = -200, -100
# The public code changes its data in place: a document that is read again is another one.
_WRONG = ("mmc4_1_second_visit",)
_BATCH = "collate"


def read_rows(folder: Path) -> Iterator[GoldenRow]:
    """The rows of a case whose text its meta.json shows; conversations are read from data/conversations.json.

    Args:
        folder: with outputs.safetensors, meta.json and data/, beside vilau_model, which has the tokenizer.

    Raises:
        ConfigError: the case lacks files.
    """
    outputs_path, model = folder / "outputs.safetensors", folder.parent / "vilau_model" / "llm"
    if not model.is_dir():
        raise ConfigError(
            f"{model}: no such folder, and {folder} has no tokenizer of its own; copy it beside the case"
        )
    from safetensors.torch import load_file

    outputs, shown = load_file(outputs_path), read_case_file(folder / "meta.json")["decoded"]
    added = read_case_file(model / "added_tokens.json")
    begins = {int(added[IMAGE_TOKENS[0]]), int(added[VIDEO_TOKENS[0]])}
    conversations = _conversations(folder)
    rows = []
    for key in sorted(outputs):
        if not (match := _ROW.fullmatch(key)) or (name := match[1]) in (*_WRONG, _BATCH):
            continue
        tokens = outputs[key].tolist()
        labels = (
            outputs[f"{name}.labels"].tolist() if f"{name}.labels" in outputs else [_IGNORED] * len(tokens)
        )
        text = str(shown[key]).removeprefix("<s>").removeprefix(" ")
        rows.append(
            _row(name, text, tokens, _with_drawn(tokens, labels, begins), conversations)._replace(
                tokenizer=model / "tokenizer.model"
            )
        )
    yield from rows
    yield from _of_batch(outputs, {tuple(row.tokens): row for row in rows}, begins)


def _conversations(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of the case's conversations, by the name of the outputs."""
    path = folder / "data" / "conversations.json"
    return {f"json_{row['id']}": row for row in read_case_rows(path)} if path.is_file() else {}


def _with_drawn(tokens: list[int], labels: list[int], begins: set[int]) -> list[int]:
    """Labels in which -200 says that a picture is to be drawn.

    The public labels have it at pictures that are read, too. To be drawn are those behind a trained <im_start> or
    <vi_start>, which decides as the public code does for all of its data sets.
    """
    found, draws = list(labels), False
    for place, token in enumerate(tokens):
        if token == _PICTURE:
            found[place] = _PICTURE if draws else _IGNORED
        else:
            draws = token in begins and labels[place] == token
    return found


def _row(
    name: str, text: str, tokens: list[int], labels: list[int], conversations: Mapping[str, dict[str, Any]]
) -> GoldenRow:
    """A row, without its tokenizer."""
    drawn = tuple(label == _PICTURE for token, label in zip(tokens, labels, strict=True) if token == _PICTURE)
    template, kind, is_video = "v1", "conversation", False
    prompt: Literal["", "text", "image", "video"] = ""
    turns: list[dict[str, str]] = []
    if name in conversations:
        turns = conversations[name]["conversations"]
    elif name.startswith("infer_"):
        match = _match(_PROMPT, name, _SHOWN_PICTURE.sub(IMAGE_TOKEN, text))
        announced = match["announced"].strip()
        prompt = "image" if announced == IMAGE_TOKENS[0] else "video" if announced else "text"
        turns = [{"from": "human", "value": match["question"]}]
    elif "USER: " not in text:
        template, kind = "document", "interleaved"
        turns = [{"from": "gpt", "value": _SHOWN_PICTURE.sub(IMAGE_TOKEN, text).removesuffix("</s>")}]
    elif any(drawn):
        kind, is_video = "generation", VIDEO_TOKENS[0] in text
        match = _match(_TURN, name, text)
        turns = [
            {"from": "human", "value": match["question"]},
            {"from": "gpt", "value": IMAGE_TOKEN * len(drawn)},
        ]
    else:
        template, turns = "v1_flan", _turns(text)
    return GoldenRow(name, template, kind, turns, len(drawn), Path(), tokens, labels, drawn, is_video, prompt)


def _match(pattern: re.Pattern[str], name: str, text: str) -> re.Match[str]:
    if (found := pattern.search(text)) is None:
        raise ConfigError(
            f"meta.json: the text of {name} has no question and answer ({text[:80]!r}); copy the case again"
        )
    return found


def _turns(text: str) -> list[dict[str, str]]:
    turns = []
    for match in _TURN.finditer(_SHOWN_PICTURE.sub(IMAGE_TOKEN, text)):
        turns += [{"from": "human", "value": match["question"]}, {"from": "gpt", "value": match["answer"]}]
    return turns


def _of_batch(
    outputs: Mapping[str, torch.Tensor], rows: Mapping[tuple[int, ...], GoldenRow], begins: set[int]
) -> Iterator[GoldenRow]:
    """The rows of the case's batch, which are some of the others without what pads them."""
    if f"{_BATCH}.input_ids" not in outputs:
        return
    names = ("input_ids", "labels", "attention_mask")
    for number, (ids, labels, mask) in enumerate(
        zip(*(outputs[f"{_BATCH}.{name}"] for name in names), strict=True)
    ):
        tokens, trained = ids[mask].tolist(), labels[mask].tolist()
        if tuple(tokens) in rows:
            row = rows[tuple(tokens)]
            yield row._replace(name=f"{_BATCH}.{number}", labels=_with_drawn(tokens, trained, begins))
