"""The tokenizer of an export as a tokenizer.json that knows `<image>`, which transformers 4 and 5 read alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from megatron_eve.config import ConfigError
from megatron_eve.data.text.text_tokenizer import SENTENCEPIECE, TextTokenizer, split_kind
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.models.text_format import IMAGE_TOKEN, VICUNA_SYSTEM

_CONTROL = ("<unk>", "<s>", "</s>")
_USER_DEFINED = 4  # type of a piece in a sentencepiece model: it is looked for before all others
# What a tokenizer may do to a text before it looks for pieces; Llama's does nothing.
_PROBES = (
    " two  spaces ",
    "line\n\nbreaks\t",
    "ﬁ ½ Å é",
    "\u3000日本語 🙂",
    VICUNA_SYSTEM,
    "</s>USER: x <s>y",
)


def fast_tokenizer(ours: TextTokenizer) -> tuple[FastTokenizer, int]:
    """A tokenizer of the library `tokenizers` that gives the ids of training.

    Args:
        ours: a tokenizer.json, or the tokenizer.model of Llama.

    Returns:
        The tokenizer, which knows `<image>`, too, and the id of that.

    Raises:
        ConfigError: a tokenizer.model that cuts texts in another way than Llama's.
    """
    if isinstance(ours, Tokenizer):
        fast = _of_sentencepiece(ours)
    else:
        fast = FastTokenizer.from_file(ours.path)
        missing = [token for token in split_kind(ours.kind)[1] if fast.token_to_id(token) is None]
        fast.add_special_tokens([_control(token) for token in missing])
    if fast.token_to_id(IMAGE_TOKEN) is None:
        fast.add_special_tokens([_control(IMAGE_TOKEN)])
    return fast, fast.get_vocab()[IMAGE_TOKEN]


def _of_sentencepiece(ours: Tokenizer) -> FastTokenizer:
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = ours.pieces()
    control = (*_CONTROL, *ours.added)
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges = generate_merges(vocabulary, pieces)
    fast = FastTokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if ours.kind == SENTENCEPIECE:
        # Each stretch between control tokens gets a leading "▁" of its own.
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.add_special_tokens([_control(token) for token in (*control, IMAGE_TOKEN)])
    else:
        _prefix_once(fast, control, [piece for piece in _user_defined(ours.path) if piece not in ours.added])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ours.bos_id)]
    )
    for text in _PROBES:
        if fast.encode(text, add_special_tokens=False).ids != ours.encode(text):
            raise ConfigError(
                f"--tokenizer {ours.path}: it does not cut {text!r} as Llama's would, so transformers could not do the "
                "same; use the tokenizer.model that comes with Vicuna or Llama 2"
            )
    return fast


def _control(token: str, normalized: bool = False) -> AddedToken:
    return AddedToken(token, normalized=normalized, special=True)


def _prefix_once(fast: FastTokenizer, control_tokens: Sequence[str], user_defined: list[str]) -> None:
    """Put a leading "▁" in front of each stretch between pictures alone (`legacy=False`), behind the BOS token.

    The text is split at `<image>`, each stretch is normalised, and only then control tokens are looked for in it. They,
    and pieces that the model's author defined, are looked for in their normalised form, which must be themselves.

    Args:
        fast: gets the normaliser and the added tokens.
        control_tokens: of the tokenizer; those that are no pieces get the ids behind these, in this order.
        user_defined: those pieces.
    """
    control = "|".join(map(re.escape, control_tokens))
    themselves = "|".join(map(re.escape, user_defined)) or "(?!)"
    beginning = rf"\A(?!{control}|(?:{themselves})\z|\z)|(?<=\A<s>)(?!{control}|\z)"
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(beginning), "▁"), normalizers.Replace(" ", "▁")]
    )
    fast.add_special_tokens([_control(token, normalized=True) for token in control_tokens])
    fast.add_special_tokens([_control(IMAGE_TOKEN)])
    fast.add_tokens([AddedToken(piece, normalized=True) for piece in user_defined])


def _user_defined(path: str) -> list[str]:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto.FromString(Path(path).read_bytes())
    return [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
