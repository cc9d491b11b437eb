"""Models that are none of ours answer as transformers' `generate` does, each prompt alone as in a batch."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.config import ConfigError
from megatron_eve.data.images import decode_image
from megatron_eve.data.text.turns import ConversationError, Turn
from megatron_eve.inference.engine import OWN_TEMPLATE, PromptError
from megatron_eve.inference.engine_choice import (
    add_engine_flags,
    check_engine_flags,
    open_engine_and_work,
)
from megatron_eve.inference.transformers_engine import TransformersEngine
from tests.inference.baseline_models import make_fuyu, make_llava

COUNT = 10


def picture(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def asked(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[at % 2], text) for at, text in enumerate(texts)]


ONE_PICTURE: list[tuple[list[Turn], list[bytes]]] = [
    (asked("Hello world, how are you?"), []),
    (asked("<image>\nWhat is it?"), [picture(30, 20)]),
    (asked("What colour is the bus on the left side of the road?"), [picture(100, 31, 1, "PPM")]),
    (asked("Hello", "Yes.", "And?"), []),
]
TWO_PICTURES = [
    (
        [Turn("system", "Be short."), *asked("<image>\nOne?", "A cat.", "<image>\nTwo?")],
        [picture(9, 9), picture(40, 70)],
    ),
    (asked("<image>\n<image>\nWhich?"), [picture(40, 70), picture(9, 9)]),
]
CONTINUATIONS = [" Yes", " No", " A", " Two dogs run over the grass, and a cat sleeps."]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def fuyu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fuyu(tmp_path_factory.mktemp("fuyu"))


def by_llava(folder: Path, prompt: str, images: list[bytes]) -> dict[str, Any]:
    """Inputs as transformers' documentation makes them."""
    from transformers import AutoProcessor

    opened = [decode_image(data, apply_exif=True, max_pixels=10**6) for data in images]
    found = AutoProcessor.from_pretrained(folder)(text=prompt, images=opened or None, return_tensors="pt")
    return dict(found)


def by_fuyu(folder: Path, prompt: str, images: list[bytes]) -> dict[str, Any]:
    """Inputs by hand: ids of rows and text, and patches of 8 x 8 of the picture, padded with 1 of 255."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    speaker, row_end, answer = (
        tokenizer.convert_tokens_to_ids(name) for name in ("|SPEAKER|", "|NEWLINE|", "<0x04>")
    )
    text = prompt.replace("<image>", "").removesuffix("<0x04>")
    ids = [1, *tokenizer(text, add_special_tokens=False).input_ids, answer]
    if not images:
        return {"input_ids": torch.tensor([ids])}
    opened = decode_image(images[0], apply_exif=True, max_pixels=10**6)
    scale = min(1.0, 32 / opened.height, 48 / opened.width)
    size = int(opened.width * scale), int(opened.height * scale)
    pixels = np.asarray(opened if scale == 1.0 else opened.resize(size, Image.Resampling.BILINEAR))
    rows, columns = -(-size[1] // 8), -(-size[0] // 8)
    canvas = np.ones((rows * 8, columns * 8, 3))
    canvas[: size[1], : size[0]] = pixels
    patches = (canvas / 255 - 0.5) / 0.5
    patches = patches.reshape(rows, 8, columns, 8, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, 192)
    ids = ([speaker] * columns + [row_end]) * rows + ids
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.tensor(patches, dtype=torch.float32)}


def check_against_generate(
    folder: Path, prompts: list[tuple[list[Turn], list[bytes]]], by_hand: Callable[..., dict[str, Any]]
) -> None:
    from transformers import AutoModelForImageTextToText

    engine, model = TransformersEngine(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    queries = [engine.prepare(engine.prompt(turns, len(images)), images, COUNT) for turns, images in prompts]
    expected = []
    for query, (_, images) in zip(queries, prompts, strict=True):
        inputs = by_hand(folder, query.text, images)
        assert query.length == inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)[0, query.length :].tolist()
        expected.append(tuple(token for token in ids if token != 2))
    assert len(set(expected)) == len(expected), "each prompt has an answer of its own"
    assert [engine.answers([query])[0].tokens for query in queries] == expected
    found = engine.answers(queries)
    assert [answer.tokens for answer in found] == expected
    assert ["".join(engine.stream(query)) for query in queries] == [answer.text for answer in found]


def check_log_likelihoods(
    folder: Path, prompts: list[tuple[list[Turn], list[bytes]]], by_hand: Callable[..., dict[str, Any]]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    engine, model = TransformersEngine(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    queries, expected = [], []
    for turns, images in prompts:
        text = engine.prompt(turns, len(images))
        for continuation in CONTINUATIONS:
            inputs = by_hand(folder, text, images)
            ids = tokenizer(continuation.removeprefix(" "), add_special_tokens=False).input_ids
            queries.append(engine.prepare_continuation(text, images, continuation))
            inputs.pop("attention_mask", None)  # it would be too short
            prompt = inputs["input_ids"].shape[1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
            with torch.no_grad():
                scores = model(**inputs).logits[0].float().log_softmax(-1)[prompt - 1 : -1]
            chosen = scores.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            expected.append((float(chosen.sum()), bool((scores.argmax(-1) == torch.tensor(ids)).all())))
    together = engine.log_likelihoods(queries)
    alone = [engine.log_likelihoods([query])[0] for query in queries]
    for found in (together, alone):
        assert [one.sum for one in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
        assert [one.is_greedy for one in found] == [one for _, one in expected]


def test_llava_answers_as_generate_in_batches_of_unequal_lengths(llava: Path) -> None:
    check_against_generate(llava, [*ONE_PICTURE, *TWO_PICTURES], by_llava)


def test_fuyu_answers_as_generate_in_batches_of_unequal_lengths(fuyu: Path) -> None:
    check_against_generate(fuyu, ONE_PICTURE, by_fuyu)


def test_llava_gives_the_log_likelihoods_of_its_forward_pass(llava: Path) -> None:
    check_log_likelihoods(llava, [*ONE_PICTURE, *TWO_PICTURES], by_llava)


def test_fuyu_gives_the_log_likelihoods_of_its_forward_pass(fuyu: Path) -> None:
    check_log_likelihoods(fuyu, ONE_PICTURE, by_fuyu)


def test_the_most_likely_answer_is_greedy_and_no_text_has_a_beginning(llava: Path) -> None:
    from transformers import AutoModelForImageTextToText

    engine = TransformersEngine(llava)
    model = AutoModelForImageTextToText.from_pretrained(llava).eval()
    (empty,) = engine.log_likelihoods([engine.prepare_continuation("", (), "Hello")])
    ids = engine._prompt_ids("Hello")
    assert ids[0] == 1
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = sum(float(scores[at, token]) for at, token in enumerate(ids[1:]))
    assert empty.sum == pytest.approx(wanted, abs=1e-4)

    context = "USER: Hello ASSISTANT:"
    spaced, plain = (context + " ", "Two dogs"), (context, " Two dogs")  # white space at the end goes along
    queries = [engine.prepare_continuation(text, (), continuation) for text, continuation in (spaced, plain)]
    assert len(set(engine.log_likelihoods(queries))) == 1
    with pytest.raises(PromptError):
        engine.prepare_continuation(context, (), "")
    candidates = [f" {word}" for word in ("Yes", "No", "the", "picture", "Two", "a", "on", "is", "dogs")]
    found = engine.log_likelihoods([engine.prepare_continuation(context, (), one) for one in candidates])
    length = len(engine._prompt_ids(context))
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([engine._prompt_ids(context)])).logits[0, -1].argmax())
    for one, continuation in zip(found, candidates, strict=True):
        added = engine._prompt_ids(context + continuation)[length:]
        assert one.is_greedy == (added == [best])


def test_each_answer_of_a_batch_has_its_own_limit_and_stop_texts(llava: Path) -> None:
    engine = TransformersEngine(llava)
    whole = engine.answers([engine.prepare("Hello world", (), 30)])[0]
    middle = whole.text[3:6].strip()
    asked_for = [
        ("Hello world", 30, ()),
        ("Hello world", 4, ()),
        ("Hello world", 30, ("zzzz", middle)),
        ("No", 17, ()),
    ]
    queries = [engine.prepare(text, (), limit, stop) for text, limit, stop in asked_for]
    found = engine.answers(queries)
    assert found == [engine.answers([query])[0] for query in queries]
    assert found[0] == whole and found[1].tokens == whole.tokens[:4]
    assert found[2].text == whole.text[: whole.text.index(middle)].strip()
    assert len(found[2].tokens) < len(whole.tokens)
    assert len(found[3].tokens) <= 17


@pytest.mark.parametrize(
    ("kind", "text", "count", "reason"),
    [
        ("fuyu", "<image><image>Two?", 2, "too_many_images"),
        ("fuyu", "One?", 1, "image_count"),
        ("llava", "<image>\nOne?", 2, "image_count"),
        ("llava", "A text that says <image>", 0, "image_count"),
        ("llava", "word " * 1100, 0, "prompt_too_long"),
        ("llava", "<image>" * 260, 260, "prompt_too_long"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused_before_anything_is_computed(
    request: pytest.FixtureRequest, kind: str, text: str, count: int, reason: str
) -> None:
    engine = TransformersEngine(request.getfixturevalue(kind))
    with pytest.raises(PromptError) as error:
        engine.prepare(text, [picture(9, 9)] * count, COUNT)
    assert error.value.reason == reason
    with pytest.raises(PromptError):
        engine.prepare_continuation(text, [picture(9, 9)] * count, " Yes")


def test_turns_that_are_no_prompt_are_refused(llava: Path, fuyu: Path) -> None:
    for folder in (llava, fuyu):
        engine = TransformersEngine(folder)
        for turns in ([], asked("One?", "Yes."), [Turn("gpt", "Yes.")], asked("<image>One?")):
            with pytest.raises(ConversationError):
                engine.prompt(turns, 0)


def flags_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    flags = parser.parse_args(words)
    flags.max_new_tokens = COUNT
    return flags


def test_a_folder_of_another_model_is_asked_with_its_own_template(llava: Path, fuyu: Path) -> None:
    for folder in (llava, fuyu):
        flags = flags_of("--model-path", str(folder))
        conv_mode = check_engine_flags(flags)
        assert conv_mode == OWN_TEMPLATE
        assert open_engine_and_work(flags, conv_mode, lambda one: int(type(one) is TransformersEngine)) == 1
    # A template that is asked for makes a LLaVA a model of the family that has its layout.
    assert check_engine_flags(flags_of("--model-path", str(llava)), "vicuna_v1") == "vicuna_v1"


def test_an_exported_llava_keeps_the_template_of_its_training(llava: Path, tmp_path: Path) -> None:
    from megatron_eve.convert.transformers_folder import _CHAT_TEMPLATES

    folder = tmp_path / "exported"
    shutil.copytree(llava, folder)
    name, text = next(iter(_CHAT_TEMPLATES.items()))
    (folder / "chat_template.jinja").write_text(text)
    assert check_engine_flags(flags_of("--model-path", str(folder)), None) != OWN_TEMPLATE
    assert name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name one model"),
        (("--model-path", "x", "--base-url", "http://a/v1", "--model", "m"), "name one model"),
        (("--base-url", "http://a/v1"), "--model"),
        (("--base-url", "file:///x", "--model", "m"), "--base-url"),
        (("--base-url", "http://user:secret@a/v1", "--model", "m"), "OPENAI_API_KEY"),
        (("--base-url", "http://a/v1", "--model", "m", "--ckpt-step", "3"), "--ckpt-step"),
        (("--base-url", "http://a/v1", "--model", "m", "--tensor-model-parallel-size", "2"), "one process"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(Exception, match=said) as error:
        check_engine_flags(flags_of(*words))
    assert "secret" not in str(error.value)


def test_a_folder_without_chat_template_or_weights_is_refused(llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(llava, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        TransformersEngine(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot open it"):
        TransformersEngine(folder)


def test_published_names_of_image_processors_are_found_without_torchvision(
    fuyu: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    shutil.copytree(fuyu, folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor")
    images["image_processor_type"] = "FuyuImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").unlink()
    ours, published = TransformersEngine(fuyu), TransformersEngine(folder)
    turns, pictures = ONE_PICTURE[2]
    queries = [one.prepare(one.prompt(turns, 1), pictures, COUNT) for one in (ours, published)]
    assert ours.answers(queries[:1]) == published.answers(queries[1:])
