"""A toy LLaVA in llava-hf's layout, trained in half a minute to say what 20 photos show, from other views of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import photos
from curation_tiny.views import KINDS, view

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PROMPT = "Describe the picture."
SIDE, PATCH = 56, 14
PIECES = 700
VIEWS, FIRST_VIEW = 12, 1000
"""Views of each photo that it is trained on; none of them is in a download."""
STEPS, BATCH, RATE = 250, 24, 2e-3
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train_captioner(folder: Path, steps: int = STEPS) -> Path:
    """Train the model, and save it with its processor in `folder`, which is returned."""
    import torch

    torch.manual_seed(0)
    captions = photos.load_captions()
    processor = _processor([captions[kind] for kind in KINDS])
    model = _model(processor)
    pictures = [view(kind, FIRST_VIEW + number) for kind in KINDS for number in range(VIEWS)]
    texts = [captions[kind] for kind in KINDS for _ in range(VIEWS)]
    inputs = _inputs(processor, pictures, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        drawn = torch.randint(0, len(pictures), (BATCH,))
        model(**{name: value[drawn] for name, value in inputs.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _inputs(processor: LlavaProcessor, pictures: list[Any], texts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids, mask, pixels and labels, padded at the end; only the captions have labels."""
    asked: list[Any] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
    ]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    found = processor(
        images=pictures, text=[f"{prompt} {text}</s>" for text in texts], return_tensors="pt", padding=True
    )
    before = processor(images=pictures[:1], text=prompt, return_tensors="pt")["input_ids"].shape[1]
    labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    labels[:, :before] = -100
    names = ("input_ids", "attention_mask", "pixel_values")
    return {**{name: found[name] for name in names}, "labels": labels}


def _processor(texts: list[str]) -> LlavaProcessor:
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square),
        _tokenizer(texts),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        num_additional_image_tokens=1,
    )


def _tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE learnt from the captions and the words of the prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *[f"USER: {PROMPT} ASSISTANT:"] * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="right",
    )  # fmt: skip


def _model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **sizes, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH, projection_dim=64
        ),
        text_config=LlamaConfig(
            **sizes, num_hidden_layers=2, vocab_size=len(processor.tokenizer), max_position_embeddings=256,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)
