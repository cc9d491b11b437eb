"""What a start says of its weights, and what it warns of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_eve.config import PRESETS, TRACKER, CheckpointConfig, DataConfig, RunConfig
from megatron_eve.preflight import describe_start
from megatron_eve.training.monitoring.weight_origin import start_lines
from tests.data.helpers import write_dataset


def said(config: RunConfig, iteration: int = 0, consumed: int = 0) -> list[str]:
    return list(start_lines(config, iteration, consumed))


def config_of(train_iters: int = 4, lr: float = 4e-5, **checkpoint: str | None) -> RunConfig:
    config = RunConfig(checkpoint=CheckpointConfig(**checkpoint))
    return replace(
        config,
        training=replace(config.training, train_iters=train_iters),
        optimizer=replace(config.optimizer, lr=lr),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with one checkpoint, by its names and checksums alone."""
    folder = tmp_path / "run"
    (folder / "iter_0000002").mkdir(parents=True)
    (folder / TRACKER).write_text("2")
    (folder / "iter_0000002" / "config.yaml").write_text(yaml.safe_dump(config_of().to_dict()))
    (folder / "iter_0000002" / "rank00000.sha256").write_text("ab  __0_0.distcp\n")
    return folder


def test_random_weights_and_nothing_kept() -> None:
    assert said(config_of()) == [
        "weights: random (--seed 1234)",
        "warning: no --save is given, so nothing is kept of this run",
    ]


def test_a_resumed_run(run: Path) -> None:
    config = config_of(load=str(run), save=str(run))
    (line,) = said(config, 2, 32)
    assert line.startswith(f"weights: {run}/iter_0000002, iteration 2 (sha256 ")
    other = said(config_of(load=str(run), save=str(run), lr=1e-3), 2, 32)
    assert other[1:] == ["warning: --lr 0.001: the checkpoint was made with 4e-05"]
    (run / "iter_0000002" / "rank00000.sha256").write_text("cd  __0_0.distcp\n")
    assert said(config, 2, 32) != [line]  # other weights of the same name


def test_a_finished_run(run: Path) -> None:
    config = config_of(train_iters=2, load=str(run), save=str(run))
    assert said(config, 2, 32)[-1].startswith("warning: nothing to do: the run is at its end, iteration 2;")


def test_weights_alone(run: Path, tmp_path: Path) -> None:
    (line,) = said(config_of(pretrained_checkpoint=str(run), save="x"))
    assert line.startswith(f"weights: {run}, iteration 2 (sha256 ")
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1")
    (first,) = said(config_of(pretrained_checkpoint=str(folder), save="x"))
    assert first.startswith(f"weights: {folder}, in Hugging Face layout (sha256 ")
    (folder / "model.safetensors").write_bytes(b"2")
    assert said(config_of(pretrained_checkpoint=str(folder), save="x")) != [first]


@pytest.mark.parametrize(("load", "there"), [("empty", "no checkpoint is there"), ("typo", "no such folder")])
def test_a_load_that_loads_nothing(tmp_path: Path, load: str, there: str) -> None:
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / load)
    config = config_of(load=path, save=str(tmp_path / "run"))
    assert said(config) == [
        "weights: random (--seed 1234)",
        f"WARNING: --load {path}: {there}, so the run begins at iteration 0; is the path right?",
    ]
    assert said(config_of(load=path, save=f"{tmp_path}/./{load}/")) == ["weights: random (--seed 1234)"]


@pytest.mark.parametrize(
    ("stage", "template", "samples"),
    [(2, "plain", None), (3, "plain", "captions"), (2, "document", None), (3, "document", "documents")],
)
def test_stage_3_on_data_without_questions(
    tmp_path: Path, stage: int, template: str, samples: str | None
) -> None:
    """Datasets made with the templates plain and document have no questions, which stage 3 is to learn."""
    captions = write_dataset(tmp_path / "captions", 2, 0)
    manifest = json.loads(Path(f"{captions}_dataset.json").read_text())
    Path(f"{captions}_dataset.json").write_text(json.dumps({**manifest, "template": template}))
    questions = tmp_path / "questions"
    Path(f"{questions}_dataset.json").write_text(json.dumps({**manifest, "template": "vicuna_v1"}))
    config = config_of()
    config = replace(
        config,
        training=replace(config.training, stage=stage),
        data=replace(config.data, data_path=("0.5", str(questions), "0.5", captions)),
    )
    first, *warnings = describe_start(config, 2).splitlines()
    assert f"stage {stage}, on 2 ranks; data: 0.5 {questions} 0.5 {captions}; 4 iterations of" in first
    told = (
        f"warning: {captions} was made with --template {template}, whose samples are {samples} without a question; "
        "stage 3 trains on conversations (tools/preprocess_data.py --template vicuna_v1)"
    )
    assert warnings == ([told] if samples else [])


def test_a_run_is_called_by_its_preset_whatever_it_trains_with() -> None:
    sizes = PRESETS["eve_7b_hd"]
    aligned = replace(sizes.vision, patch_aligning=True, teacher_model="clip", align_loss_weight=0.5)
    config = replace(config_of(), model=sizes.model, vision=aligned, data=DataConfig(mock_data=True))
    assert ": eve_7b_hd, stage 2, on 1 rank; data: mock data" in describe_start(config, 1)
    other = replace(config, vision=replace(aligned, image_size=2016))
    assert ": a model of its own sizes, stage 2" in describe_start(other, 1)
