"""The datasets of a run, opened and divided as its configuration says, or refused. Needs no torch and no megatron-core.

Preflight opens them here before torch is loaded, and the run does the same again, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config import RunConfig, parse_blend, parse_split
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.code_part import AnyCodes, JoinedCodes, open_codes
from megatron_eve.data.format.joined import AnyDataset, JoinedDataset, open_dataset
from megatron_eve.data.sampling.fitting import PackLimits
from megatron_eve.data.sampling.orders import DatasetSlice, split_dataset
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.registry import find_family, find_image_codes, tower_family

# Codes of each part that are looked through when a dataset is opened; one that is out of range in the rest is found
# when it is read, or by tools/inspect_data.py --check.
_CHECKED_CODE_BYTES = 1 << 26
_NO_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class OpenedDatasets:
    """What `--data-path` and `--valid-data-path` name.

    Attributes:
        datasets: those that are trained on, then those that are only measured.
        weights: one for each dataset that is trained on, or None.
        training: what is trained on of each dataset.
        held_out: what losses are measured on, of each dataset that has such samples.
        dropped: a sentence for each dataset with samples that no pack can hold, which are in neither.
        codes: of all their images, where the family reads codes.
    """

    datasets: tuple[AnyDataset, ...]
    weights: tuple[float, ...] | None
    training: tuple[DatasetSlice, ...]
    held_out: tuple[DatasetSlice, ...]
    dropped: tuple[str, ...]
    codes: JoinedCodes | None = None

    def joined(self) -> AnyDataset | JoinedDataset:
        """All of them as one dataset.

        Raises:
            DataError: they do not go together.
        """
        return self.datasets[0] if len(self.datasets) == 1 else JoinedDataset(self.datasets)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a checkpoint's place in the order to mean anything."""
        trained = self.datasets[: len(self.training)]
        weights = self.weights or ()
        coded = _codes_of(trained) if self.codes else None
        parts = coded.parts if coded else []
        codes = (
            {
                "code tower": parts[0].info.tower_sha256,
                "code dtypes": sorted({part.info.dtype for part in parts}),
            }
            if parts
            else {}
        )
        written = sorted({dataset.info.chat_template_sha256 for dataset in trained} - {""})
        chat_templates = {"chat_templates": written} if written else {}
        return {
            "samples": [len(dataset) for dataset in trained],
            "tokens": [dataset.info.num_tokens for dataset in trained],
            "tokenizer_sha256": trained[0].info.tokenizer_sha256,
            "tokenizer_kind": trained[0].info.tokenizer_kind,
            "templates": sorted({dataset.info.template for dataset in trained}),
            **chat_templates,
            "apply_exif": trained[0].info.apply_exif,
            # Other storage is other pixels: it has the same rows, and yet is another dataset.
            "image storage": [dataset.info.image_storage for dataset in trained],
            "shares": [round(weight / sum(weights), 9) for weight in weights],
            "dropped samples": dropped_fingerprints(self.training),
            "content": [dataset.info.content_sha256 for dataset in trained],
            **codes,
        }


def open_datasets(config: RunConfig) -> OpenedDatasets:
    """Open what `--data-path` and `--valid-data-path` name, and refuse what this run cannot take.

    Raises:
        DataError: damaged files; another tokenizer, vocabulary, family or image setting; a split, or samples that no
            pack can hold, leave nothing of a dataset.
        ConfigError: a flag that cannot be read.
    """
    data = config.data
    blend, others = parse_blend(data.data_path), parse_blend(data.valid_data_path, "--valid-data-path")
    prefixes = (*blend.prefixes, *others.prefixes)
    # For its fingerprint, and whether it keeps newlines: the legacy mode of a tokenizer.model changes neither.
    tokenizer = load_tokenizer(data.tokenizer_model, legacy=True) if data.tokenizer_model else None
    datasets = [open_one(config, prefix, tokenizer.sha256 if tokenizer else None) for prefix in prefixes]
    if tokenizer and any(dataset.info.template == "plain" for dataset in datasets):
        tokenizer.check_newline()
    if tokenizer:
        for prefix, dataset in zip(prefixes, datasets, strict=True):
            _check_chat_template(prefix, dataset.info.chat_template_sha256, tokenizer)
    codes = _codes_of(datasets)
    training, held_out, dropped = _divide(config, prefixes, datasets, len(blend.prefixes))
    return OpenedDatasets(
        tuple(datasets), blend.weights, tuple(training), tuple(held_out), tuple(dropped), codes
    )


def _check_chat_template(prefix: str, sha256: str, tokenizer: TextTokenizer) -> None:
    """Refuse a tokenizer whose chat template is not the one of a dataset that was made with one.

    Raises:
        DataError: naming both and the remedy.
    """
    if not sha256:
        return
    from megatron_eve.data.text.chat_template import chat_template_sha256

    if (found := chat_template_sha256(tokenizer.path)) != sha256:
        what = f"another one (sha256 {found[:12]}...)" if found else "none"
        raise DataError(
            f"{prefix} was made with the tokenizer's chat template (sha256 {sha256[:12]}...), and {tokenizer.path} has "
            f"{what} beside it: name the tokenizer's folder as it was, or make the dataset again"
        )


def _codes_of(datasets: Sequence[AnyDataset]) -> JoinedCodes | None:
    """The codes of those datasets that have some; None if none has.

    Raises:
        DataError: they are of several towers.
    """
    coded = [cast(AnyCodes, dataset.opened_codes) for dataset in datasets if dataset.opened_codes]
    return JoinedCodes(coded) if coded else None


def dropped_fingerprints(parts: Sequence[DatasetSlice]) -> list[str]:
    """Which samples the order leaves out, for a checkpoint; an empty list where it leaves out none."""
    fingerprints = [part.dropped_fingerprint() for part in parts]
    return fingerprints if any(fingerprints) else []


def pack_limits(config: RunConfig) -> PackLimits:
    """What one sample of a run may have."""
    data = config.data
    if tower_family(config.family):  # whose texts are cut, and which makes no packs
        return PackLimits(_NO_LIMIT, _NO_LIMIT, None)
    return PackLimits(data.seq_length, config.model.max_position_embeddings, data.max_images_per_pack)


def _divide(
    config: RunConfig, prefixes: Sequence[str], datasets: Sequence[AnyDataset], trained: int
) -> tuple[list[DatasetSlice], list[DatasetSlice], list[str]]:
    """Divide datasets, of which the first `trained` are trained on.

    Returns:
        What is trained on, what is held out, and a sentence for each dataset with samples that are in neither.
    """
    share, limits = parse_split(config.data.split), pack_limits(config)
    names = [Path(prefix).name for prefix in prefixes]
    training, held_out, notes, first = [], [], [], 0
    for number, (prefix, dataset) in enumerate(zip(prefixes, datasets, strict=True)):
        name = names[number] if names.count(names[number]) == 1 else prefix
        kept, out = split_dataset(name, first, len(dataset), share if number < trained else 1.0)
        first += len(dataset)
        if number < trained:
            check_split(config, prefix, kept, out)
        rows = limits.oversized(dataset)
        if len(rows):
            notes.append(limits.describe(dataset, rows))
            kept, out = (_without(part, rows, prefix, notes[-1]) for part in (kept, out))
        if number < trained:
            training.append(kept)
        if len(out):
            held_out.append(out)
    return training, held_out, notes


def _without(part: DatasetSlice, rows: NDArray[np.int64], prefix: str, message: str) -> DatasetSlice:
    left = part.without(rows)
    if len(part) and not len(left):
        raise DataError(f"nothing is left of {prefix} to train on or to hold out: {message}")
    return left


def check_split(config: RunConfig, name: str, kept: DatasetSlice, held_out: DatasetSlice) -> None:
    """Refuse a split that leaves nothing of a dataset.

    Raises:
        DataError: nothing is left to train on, or nothing is held out though --split asks for it.
    """
    if not len(kept) or (parse_split(config.data.split) and not len(held_out)):
        raise DataError(
            f"--split {config.data.split} leaves nothing to {'hold out' if len(kept) else 'train on'} of the "
            f"{kept.size} samples of {name}: change the shares, or leave the dataset out"
        )


def open_one(config: RunConfig, prefix: str, tokenizer_sha256: str | None) -> AnyDataset:
    """Open a dataset for the model of a configuration; the digest of a tokenizer must be that of the dataset's.

    Raises:
        DataError: damaged files; another tokenizer, vocabulary, family or image setting.
    """
    settings, tower = find_family(config.family).image_settings(config), tower_family(config.family)
    dataset = open_dataset(prefix, mmap_bin_files=config.data.mmap_bin_files)
    if tower:
        _check_pairs(config, prefix, dataset)
    dataset.check_compatible(
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=tower.vocabulary_size(config) if tower else config.model.vocab_size,
        family=config.family,
        image_settings=settings,
    )
    dataset.use_image_settings(config.family, settings)
    if find_family(config.family).reads_codes:
        _use_codes(config, dataset)
    return dataset


def _check_pairs(config: RunConfig, prefix: str, dataset: AnyDataset) -> None:
    """Refuse samples that are not one picture and a text each.

    Raises:
        DataError: naming the first such sample, or the template of another kind of samples.
    """
    family = find_family(config.family)
    template, wanted = dataset.info.template, family.stage(config).template
    if template != wanted:
        raise DataError(
            f"{prefix} was made with --template {template}, and a tower trains on pairs of a picture and a text: make "
            f"it again (tools/preprocess_data.py --family {family.name} --template {wanted})"
        )
    samples = dataset.samples
    for wrong, what in (
        (samples["num_images"] == 0, "no picture"),
        (samples["num_images"] > 1, "several pictures"),
        (samples["text_length"] - samples["num_images"] < 1, "no text"),
    ):
        if (rows := np.flatnonzero(wrong)).size:
            others = f" ({rows.size:,} samples have)" if rows.size > 1 else ""
            raise DataError(
                f"{dataset.sample_name(int(rows[0]))} has {what}{others}, and a tower trains on pairs of one picture "
                f"and a text: leave such rows out, and make {prefix} again"
            )


def _use_codes(config: RunConfig, dataset: AnyDataset) -> None:
    """Open the codes of a dataset's images, and refuse those that the model cannot read.

    Which tower they are of is checked when torch is there (`check_code_tower`).

    Raises:
        DataError: codes are missing, truncated, not of this dataset, or of another grid, depth or codebook.
    """
    sizes = find_family(config.family).code_sizes(config)
    assert sizes is not None, f"the family {config.family} reads codes"
    codes = open_codes(dataset) if dataset.info.num_images else None
    if codes is not None:
        codes.check_tower(**sizes._asdict())
        codes.check_first_codes(_CHECKED_CODE_BYTES)
    dataset.use_codes(codes, sizes.depth)


def check_code_tower(config: RunConfig, codes: JoinedCodes | None) -> None:
    """Refuse codes of another tower than the run names. It reads the tower's weights, so one rank asks.

    Raises:
        DataError: codes of another tower.
        ConfigError: a tower that cannot be read.
    """
    family = find_family(config.family)
    sizes, tower = family.code_sizes(config), family.code_tower(config)
    if sizes is not None and tower is not None and codes is not None:
        codes.check_tower(**sizes._asdict(), tower_sha256=find_image_codes(config.family).sha256(tower))
