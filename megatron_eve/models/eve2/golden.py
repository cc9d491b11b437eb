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
    GoldenSteps,
    LanguageGolden,
    read_case_file,
    tensor_names,
)
from megatron_eve.models.text_format import IMAGE_TOKEN

_META, _SIZES, _ROWS, _STEPS = "meta.json", "sizes.json", "cases.json", "steps.json"
_COPY, _OF_COPY = "copy.json", "outputs.safetensors"
# Models that answer text as the plain language model does: before the copy, after it, and with other experts.
_COPIES = ("hf_stage0", "hf_init_copy", "hf_all")
_STAGES = {"stage0": 0, "stage1": 1, "all": 2}
# What the case of pictures calls the two rules.
_RESIZES = {"train": "shrink", "eval": "scale"}
_PROMPTS = "eval_prompts"
_TEMPLATES = {"qwen2": EVE2_QWEN2.name, "plain": EVE2_PLAIN.name}


class EVE2Golden(LanguageGolden):
    """See `GoldenFormat`: batches and training steps of the public code, its pictures under both rules, and its rows of
    text."""

    def reads(self, folder: Path) -> bool:
        """See `GoldenFormat.reads`."""
        return (
            _is_batch(folder)
            or bool(_geometry(folder))
            or bool(_runs(folder))
            or _is_copy(folder)
            or ((folder / _ROWS).is_file() and bool(_groups(folder)))
        )

    def batches(self, folder: Path) -> Sequence[GoldenBatch]:
        """See `GoldenFormat.batches`: one, in the form of `verification/cases.py`; or texts that three models read."""
        from safetensors.torch import load_file

        if _is_copy(folder):
            return list(_texts(folder))
        if not _is_batch(folder):
            return ()
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

    def steps(self, folder: Path) -> Iterator[GoldenSteps]:
        """See `GoldenFormat.steps`: some of each stage."""
        from safetensors.torch import load_file

        runs = _runs(folder)
        final = load_file(folder / "final.safetensors") if runs else {}
        for name, run in runs.items():
            weights, settings = folder.parent / "_shared" / run["hf"], run["optimizer"]
            assert settings["name"] == "AdamW" and run["lr_schedule"] == "constant", name
            files = [[folder / "raw" / row["image"]] if "image" in row else [] for row in run["records"]]
            yield GoldenSteps(
                name=name,
                weights=weights,
                stage=_STAGES[run["trains"]],
                optimizer={
                    "lr": run["lr"],
                    "adam_beta1": settings["betas"][0],
                    "adam_beta2": settings["betas"][1],
                    "adam_eps": settings["eps"],
                    "weight_decay": settings["weight_decay"],
                    "clip_grad": settings["gradient_clipping"] or 0.0,
                },
                samples=[
                    GoldenRow(
                        name=row["id"],
                        template=_TEMPLATES[run["template"]],
                        kind="conversation",
                        turns=row["conversations"],
                        pictures=len(some),
                        tokenizer=weights / "tokenizer.json",
                        tokens=[],
                        labels=[],
                    )
                    for row, some in zip(run["records"], files, strict=True)
                ],
                pictures=[[path.read_bytes() for path in some] for some in files],
                losses=[step["loss"] for step in run["steps"]],
                grad_norms=[step["grad_norm"] for step in run["steps"]],
                changes=run["delta_norm"],
                final={
                    key.removeprefix(f"{name}."): tensor
                    for key, tensor in final.items()
                    if key.startswith(f"{name}.")
                },
            )

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


def _is_copy(folder: Path) -> bool:
    return (folder / _COPY).is_file() and "logits_plain_qwen2.0" in tensor_names(folder / _OF_COPY)


def _texts(folder: Path) -> Iterator[GoldenBatch]:
    """Each text by itself, with the logits of the plain language model."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / _OF_COPY)
    numbers = [name.rpartition(".")[2] for name in tensors if name.startswith("input_ids.")]
    for weights in _COPIES:
        for number in numbers:
            ids = tensors[f"input_ids.{number}"]
            yield GoldenBatch(
                name=f"{weights}.{number}",
                weights=folder.parent / "_shared" / weights,
                inputs={
                    "input_ids": ids,
                    "labels": ids,
                    "attention_mask": torch.ones_like(ids, dtype=torch.bool),
                },
                outputs={"logits": tensors[f"logits_plain_qwen2.{number}"]},
                pictures=[[]],
            )


def _runs(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / _STEPS
    found = read_case_file(path) if path.is_file() else {}
    return {
        name: run
        for name, run in found.items()
        if isinstance(run, dict)
        and {"records", "hf", "trains", "optimizer", "steps", "delta_norm"} <= set(run)
    }


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
