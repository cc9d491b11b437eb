"""Can a run train on a dataset, by its manifest?"""

from __future__ import annotations

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.manifest import MANIFEST, STORED_AS, DatasetInfo, max_padding_rows
from megatron_eve.models.image_flags import ImageSettings
from megatron_eve.models.registry import find_family, tower_family


def check_compatible(
    prefix: str,
    info: DatasetInfo,
    tokenizer_sha256: str | None,
    vocab_size: int,
    family: str,
    image_settings: ImageSettings,
) -> None:
    """See `IndexedVisionDataset.check_compatible`.

    Args:
        prefix: of the dataset.
        info: its manifest.

    Raises:
        DataError: the run cannot train on it.
    """
    path = prefix + MANIFEST
    if tokenizer_sha256 is not None and tokenizer_sha256 != info.tokenizer_sha256:
        raise DataError(
            f"{path} was made with another tokenizer (sha256 {info.tokenizer_sha256[:12]}..., the run's "
            f"is {tokenizer_sha256[:12]}...): give that one as --tokenizer-model, or preprocess again"
        )
    if not info.vocab_size <= vocab_size <= info.vocab_size + max_padding_rows(info.tokenizer_kind):
        same, cut = f"give --vocab-size {info.vocab_size}", ""
        if tower_family(family):
            same = "name the SigLIP with that tokenizer (--vision-tower)"
        elif info.vocab_size < vocab_size:
            cut = f"; cut weights with more rows first (transformers' resize_token_embeddings({info.vocab_size}))"
        raise DataError(
            f"{path} was made with a tokenizer of {info.vocab_size} pieces, and the run's vocabulary has "
            f"{vocab_size}: {same}, or preprocess the data with the model's tokenizer{cut}"
        )
    if info.num_images and info.family != family:
        raise DataError(
            f"{path} was made for the family {info.family} and the run has {family}: give --family {info.family}, "
            f"or preprocess the data with --family {family}"
        )
    if info.num_images:
        _check_image_settings(path, info, image_settings)


def _check_image_settings(path: str, info: DatasetInfo, theirs: ImageSettings) -> None:
    flags = find_family(info.family).image_flags
    for key, ours in info.made_for.items():
        if key not in theirs or theirs[key] == ours or (key in flags and flags[key].fits(ours, theirs[key])):
            continue
        name, flag = key.replace("_", " "), f"--{key.replace('_', '-')}"
        if key in info.image_settings:
            beside = f"{flags[key].beside} " if key in flags and flags[key].beside else ""
            raise DataError(
                f"{path} was made for {name} {ours} and the run has {theirs[key]}: use the matching recipe "
                f"({beside}{flag} {ours}), or preprocess the data with {flag} {theirs[key]}"
            )
        raise DataError(
            f"{path} holds {STORED_AS[info.image_storage]} that were made for {name} {ours} and the run has "
            f"{theirs[key]}: preprocess the data with {flag} {theirs[key]}, or with --image-storage encoded, "
            f"which fits any {name}"
        )
