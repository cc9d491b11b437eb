"""VILA in transformers and ours: the same weights, pictures and prompts in both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from megatron_eve.config import TRACKER, RunConfig
from megatron_eve.data.text.prompts import encode_text, prompt_text
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.inference.generate import Prompt, generation_config
from tests.convert.test_conversion import convert
from tests.golden_dir import find_golden
from tests.inference.test_generate import picture

# A question, with `<image>` where its pictures are; no pictures, one, and several. The pictures are such that every
# Pillow resizes them alike (`data/images/resizing.py`).
QUESTIONS: list[tuple[str, list[bytes]]] = [
    ("What is the answer to everything?", []),
    ("<image>\nWhat is shown?", [picture(90, 60)]),
    ("<image>\n<image>\nWhat differs between a and b?", [picture(100, 70), picture(64, 64)]),
]


def exported(folder: Path, source: Path, *words: object) -> Path:
    """A folder for transformers of a model that is published otherwise, by way of a checkpoint."""
    assert convert("import", "--source", source, "--target", folder / "run") == 0
    return exported_run(folder, *words)


def exported_run(folder: Path, *words: object) -> Path:
    """A folder for transformers of the checkpoint in `run`."""
    tokenizer = find_golden("tokenize") / "tokenizer.model"
    flags = ("--format", "transformers", "--tokenizer", tokenizer, *words)
    assert convert("export", "--source", folder / "run", "--target", folder / "for transformers", *flags) == 0
    return folder / "for transformers"


def our_prompts(template: str) -> list[Prompt]:
    """The questions as our tools ask them."""
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model", legacy=False)
    texts = [(prompt_text(question, template, len(images)), images) for question, images in QUESTIONS]
    return [Prompt(encode_text(text, tokenizer, template), images) for text, images in texts]


def their_inputs(processor: Any, numbers: Sequence[int]) -> Any:
    """Some of the questions as transformers asks them, in one padded batch."""
    messages = [
        [{"role": "user", "content": _content(QUESTIONS[number][0], QUESTIONS[number][1])}]
        for number in numbers
    ]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({"padding": True} if transformers.__version__ < "5" else {"processor_kwargs": {"padding": True}}),
    )


def _content(question: str, images: list[bytes]) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": Image.open(io.BytesIO(some))} for some in images]
    return [*pictures, {"type": "text", "text": question.replace("<image>\n", "")}]


def config_of(source: Path, tensor_parallel: int = 1) -> RunConfig:
    """To generate with the model of a folder, or of an import's checkpoint."""
    from megatron_eve.checkpoint.hf.config import settings_of
    from megatron_eve.checkpoint.state import saved_config
    from megatron_eve.config import from_saved

    if (source / TRACKER).is_file():
        return generation_config(from_saved(saved_config(str(source)), str(source))[0], tensor_parallel, 1)
    sizes = settings_of(source)
    config = RunConfig(family="vila", model=sizes.model, vision=sizes.vision)
    return generation_config(config, tensor_parallel, 1)


def ours(
    config: RunConfig, source: Path, prompts: Sequence[Prompt], count: int
) -> tuple[list[Any], list[list[int]]]:
    """Runs on each rank: logits [L, W] of each prompt, and so many greedy ids."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.checkpoint.state import load_weights
    from megatron_eve.inference.generate import _prompt_batch, generate
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs

    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        if (source / TRACKER).is_file():
            load_weights(str(source), [model], config)
        else:
            load_hf_weights(source, [model], config)
        batch = _prompt_batch(prompts, config, apply_exif=True)
        inputs = model_inputs(DevicePack(batch), model)
        inputs.labels, inputs.output_rows = None, torch.arange(len(batch.tokens))
        rows = model(inputs)
        logits = [rows[first:last].clone() for first, last in pairwise(batch.cu_seqlens.tolist())]
        return logits, generate(model, prompts, config, max_new_tokens=count, stop_ids=())
