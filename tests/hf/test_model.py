"""The exported model in transformers computes what ours computes, and generates what ours generates."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.config import RunConfig
from megatron_eve.data.text.prompts import encode_prompt
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.inference.generate import Prompt
from megatron_eve.models.text_format import VICUNA_SYSTEM
from tests.convert.test_conversion import convert
from tests.convert.test_language_models import SAMPLES, folder_of, start_of, transformers_model
from tests.golden_dir import find_golden
from tests.inference.test_generate import answers, config_of, picture
from tests.layouts import ONE
from tests.ranks import RankPool
from tests.test_commands import ROOT

pytestmark = pytest.mark.distributed

QUESTIONS = {
    "text alone": ("What is the answer to everything?", []),
    "one image": ("What is shown?", [picture(90, 60)]),
    "several images": ("<image>\nand <image>: what differs?", [picture(40, 100), picture(64, 64)]),
}


def logits(config: RunConfig, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Runs on each rank: [L, W] for each prompt."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.inference.generate import _prompt_batch
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs

    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(find_golden("_shared/hf_mini224"), [model], config)
        batch = _prompt_batch(prompts, config, apply_exif=True)
        inputs = model_inputs(DevicePack(batch), model)
        inputs.labels, inputs.output_rows = None, torch.arange(len(batch.tokens))
        bounds = batch.cu_seqlens.tolist()
        rows = model(inputs)
        return [rows[first:last].clone() for first, last in pairwise(bounds)]


def our_prompt(question: str, images: list[bytes]) -> Prompt:
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    return Prompt(encode_prompt(question, tokenizer, "vicuna_v1", len(images)), images)


def their_inputs(folder: Path, questions: Sequence[tuple[str, list[bytes]]]) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    texts, images = [], []
    for question, data in questions:
        if data and "<image>" not in question:
            question = "<image>\n" * len(data) + question
        texts.append(f"{VICUNA_SYSTEM} USER: {question} ASSISTANT:")
        images.append([Image.open(io.BytesIO(some)) for some in data])
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def load(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def assert_close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    assert (theirs - ours).norm() < 5e-6 * ours.norm()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_ours(ranks: RankPool, exported: Path, attention: str) -> None:
    """Every row of text-only, one-image and several-image prompts, alone and in a padded batch, within 1e-5.

    Of the largest logit, which is 9.4 here: in float32 both lie 1.5e-6 (relative L2) from the model in float64.
    """
    questions = list(QUESTIONS.values())
    (expected,) = ranks.run(1, logits, config_of(ONE), [our_prompt(*some) for some in questions])
    model = load(exported, attn_implementation=attention)
    with torch.no_grad():
        for ours, some in zip(expected, questions, strict=True):
            theirs = model(**their_inputs(exported, [some])).logits[0]
            assert_close(theirs, ours)
        inputs = their_inputs(exported, questions)
        batch = model(**inputs).logits
    for ours, theirs, mask in zip(expected, batch, inputs["attention_mask"].bool(), strict=True):
        assert_close(theirs[mask], ours)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_generation_is_ours(ranks: RankPool, exported: Path, attention: str) -> None:
    """Token by token, alone and in a batch, with a cache and without."""
    questions, count = list(QUESTIONS.values()), 12
    (expected,) = ranks.run(1, answers, config_of(ONE), [our_prompt(*some) for some in questions], count)
    model = load(exported, attn_implementation=attention)
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    for some in ([questions[0]], [questions[1]], [questions[2]], questions):
        inputs = their_inputs(exported, some)
        ours = [expected[questions.index(one)] for one in some]
        for cached in (True, False):
            found = model.generate(**inputs, **settings, use_cache=cached)[:, inputs["input_ids"].shape[1] :]
            assert found.tolist() == ours


def test_other_ways_to_generate(exported: Path) -> None:
    """Beams, samples and a penalty on what the prompt holds, the image token among it."""
    inputs = their_inputs(exported, list(QUESTIONS.values()))
    model = load(exported)
    for settings in (
        {"num_beams": 3, "do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 20, "no_repeat_ngram_size": 2},
    ):
        found = model.generate(**inputs, **settings, max_new_tokens=5)
        new = found[:, inputs["input_ids"].shape[1] :]
        assert len(new) == 3 * settings.get("num_return_sequences", 1)
        assert (new < model.config.vocab_size).all()


def test_prompt_lookup_is_greedy(exported: Path) -> None:
    """Words of the prompt are proposed, and no image tokens, which no embedding stands for; the answer is the same."""
    model = load(exported)
    for question in QUESTIONS.values():
        inputs = their_inputs(exported, [question])
        ids = inputs["input_ids"]
        (places,) = (ids[0] == model.model.image_token_id).nonzero(as_tuple=True)
        if len(
            places
        ):  # the prompt ends with what stands in front of a picture: image tokens are looked up first
            inputs["input_ids"] = torch.cat([ids, ids[:, places[0] - 2 : places[0]]], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        greedy = model.generate(**inputs, max_new_tokens=40)
        lookup = model.generate(**inputs, max_new_tokens=40, prompt_lookup_num_tokens=4)
        assert lookup.tolist() == greedy.tolist()


def test_labels_at_image_rows_make_no_difference(exported: Path) -> None:
    """`labels=input_ids` trains, also in a trainer that puts its own forward on the model, as TRL does."""
    model = load(exported)
    inputs = their_inputs(exported, list(QUESTIONS.values()))
    ids = inputs["input_ids"]
    images = ids == model.model.image_token_id
    labels = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    hidden = labels.masked_fill(images, -100)
    noise = labels.where(~images, torch.randint(0, model.config.vocab_size, ids.shape))
    for settings in ({}, {"num_items_in_batch": torch.tensor(50)}):
        (expected,) = {
            model(**inputs, labels=some, **settings).loss.item() for some in (hidden, labels, noise)
        }
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    by_hand = torch.nn.functional.cross_entropy(logits, hidden[:, 1:].flatten(), reduction="sum") / 50
    torch.testing.assert_close(torch.tensor(expected), by_hand)

    model(**inputs, labels=ids).loss.backward()
    assert model.model.vision_tower.patch_embedding.weight.grad.abs().max() > 0
    model.forward = lambda **kwargs: kwargs["labels"]
    assert torch.equal(model(**inputs, labels=noise), hidden)


def test_the_decoder_alone_takes_pictures(exported: Path) -> None:
    from transformers import AutoModel

    inputs = their_inputs(exported, list(QUESTIONS.values()))
    model, decoder = load(exported), AutoModel.from_pretrained(exported)
    with torch.no_grad():
        hidden = decoder(**inputs).last_hidden_state
        assert torch.equal(hidden, model.base_model(**inputs).last_hidden_state)
        assert torch.equal(model.lm_head(hidden), model(**inputs).logits)
        assert torch.equal(model(**inputs, logits_to_keep=2).logits, model.lm_head(hidden[:, -2:]))


def test_a_vocabulary_that_grows(exported: Path, tmp_path: Path) -> None:
    """`<image>` keeps its id, which the embedding then has a row of, and no answer holds it."""
    inputs = their_inputs(exported, [QUESTIONS["one image"]])
    model = load(exported)
    before = model(**inputs).logits
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(tmp_path)
    after = load(tmp_path)
    assert torch.equal(after(**inputs).logits[..., : before.shape[-1]], before)
    new = after.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=50.0)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert after.model.image_token_id not in new


@pytest.mark.parametrize("kind", ["llama3 tied", "qwen2"])
def test_decoders_of_other_families(tmp_path: Path, kind: str) -> None:
    """Grouped queries, another base, tied ends, biases: the exported model's logits on text are the source's."""
    source = folder_of(tmp_path, kind)
    start_of(source, tmp_path / "start")
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back") == 0
    tokens = torch.tensor([SAMPLES[0]])
    with torch.no_grad():
        assert_close(load(tmp_path / "back")(tokens).logits, transformers_model(kind)(tokens).logits)


# What a user does who has transformers alone.
STANDALONE = """
import json, sys
sys.modules["megatron_eve"] = sys.modules["accelerate"] = None  # not to be had
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
for some in (processor, model):
    some.save_pretrained("saved")
processor = AutoProcessor.from_pretrained("saved", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is shown?"}]
settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
print(json.dumps(out[0, inputs["input_ids"].shape[1]:].tolist()))
"""


def example_of_the_page() -> str:
    """The first program of docs/hugging_face.md."""
    page = (ROOT / "docs" / "hugging_face.md").read_text(encoding="utf-8")
    program, *_ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "max_new_tokens=128" in program
    return program.replace("max_new_tokens=128", "max_new_tokens=4")


def test_the_folder_needs_transformers_alone(ranks: RankPool, exported: Path, tmp_path: Path) -> None:
    """With trust_remote_code=True and without this project: a picture and the chat template, our tokens; and the
    example of the page. What transformers saves of it is such a folder again. Nothing is said to be deprecated."""
    for name in ("picture.png", "a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(picture(90, 60))
    (tmp_path / "eve-7b-hf").symlink_to(exported)
    (expected,) = ranks.run(1, answers, config_of(ONE), [our_prompt(*QUESTIONS["one image"])], 8)
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning"),
            *("-c", STANDALONE + example_of_the_page(), str(exported), "picture.png"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr and "processor_kwargs" not in done.stderr
    tokens, told = done.stdout.splitlines()
    assert json.loads(tokens) == expected[0]
    assert len(ast.literal_eval(told)) == 2  # an answer to each of the page's conversations


def test_code_in_a_folder_does_not_run(exported: Path, tmp_path: Path) -> None:
    """With this project imported its own classes are taken, whatever the folder's files say."""
    import shutil

    folder, mark = tmp_path / "eve", tmp_path / "ran"
    shutil.copytree(exported, folder)
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(mark)!r}, 'w')\n" + path.read_text())
    assert type(load(folder)).__module__ == "megatron_eve.models.eve.hf.modeling_eve"
    their_inputs(folder, [QUESTIONS["one image"]])
    assert not mark.exists()


@pytest.mark.parametrize("shards", ["safetensors", "pickled"])
def test_published_folders_load_too(exported: Path, tmp_path: Path, shards: str) -> None:
    """As on the hub: a teacher, an aligning layer and old buffers are left aside, nothing is missing."""
    published = find_golden("_shared/hf_mini224")
    tensors = load_file(published / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    if shards == "pickled":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    wanted = load(exported).state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_saved_again_it_is_the_same(exported: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    load(exported).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(exported).save_pretrained(tmp_path)
    for path in exported.glob("*.py"):  # so that it needs transformers alone, as before
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    some = [QUESTIONS["several images"]]
    first, second = (their_inputs(folder, some) for folder in (exported, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_and_tokens_must_belong_together(exported: Path) -> None:
    model = load(exported)
    inputs = their_inputs(exported, [QUESTIONS["one image"]])
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=inputs["input_ids"])
    images = {name: inputs[name] for name in ("pixel_values", "image_grids")}
    with pytest.raises(ValueError, match="was a prompt cut"):
        model(input_ids=inputs["input_ids"][:, :-40], **images)
