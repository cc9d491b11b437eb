"""EVE v2 for transformers: logits, gradients, greedy tokens, pictures and texts of the public code; the folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.data.text.conversation import encode_conversation
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.hf import EVE2ImageProcessor
from tests.convert.test_conversion import convert
from tests.golden_dir import find_golden

CASES = ("all_mixed", "all_plain", "all_text_only", "stage0_plain")
IMAGE_ID = 359  # of the golden tokenizer, behind its own tokens
PICTURES = {"train": "shrink", "eval": "scale"}


def golden(*names: str) -> Path:
    return find_golden("eve_v2").joinpath(*names)


def for_transformers(place: Path, source: str) -> Path:
    folder = golden("_shared", source)
    assert convert("import", "--source", folder, "--target", place / "run") == 0
    words = ("--format", "transformers", "--tokenizer", folder)
    assert convert("export", "--source", place / "run", "--target", place / "hf", *words) == 0
    return place / "hf"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return for_transformers(tmp_path_factory.mktemp("eve2"), "hf_all")


@pytest.fixture(scope="module")
def processor(exported: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(exported)


def load(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def greedy_cases() -> list[dict[str, Any]]:
    return json.loads(golden("generate", "greedy.json").read_text(encoding="utf-8"))["cases"]


def greedy_inputs(processor: Any, cases: list[dict[str, Any]]) -> Any:
    """Prompts and pictures of the golden answers, in one padded batch."""
    pictures = [
        [Image.open(golden("generate", "raw", one["image"]))] if one["image"] else [] for one in cases
    ]
    texts = [one["prompt"] for one in cases]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def batch_of(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A golden batch as the model takes it, padded behind as there, and the published outputs."""
    folder = golden(case)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    process = EVE2ImageProcessor(max_size=meta["max_size"], image_resize="shrink")
    files = {path.name.split("_", 1)[0]: path for path in (folder / "raw").glob("*")}
    shown = [[Image.open(files[str(n)])] if has else [] for n, has in enumerate(meta["has_image"])]
    pictures = process(shown)
    ids, labels = [], []
    for sample, rows in enumerate(meta["image_tokens"]):
        real = inputs["attention_mask"][sample]
        one, label = inputs["input_ids"][sample][real], inputs["labels"][sample][real]
        repeats = torch.where(one == -200, rows, 1)
        ids.append(one.where(one != -200, IMAGE_ID).repeat_interleave(repeats))
        labels.append(label.where(one != -200, -100).repeat_interleave(repeats))
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
    }
    return batch | (dict(pictures) if any(meta["has_image"]) else {}), outputs


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_are_the_published_ones(case: str) -> None:
    """Of text-only samples and pictures of several sizes in one batch; published folders load as they are, too."""
    from transformers import AutoConfig

    source = "hf_stage0" if case.startswith("stage0") else "hf_all"
    published = golden("_shared", source)
    model = load(published, config=AutoConfig.from_pretrained(published, image_token_index=IMAGE_ID))
    batch, outputs = batch_of(case)
    out = model(**batch)
    assert abs(out.loss.item() - outputs["loss"].item()) < 5e-6
    found = out.logits[outputs["logits_index"][:, 0], outputs["logits_index"][:, 1]]
    assert (found - outputs["logits_rows"]).norm() < 5e-6 * outputs["logits_rows"].norm()
    real = batch["attention_mask"].bool()
    assert torch.equal(out.logits.argmax(-1)[real], outputs["logits_argmax"][real])


def test_gradients_of_both_sets_are_the_published_ones(exported: Path) -> None:
    batch, outputs = batch_of("all_mixed")
    model = load(exported)
    model(**batch).loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if (expected := outputs.get(f"grad.{name}")) is not None:
            found = parameter.grad
            assert (found - expected).norm() <= 2e-5 * expected.norm() + 1e-9, name
            compared += "moe_" in name
    assert compared > 10


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_tokens_are_the_published_ones(exported: Path, processor: Any, attention: str) -> None:
    """Alone and in a padded batch, with a cache and without: new tokens go through the text's weights."""
    model, cases = load(exported, attn_implementation=attention), greedy_cases()
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    for some in ([cases[0]], [cases[1]], [cases[2]], cases):
        inputs = greedy_inputs(processor, some)
        for cached in (True, False):
            found = model.generate(**inputs, **settings, use_cache=cached)[:, inputs["input_ids"].shape[1] :]
            assert found.tolist() == [one["new_tokens"] for one in some]


def test_other_ways_to_generate(exported: Path, processor: Any) -> None:
    """Beams, samples, a static cache, a penalty on the prompt: no answer holds the image token."""
    model, inputs = load(exported), greedy_inputs(processor, greedy_cases())
    for settings in (
        {"num_beams": 3, "do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 0, "temperature": 50.0},
    ):
        new = model.generate(**inputs, **settings, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        assert len(new) == 3 and not (new == IMAGE_ID).any()


def test_several_pictures_and_labels_at_their_rows(exported: Path, processor: Any) -> None:
    """Each row of a prompt with two pictures depends on no padding; labels at image rows make no difference."""
    model = load(exported)
    a, b = (Image.open(golden("generate", "raw", name)) for name in ("a.png", "b.png"))
    texts, pictures = ["<image>\n<image>\nWhat differs?", "Why?"], [[a, b], []]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    alone = processor(text=texts[0], images=[[a, b]], return_tensors="pt")
    with torch.no_grad():
        whole, single = model(**batch).logits[0], model(**alone).logits[0]
    torch.testing.assert_close(whole[batch["attention_mask"][0].bool()], single, rtol=0, atol=1e-5)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    hidden = labels.masked_fill(batch["input_ids"] == IMAGE_ID, -100)
    assert model(**batch, labels=labels).loss == model(**batch, labels=hidden).loss


def test_sizes_are_the_published_ones() -> None:
    """Grids of all sizes of the golden cases, under both rules."""
    sizes = json.loads(golden("preprocess", "sizes.json").read_text(encoding="utf-8"))["geometry"]
    for entry in sizes:
        for rule, resize in PICTURES.items():
            for side in (800, 1600):
                process = EVE2ImageProcessor(max_size=side, image_resize=resize)
                grid = process.grid(entry["width"], entry["height"])
                assert list(grid) == entry[f"{rule}_{side}"]["grid_hw"]
    assert len(sizes) == 45
    with pytest.raises(ValueError, match="image_resize is 'crop'"):
        EVE2ImageProcessor(image_resize="crop").grid(10, 10)


def test_pixels_are_the_published_ones() -> None:
    """The resized pictures of a golden batch, as they are stored, normalised."""
    folder = golden("all_mixed")
    process = EVE2ImageProcessor(max_size=160, image_resize="shrink")
    mean, std = (torch.tensor(some)[:, None, None] for some in (process.image_mean, process.image_std))
    for path in (folder / "raw").glob("*.png"):
        resized = Image.open(folder / "proc" / f"{path.name.split('_', 1)[0]}.png").convert("RGB")
        values = torch.from_numpy(np.array(resized)).float()
        expected = values.permute(2, 0, 1).div(255).sub(mean).div(std)
        out = process(Image.open(path))
        rows, columns = out["image_grids"][0, 0].tolist()
        cells = out["pixel_values"][0].view(rows, columns, 2, 2, 3, 16, 16)
        found = cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 32, columns * 32)
        assert torch.equal(found, expected)


def test_prompts_are_the_published_ones(processor: Any) -> None:
    """Of evaluation: the chat template's text and its ids, `<image>` as one."""
    prompts = json.loads(golden("tokenize", "cases.json").read_text(encoding="utf-8"))["eval_prompts"]
    for one in prompts:
        picture = [{"type": "image"}] if one["with_image"] else []
        messages = [{"role": "user", "content": [*picture, {"type": "text", "text": one["question"]}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == one["prompt"]
        ids = processor.tokenizer(text)["input_ids"]
        assert [-200 if i == IMAGE_ID else i for i in ids] == one["input_ids"]
    assert len(prompts) > 1


def test_the_assistant_mask_is_where_training_has_labels(processor: Any) -> None:
    ours = load_tokenizer(golden("_shared", "hf_all") / "tokenizer.json", legacy=False)
    turns = [("human", "What is <image> this?"), ("gpt", "A cat, 日本語."), ("human", "And?"), ("gpt", "48")]
    rows = [{"from": role, "value": text} for role, text in turns]
    labels = [i for i in encode_conversation(rows, ours, "eve2_qwen2", 1).labels if i >= 0]
    content = [
        {"role": {"human": "user", "gpt": "assistant"}[role], "content": [{"type": "text", "text": text}]}
        for role, text in turns
    ]
    picture = {"type": "image", "image": Image.open(golden("generate", "raw", "a.png"))}
    content[0]["content"] = [picture, {"type": "text", "text": "What is  this?"}]
    out = processor.apply_chat_template(
        [content], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert out["input_ids"][0][out["assistant_masks"][0].bool()].tolist() == labels


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [("<image>", 0, "there are no images"), ("nothing", 1, r"\[0\], images: \[1\]")],
)
def test_as_many_pictures_as_the_text_says(processor: Any, text: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[Image.new("RGB", (9, 9))] * count or None)


def test_images_and_tokens_must_belong_together(exported: Path, processor: Any) -> None:
    model, inputs = load(exported), greedy_inputs(processor, greedy_cases()[:1])
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=inputs["input_ids"])
    images = {name: inputs[name] for name in ("pixel_values", "image_grids")}
    with pytest.raises(ValueError, match="was a prompt cut"):
        model(input_ids=inputs["input_ids"][:, -20:], **images)


def test_the_folder_goes_back_in(exported: Path, tmp_path: Path) -> None:
    """Exported again, and in the published layout, every byte is the same."""
    assert convert("import", "--source", exported, "--target", tmp_path / "run") == 0
    words = ("--source", tmp_path / "run", "--tokenizer", exported)
    assert convert("export", *words, "--target", tmp_path / "back", "--format", "transformers") == 0
    for path in exported.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = (load_file(some / "model.safetensors") for some in (exported, golden("_shared", "hf_all")))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


# What a user does who has transformers alone; what transformers saves is such a folder again.
STANDALONE = """
import json, sys
sys.modules["megatron_eve"] = sys.modules["accelerate"] = None  # not to be had
from transformers import AutoModelForCausalLM, AutoProcessor
folder, picture = sys.argv[1:]
for place in (folder, "saved"):
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    if place != "saved":
        processor.save_pretrained("saved")
        model.save_pretrained("saved")
content = [{"type": "image", "path": picture}, {"type": "text", "text": "How many boats can you see?"}]
settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
out = model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None)
print(json.dumps(out[0, inputs["input_ids"].shape[1]:].tolist()))
"""


def test_the_folder_needs_transformers_alone(exported: Path, tmp_path: Path) -> None:
    shutil.copyfile(golden("generate", "raw", "a.png"), tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, "-c", STANDALONE, str(exported), "a.png"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == greedy_cases()[0]["new_tokens"]
    for path in exported.glob("*.py"):
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
