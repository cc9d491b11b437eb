"""The language model that the EVE v2 example starts from: a folder like Qwen2.5's, with random weights and a tokenizer.

A real run takes Qwen2.5-7B-Instruct; nothing is downloaded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from megatron_eve.config.presets import PRESETS

PRESET = "eve2_tiny"
_MODEL = PRESETS[PRESET].model
# The tokens that Qwen2.5's tokenizer_config.json calls special, in its order; they have the last ids, as there.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Where Qwen2.5 cuts a text into words: contractions, words with the space in front, single digits, punctuation.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def save_language_model(folder: Path, texts: Iterable[str]) -> Path:
    """Save a seeded random Qwen2 of the preset's sizes and a tokenizer trained on texts; returns the folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=_MODEL.vocab_size,
        hidden_size=_MODEL.hidden_size,
        intermediate_size=_MODEL.ffn_hidden_size,
        num_hidden_layers=_MODEL.num_layers,
        num_attention_heads=_MODEL.num_attention_heads,
        num_key_value_heads=_MODEL.num_query_groups,
        max_position_embeddings=_MODEL.max_position_embeddings,
        rms_norm_eps=_MODEL.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(_MODEL.rotary_base)},
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, texts)
    return folder


def save_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Train a byte-level BPE on texts and save it as Qwen2.5's is: `tokenizer.json` and `tokenizer_config.json`.

    It has as many tokens as the preset's vocabulary, if the texts have enough pairs of characters.
    """
    bytes_to_text = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, bytes_to_text])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_MODEL.vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(SPECIAL_TOKENS)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": SPECIAL_TOKENS[1:],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
