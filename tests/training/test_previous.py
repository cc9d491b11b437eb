"""What an earlier commit wrote resumes, opens and converts (`tests/golden/previous`); the next losses are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_eve.config import CheckpointConfig, RunConfig
from megatron_eve.config.recipe import load_recipe
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.convert.test_conversion import convert
from tests.families.eve import TEACHER
from tests.families.suite import run
from tests.golden_dir import find_golden
from tests.layouts import ONE, TP2_SP, Layout, layout, parametrize
from tests.ranks import RankPool

PREVIOUS = Path(__file__).parents[1] / "golden" / "previous"
PP2_VPP2 = layout("PP2xVPP2", 2, pp=2, num_layers_per_virtual_pipeline_stage=1)
TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenize" / "tokenizer.model"
MOST_BYTES = 2_000_000
ELSEWHERE = 1e-6
"""Relative difference of a loss that another kind of CPU, another torch, or the patch embedding's new rounding make."""


def machine() -> dict[str, str]:
    """What the bits of a loss depend on, apart from the code: the kind of CPU, the kernels for it, and torch."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": " ".join(found.get(name, "") for name in ("model name", "cpu family", "model")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def config_of(layout: Layout, **checkpoint: str) -> RunConfig:
    """The recorded run's settings, from its own recipe, under another layout."""
    config = load_recipe(PREVIOUS / "recipe.yaml")
    return replace(
        config,
        parallel=layout.parallel,
        vision=replace(config.vision, teacher_model=str(find_golden(TEACHER))),
        data=replace(config.data, data_path=(str(PREVIOUS / "data"),), tokenizer_model=str(TOKENIZER)),
        checkpoint=CheckpointConfig(**checkpoint),
    )


@pytest.mark.distributed
@parametrize(ONE, TP2_SP, PP2_VPP2)
def test_the_next_losses_are_those_it_would_have_had(ranks: RankPool, layout: Layout) -> None:
    lines = (PREVIOUS / f"losses_{layout.name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["iteration"] for record in records] == [4, 5, 6, 7, 8]
    config = config_of(layout, load=str(PREVIOUS / "checkpoint"))
    trace = ranks.run(layout.world_size, run, config)[-1]
    for name, found in (("lm_loss", trace.losses), ("align_loss", trace.aligning)):
        assert found == pytest.approx([record[name] for record in records], rel=ELSEWHERE, abs=0), name
        if machine() == json.loads((PREVIOUS / "machine.json").read_text(encoding="utf-8")):
            assert [loss.hex() for loss in found] == [record[f"{name}_hex"] for record in records], name


def test_the_dataset_opens() -> None:
    rows = json.loads((PREVIOUS / "rows.json").read_text(encoding="utf-8"))
    dataset = open_dataset(str(PREVIOUS / "data"))
    tokenizer = Tokenizer(str(TOKENIZER))
    assert len(dataset) == len(rows)
    for number, row in enumerate(rows):
        _, labels = dataset.text(number)
        trained = [int(token) for token in labels if token >= 0]
        answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        for answer in answers:
            assert answer in tokenizer.decode(trained)
    with_images = [row.get("image", []) for row in rows]
    names = [name for names in with_images for name in ([names] if isinstance(names, str) else names)]
    for image, name in enumerate(names):
        picture = find_golden("mini224_mixed") / "proc" / name
        assert dataset.image_bytes(image) == picture.read_bytes()


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("published", ()),
        ("transformers", ("--format", "transformers")),
    ],
)
def test_the_checkpoint_becomes_the_folders_that_it_became(
    tmp_path: Path, folder: str, words: tuple[str, ...]
) -> None:
    source = ("--source", PREVIOUS / "checkpoint", "--tokenizer", TOKENIZER)
    assert convert("export", *source, "--target", tmp_path / "out", *words) == 0
    before, after = (
        load_file(place / "model.safetensors") for place in (PREVIOUS / folder, tmp_path / "out")
    )
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def test_the_published_folder_becomes_the_checkpoint_again(tmp_path: Path) -> None:
    """There and back: what is imported from the folder is exported as the very same bytes."""
    words = ("--source", PREVIOUS / "published", "--teacher-model", find_golden(TEACHER))
    assert convert("import", *words, "--target", tmp_path / "start") == 0
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back") == 0
    weights = (PREVIOUS / "published" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == weights


def test_the_folder_for_transformers_opens() -> None:
    """With this package's own classes: every weight has its place in the model, and an image its rows."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    import megatron_eve.hf  # noqa: F401 - registers the model

    folder = PREVIOUS / "transformers"
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("megatron_eve.models.eve.hf.")
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    mine = model.state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(mine[name], tensor), name
    picture = Image.open(find_golden("mini224_mixed") / "proc" / "2_eve.png")
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="USER: <image>\nWhat is this? ASSISTANT:", images=[picture], return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in PREVIOUS.rglob("*") if path.is_file()) <= MOST_BYTES
