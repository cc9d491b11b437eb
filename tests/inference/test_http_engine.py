"""A server answers as the model that it serves, in order, and what goes wrong is one sentence or another try."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from megatron_eve.config import ConfigError
from megatron_eve.data.images import ImageError, decode_image
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference import http_client
from megatron_eve.inference.engine import Answer, PromptError
from megatron_eve.inference.engine_choice import engine_fingerprint
from megatron_eve.inference.http_client import HTTPClient, ServerError
from megatron_eve.inference.http_engine import UNKNOWN_LENGTH, HTTPEngine, data_url
from megatron_eve.inference.sampling import Sampling
from megatron_eve.inference.transformers_engine import TransformersEngine
from tests.inference.baseline_models import make_llava
from tests.inference.openai_server import Failure, Served, serving
from tests.inference.test_baselines import COUNT, ONE_PICTURE, TWO_PICTURES, asked, picture

KEY = "sk-0123456789"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return TransformersEngine(make_llava(tmp_path_factory.mktemp("served")))


@pytest.fixture
def server(engine: TransformersEngine) -> Iterator[tuple[str, Served]]:
    with serving(engine) as both:
        yield both


def opened(url: str, model: str = "tiny") -> HTTPEngine:
    return HTTPEngine(url, model, client=HTTPClient(url, first_wait=0.01))


def test_answers_are_those_of_the_model_that_is_served(
    engine: TransformersEngine, server: tuple[str, Served]
) -> None:
    url, served = server
    remote = opened(url)
    assert remote.max_length == engine.max_length
    prompts = [*ONE_PICTURE, *TWO_PICTURES]
    here = [engine.prepare(engine.prompt(turns, len(images)), images, COUNT) for turns, images in prompts]
    there = [remote.prepare(remote.prompt(turns, len(images)), images, COUNT) for turns, images in prompts]
    raw = [one.prepare("USER: Hello ASSISTANT:", (), COUNT) for one in (engine, remote)]
    wanted = [answer.text for answer in engine.answers([*here, raw[0]])]
    assert [answer.text for answer in remote.answers([*there, raw[1]])] == wanted
    assert "".join(remote.stream(there[1])) == wanted[1]
    assert all(body["temperature"] == 0 and body["max_tokens"] == COUNT for _, body in served.asked)
    assert {path for path, _ in served.asked} == {"/v1/chat/completions", "/v1/completions"}


def test_answers_come_in_order_while_several_requests_are_in_flight(
    engine: TransformersEngine, server: tuple[str, Served]
) -> None:
    url, served = server
    remote = opened(url)
    names = ["Yes", "No", "the", "picture"]
    served.delay = {"Yes": 0.4, "No": 0.2, "the": 0.1}
    here = [engine.prepare(engine.prompt(asked(name), 0), (), COUNT) for name in names]
    there = [remote.prepare(remote.prompt(asked(name), 0), (), COUNT) for name in names]
    assert [one.text for one in remote.answers(there)] == [one.text for one in engine.answers(here)]
    assert served.most_at_once > 1


def test_stop_texts_go_along_and_those_too_many_are_applied_here(
    engine: TransformersEngine, server: tuple[str, Served]
) -> None:
    url, served = server
    remote = opened(url)
    text = "USER: Hello ASSISTANT:"
    whole = engine.answers([engine.prepare(text, (), 30)])[0].text
    stop = ("zzz1", "zzz2", "zzz3", "zzz4", whole[4:6])
    (answer,) = remote.answers([remote.prepare(text, (), 30, stop)])
    assert answer.text == whole[: whole.index(stop[-1])].strip()
    assert served.asked[-1][1]["stop"] == list(stop[:4])


def test_log_likelihoods_are_those_of_the_model_that_is_served(
    engine: TransformersEngine, server: tuple[str, Served]
) -> None:
    url, _ = server
    remote = opened(url)
    pairs = [
        (context, continuation)
        for context in ("", "Answer the question:", "Hello world ", "Two dogs\n\n")
        for continuation in (" Yes", " the grass, and a cat")
    ]
    here = engine.log_likelihoods([engine.prepare_continuation(one, (), two) for one, two in pairs])
    there = remote.log_likelihoods([remote.prepare_continuation(one, (), two) for one, two in pairs])
    assert [one.sum for one in there] == pytest.approx([one.sum for one in here], abs=1e-4)
    assert [one.is_greedy for one in there] == [one.is_greedy for one in here]
    # The most likely word behind a context is greedy.
    text = "Answer the question:"
    token = int(engine._model(**engine._inputs([engine.prepare(text, (), 1)])).logits[0, -1].argmax())
    word = engine._processor.tokenizer.convert_ids_to_tokens(token).replace("▁", " ")
    if engine._prompt_ids(text + word)[:-1] == engine._prompt_ids(text):
        assert remote.log_likelihoods([remote.prepare_continuation(text, (), word)])[0].is_greedy


def test_log_likelihoods_that_the_server_does_not_give_are_refused_before_any_is_asked(
    server: tuple[str, Served],
) -> None:
    url, served = server
    served.echoes = False
    remote = opened(url)
    with pytest.raises(ServerError, match="take tasks that generate"):
        remote.prepare_continuation("Answer:", (), " Yes")
    assert len(served.asked) == 1
    with pytest.raises(ConfigError, match="raw text"):
        remote.prepare_continuation(remote.prompt(asked("Hello"), 0), (), " Yes")
    assert len(served.asked) == 1


def test_a_request_is_tried_again_when_the_server_is_busy_or_gone(server: tuple[str, Served]) -> None:
    url, served = server
    remote = opened(url)
    query = remote.prepare(remote.prompt(asked("Hello"), 0), (), COUNT)
    wanted = remote.answers([query])
    served.failures = [
        (429, {"Retry-After": "0"}, "slow down"),
        (0, {}, ""),
        (503, {}, "starting"),
        (500, {}, "{}"),
    ]
    assert remote.answers([query]) == wanted
    assert not served.failures
    served.failures = [(503, {}, json.dumps({"error": {"message": "no\nworker"}}))] * http_client.TRIES
    with pytest.raises(ServerError, match=r"no answer after \d+ tries \(status 503: no worker\)"):
        remote.answers([query])
    assert not served.failures


def test_retry_after_is_waited_for(server: tuple[str, Served]) -> None:
    url, served = server
    remote = opened(url)
    query = remote.prepare("Hello", (), 1)
    served.failures = [(429, {"Retry-After": "1"}, "")]
    began = time.monotonic()
    remote.answers([query])
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ((400, {}, '{"error": {"message": "unknown field: stop"}}'), "status 400: unknown field: stop"),
        ((404, {}, '{"detail": "Not Found"}'), "has no /completions"),
        ((302, {"Location": "http://127.0.0.1:1/"}, ""), "status 302"),
        ((200, {}, "<html>"), "does not answer with JSON"),
        ((200, {}, "[1]"), r"no choices\[0\].text"),
    ],
)
def test_what_no_further_try_mends_is_one_sentence(
    server: tuple[str, Served], failure: Failure, said: str
) -> None:
    url, served = server
    remote = opened(url)
    served.failures = [failure]
    with pytest.raises(ServerError, match=said) as error:
        remote.answers([remote.prepare("Hello", (), 1)])
    assert "\n" not in str(error.value) and url in str(error.value)
    assert len(served.asked) == 1


def test_a_prompt_that_turns_out_too_long_has_a_problem_and_the_others_their_answers(
    server: tuple[str, Served],
) -> None:
    url, _ = server
    remote = opened(url)
    queries = [remote.prepare(text, (), COUNT) for text in ("Hello", "Hello " * 1100, "No")]
    first, second, third = remote.answers(queries)
    assert first.text and third.text and not first.problem and not third.problem
    assert second == Answer((), "", problem=second.problem)
    assert second.problem is not None and second.problem.startswith("prompt_too_long: This model's maximum")


def test_unknown_models_and_servers_are_refused_at_the_start(server: tuple[str, Served]) -> None:
    url, served = server
    with pytest.raises(ServerError, match="serves no such model, but tiny"):
        opened(url, "large")
    served.lists_models = False
    remote = opened(url, "large")  # found by the first request
    assert remote.max_length == UNKNOWN_LENGTH
    with pytest.raises(ServerError, match="`large` does not exist"):
        remote.answers([remote.prepare("Hello", (), 1)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match="no answer after"):
            opened(f"http://127.0.0.1:{free.getsockname()[1]}/v1")


def test_a_model_of_a_server_is_its_name_and_the_folder_that_the_server_names(
    server: tuple[str, Served], engine: TransformersEngine
) -> None:
    def digest(url: str) -> str:
        name, iteration, found = engine_fingerprint(Namespace(base_url=url, model="tiny"))
        assert (name, iteration) == (f"{url}, model tiny", None)
        return found

    url, served = server
    first = digest(url)
    with serving(engine) as (other, again):
        assert other != url and digest(other) == first  # the same model on another port
        again.models[0]["root"] = "models/one"
        one = digest(other)
        again.models[0]["root"] = "models/two"
        assert len({first, one, digest(other)}) == 3
    served.lists_models = False
    assert digest(url) == first
    served.lists_models, served.models = True, [{"id": "small"}]
    with pytest.raises(ServerError, match="serves no such model, but small"):
        digest(url)


def test_the_key_goes_to_the_server_and_into_no_message(
    server: tuple[str, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    remote = opened(url)
    assert served.keys == [f"Bearer {KEY}"]
    for status in (400, 401, 403):
        served.failures = [
            (status, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}))
        ]
        with pytest.raises(ServerError) as error:
            remote.answers([remote.prepare("Hello", (), 1)])
        assert KEY not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "clé")
    with pytest.raises(ServerError, match="characters"):
        opened(url)


def test_pictures_and_sampling_that_a_server_cannot_take_are_refused(server: tuple[str, Served]) -> None:
    url, served = server
    remote = opened(url)
    text = remote.prompt(asked("<image>\nOne?"), 1)
    with pytest.raises(ImageError):
        remote.prepare(text, [b"no picture"], COUNT)
    with pytest.raises(PromptError, match="messages"):
        remote.prepare("One?", [picture(9, 9)], COUNT)
    with pytest.raises(ConfigError, match="--temperature"):
        remote.answers([remote.prepare("One?", (), COUNT)], Sampling(temperature=1.0))
    assert not served.asked


def pixels(url: str) -> np.ndarray:
    kind, data = url.split(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    # As a server opens it, by Pillow alone.
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_pictures_are_sent_without_loss_and_upright() -> None:
    drawn = Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8))

    def file(kind: str, image: Image.Image = drawn, **how: object) -> bytes:
        found = io.BytesIO()
        image.save(found, kind, **how)
        return found.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (
        file("PNG"),
        file("JPEG"),
        file("PPM"),
        file("WEBP", lossless=True),
        file("PNG", drawn.convert("LA")),
        file("PNG", drawn.convert("P")),
        file("JPEG", drawn.convert("CMYK")),
        file("JPEG", exif=turned),
    ):
        wanted = np.asarray(decode_image(data, apply_exif=True, max_pixels=10**6))
        assert np.array_equal(pixels(data_url(data)), wanted)
    assert base64.b64decode(data_url(file("JPEG")).partition(",")[2]) == file("JPEG")  # as it came
    assert pixels(data_url(file("JPEG", exif=turned), apply_exif=False)).shape == (20, 30, 3)


def test_turns_become_messages_with_pictures_at_their_places(server: tuple[str, Served]) -> None:
    url, served = server
    remote = opened(url)
    turns = [Turn("system", "Be short."), *asked("<image>\nOne?", "A cat.", "See <image>\nand <image> here")]
    images = [picture(9, 9, seed) for seed in range(3)]
    remote.answers([remote.prepare(remote.prompt(turns, 3), images, 1)])
    system, first, answer, last = served.asked[-1][1]["messages"]
    assert (system["content"], answer["content"]) == ("Be short.", "A cat.")
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert [part.get("text") for part in last["content"]] == ["See ", None, "and ", None, " here"]
    sent = [
        part["image_url"]["url"] for one in (first, last) for part in one["content"] if part["type"] != "text"
    ]
    assert sent == [data_url(image) for image in images]
