"""Pictures and texts reach transformers' model as they reach ours, and as the published processor made them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import megatron_eve.hf  # noqa: F401 - registers the processor
from megatron_eve.convert.fast_tokenizer import fast_tokenizer
from megatron_eve.data.images.patches import view_of
from megatron_eve.data.text.conversation import encode_conversation
from megatron_eve.data.text.prompts import encode_prompt
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.hf import EVEImageProcessor
from megatron_eve.models.normalise import normalise
from tests.data.helpers import planner
from tests.golden_dir import find_golden
from tests.inference.test_generate import picture


@pytest.fixture(scope="module")
def processor(exported: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(exported)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(find_golden("tokenize") / "tokenizer.model")


def image(width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(picture(width, height)))


@pytest.mark.parametrize(("size", "step", "offset"), [(672, 1, 3), (1344, 2, 5)])
def test_patches_are_the_published_pixels(size: int, step: int, offset: int) -> None:
    """Bit for bit: the golden samples are one pixel of every cell, or of every second."""
    samples = load_file(find_golden("preprocess") / "samples.safetensors")
    paths = sorted((find_golden("preprocess") / "raw").glob("*.png"))
    for path in paths:
        sample = samples[f"{size}.{path.stem}.image_strided7"]  # three colours and the mask of the padding
        out = EVEImageProcessor(image_size=size)(Image.open(path))
        cells = out["pixel_values"].unflatten(1, (*out["image_grids"][0, 0].tolist(), 4))
        pixels = cells[0, ::step, ::step, 0].unflatten(-1, (3, 14, 14))[..., offset, offset]
        assert torch.equal(pixels.flatten(0, 1), sample[:3, sample[3] == 1].T)
    assert len(paths) == 5


@pytest.mark.parametrize("size", ["1x1", "3x700", "700x3", "448x449", "449x448", "640x427"])
def test_patches_are_ours(size: str) -> None:
    width, height = map(int, size.split("x"))
    picture_ = image(width, height)
    out = EVEImageProcessor(image_size=672)(picture_)
    plan = planner(672, 336)(width, height)
    patches = torch.from_numpy(view_of(picture_, plan.views["patches"]))
    assert out["image_grids"].tolist() == [[list(plan.grid)]]
    assert torch.equal(out["pixel_values"][0], normalise(patches, torch.float32))


def test_any_kind_of_picture(tmp_path: Path) -> None:
    """A path, an array, another mode, and one that lies on its side all give the upright RGB picture."""
    upright = image(50, 30).convert("L").convert("RGB")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    process = EVEImageProcessor()
    expected = process(upright)["pixel_values"]
    for one in (
        upright.convert("L"),
        np.array(upright),
        str(tmp_path / "turned.png"),
        Image.open(tmp_path / "turned.png"),
    ):
        assert torch.equal(process(one)["pixel_values"], expected)


def messages(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """LLaVA's layout as that of transformers; a first turn of the model's is dropped, as in training."""
    named = [{"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in turns]
    return named[named[0]["role"] == "assistant" :]


def test_golden_conversations(processor: Any) -> None:
    """The chat template on the golden conversations of vicuna_v1 gives the published token ids."""
    cases = json.loads((find_golden("tokenize") / "cases.json").read_text())["legacy_true"]["v1"]
    cases = [case for case in cases if "input_ids" in case]
    for case in cases:
        text = processor.apply_chat_template(messages(case["conversations"]))
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [-200 if i == processor.image_token_id else i for i in ids]
        assert ids[: len(case["input_ids"])] == case["input_ids"], case["name"]
    assert len(cases) > 5


PIECES = st.one_of(
    st.text(max_size=20), st.sampled_from(["</s>", "<s>", "<unk>", "  ", "\n", "▁", "é", "🙂"])
)


@pytest.fixture(scope="module")
def fast() -> Any:
    return fast_tokenizer(Tokenizer(find_golden("tokenize") / "tokenizer.model"))[0]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(PIECES).map("".join))
def test_token_ids_are_ours(fast: Any, ours: Tokenizer, text: str) -> None:
    assert fast.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_decoding_is_ours(processor: Any, ours: Tokenizer) -> None:
    text = "A red circle, 日本語 🙂\n  and </s> more"
    ids = ours.encode(text, bos=True)
    assert processor.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_prompts_are_ours(processor: Any, ours: Tokenizer) -> None:
    """Several turns with pictures in several places, as ours are encoded."""
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is larger?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = encode_prompt("Which is larger?", ours, "vicuna_v1", 2)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [384 if i == -200 else i for i in expected]

    turns = [
        {"from": "human", "value": "What is <image> this?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "A hat."},
    ]
    encoded = encode_conversation(turns, ours, "vicuna_v1", 1).tokens
    text = processor.apply_chat_template(messages(turns))
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [384 if i == -200 else i for i in encoded]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_assistant_mask_is_where_training_has_labels(processor: Any, ours: Tokenizer, side: str) -> None:
    """Of answers before and behind pictures, in a batch of unequal lengths; padding and image rows are in none."""
    conversations = [
        [("What is <image> this?", "A cat, 日本語."), ("And?", "A hat.")],
        [("Compare <image> with <image>.", "Equal.")],
        [("Who?", "Nobody at all, of course.")],
    ]
    pictures = iter([image(90, 60), image(40, 100), image(64, 64)])
    batch, expected = [], []
    for conversation in conversations:
        turns = [
            {"from": ("human", "gpt")[place], "value": text}
            for pair in conversation
            for place, text in enumerate(pair)
        ]
        count = sum(turn["value"].count("<image>") for turn in turns)
        expected.append([i for i in encode_conversation(turns, ours, "vicuna_v1", count).labels if i >= 0])
        content = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages(turns)]
        if count == 1:  # goes to the front, as in training
            content[0]["content"][0]["text"] = turns[0]["value"].replace("<image>", "")
            content[0]["content"].insert(0, {"type": "image", "image": next(pictures)})
        elif count:
            words = turns[0]["value"].split("<image>")
            content[0]["content"] = [{"type": "text", "text": words[0]}]
            for word in words[1:]:
                content[0]["content"] += [
                    {"type": "image", "image": next(pictures)},
                    {"type": "text", "text": word},
                ]
        batch.append(content)
    out = processor.apply_chat_template(
        batch,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side},
    )
    found = [
        ids[mask.bool()].tolist() for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)
    ]
    assert found == expected
    first = out["attention_mask"].argmax(1)
    assert (out["input_ids"].gather(1, first[:, None]) == ours.bos_id).all()
    assert ((out["input_ids"] == ours.bos_id).sum(1) == 1).all()


def test_a_rendered_text_gets_no_second_bos(processor: Any) -> None:
    text = processor.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    rendered = processor(text=[text, "plain"])["input_ids"]
    assert rendered[0] == processor(text=text.removeprefix("<s>"))["input_ids"][0]
    assert rendered[0] == processor(text=text, add_special_tokens=False)["input_ids"][0]
    assert [ids.count(1) for ids in rendered] == [1, 1]


def test_a_system_prompt_and_an_unknown_role(processor: Any) -> None:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert (
        processor.apply_chat_template(system, add_generation_prompt=True)
        == "<s>Be brief. USER: Who? ASSISTANT:"
    )
    with pytest.raises(Exception, match="roles are user and assistant"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_pictures_are_dealt_out(processor: Any) -> None:
    """A flat list goes to the texts in order; the other ways to say the same give the same."""
    texts, pictures = ["<image> a <image>", "b", "<image>"], [image(40, 100), image(64, 64), image(90, 60)]
    nested = processor(text=texts, images=[pictures[:2], [], pictures[2:]], padding=True, return_tensors="pt")
    flat = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    assert all(torch.equal(nested[name], flat[name]) for name in nested)
    rows = nested["image_grids"][..., 0] * (nested["image_grids"][..., 1] + 1) + (
        nested["image_grids"][..., 0] > 0
    )
    assert (nested["input_ids"] == processor.image_token_id).sum(1).tolist() == rows.sum(1).tolist()
    one = processor(text="<image>", images=pictures[2], return_tensors="pt")
    assert torch.equal(one["pixel_values"][0], nested["pixel_values"][2][: one["pixel_values"].shape[1]])


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<image>", 0, "there are no images"),
        ("<image> <image>", 1, r"\[2\], images: \[1\]"),
        ("nothing", 1, r"\[0\], images: \[1\]"),
    ],
)
def test_as_many_pictures_as_the_text_says(processor: Any, text: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[image(9, 9)] * count or None)
