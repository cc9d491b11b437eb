"""VILA for transformers computes and generates what ours does: as its own LLaVA, or by our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.convert.fast_tokenizer import fast_tokenizer
from megatron_eve.data.text.conversation import marked_parts
from megatron_eve.data.text.prompts import prompt_text
from megatron_eve.data.text.templates import find_template
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.data.text.turns import Turn
from megatron_eve.models.vila.hf.chat_templates import CHAT_TEMPLATES
from tests.convert.test_conversion import convert, llama
from tests.convert.vila_folders import LANGUAGE, llava, same, tensors, tower_alone
from tests.golden_dir import find_golden
from tests.hf.vila_models import QUESTIONS, config_of, exported, our_prompts, ours, their_inputs
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

# Tower, language model, and how pictures become squares: LLaVA's. Then projectors that LLaVA does not have.
LLAVAS = [("clip", "llama", "pad"), ("siglip", "qwen2", "stretch")]
PROJECTORS = ["mlp_downsample column", "mlp_downsample_3x3_fix"]
SLOW = [("clip", "llama", "crop"), "linear", "mlp3x_gelu", "mlp_downsample"]
COUNT = 8
# Weights of a size at which the likeliest of the next tokens is clear; as many pieces as the tokenizer has.
SIZES = {**LANGUAGE, "vocab_size": 384, "initializer_range": 0.15}


class Model(NamedTuple):
    """A folder that ours reads, and one for transformers; whether that is its own LLaVA."""

    source: Path
    folder: Path
    is_llava: bool


@pytest.fixture(
    scope="module",
    params=[*LLAVAS, *PROJECTORS, *(pytest.param(some, marks=pytest.mark.slow) for some in SLOW)],
    ids=lambda some: "-".join(some) if isinstance(some, tuple) else some,
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """See `Model`."""
    folder = tmp_path_factory.mktemp("vila")
    if isinstance(request.param, tuple):
        tower, language, fit = request.param
        source = llava(folder / "source", tower, language, SIZES, image_fit=fit)
    else:
        source = _with_projector(folder, request.param)
    return Model(source, exported(folder, source), isinstance(request.param, tuple))


def _with_projector(folder: Path, projector: str) -> Path:
    """A published folder, of a language model and a tower that have been put together."""
    projector, _, order = projector.partition(" ")
    language, tower = llama(folder / "llama", **SIZES), tower_alone(folder / "tower", "siglip_vision_model")
    words = ("--family", "vila", "--vision-tower", tower, "--projector-type", projector)
    assert convert("import", "--source", language, "--target", folder / "start", *words) == 0
    words = ("--target", folder / "source", "--published-layout", "vila1.5")
    assert convert("export", "--source", folder / "start", *words) == 0
    config = json.loads((folder / "source" / "config.json").read_text())
    if order == "column":
        for name in ("image_encoder", "ps3"):
            del config[name]
    (folder / "source" / "config.json").write_text(json.dumps(config))
    return folder / "source"


def assert_close(theirs: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_transformers_computes_what_ours_does(ranks: RankPool, model: Model) -> None:
    """Logits and greedy ids of prompts with none, one and two pictures, alone and in a batch; eager and SDPA."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source, folder = model.source, model.folder
    (found,) = ranks.run(1, ours, config_of(source), source, our_prompts("vila_v1"), COUNT)
    logits, answers = found
    assert len({tuple(answer) for answer in answers}) == len(QUESTIONS), "the pictures are looked at"
    processor = AutoProcessor.from_pretrained(folder)
    for attention in ("eager", "sdpa"):
        theirs: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention)
        assert theirs.config.text_config.vocab_size == 385, "one row more, for <image>"
        for numbers in ([0], [1], [2], [0, 1, 2]):
            inputs = their_inputs(processor, numbers)
            with torch.no_grad():
                batch = theirs(**inputs).logits
            for number, row, mask in zip(numbers, batch, inputs["attention_mask"].bool(), strict=True):
                assert_close(row[mask][:, :384], logits[number])
            new = theirs.generate(**inputs, max_new_tokens=COUNT, eos_token_id=None)[
                :, inputs["input_ids"].shape[1] :
            ]
            assert new.tolist() == [answers[number] for number in numbers]


def test_the_tools_ask_it(ranks: RankPool, model: Model) -> None:
    """`tools/generate.py` and `tools/chat.py` on the folder answer as on the checkpoint."""
    from megatron_eve.inference.hf_engine import HFEngine

    prompts = our_prompts("vila_v1")
    (found,) = ranks.run(1, ours, config_of(model.source), model.source, prompts, COUNT)
    engine = HFEngine(model.folder, "vila_v1")
    texts = [(prompt_text(text, "vila_v1", len(images)), images) for text, images in QUESTIONS]
    queries = [engine.prepare(text, images, COUNT) for text, images in texts]
    assert [query.length for query in queries] == [len(rows) for rows in found[0]]
    eos = engine._processor.tokenizer.eos_token_id
    wanted = [answer[: answer.index(eos)] if eos in answer else answer for answer in found[1]]
    assert [list(answer.tokens) for answer in engine.answers(queries)] == wanted


def test_log_likelihoods_of_the_folder_are_those_of_our_logits(ranks: RankPool, model: Model) -> None:
    """The row of `<image>`, which is no word of the vocabulary, has no part in them."""
    from megatron_eve.inference.generate import Prompt
    from megatron_eve.inference.hf_engine import HFEngine

    engine = HFEngine(model.folder, "vila_v1")
    texts = [(prompt_text(text, "vila_v1", len(images)), images) for text, images in QUESTIONS]
    queries = [engine.prepare_continuation(text, images, " A cat and a dog.") for text, images in texts]
    count = engine._pair(queries[0]).count
    ends = [engine._pair(query).continuation for query in queries]
    prompts = [
        Prompt([*prompt.tokens, *end], prompt.images)
        for prompt, end in zip(our_prompts("vila_v1"), ends, strict=True)
    ]
    (found,) = ranks.run(1, ours, config_of(model.source), model.source, prompts, 1)
    for said, end, logits in zip(engine.log_likelihoods(queries), ends, found[0], strict=True):
        chances = logits[-count - 1 : -1].log_softmax(-1)
        assert said.sum == pytest.approx(chances[range(count), end].sum().item(), abs=1e-3)


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
@pytest.mark.parametrize("system", [None, "Be brief, don't guess."])
def test_chat_templates_write_the_texts_of_training(name: str, system: str | None) -> None:
    """Conversations with pictures in front, inside and behind, and the end of a prompt."""
    from transformers import PreTrainedTokenizerFast

    fast, _ = fast_tokenizer(Tokenizer(find_golden("tokenize") / "tokenizer.model", legacy=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    turns = ["<image>\nWhat is it?", "A box.", "And <image> or\n<image> ?", "Blue.", " No picture "]
    template = find_template(name)
    assert template.answer is not None
    placed = [
        Turn("gpt" if number % 2 else "human", text if number % 2 else template.place_images(text))
        for number, text in enumerate(turns)
    ]
    parts = marked_parts(template, template.default_system if system is None else system, placed)
    begin = {"llama_3": "<|begin_of_text|>", "qwen2": ""}.get(name, "<s>")
    wanted = begin + "".join(part for part, _ in parts) + template.answer.header
    if template.behind_image:
        wanted = wanted.replace("<image>", f"<image>{template.behind_image}")
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(turns)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    found = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert found == wanted


def test_transformers_own_model_needs_no_code(model: Model) -> None:
    from transformers import AutoConfig

    kind = "LlavaConfig" if model.is_llava else "VILAConfig"
    assert type(AutoConfig.from_pretrained(model.folder)).__name__ == kind
    code = {path.name for path in model.folder.glob("*.py")}
    assert code == (set() if model.is_llava else {"configuration_vila.py", "modeling_vila.py"})


def test_it_comes_back(model: Model, tmp_path: Path) -> None:
    """As transformers saves it again, it is imported: the same weights, with a row for `<image>`, and settings."""
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(model.folder).save_pretrained(tmp_path / "saved")
    preprocessor = model.folder / "preprocessor_config.json"
    (tmp_path / "saved" / preprocessor.name).write_bytes(preprocessor.read_bytes())
    assert convert("import", "--source", tmp_path / "saved", "--target", tmp_path / "run") == 0
    assert config_of(tmp_path / "saved").vision == config_of(model.source).vision
    words = ("--published-layout", "vila1.5")
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back", *words) == 0
    assert (
        convert("export", "--source", model.folder.parent / "run", "--target", tmp_path / "first", *words)
        == 0
    )
    found, wanted = tensors(tmp_path / "back"), tensors(tmp_path / "first")
    for name in ("llm/model.embed_tokens.weight", "llm/lm_head.weight"):
        assert not found[name][384:].any() and len(found[name]) == 385
        found[name] = found[name][:384].clone()
    assert same(found, wanted)


def test_no_answer_holds_the_image_token(model: Model) -> None:
    """Its score is 0, which is the highest where all others are negative."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    theirs: Any = AutoModelForImageTextToText.from_pretrained(model.folder)
    theirs.lm_head.weight.data[:384] = 0
    theirs.lm_head.bias = torch.nn.Parameter(torch.tensor([-1.0] * 384 + [0.0]))
    inputs = their_inputs(AutoProcessor.from_pretrained(model.folder), [1])
    new = theirs.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    assert (new < 384).all()
