"""EVE v2's golden cases: see `GoldenFormat`. Imports no torch at its top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.models.eve2.templates import EVE2_PLAIN, EVE2_QWEN2
from megatron_eve.models.golden_format import (
    GoldenBatch,
    GoldenPicture,
    GoldenRow,
    LanguageGolden,
    read_case_file,
)
from megatron_eve.models.text_format import IMAGE_TOKEN

_META, _SIZES, _ROWS = "meta.json", "sizes.json", "cases.json"
_STAGES = {"stage0": 0, "stage1": 1, "all": 2}
# What the case of pictures calls the two rules.
_RESIZES = {"train": "shrink", "eval": "scale"}
_PROMPTS = "eval_prompts"
_TEMPLATES = {"qwen2": EVE2_QWEN2.name, "plain": EVE2_PLAIN.name}


class EVE2Golden(LanguageGolden):
    """See `GoldenFormat`: batches of the public code, its pictures under both rules, and its rows of text."""

    def reads(self, folder: Path) -> bool:
        """See `GoldenFormat.reads`."""
        return (
            _is_batch(folder)
            or bool(_geometry(folder))
            or ((folder / _ROWS).is_file() and bool(_groups(folder)))
        )

    def batches(self, folder: Path) -> Sequence[GoldenBatch]:
        """See `GoldenFormat.batches`: one, in the form of `verification/cases.py`."""
        if not _is_batch(folder):
            return ()
        from safetensors.torch import load_file

        meta = read_case_file(folder / _META)
        inputs = load_file(folder / "inputs.safetensors")
        weights = folder / "hf"
        if not weights.is_dir():  # some copies hold the link as a text file
            weights = folder / weights.read_text(encoding="utf-8").strip()
        files = {path.name.split("_", 1)[0]: path for path in (folder / "raw").glob("*")}
        pictures = [
            [files[str(sample)].read_bytes()] if has else [] for sample, has in enumerate(meta["has_image"])
        ]
        return [
            GoldenBatch(
                name="",
                weights=weights,
                inputs=inputs,
                outputs=load_file(folder / "outputs.safetensors"),
                pictures=pictures,
                settings={"max_image_side": meta["max_size"]},
                stage=_STAGES[meta["stage"]],
            )
        ]

    def rows(self, folder: Path) -> Iterator[GoldenRow]:
        """See `GoldenFormat.rows`: conversations, captions and prompts of evaluation."""
        for group, entries in _groups(folder).items():
            for entry in entries:
                if group == _PROMPTS:
                    yield _prompt(folder, entry)
                elif _is_kept(group, entry):
                    yield _row(folder, group, entry)

    def pictures_alone(self, folder: Path) -> Iterator[GoldenPicture]:
        """See `GoldenFormat.pictures_alone`."""
        for entry in _geometry(folder):
            file = folder / "raw" / f"{entry['width']}x{entry['height']}.png"
            for name, fields in entry.items():
                rule, _, side = name.partition("_")
                if rule in _RESIZES and "sha256_u8" in fields and file.is_file():
                    settings = {"max_image_side": int(side), "image_resize": _RESIZES[rule]}
                    yield GoldenPicture(
                        f"{file.name}.{name}",
                        file,
                        settings,
                        "patches",
                        fields["sha256_u8"],
                        channels_last=True,
                    )


def _is_batch(folder: Path) -> bool:
    path = folder / _META
    return path.is_file() and {"hf", "grids_hw", "max_size", "stage"} <= set(read_case_file(path))


def _geometry(folder: Path) -> list[dict[str, Any]]:
    path = folder / _SIZES
    found = read_case_file(path).get("geometry", []) if path.is_file() else []
    return [entry for entry in found if any(name.startswith("train_") for name in entry)]


def _groups(folder: Path) -> dict[str, list[dict[str, Any]]]:
    path = folder / _ROWS
    content = read_case_file(path) if path.is_file() and (folder / "tokenizer.json").is_file() else {}
    return {name: content[name] for name in (*_TEMPLATES, _PROMPTS) if isinstance(content.get(name), list)}


def _is_kept(group: str, entry: dict[str, Any]) -> bool:
    """Is the row made into the same sample here?

    Not those that the public code refuses, nor those whose labels it drops because lengths differ, which it prints; nor
    rows with other numbers of pictures and placeholders, which here are left out: it tokenises the `<image>` of a row
    without a picture as text, makes several of a turn one, and gives a row without any the rows of no picture. A blank
    answer trains nothing here.
    """
    turns = entry["conversations"]
    if "error" in entry or "printed" in entry or any(not turn["value"].strip() for turn in turns[1:]):
        return False
    counts = [turn["value"].count(IMAGE_TOKEN) for turn in turns]
    if group == "plain":
        # Of captions it looks neither at roles nor at the question, and takes those without a picture.
        return counts == [1, 0] and turns[0]["from"] == "human" and bool(entry["has_image"])
    return max(counts) <= 1 and (sum(counts) > 0) == entry["has_image"]


def _row(folder: Path, group: str, entry: dict[str, Any]) -> GoldenRow:
    turns = entry["conversations"]
    return GoldenRow(
        name=f"{group}.{entry['name']}",
        template=_TEMPLATES[group],
        kind="conversation",
        turns=turns,
        pictures=sum(turn["value"].count(IMAGE_TOKEN) for turn in turns),
        tokenizer=folder / "tokenizer.json",
        tokens=entry["input_ids"],
        # An image in an answer keeps its placeholder among the labels until it is expanded.
        labels=[-100 if label == -200 else label for label in entry["labels"]],
    )


def _prompt(folder: Path, entry: dict[str, Any]) -> GoldenRow:
    return GoldenRow(
        name=f"{_PROMPTS}.{entry['question'][:20]!r}.{'image' if entry['with_image'] else 'text'}",
        template=EVE2_QWEN2.name,
        kind="conversation",
        turns=[{"from": "human", "value": entry["question"]}],
        pictures=int(entry["with_image"]),
        tokenizer=folder / "tokenizer.json",
        tokens=entry["input_ids"],
        labels=[],
        prompt="text",
    )
