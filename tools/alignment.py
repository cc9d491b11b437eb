#!/usr/bin/env python
"""Draw how close the hidden states of pictures and text are, layer by layer."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config import ConfigError, RunConfig
from megatron_eve.inference.alignment_curve import AlignmentCurve, draw
from megatron_eve.inference.opening import (
    add_checkpoint_flags,
    check_checkpoint_flags,
    model_name,
    run_on_rank,
    show_any_text,
)
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import run_command
from megatron_eve.runtime.ranks import global_rank

if TYPE_CHECKING:
    from megatron_eve.data.format.joined import AnyDataset

DESCRIPTION = """\
Draw how close the hidden states of pictures and text are, layer by layer, in a checkpoint of any family.

Samples of a dataset go through the decoder. At each depth (what enters the decoder, and what leaves each layer) the
picture rows of a sample are compared with its text rows by their cosines, and samples are averaged:
  nearest_cosine  of each row with the nearest row of the other kind, averaged over the picture rows and over the text
                  rows, half each; in arXiv 2312.07533 it grows in deep layers when the decoder trains
  mean_cosine     of all pairs of a picture row and a text row
Lengths of hidden states, which grow with the depth, do not count in either.

--output FILE.json gets the numbers, and FILE.png beside it the picture. --with adds curves of other checkpoints to the
picture. Curves are comparable where their samples are the same: another model of the same tokenizer and the same
--data-path, or the same rows preprocessed for it.
"""
EXAMPLES = """\
python tools/alignment.py --model-path runs/stage2 \\
    --data-path data/captions --output curves/stage2.json
python tools/alignment.py --model-path runs/stage3 \\
    --data-path data/captions --output curves/stage3.json \\
    --with curves/stage2.json
torchrun --nproc-per-node 2 tools/alignment.py \\
    --tensor-model-parallel-size 2 --model-path runs/stage3 \\
    --data-path data/captions --output curves/stage3.json
"""


class Work(NamedTuple):
    """What is measured.

    Attributes:
        dataset: opened for the model.
        samples: those that are measured.
        family: of the model.
        iteration: of the checkpoint.
    """

    dataset: AnyDataset
    samples: list[int]
    family: str
    iteration: int


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    model = parser.add_argument_group("model", "Which model is measured, and on how many processes.")
    add_checkpoint_flags(
        model, "folder of a checkpoint: what --save of a run or an import wrote, or one iter_ folder in it"
    )
    samples = parser.add_argument_group("samples", "What goes through the model.")
    samples.add_argument(
        "--data-path",
        required=True,
        metavar="PREFIX",
        help="dataset, the --output-prefix of tools/preprocess_data.py",
    )
    samples.add_argument(
        "--samples",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="samples with pictures to measure, always the same ones of a dataset (all if it has fewer)",
    )
    files = parser.add_argument_group("files", "Where the curve goes.")
    files.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE.json",
        help="file for the numbers; the picture is beside it, with the suffix .png",
    )
    files.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE.json",
        help="--output of earlier calls, drawn into the same picture",
    )
    return parser


def check_files(flags: argparse.Namespace) -> list[AlignmentCurve]:
    """Refuse what cannot be written or read; returns the curves of `--with`.

    Raises:
        UserError: naming the flag and the remedy; OSError, a file that cannot be read.
    """
    if flags.output.suffix != ".json":
        raise ConfigError(
            f"--output {flags.output}: must end in .json; the picture gets the same name with .png"
        )
    if not flags.output.parent.is_dir():
        raise ConfigError(f"--output {flags.output}: {flags.output.parent} is no folder; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "matplotlib, which draws the picture, is not installed: pip install '.[quickstart]'"
        )
    return [AlignmentCurve.read(path) for path in flags.others]


def find_work(flags: argparse.Namespace) -> Work:
    """Open the dataset for the model, and choose samples. Imports no torch.

    Raises:
        UserError: a dataset of another model, or without a sample to measure.
    """
    from megatron_eve.checkpoint.compatibility import CheckpointError
    from megatron_eve.checkpoint.saved_state import read_common
    from megatron_eve.checkpoint.store import CheckpointStore
    from megatron_eve.checkpoint.tokenizer_record import recorded_tokenizer
    from megatron_eve.config import from_saved
    from megatron_eve.data.opening import open_one

    store = CheckpointStore(flags.model_path)
    iteration = store.latest()
    assert iteration is not None, "there is a checkpoint"
    saved = read_common(store.folder(iteration))
    if saved is None or "config" not in saved:
        raise CheckpointError(
            f"{store.folder(iteration)}: its common.pt cannot be read; copy the checkpoint again, or name another"
        )
    config, _ = from_saved(saved["config"], str(flags.model_path))
    tokenizer = recorded_tokenizer(saved)
    dataset = open_one(config, flags.data_path, tokenizer.sha256 if tokenizer else None)
    return Work(dataset, choose(dataset, config, flags), config.family, iteration)


def choose(dataset: AnyDataset, config: RunConfig, flags: argparse.Namespace) -> list[int]:
    """Samples with pictures and text that the model can take, in a fixed random order.

    Raises:
        ConfigError: there is none.
    """
    import numpy as np

    from megatron_eve.data.sampling.permutation import sample_order

    rows = dataset.samples[np.arange(len(dataset))]
    fits = rows["length"] <= config.model.max_position_embeddings
    usable = np.flatnonzero(fits & (rows["num_images"] > 0) & (rows["labels"] > 0))
    if not len(usable):
        raise ConfigError(
            f"--data-path {flags.data_path}: no sample has a picture and text and fits into the "
            f"{config.model.max_position_embeddings} tokens that the model takes; name a dataset with pictures"
        )
    order = sample_order(np.arange(min(flags.samples, len(usable))), len(usable), seed=0)
    return [int(sample) for sample in usable[order]]


def measure(flags: argparse.Namespace, work: Work, others: Sequence[AlignmentCurve]) -> int:
    """Open the model, measure, write and draw; returns the exit status."""
    from tqdm import tqdm

    from megatron_eve.inference.alignment import layer_cosines
    from megatron_eve.inference.checkpoint_model import checkpoint_config, checkpoint_model, warn

    config = checkpoint_config(flags)
    with (
        checkpoint_model(flags, config) as model,
        tqdm(total=len(work.samples), desc="samples", disable=global_rank() > 0) as bar,
    ):

        def done(damaged: str | None) -> None:
            warn(damaged and f"{damaged}; a grey one takes its place")
            bar.update()

        found = layer_cosines(model, config, work.dataset, work.samples, done)
    if global_rank():
        return 0
    curve = AlignmentCurve.of(
        found,
        name=model_name(flags.model_path),
        model=str(flags.model_path.resolve()),
        family=work.family,
        iteration=work.iteration,
        data=str(flags.data_path),
        samples=len(work.samples),
    )
    curve.write(flags.output)
    draw([*others, curve], flags.output.with_suffix(".png"))
    print("depth  nearest_cosine  mean_cosine")
    for depth, some in found.items():
        print(f"{depth:5d}  {some.nearest:14.4f}  {some.mean:11.4f}")
    print(f"{len(work.samples)} samples -> {flags.output}, {flags.output.with_suffix('.png').name} beside it")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check flags, dataset and files, measure; returns the exit status."""
    flags = build_parser().parse_args(argv)
    show_any_text()
    return run_command(lambda: align(flags))


def align(flags: argparse.Namespace) -> int:
    """Refuse what cannot be measured before torch is loaded, then measure; returns the exit status.

    Raises:
        UserError: what is wrong; OSError, what cannot be read or written.
    """
    others = check_files(flags)
    check_checkpoint_flags(flags)
    work = find_work(flags)
    return run_on_rank(lambda: measure(flags, work, others))


if __name__ == "__main__":
    sys.exit(main())
