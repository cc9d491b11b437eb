"""The same questions put to transformers, which reads nothing but the folder of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eve2_tiny.inputs import Learnt


def ask_transformers(folder: Path, learnt: Sequence[Learnt], images: Path) -> list[str]:
    """Greedy answers of the exported model; the code in the folder runs, and no other of this repository.

    Args:
        folder: what tools/convert_checkpoint.py export --format transformers wrote.
        learnt: the questions; their answers are not looked at.
        images: folder of the photos.
    """
    from transformers import AutoModelForCausalLM, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    conversations = []
    for shown, text, _ in learnt:
        pictures = [{"type": "image", "path": str(images / name)} for name in shown]
        conversations.append([{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}])
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    new = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
