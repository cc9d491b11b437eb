"""Tiny folders of two published kinds of model with random weights: LLaVA-1.5 in llava-hf's layout, and Fuyu."""

from __future__ import annotations

from pathlib import Path

import torch

TEXTS = [
    "USER: What is in the picture? ASSISTANT: Two dogs run over the grass, and a cat sleeps.",
    "Answer the question using a single word or phrase. Yes. No. Hello world, how are you?",
    "Generate a coco-style caption.\nWhat colour is the bus on the left side of the road?\n",
    "A question about pictures, with words of many lengths: a, be, see, tree, three, through.",
]
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As llava-hf/llava-1.5-7b-hf has it, but for a branch for the model's answers in training."""


def _tokenizer(special: list[str], size: int = 300) -> object:
    """A byte-fallback BPE with Llama's word mark in front of a text, and BOS in front of that."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=len(names) + size, special_tokens=names, max_token_length=8)
    tokenizer.train_from_iterator(TEXTS, trainer)
    # Bytes are plain pieces of the vocabulary, not texts to be found in prompts, but for what `special` names.
    import json

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def make_llava(folder: Path, seed: int = 0) -> Path:
    """A folder with pictures of 28 pixels a side in four tokens."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = _tokenizer(["<image>"])
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=side),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=32),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=1, eos_token_id=2
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return _save(folder, seed, LlavaForConditionalGeneration, config, processor)


def make_fuyu(folder: Path, seed: int = 0) -> Path:
    """A folder with pictures of at most 32 x 48 pixels, a token for 8 x 8 of them."""
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuProcessor, PersimmonConfig
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    tokenizer = _tokenizer(["|SPEAKER|", "|NEWLINE|"])
    processor = FuyuProcessor(
        FuyuImageProcessorPil(size={"height": 32, "width": 48}, patch_size={"height": 8, "width": 8}),
        tokenizer,
    )
    text = PersimmonConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = FuyuConfig(
        text_config=text,
        patch_size=8,
        image_size=32,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
    )
    return _save(folder, seed, FuyuForCausalLM, config, processor)


def _save(folder: Path, seed: int, kind: type, config: object, processor: object) -> Path:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # far enough from each other that answers differ with their prompts
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
