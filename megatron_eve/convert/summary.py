"""The summary of a conversion: what happened to every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_eve.checkpoint.hf.folder import LazyTensor
from megatron_eve.convert.folders import decimal_size

_FIRST = 3  # names that the summary gives of each reason


def size_of(tensors: Mapping[str, LazyTensor]) -> int:
    """Bytes of tensors, without reading or computing them."""
    return sum(lazy.shape.numel() * lazy.dtype.itemsize for lazy in tensors.values())


def summary(
    tensors: Mapping[str, LazyTensor],
    mapped: Mapping[str, tuple[str, ...]],
    others: Mapping[str, Mapping[str, str]],
    dry_run: bool,
) -> str:
    """The summary as text.

    Args:
        tensors: what is written.
        mapped: Hugging Face keys by key of the checkpoint.
        others: tensors that are not mapped: a word such as "dropped" -> key -> reason.
        dry_run: nothing was written. Every tensor is listed, not only their number.
    """
    lines = []
    if dry_run:
        lines += [f"  {key} <-> {', '.join(names)}" for key, names in mapped.items()]
    dtypes = Counter(str(lazy.dtype).removeprefix("torch.") for lazy in tensors.values())
    written, kinds = "would write" if dry_run else "written", ", ".join(sorted(dtypes))
    lines.append(f"{written:<12} {len(tensors):,} tensors, {size_of(tensors):,} bytes ({kinds})")
    count = len({name for names in mapped.values() for name in names})
    lines.append(f"mapped       {count:,} tensors of the Hugging Face layout, {len(mapped):,} of ours")
    for word, reasons in others.items():
        for reason in sorted(set(reasons.values())):
            keys = [key for key, why in reasons.items() if why == reason]
            named = keys if dry_run else keys[:_FIRST]
            more = ", ..." if len(keys) > len(named) else ""
            lines.append(f"{word:<12} {len(keys):,}: {reason} ({', '.join(named)}{more})")
    return "\n".join(lines)


def dry_run_line(files: int, size: int, target: Path) -> str:
    """The last line of a dry run.

    Args:
        files: of weights.
        size: of all of them, in bytes.
        target: the folder.
    """
    what = "file" if files == 1 else "files"
    return f"would write {files:,} {what} of weights, {decimal_size(size)}, to {target}; nothing is written (--dry-run)"
