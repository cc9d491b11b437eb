"""The origin of an answer: model, tokenizer and settings. Each row of an answers file records it.

A run that continues an answers file compares it, so that answers of another model or other settings are not mixed in.
Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.files import weights_fingerprint
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.config import ConfigError
from megatron_eve.inference.opening import model_name
from megatron_eve.training.monitoring.weight_origin import folder_fingerprint


@dataclass(frozen=True)
class AnswerOrigin:
    """What an answer depends on, apart from its question and pictures.

    Attributes:
        model_path: the model's folder, absolute.
        iteration: of the checkpoint; None for a folder for transformers.
        model_sha256: one digest of the weights, and of the tokenizer where the folder has its own.
        tokenizer_sha256: of `--tokenizer-model`; None where the folder has its own.
        conv_mode: the template of the prompts.
        max_new_tokens: limit of an answer's tokens; None where each question has its own.
        apply_exif: pictures were turned upright.
        sampling: how tokens were drawn (see `Sampling`); None for the most likely ones.
        tower_sha256: of the tower that made codes of the pictures; None where no question has a picture, or the model
            reads no codes.
    """

    model_path: str
    iteration: int | None
    model_sha256: str
    tokenizer_sha256: str | None
    conv_mode: str
    max_new_tokens: int | None
    apply_exif: bool
    sampling: dict[str, Any] | None = None
    tower_sha256: str | None = None

    @property
    def model_id(self) -> str:
        """The `model_id` of the published layout: the name of the model's folder (see `model_name`)."""
        return model_name(Path(self.model_path))

    @property
    def model(self) -> str:
        """The model's name for messages."""
        place = (
            self.model_path if self.iteration is None else f"{self.model_path}, iteration {self.iteration}"
        )
        return f"{place} (sha256 {self.model_sha256[:12]}...)"

    def to_metadata(self) -> dict[str, Any]:
        """The entries of a row's `metadata`; `tower_sha256` only where there is a tower."""
        entries = asdict(self)
        if self.tower_sha256 is None:
            del entries["tower_sha256"]
        return entries

    def difference(self, metadata: dict[str, Any]) -> str | None:
        """The difference to the origin in an answer's `metadata`, for a message; None if it is the same.

        The same weights in another folder are the same model.
        """
        # Older versions took the most likely tokens.
        metadata = {"sampling": None, "tower_sha256": None, **metadata}
        if not asdict(self).keys() <= metadata.keys():
            return "does not say which model, settings and pictures it came from, as older versions wrote it"
        before = AnswerOrigin(**{name: metadata[name] for name in asdict(self)})
        if before.model_sha256 != self.model_sha256:
            return f"came from {before.model}, and --model-path names {self.model}"
        for name, flag in (
            ("tokenizer_sha256", "another --tokenizer-model"),
            ("conv_mode", f"--conv-mode {before.conv_mode}"),
            ("max_new_tokens", f"--max-new-tokens {before.max_new_tokens}"),
            ("sampling", _flags(before.sampling)),
            ("apply_exif", f"{'no ' if before.apply_exif else ''}--ignore-exif-orientation"),
        ):
            if getattr(before, name) != getattr(self, name):
                return f"was made with {flag}"
        # Answers about text alone, which are without one, depend on no tower.
        if None not in (towers := {before.tower_sha256, self.tower_sha256}) and len(towers) > 1:
            return "was made with another --tower"
        return None


def model_fingerprint(folder: Path) -> tuple[int | None, str]:
    """The iteration of a folder's latest checkpoint and one digest of its weights; of a folder for transformers, None
    and a digest of its files, which are read whole.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    store = CheckpointStore(folder)
    iteration = store.latest()
    if iteration is not None and not store.folder(iteration).is_dir():
        raise ConfigError(
            f"--model-path {store.folder(iteration)}: the folder is missing, so this checkpoint is not whole; name "
            "another iteration (--ckpt-step)"
        )
    try:
        if iteration is not None:
            return iteration, weights_fingerprint(store.folder(iteration))
        return None, folder_fingerprint(folder)
    except OSError as error:
        raise ConfigError(
            f"--model-path {folder}: {error.filename or 'a file'} cannot be read ({error.strerror})"
        ) from None


def _flags(sampling: dict[str, Any] | None) -> str:
    """The flags of a sampling."""
    if sampling is None:
        return "--temperature 0, as greedy answers are"
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sampling.items())
