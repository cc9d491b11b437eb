"""Trainers of transformers and TRL on an exported folder, as docs/fine_tuning.md shows them, and what comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import megatron_eve.hf  # noqa: F401 - registers the model
from tests.convert.test_conversion import convert
from tests.inference.test_generate import picture
from tests.test_commands import ROOT

ANSWERS = ["A red box, and a blue one.", "Blue.", "Nobody at all, of course: it is a picture.", "No."]
QUESTIONS = ["Both?", "What is <image>?", "Who?", "Is it red?"]
PICTURES = [["a.png", "b.png"], ["b.png"], [], ["a.png"]]
# Beside the pinned transformers; none of them brings torch.
TRL = (
    "trl==1.16.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19",
    "xxhash==4.1.0",
)  # fmt: skip
OLDER = (
    "transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1", "requests", "urllib3",
    "charset_normalizer",
)  # fmt: skip


def scripts() -> list[str]:
    """The two programs of the page."""
    page = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def data(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the page's programs read."""
    (tmp_path / "eve-7b-hf").symlink_to(exported)
    (tmp_path / "a.png").write_bytes(picture(90, 60))
    (tmp_path / "b.png").write_bytes(picture(40, 100))
    rows = [
        {
            "images": images,
            "messages": [
                {"role": "user", "content": question.replace("<image>", "it")},
                {"role": "assistant", "content": answer},
            ],
        }
        for images, question, answer in zip(PICTURES, QUESTIONS, ANSWERS, strict=True)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def collate_of_the_page(folder: Path) -> Any:
    """The page's collator."""
    from transformers import AutoProcessor

    known: dict[str, Any] = {"processor": AutoProcessor.from_pretrained(folder)}
    (collator,) = re.findall(r"^def conversation.*?(?=^trainer = )", scripts()[0], re.MULTILINE | re.DOTALL)
    exec(collator, known)
    return known


def by_hand(folder: Path, batch: Any, steps: int, rate: float) -> tuple[list[float], nn.Module]:
    """Losses and the model of plain steps on the mean over all labels of one batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def check_it_comes_back(folder: Path, work: Path) -> None:
    """It answers, and becomes a checkpoint with the weights that were trained."""
    from megatron_eve.inference.hf_engine import HFEngine

    engine = HFEngine(folder, "vicuna_v1")
    query = engine.prepare("USER: <image>\nWhat? ASSISTANT:", [picture(90, 60)], 4)
    assert len(engine.answers([query])) == 1
    assert convert("import", "--source", folder, "--target", work / "run") == 0
    words = ("--format", "transformers", "--tokenizer", work / "eve-7b-hf")
    assert convert("export", "--source", work / "run", "--target", work / "again", *words) == 0
    tuned, again = (load_file(some / "model.safetensors") for some in (folder, work / "again"))
    before = load_file(work / "eve-7b-hf" / "model.safetensors")
    assert tuned.keys() == again.keys() and all(torch.equal(tuned[name], again[name]) for name in tuned)
    assert any(not torch.equal(tuned[name], before[name]) for name in before)


def test_trainer_takes_the_steps_of_a_plain_loop(exported: Path, data: Path) -> None:
    """Three steps with activation checkpointing: one batch, and the same as uneven microbatches."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    page, rate = collate_of_the_page(exported), 0.05
    losses, expected = by_hand(exported, page["collate"](rows), 3, rate)
    assert losses[2] < losses[0] - 0.05
    for batch, parts in ((4, 1), (1, 4)):
        args = TrainingArguments(
            output_dir=str(data / f"out{parts}"), max_steps=3, per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts, learning_rate=rate, lr_scheduler_type="constant", optim="sgd",
            max_grad_norm=0, logging_steps=1, save_steps=3,
            use_cpu=True, remove_unused_columns=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(exported)
        model.gradient_checkpointing_enable()
        trainer = Trainer(
            model=model, args=args, train_dataset=rows, data_collator=page["collate"],
            processing_class=page["processor"],
        )  # fmt: skip
        trainer.train()
        told = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert told == pytest.approx(losses, abs=2e-3)
        for found, weight in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(found, weight, rtol=0, atol=2e-5)
    check_it_comes_back(data / "out4" / "checkpoint-3", data)


def with_path(*folders: Path | None) -> dict[str, str]:
    """The environment, in which these folders come first."""
    path = [str(folder) for folder in folders if folder is not None]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }


def run_script(code: str, folder: Path, beside: Path | None = None) -> str:
    """Run a program of the page on a CPU, three steps long; returns what it said."""
    for there, here in (("num_train_epochs=1", "max_steps=3"), ("bf16=True", "bf16=True, use_cpu=True")):
        assert there in code
        code = code.replace(there, here)
    environment = {**with_path(beside), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def installed_beside(folder: Path, packages: tuple[str, ...]) -> Path:
    """Packages in a folder of their own, without what they depend on."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "No matching distribution" not in done.stderr:
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert not (folder / "torch").exists()
    return folder


@pytest.mark.slow
def test_the_page_with_trainer(data: Path) -> None:
    said = run_script(scripts()[0], data)
    assert said.count("'loss'") == 3 and "deprecated" not in said
    check_it_comes_back(data / "eve-7b-tuned", data)


@pytest.mark.slow
def test_the_page_with_trl_and_peft(data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As it stands, and without the mask of answers and the adapter: labels at image tokens count there no more."""
    beside = installed_beside(tmp_path_factory.mktemp("trl"), TRL)
    script = scripts()[1]
    said = run_script(script, data, beside)
    assert said.count("'loss'") == 3
    adapter = load_file(data / "eve-7b-lora" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    check_it_comes_back(data / "eve-7b-tuned", data)
    for name in ("eve-7b-tuned", "run", "again"):
        shutil.rmtree(data / name)
    plain = script.replace("assistant_only_loss=True,", "").replace(".merge_and_unload()", "")
    plain = re.sub(r"    peft_config=.*\n", "", plain).replace('dtype="bfloat16"', 'dtype="float32"')
    assert run_script(plain, data, beside).count("'loss'") == 3
    check_it_comes_back(data / "eve-7b-tuned", data)


@pytest.mark.slow
def test_another_transformers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests of this folder, and those of towers, with the oldest transformers that is supported."""
    beside = installed_beside(tmp_path_factory.mktemp("older"), OLDER)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/hf", "tests/models/towers"],
        cwd=ROOT, env=with_path(beside), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
