"""Golden cases of greedy generation: tokens of prompts, under tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.checkpoint.hf.config import FolderSettings, settings_of
from megatron_eve.checkpoint.hf.load import load_hf_weights
from megatron_eve.config import ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.inference.generate import Prompt, generate, generation_config
from megatron_eve.models.build import build_chunks
from megatron_eve.models.golden_format import read_case_file
from megatron_eve.models.process_groups import model_parallel
from megatron_eve.verification.cases import case_family, linked
from megatron_eve.verification.results import CheckResult, equal


class _Answer(NamedTuple):
    """A prompt, and the published model's tokens with how far each was ahead of the second."""

    name: str
    prompt: Prompt
    tokens: list[int]
    margins: list[float]


class _Model(NamedTuple):
    """The prompts of one model, which are answered in one pack."""

    weights: Path
    settings: FolderSettings
    answers: list[_Answer]


def check_greedy(folder: Path, parallel: ParallelConfig) -> list[CheckResult]:
    """`greedy.json` of a folder: greedy tokens equal. Collective.

    A token is compared up to the first position where the published model's own margin is within rounding.

    Raises:
        ConfigError: the folder or one that it names lacks files.
    """
    content = read_case_file(folder / "greedy.json")
    models = [_own_model(folder, content)] if "hf" in content else _sibling_models(folder, content)
    return [row for model in models for row in _check_answers(model, parallel)]


def _sibling_models(folder: Path, content: Mapping[str, Any]) -> Iterator[_Model]:
    """The form whose entries name model cases beside the folder, with their weights and pictures."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in content["cases"]:
        entries.setdefault(entry["case"], []).append(entry)
    for name, some in entries.items():
        case = folder.parent / name
        if not case.is_dir():
            continue
        meta, weights = read_case_file(case / "meta.json"), linked(case, "hf")
        settings = settings_of(weights, **case_family(meta).golden().settings(meta, weights, ()))
        answers = [
            _answer(
                f"{name}.{entry['sample']}.{entry['kind']}",
                entry,
                [next((case / "raw").glob(f"{entry['sample']}_*.png"))],
            )
            for entry in some
        ]
        yield _Model(weights, settings, answers)


def _own_model(folder: Path, content: Mapping[str, Any]) -> _Model:
    """The form that names one model in `_shared` beside the folder, and pictures in `raw` of the folder."""
    weights = folder.parent / "_shared" / content["hf"]
    answers = [
        _answer(entry["image"] or "text", entry, [folder / "raw" / entry["image"]] if entry["image"] else [])
        for entry in content["cases"]
    ]
    return _Model(weights, settings_of(weights), answers)


def _answer(name: str, entry: Mapping[str, Any], pictures: list[Path]) -> _Answer:
    prompt = Prompt(entry["input_ids"], [path.read_bytes() for path in pictures])
    return _Answer(name, prompt, entry["new_tokens"], entry["top1_minus_top2_logit"])


def _check_answers(case: _Model, parallel: ParallelConfig) -> list[CheckResult]:
    config = generation_config(
        RunConfig(
            family=case.settings.family,
            model=case.settings.model,
            vision=case.settings.vision,
            training=TrainingConfig(transformer_impl="local"),
        ),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    with model_parallel(config):
        (chunk,) = build_chunks(config, freeze=False)
        load_hf_weights(case.weights, [chunk], case.settings)
        found = generate(
            chunk,
            [one.prompt for one in case.answers],
            config,
            max_new_tokens=max(len(one.tokens) for one in case.answers),
            stop_ids=(),
            apply_exif=False,
        )
    rows = []
    for one, ours in zip(case.answers, found, strict=True):
        clear = next((i for i, margin in enumerate(one.margins) if margin < 1e-4), len(one.tokens))
        different = sum(a != b for a, b in zip(ours[:clear], one.tokens[:clear], strict=True))
        rows.append(equal(f"{one.name}: tokens", different))
    return rows
