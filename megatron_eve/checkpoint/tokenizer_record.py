"""The tokenizer of a checkpoint: its fingerprint, which every checkpoint records, and the check of one that is given.

`common.pt` holds it as `tokenizer`: `{"kind", "sha256", "path"}`; the kind says how the file is read. Checkpoints of
older versions hold the sha256 alone, in the fingerprint of their dataset, or, of an import, as `tokenizer_sha256`.
Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.compatibility import CheckpointError, family_of
from megatron_eve.checkpoint.saved_state import read_common
from megatron_eve.checkpoint.store import CheckpointStore, path_of_pretrained, path_to_resume
from megatron_eve.config import ConfigError, RunConfig
from megatron_eve.data.errors import DataError
from megatron_eve.data.text.load_tokenizer import load_kind
from megatron_eve.data.text.text_tokenizer import (
    SENTENCEPIECE,
    SENTENCEPIECE_NOT_LEGACY,
    TOKENIZERS,
    TextTokenizer,
    kind_with,
    split_kind,
)
from megatron_eve.models.registry import find_family
from megatron_eve.runtime.errors import UserError

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"


@dataclass(frozen=True)
class TokenizerRecord:
    """What identifies a tokenizer. Two are the same if kind and sha256 are.

    Attributes:
        kind: how its file is read (`TextTokenizer.kind`).
        sha256: of its file, in hexadecimal digits.
        path: where the file was, absolute; None where that is not known (a dataset records the sha256 alone).
    """

    kind: str
    sha256: str
    path: str | None = None

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> TokenizerRecord:
        """Of a tokenizer that is open."""
        return cls(tokenizer.kind, tokenizer.sha256, str(Path(tokenizer.path).absolute()))

    def is_same(self, other: TokenizerRecord) -> bool:
        """Is it the same tokenizer, wherever its file lies?"""
        return (self.kind, self.sha256) == (other.kind, other.sha256)

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return asdict(self)

    def __str__(self) -> str:
        base, added = split_kind(self.kind)
        mode = ", legacy=False" if base == SENTENCEPIECE_NOT_LEGACY else ""
        mode += f", with {' '.join(added)}" if added else ""
        return f"{self.path or self.kind.split()[0]} (sha256 {self.sha256[:12]}...{mode})"


def recorded_tokenizer(saved: dict[str, Any]) -> TokenizerRecord | None:
    """The tokenizer that a checkpoint's text was made with; None where it does not say.

    Args:
        saved: what its `common.pt` holds. Random tokens (`--mock-data`) have no tokenizer.
    """
    found = saved.get("tokenizer")
    if isinstance(found, dict) and {"kind", "sha256"} <= found.keys():
        return TokenizerRecord(str(found["kind"]), str(found["sha256"]), found.get("path"))
    dataset = saved.get("dataset") or {}
    sha256 = dataset.get("tokenizer_sha256") or saved.get("tokenizer_sha256")
    kind = dataset.get("tokenizer_kind", SENTENCEPIECE)
    return None if sha256 in (None, "mock") else TokenizerRecord(kind, str(sha256))


def tokenizer_kind(saved: dict[str, Any]) -> str:
    """How a tokenizer is read that is given with a checkpoint: as recorded, else as its family's texts are.

    Args:
        saved: what its `common.pt` holds.
    """
    if (recorded := recorded_tokenizer(saved)) is not None:
        return recorded.kind
    return family_kind(family_of(saved)) if "config" in saved else SENTENCEPIECE


def family_kind(family: str) -> str:
    """How a tokenizer.model of a family's models is read unless something says otherwise."""
    rules = find_family(family).text_rules
    return kind_with(
        SENTENCEPIECE if rules.tokenizer_legacy else SENTENCEPIECE_NOT_LEGACY, rules.added_tokens
    )


def tokenizer_of_folder(folder: Path, kind: str = SENTENCEPIECE) -> TokenizerRecord | None:
    """The tokenizer of a folder of weights: of a run, of one of its checkpoints, or in Hugging Face layout.

    Args:
        folder: of the weights.
        kind: how a tokenizer in Hugging Face layout is read, which such a folder does not say.

    Returns:
        None where there is none, or where the folder cannot be read, which other checks say.
    """
    try:
        if (folder / "config.json").exists():
            return _of_file(folder / file_name(kind), kind)
        store = CheckpointStore(folder)
        iteration = store.latest()
        saved = read_common(store.folder(iteration)) if iteration is not None else None
    except (OSError, UserError):
        return None
    return recorded_tokenizer(saved) if saved else None


def file_name(kind: str) -> str:
    """Name of a tokenizer's file in a folder of weights."""
    return TOKENIZER_JSON if split_kind(kind)[0] == TOKENIZERS else TOKENIZER_FILE


def _of_file(path: Path, kind: str) -> TokenizerRecord | None:
    """Of a tokenizer's file; None where it is not there or is no such file."""
    try:
        return TokenizerRecord.of(load_kind(path, kind))
    except DataError:
        return None


def tokenizer_of_run(config: RunConfig, dataset: dict[str, Any]) -> TokenizerRecord | None:
    """What a run's checkpoints are to record.

    It is the tokenizer of the run's data, with its path where `--tokenizer-model`, or the weights that the run started
    from, tell it. Random tokens (`--mock-data`) have none, so there it is that of the weights.

    Args:
        config: of the run.
        dataset: the fingerprint of its data.
    """
    data = recorded_tokenizer({"dataset": dataset})
    kind = data.kind if data else family_kind(config.family)
    found = [_of_file(Path(config.data.tokenizer_model), kind)] if config.data.tokenizer_model else []
    paths = path_to_resume(config.checkpoint), path_of_pretrained(config.checkpoint)
    found += [tokenizer_of_folder(path, kind) for path in paths if path is not None]
    return next((one for one in found if one and (data is None or one.is_same(data))), data)


def check_pretrained_tokenizer(folder: Path, data: TokenizerRecord) -> None:
    """Refuse weights to start from that know another tokenizer than the run's data was made with.

    Raises:
        CheckpointError: naming both and the remedy.
    """
    before = tokenizer_of_folder(folder, data.kind)
    if before is not None and before.sha256 == data.sha256 and before.kind != data.kind:
        (base, added), (_, theirs) = split_kind(before.kind), split_kind(data.kind)
        flag = "--tokenizer-legacy" if base == SENTENCEPIECE else "--no-tokenizer-legacy"
        if added != theirs:
            flag = "the --family of these weights"
        raise CheckpointError(
            f"--pretrained-checkpoint {folder}: was trained with the tokenizer mode {before.kind!r}, and --data-path "
            f"was made with {data.kind!r}, which gives other ids for the same text; preprocess the data with {flag}"
        )
    if before is not None and not before.is_same(data):
        raise CheckpointError(
            f"--pretrained-checkpoint {folder}: was trained with the tokenizer {before}, and --data-path was made with "
            f"{data}, whose ids mean other text; preprocess the data with the tokenizer of these weights"
        )


def check_tokenizer(
    folder: Path, saved: dict[str, Any], tokenizer: TextTokenizer, flag: str = "--tokenizer-model"
) -> str | None:
    """Refuse another tokenizer than the one that a checkpoint's text was made with.

    Args:
        folder: of the checkpoint, for messages.
        saved: what its `common.pt` holds.
        tokenizer: the one that was given.
        flag: it was given with.

    Returns:
        A sentence to warn with, where the checkpoint does not say which tokenizer is right; else None.

    Raises:
        CheckpointError: the tokenizer is another file; or the checkpoint does not say, and it has another number of
            pieces than the model's vocabulary.
    """
    recorded, given = recorded_tokenizer(saved), TokenizerRecord.of(tokenizer)
    if recorded is not None:
        if recorded.is_same(given):
            return None
        raise CheckpointError(
            f"{flag} {tokenizer.path}: is another tokenizer (sha256 {given.sha256[:12]}...) than the one that {folder} "
            f"was trained with, {recorded}; name that one"
        )
    pieces, rows = tokenizer.vocab_size, saved["config"]["model"]["vocab_size"]
    if pieces != rows:
        message = f"{flag} {tokenizer.path}: has {pieces} pieces, and the model {rows}; name the one that {folder} was "
        message += "trained with"
        # An embedding may have rows that no piece has; an import knows it by the tokenizer beside the weights.
        if not saved.get("dataset") and pieces < rows:
            message += (
                "; or, if it is that one and the embedding was padded with more rows, put tokenizer.model beside the "
                "weights and import them again"
            )
        raise CheckpointError(message)
    return (
        f"{folder} does not say which tokenizer it was trained with (it was imported without one, trained on "
        f"--mock-data, or written by an older version), so nothing can tell whether {flag} {tokenizer.path} is the "
        "right one"
    )


def open_tokenizer(
    checkpoint: Path, given: Path | None, flag: str = "--tokenizer-model"
) -> tuple[TextTokenizer, str | None]:
    """The tokenizer to use with a checkpoint: the one that is given, else the one that it records.

    Args:
        checkpoint: its folder.
        given: a tokenizer.model or tokenizer.json, or a folder that holds one; None if the flag was left out.
        flag: it is given with.

    Returns:
        The tokenizer; and a sentence to warn with, where the checkpoint does not say which one is right.

    Raises:
        ConfigError: none is given, and the recorded one is not there any more; or what is given is none.
        CheckpointError: see `check_tokenizer`.
    """
    saved = read_common(checkpoint) or {}
    if given is None:
        return _recorded(checkpoint, recorded_tokenizer(saved), flag), None
    kind = tokenizer_kind(saved)
    path = given if given.is_file() else given / file_name(kind)
    if not path.exists() and (given / TOKENIZER_JSON).is_file():
        path = given / TOKENIZER_JSON
    try:
        tokenizer = load_kind(path, kind)
    except DataError as error:
        raise ConfigError(f"{flag}: {error}") from None
    # Of a common.pt that cannot be read, the load itself says what is wrong.
    return tokenizer, check_tokenizer(checkpoint, saved, tokenizer, flag) if "config" in saved else None


def _recorded(checkpoint: Path, recorded: TokenizerRecord | None, flag: str) -> TextTokenizer:
    """The tokenizer at the recorded path, if it is still the same.

    Raises:
        ConfigError: there is none, or another one.
    """
    missing = f"{flag}: a checkpoint does not hold its tokenizer"
    if recorded is None or recorded.path is None:
        name = file_name(recorded.kind) if recorded else TOKENIZER_FILE
        raise ConfigError(f"{missing}; name the {name} that {checkpoint} was trained with")
    was = f"{missing}, and {recorded.path}, which {checkpoint} was trained with, is"
    try:
        found = load_kind(recorded.path, recorded.kind)
    except DataError:
        raise ConfigError(f"{was} not there any more; name a copy of it") from None
    if not recorded.is_same(TokenizerRecord.of(found)):
        raise ConfigError(f"{was} another one now; name the one with sha256 {recorded.sha256[:12]}...")
    return found
