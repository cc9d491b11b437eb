"""The codes of a dataset, as far as they are there: what tools/inspect_data.py shows of them, and their check."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.code_part import CODES, CODES_MANIFEST, CodePart, has_codes
from megatron_eve.data.format.joined import AnyDataset, MergedDataset
from megatron_eve.data.inspecting.checking import Damage, parts_of

Codes = CodePart | DataError
"""Codes, or why they do not open."""


def find_dataset_codes(dataset: AnyDataset, prefix: str | None) -> list[Codes]:
    """Open the codes of a dataset.

    Args:
        dataset: merged or not.
        prefix: of the codes; None: that of the dataset, and of the parts of a merged one, where there are any.

    Raises:
        DataError: there are none at `prefix`.
    """
    if prefix is not None:
        if not has_codes(prefix):
            raise DataError(
                f"--codes {prefix}: {prefix}{CODES_MANIFEST} is missing; name the prefix of codes"
            )
        return [_open(prefix, dataset)]
    own: list[AnyDataset] = [dataset] if isinstance(dataset, MergedDataset) else []
    return [_open(one.prefix, one) for one in (*own, *parts_of(dataset)) if has_codes(one.prefix)]


def _open(prefix: str, dataset: AnyDataset) -> Codes:
    try:
        return CodePart(prefix, dataset)
    except DataError as error:
        return error


def describe_codes(codes: Codes) -> str:
    """What the page says of codes."""
    if isinstance(codes, DataError):
        return str(codes)
    info = codes.info
    height, width, depth = info.image_shape
    damaged = f"; {info.num_damaged:,} of the placeholder image" if info.num_damaged else ""
    return (
        f"{codes.prefix}{CODES}: {height} x {width} x {depth} of each image, below {info.codebook_size:,}; fit "
        f"{info.fit}; tower sha256 {info.tower_sha256}{damaged}"
    )


def check_codes(codes: Codes) -> Iterator[Damage]:
    """Read all codes and yield what is damaged."""
    if isinstance(codes, DataError):
        yield Damage("codes", str(codes))
        return
    for where, reason in codes.damage():
        yield Damage(where, reason)
