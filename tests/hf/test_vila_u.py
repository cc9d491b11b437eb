"""VILA-U for transformers: losses of the public code, and logits, answers and drawings of ours."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.config import RunConfig
from megatron_eve.data.text.prompts import drawing_prompt, encode_text, prompt_text
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.inference.drawing import Drawing
from megatron_eve.inference.sampling import GREEDY, Sampling, kept_probabilities
from megatron_eve.models.name_rules import renamed
from megatron_eve.models.vila_u.hf.modeling_vila_u import _chosen
from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS
from tests.convert.test_conversion import convert
from tests.convert.test_vila_u import HEAD, SEPARATE, start
from tests.golden_dir import find_golden
from tests.hf.vila_models import config_of
from tests.models.vila_u.towers import write_tower
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

COUNT = 6
QUESTIONS: list[tuple[str, int]] = [
    ("What is the answer to everything?", 0),
    ("<image>\nWhat is shown?", 1),
    ("<image>\n<image>\nWhat differs between a and b?", 2),
]
CAPTIONS = ["a red ball", "two blue cubes on a green table, and nothing else"]
# What a folder gives in a process that knows nothing of this project.
PROGRAM = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
given = torch.load(sys.argv[2], weights_only=False)
drawn = model.draw(**processor.drawing_inputs(given["captions"]), temperature=0)
inputs = processor(text=given["texts"], images=given["images"], padding=True, return_tensors="pt")
answers = model.generate(**inputs, max_new_tokens=given["count"])[:, inputs["input_ids"].shape[1]:]
pictures = model.decode(drawn)
torch.save({"drawn": drawn, "answers": answers, "pictures": pictures, "logits": model(**inputs).logits}, sys.argv[3])
assert "megatron_eve" not in sys.modules
"""


class Case(NamedTuple):
    """A model in both forms."""

    run: Path
    folder: Path

    def model(self, **settings: Any) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(self.folder, **settings).eval()

    def processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.folder)


def for_transformers(run: Path, folder: Path) -> Case:
    words = ("--format", "transformers", "--tokenizer", find_golden("golden/vila/vilau_model") / "llm")
    assert convert("export", "--source", run, "--target", folder, *words) == 0
    return Case(run, folder)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Case:
    place = tmp_path_factory.mktemp("golden")
    source = find_golden("golden/vila/vilau_model")
    assert convert("import", "--source", source, "--target", place / "run") == 0
    return for_transformers(place / "run", place / "hf")


def tokenizer() -> Tokenizer:
    path = find_golden("golden/vila/vilau_model") / "llm" / "tokenizer.model"
    return Tokenizer(path, legacy=False, added=SPECIAL_TOKENS)


def images(count: int, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(count)]


def texts() -> list[str]:
    return [prompt_text(question, "v1", count) for question, count in QUESTIONS]


def shown() -> list[list[Image.Image]]:
    return [images(count, number) for number, (_, count) in enumerate(QUESTIONS)]


# --- against the public code ---


def merged(
    inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], name: str
) -> dict[str, torch.Tensor]:
    """A golden batch as the model takes it: 16 image tokens for each placeholder, texts padded behind."""
    ids, labels, mask = (inputs[f"{name}.{key}"] for key in ("input_ids", "labels", "attention_mask"))
    rows, drawn, begins = [], [], torch.tensor([476, 478])
    for one, label, real in zip(ids, labels, mask, strict=True):
        one, label = one[real], label[real]
        pictures = one == -200
        runs = pictures & ~torch.cat([torch.zeros(1, dtype=torch.bool), pictures[:-1]])
        for place in pictures.nonzero()[:, 0].tolist():
            first = int(runs[: place + 1].nonzero()[-1])
            drawn.append(first > 0 and bool(torch.isin(label[first - 1], begins)))
        counts = torch.where(pictures, 16, 1)
        rows.append(
            (one.masked_fill(pictures, 480).repeat_interleave(counts), label.repeat_interleave(counts))
        )
    length = max(len(one) for one, _ in rows)
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(one, (0, length - len(one))) for one, _ in rows]),
        "labels": torch.stack(
            [torch.nn.functional.pad(label, (0, length - len(label)), value=-100) for _, label in rows]
        ),
        "attention_mask": torch.stack(
            [torch.arange(length) < len(one) for one, _ in rows]
        ).long(),
    }  # fmt: skip
    if drawn:
        batch |= {"pixel_values": inputs[f"{name}.images"], "drawn": torch.tensor(drawn)}
        codes = outputs[f"{name}.image_codes_plus_vocab"] - 480
        targets = outputs[f"{name}.labels_merged"]
        assert int(batch["drawn"].sum()) * 16 == int((targets[..., 0] >= 480).sum())
        batch["known codes"] = codes
    return batch


@pytest.mark.parametrize("name", ["mixed", "understanding", "t2i_pair", "text_only"])
def test_the_losses_of_the_public_code(golden: Case, name: str) -> None:
    case = find_golden("golden/vila/vilau_llm_train")
    inputs, outputs = (load_file(case / f"{some}.safetensors") for some in ("inputs", "outputs"))
    model, batch = golden.model(), merged(inputs, outputs, name)
    if (codes := batch.pop("known codes", None)) is not None:
        found = model.vision_tower.encode(batch["pixel_values"])
        assert torch.equal(found.flatten(1, 2), codes)
    found = model(**batch)
    assert abs(found.lm_loss - outputs[f"{name}.eval.text_loss"]) < 1e-5
    if "drawn" in batch and batch["drawn"].any():
        assert abs(found.visual_loss - outputs[f"{name}.eval.image_loss"]) < 1e-5
        if (known := outputs.get(f"{name}.train.image_logits_logsumexp")) is not None:  # in another order
            ours = found.visual_logits.flatten(0, 1).logsumexp(-1)
            assert torch.allclose(ours.sort()[0], known.sort()[0], atol=2e-5)
    else:
        assert found.visual_loss is None
    assert abs(found.loss - outputs[f"{name}.eval.loss"]) < 1e-5
    found.loss.backward()
    names = {
        "model.": "llm.model.",
        "lm_head.": "llm.lm_head.",
        "rqtransformer.": "vision_tower.vision_tower.rqtransformer.",
    }
    checked = 0
    for key, parameter in model.named_parameters():
        known = outputs.get(f"{name}.train.gradnorm.{renamed(key, names)}")
        if key.startswith("vision_tower."):
            assert parameter.grad is None  # frozen
        elif known is not None and not key.endswith("attn.key.bias"):  # which has no true gradient
            checked += 1
            norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            assert abs(norm - known) <= 5e-5 * known, key
    assert checked > 20


# --- against ours ---


def ours(
    config: RunConfig, run: Path, prompts: Sequence[tuple[list[int], Any]], drawings: Sequence[Drawing]
) -> dict[str, Any]:
    """Runs on one process: logits [L, W] of prompts with the codes of their pictures, greedy ids by a loop that keeps
    nothing, and drawings."""
    from megatron_eve.checkpoint.state import load_weights
    from megatron_eve.inference.drawing import draw
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        load_weights(str(run), [model], config)
        model.eval()
        logits, answers = [], []
        for ids, codes in prompts:
            logits.append(_logits(model, ids, codes, config.vision.rows))
            new: list[int] = []
            for _ in range(COUNT):
                vocabulary = _logits(model, [*ids, *new], codes, config.vision.rows)
                new.append(int(vocabulary[-1, : config.model.vocab_size].argmax()))
            answers.append(new)
        drawn = {
            (guidance, frames): draw(
                model, drawings, config, sampling=GREEDY, guidance=guidance, frames=frames
            )
            for guidance, frames in ((3.0, 1), (1.0, 1), (3.0, 2))
        }
    return {"logits": logits, "answers": answers, "drawn": drawn}


def _logits(model: Any, ids: list[int], codes: Any, rows: int) -> torch.Tensor:
    """Of a prompt whose ids hold -1 for each picture."""
    from megatron_eve.models.decoder.model import ModelInputs
    from megatron_eve.models.decoder.packed import packed_params
    from megatron_eve.models.model_parts import VisualInputs

    tokens = torch.tensor([one for token in ids for one in ([token] if token >= 0 else [-1] * rows)])
    places = (tokens < 0).nonzero()[:, 0]
    length = len(tokens)
    found = model(
        ModelInputs(
            packed=packed_params(torch.tensor([0, length], dtype=torch.int32), [length]),
            position_ids=torch.arange(length),
            tokens=tokens.clamp(min=0),
            visual=VisualInputs({}, torch.zeros(0, 2, dtype=torch.int64), codes),
            image_rows=places,
            output_rows=torch.arange(length),
        )
    )
    return found.clone()  # type: ignore[no-any-return]


def our_prompts(case: Case) -> list[tuple[list[int], torch.Tensor]]:
    """Ids and codes; the tower is compared by its own tests."""
    model, processor = case.model(), case.processor()
    found = []
    for text, pictures in zip(texts(), shown(), strict=True):
        ids = encode_text(text, tokenizer(), "v1")
        codes = torch.zeros(0, model.depth, dtype=torch.int64)
        if pictures:
            codes = model.vision_tower.encode(processor.image_processor(pictures)["pixel_values"]).flatten(
                0, 2
            )
        found.append(([token if token >= 0 else -1 for token in ids], codes))
    return found


def our_drawings() -> list[Drawing]:
    unconditional = encode_text(drawing_prompt("", "v1"), tokenizer(), "v1")
    return [
        Drawing(encode_text(drawing_prompt(one, "v1"), tokenizer(), "v1"), unconditional) for one in CAPTIONS
    ]


def compare(case: Case, ranks: RankPool) -> None:
    (known,) = ranks.run(1, ours, config_of(case.run), case.run, our_prompts(case), our_drawings())
    model, processor = case.model(), case.processor()
    inputs = processor(text=texts(), images=shown(), padding=True, return_tensors="pt")
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions).logits
    width = config_of(case.run).model.vocab_size
    for theirs, expected in zip(logits, known["logits"], strict=True):
        found, wanted = theirs[-len(expected) :, :width], expected[:, :width]
        assert (found - wanted).norm() / wanted.norm() < 1e-5
    new = model.generate(**inputs, max_new_tokens=COUNT, eos_token_id=[])[:, inputs["input_ids"].shape[1] :]
    assert new.tolist() == known["answers"]
    for (guidance, frames), expected in known["drawn"].items():
        given = processor.drawing_inputs(CAPTIONS, guidance=guidance != 1)
        for cached in (True, False):
            drawn = model.draw(**given, guidance=guidance, temperature=0, frames=frames, use_cache=cached)
            assert torch.equal(drawn, expected)
        alone = model.draw(
            **processor.drawing_inputs(CAPTIONS[:1], guidance=guidance != 1),
            guidance=guidance, temperature=0, frames=frames,
        )  # fmt: skip
        assert torch.equal(alone, expected[:1])
    assert not torch.equal(known["drawn"][3.0, 1], known["drawn"][1.0, 1])


def test_logits_answers_and_drawings_are_ours(golden: Case, ranks: RankPool) -> None:
    compare(golden, ranks)


def test_a_model_with_a_codebook_for_each_depth(tmp_path: Path, ranks: RankPool) -> None:
    """Features of blocks, other sizes, and a vocabulary padded to more rows than pieces."""
    run = start(write_tower(tmp_path / "tower", SEPARATE), tmp_path, *HEAD, rows=512)
    case = for_transformers(run, tmp_path / "hf")
    compare(case, ranks)
    check_log_likelihoods(case)


def files() -> list[list[bytes]]:
    """The pictures of `shown` as PNG."""
    found: list[list[bytes]] = []
    for pictures in shown():
        found.append([])
        for picture in pictures:
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            found[-1].append(stream.getvalue())
    return found


def check_log_likelihoods(case: Case) -> None:
    """Of the ends of the prompts, against the folder's logits, whose rows all count: those without a token, too."""
    from megatron_eve.inference.hf_engine import HFEngine

    engine = HFEngine(case.folder, "v1")
    ends = [
        engine.prepare_continuation(text.removesuffix("ASSISTANT:"), some, "ASSISTANT:")
        for text, some in zip(texts(), files(), strict=True)
    ]
    inputs = case.processor()(text=texts(), images=shown(), padding=True, return_tensors="pt")
    assert [end.length for end in ends] == inputs["attention_mask"].sum(1).tolist()
    with torch.no_grad():
        batch = case.model()(**inputs).logits
    for ids, logits, end, said in zip(
        inputs["input_ids"], batch, ends, engine.log_likelihoods(ends), strict=True
    ):
        count = engine._pair(end).count
        rows = logits[-1 - count : -1].log_softmax(-1)
        assert said.sum == pytest.approx(rows[range(count), ids[-count:]].sum().item(), abs=1e-4)


def test_the_tools_answer_from_the_folder(golden: Case) -> None:
    """As tools/generate.py and tools/chat.py do, in one batch of unequal prompts and streamed."""
    from megatron_eve.inference.hf_engine import HFEngine

    engine = HFEngine(golden.folder, "v1")
    queries = [engine.prepare(text, some, COUNT) for text, some in zip(texts(), files(), strict=True)]
    model, inputs = (
        golden.model(),
        golden.processor()(text=texts(), images=shown(), padding=True, return_tensors="pt"),
    )
    assert [query.length for query in queries] == inputs["attention_mask"].sum(1).tolist()
    expected = model.generate(**inputs, max_new_tokens=COUNT)[:, inputs["input_ids"].shape[1] :]
    answers = engine.answers(queries)
    for answer, ids in zip(answers, expected.tolist(), strict=True):
        assert list(answer.tokens) == ids[: len(answer.tokens)] and answer.tokens
    assert "".join(engine.stream(queries[1])).strip() == answers[1].text
    check_log_likelihoods(golden)


def test_samples_are_repeated_with_their_own_pictures(golden: Case) -> None:
    """As beams and several answers to a question need it."""
    model, processor = golden.model(), golden.processor()
    inputs = processor(text=texts(), images=shown(), padding=True, return_tensors="pt")
    answers = model.generate(**inputs, max_new_tokens=COUNT)
    again = model.generate(**inputs, max_new_tokens=COUNT, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(again, answers.repeat_interleave(2, 0))


def test_the_tower_stays_float32(golden: Case) -> None:
    """A model in bfloat16 reads the codes that training reads."""
    model, inputs = golden.model(dtype=torch.bfloat16), golden.processor().image_processor(images(8))
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {one.dtype for one in model.vision_tower.parameters()} == {torch.float32}
    codes = golden.model().vision_tower.encode(inputs["pixel_values"])
    assert torch.equal(model.vision_tower.encode(inputs["pixel_values"]), codes)
    drawn = model.draw(**golden.processor().drawing_inputs(CAPTIONS), temperature=0)
    assert model.decode(drawn).dtype == torch.float32


def test_prompts_are_those_of_training(golden: Case) -> None:
    processor = golden.processor()
    for (question, count), text in zip(QUESTIONS, texts(), strict=True):
        content = [{"type": "image"}] * count + [{"type": "text", "text": question.replace("<image>\n", "")}]
        written = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert written == f"<s>{text}"
        inputs = processor(text=written, images=images(count) or None)
        expected = [one for token in encode_text(text, tokenizer(), "v1") for one in
                    ([token] if token >= 0 else [480] * 16)]  # fmt: skip
        assert list(inputs["input_ids"][0]) == expected
    for video in (False, True):
        given = processor.drawing_inputs(CAPTIONS, video=video)
        for row, mask, caption in zip(
            given["input_ids"], given["attention_mask"], [*CAPTIONS, "", ""], strict=True
        ):
            expected = encode_text(drawing_prompt(caption, "v1", video=video), tokenizer(), "v1")
            assert row[mask.bool()].tolist() == expected


def test_sampled_codes_have_their_probabilities() -> None:
    """20,000 draws against the probabilities of our sampling, by the chi-square of 50 codes."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    sampling = Sampling(temperature=0.8, top_k=30, top_p=0.95, seed=0)
    expected = kept_probabilities(logits[None], sampling)[0] * 20000
    drawn = _chosen(logits.expand(20000, -1), 0.8, 30, 0.95, torch.Generator().manual_seed(1))
    counts, kept = drawn.bincount(minlength=50), expected > 0
    assert not counts[~kept].any()
    freedom = int(kept.sum()) - 1
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_mistakes_are_said(golden: Case) -> None:
    model, processor = golden.model(), golden.processor()
    with pytest.raises(ValueError, match="hold <image> 1 times, and there are 0 images"):
        processor(text="USER: <image>")
    with pytest.raises(ValueError, match="fit is 'pad', and stretch or square is needed"):
        processor(text="USER: <image>", images=images(1), fit="pad")
    alone = processor.drawing_inputs(CAPTIONS, guidance=False)
    with pytest.raises(ValueError, match="needs an unconditional prompt for each prompt"):
        model.draw(**alone)
    for values in ({"temperature": -1}, {"top_p": 0}, {"frames": 0}, {"guidance": -1}):
        with pytest.raises(ValueError, match="must be 0 or more, top_p above 0"):
            model.draw(**{**alone, "guidance": 1, **values})
    with pytest.raises(ValueError, match=r"and the drawing 6400, and the model has \d+ positions"):
        model.draw(**alone, guidance=1, frames=400)
    both = model.draw(**processor.drawing_inputs(CAPTIONS), guidance=1, temperature=0)
    assert torch.equal(both, model.draw(**alone, guidance=1, temperature=0)), "without the unconditional ones"
    for text in (None, []):
        with pytest.raises(ValueError, match="no text; a prompt has one"):
            processor(text=text)
    with pytest.raises(ValueError, match="no text; say what to draw"):
        processor.drawing_inputs([])
    inputs = processor(text="USER: <image>", images=images(1), return_tensors="pt")
    with pytest.raises(ValueError, match="hold 15 image tokens, and the pictures have 16 positions"):
        model(input_ids=inputs["input_ids"][:, :-1], pixel_values=inputs["pixel_values"])


def test_what_transformers_saves_is_the_same_model(golden: Case, tmp_path: Path) -> None:
    model, processor = golden.model(), golden.processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = Case(golden.run, tmp_path)
    assert again.processor().image_rows == 16
    given = processor.drawing_inputs(CAPTIONS)
    assert torch.equal(again.model().draw(**given, temperature=0), model.draw(**given, temperature=0))
    halved = again.model(dtype=torch.bfloat16)
    assert halved.vision_tower.rqvaesiglip.quantizer.codebooks[0].weight.dtype == torch.float32
    assert halved.lm_head.weight.dtype == torch.bfloat16
    assert halved.draw(**given).shape == (2, 1, 4, 4, 4)


def run_alone(case: Case, place: Path, environment: dict[str, str]) -> None:
    """The folder's own code, in a process of its own, gives what it gives here."""
    model, processor = case.model(), case.processor()
    torch.save({"captions": CAPTIONS, "texts": texts(), "images": shown(), "count": COUNT}, place / "given")
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(case.folder), str(place / "given"), str(place / "found")],
        check=True, cwd=place, env={**os.environ, "HF_MODULES_CACHE": str(place / "cache"), **environment},
    )  # fmt: skip
    found = torch.load(place / "found")
    inputs = processor(text=texts(), images=shown(), padding=True, return_tensors="pt")
    drawn = model.draw(**processor.drawing_inputs(CAPTIONS), temperature=0)
    assert torch.equal(found["drawn"], drawn)
    assert torch.allclose(found["pictures"], model.decode(drawn), atol=1e-5)
    answers = model.generate(**inputs, max_new_tokens=COUNT)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found["answers"], answers)
    real, logits = inputs["attention_mask"].bool(), model(**inputs).logits
    assert torch.allclose(found["logits"][real], logits[real], atol=1e-5)


def test_a_folder_needs_nothing_of_this_project(golden: Case, tmp_path: Path) -> None:
    run_alone(golden, tmp_path, {})


@pytest.mark.slow
def test_a_folder_under_an_older_transformers(golden: Case, tmp_path: Path) -> None:
    from tests.hf.test_fine_tuning import OLDER

    other = tmp_path / "other"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(other), *OLDER],
        check=True,
    )
    run_alone(golden, tmp_path, {"PYTHONPATH": str(other)})
