"""A VILA with the projector `qformer`, which is in no published layout, for transformers: there, in use, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.models.dist_folder import DistFolder
from tests.convert.test_conversion import convert, llama
from tests.convert.vila_folders import tower_alone
from tests.golden_dir import find_golden
from tests.hf.test_vila import COUNT, SIZES, assert_close
from tests.hf.vila_models import QUESTIONS, config_of, exported_run, our_prompts, ours, their_inputs
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

QUERIES = 5


class Model(NamedTuple):
    """An import's checkpoint, and its folder for transformers."""

    run: Path
    folder: Path


@pytest.fixture(scope="module", params=["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of a language model and a tower, with a projector that has random weights."""
    folder = tmp_path_factory.mktemp("qformer")
    language, tower = (
        llama(folder / "llama", **SIZES),
        tower_alone(folder / "tower", f"{request.param}_vision_model"),
    )
    words = ("--family", "vila", "--vision-tower", tower, "--projector-type", "qformer")
    words = (*words, "--qformer-num-queries", QUERIES)
    assert convert("import", "--source", language, "--target", folder / "run", *words) == 0
    return Model(folder / "run", exported_run(folder))


def test_transformers_computes_what_ours_does(ranks: RankPool, model: Model) -> None:
    """Logits and greedy ids of prompts with none, one and two pictures, alone and in a batch; eager and SDPA."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    (found,) = ranks.run(1, ours, config_of(model.run), model.run, our_prompts("vila_v1"), COUNT)
    logits, answers = found
    assert len({tuple(answer) for answer in answers}) == len(QUESTIONS), "the pictures are looked at"
    processor = AutoProcessor.from_pretrained(model.folder)
    for attention in ("eager", "sdpa"):
        theirs: Any = AutoModelForImageTextToText.from_pretrained(model.folder, attn_implementation=attention)
        assert type(theirs).__name__ == "VILAForConditionalGeneration"
        for numbers in ([0], [1], [2], [2, 0, 1]):
            inputs = their_inputs(processor, numbers)
            pictures = sum(len(QUESTIONS[number][1]) for number in numbers)
            image = theirs.config.image_token_index
            assert int((inputs["input_ids"] == image).sum()) == QUERIES * pictures
            with torch.no_grad():
                batch = theirs(**inputs).logits
            for number, row, mask in zip(numbers, batch, inputs["attention_mask"].bool(), strict=True):
                assert_close(row[mask][:, :384], logits[number])
            new = theirs.generate(**inputs, max_new_tokens=COUNT, eos_token_id=None)
            assert new[:, inputs["input_ids"].shape[1] :].tolist() == [answers[number] for number in numbers]


def test_the_folder_is_read_under_tensor_parallelism(ranks: RankPool, model: Model) -> None:
    prompts = our_prompts("vila_v1")
    (found,) = ranks.run(1, ours, config_of(model.run), model.run, prompts, COUNT)
    for split in ranks.run(2, ours, config_of(model.folder, 2), model.folder, prompts, COUNT):
        for rows, expected in zip(split[0], found[0], strict=True):
            assert_close(rows[:, :384], expected)
        assert split[1] == found[1]


def test_it_comes_back(model: Model, tmp_path: Path) -> None:
    """As it is and as transformers saves it: the same settings, and every byte but for the rows of `<image>`."""
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(model.folder).save_pretrained(tmp_path / "saved")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "saved" / name).write_bytes((model.folder / name).read_bytes())
    first = DistFolder(model.run / "iter_0000000")
    for number, source in enumerate((model.folder, tmp_path / "saved")):
        target = tmp_path / f"run{number}"
        assert convert("import", "--source", source, "--target", target) == 0
        vision = config_of(target).vision
        assert (vision.projector_type, vision.qformer_num_queries) == ("qformer", QUERIES)
        assert vision == config_of(model.run).vision
        again = DistFolder(target / "iter_0000000")
        assert set(first) == set(again)
        for key in first:
            rows = 384 if key.startswith(("embedding.", "output_layer.")) else None
            assert torch.equal(again.tensor(key)[:rows], first.tensor(key)[:rows]), key


# What a user does who has transformers alone; also with what it saves again.
STANDALONE = """
import json, sys
sys.modules["megatron_eve"] = sys.modules["accelerate"] = None  # not to be had
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
for some in (processor, model):
    some.save_pretrained("saved")
model = AutoModelForImageTextToText.from_pretrained("saved", trust_remote_code=True)
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is shown?"}]
settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
out = model.generate(**inputs, max_new_tokens=8, eos_token_id=None)
print(json.dumps(out[0, inputs["input_ids"].shape[1]:].tolist()))
"""


def test_the_folder_needs_transformers_alone(ranks: RankPool, model: Model, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(QUESTIONS[1][1][0])
    (found,) = ranks.run(1, ours, config_of(model.run), model.run, our_prompts("vila_v1")[1:2], COUNT)
    done = subprocess.run(
        [sys.executable, "-c", STANDALONE, str(model.folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found[1][0]
    config = json.loads((model.folder / "config.json").read_text())
    assert config["mm_projector_type"] == "qformer" and config["qformer_num_queries"] == QUERIES


def test_no_published_layout_has_it(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("export", "--source", model.run, "--target", tmp_path / "out") == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told == "error: a projector of type qformer is in no published layout; use --format transformers"
    words = ("--source", find_golden("golden/vila/vila15_llm") / "model", "--qformer-num-queries", 7)
    assert convert("import", "--target", tmp_path / "run", *words) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert (
        told == "error: --qformer-num-queries 7: is for --projector-type qformer; add that, or leave it out"
    )
