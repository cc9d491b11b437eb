"""Messages before the first step: where the weights come from, and warnings. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from megatron_eve.checkpoint.files import weights_fingerprint
from megatron_eve.checkpoint.store import CheckpointStore, path_of_pretrained, path_to_resume
from megatron_eve.config import RunConfig
from megatron_eve.config.validate import same_folder
from megatron_eve.models.registry import tower_family
from megatron_eve.runtime.digests import file_digest

# Files of a folder in Hugging Face layout that affect the model's output. `*.bin` are pickled weights.
_HF_PARTS = ("*.safetensors", "*.bin", "*.json", "tokenizer.model")
# Settings that a resumed run takes from its own flags rather than from the checkpoint.
_OWN_SETTINGS = ("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "weight_decay", "clip_grad")


def startup_messages(config: RunConfig, iteration: int, consumed_samples: int) -> Iterator[str]:
    """One message about where the weights come from, then warnings about likely mistakes. For rank 0, after loading.

    Args:
        config: of the run.
        iteration, consumed_samples: of the loaded checkpoint; 0 for a new run.
    """
    checkpoint = config.checkpoint
    load = path_to_resume(checkpoint)
    store = CheckpointStore(load) if load else None
    resumed = store is not None and bool(store.candidates())
    if store is not None and resumed:
        folder = store.folder(iteration)
        yield f"weights: {folder}, iteration {iteration} ({_short(weights_fingerprint, folder)})"
        yield from _other_settings(config, folder)
    elif pretrained := path_of_pretrained(checkpoint):
        yield f"weights: {_described(pretrained)}"
    elif tower := tower_family(config.family):
        yield f"weights: {_described(tower.start_folder(config))}; all else random (--seed {config.training.seed})"
    else:
        yield f"weights: random (--seed {config.training.seed})"
    if store is not None and not resumed and not same_folder(checkpoint.load, checkpoint.save):
        there = "no checkpoint is there" if store.root.is_dir() else "no such folder"
        yield f"WARNING: --load {checkpoint.load}: {there}, so the run begins at iteration 0; is the path right?"
    if not checkpoint.save:
        yield "warning: no --save is given, so nothing is kept of this run"
    if consumed_samples >= config.total_samples:
        yield (
            f"warning: nothing to do: the run is at its end, iteration {iteration}; a larger --train-iters or "
            "--train-samples goes on"
        )


def _other_settings(config: RunConfig, folder: Path) -> Iterator[str]:
    """A warning for each of `_OWN_SETTINGS` that differs from the checkpoint's."""
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["optimizer"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # config.yaml is only informative here
        return
    for name in _OWN_SETTINGS:
        now = getattr(config.optimizer, name)
        if name in saved and saved[name] != now:
            yield f"warning: --{name.replace('_', '-')} {now}: the checkpoint was made with {saved[name]}"


def _short(fingerprint: Callable[[Path], str], folder: Path) -> str:
    """The first 12 digits of a fingerprint, for messages."""
    try:
        return f"sha256 {fingerprint(folder)[:12]}..."
    except OSError as error:  # the weights are loaded already, so this does not end the run
        return f"sha256 unknown: {error.strerror}"


def _described(folder: Path) -> str:
    """Text for a folder of weights: path, iteration or Hugging Face layout, and fingerprint."""
    if (folder / "config.json").exists():
        return f"{folder}, in Hugging Face layout ({_short(folder_fingerprint, folder)})"
    store = CheckpointStore(folder)
    iteration = store.latest()
    assert iteration is not None  # it was loaded
    return f"{folder}, iteration {iteration} ({_short(weights_fingerprint, store.folder(iteration))})"


def folder_fingerprint(folder: Path) -> str:
    """One sha256 for a folder in Hugging Face layout: of its weights, configuration and tokenizer, read whole.

    Raises:
        OSError: a file cannot be read.
    """
    return _digest_of(path for pattern in _HF_PARTS for path in folder.glob(pattern))


def _digest_of(paths: Iterable[Path]) -> str:
    files = sorted(path for path in paths if path.is_file())
    with ThreadPoolExecutor(4) as threads:  # hashing releases the GIL
        digests = list(threads.map(file_digest, files))
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
