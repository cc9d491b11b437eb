"""What is wrong with a run, found before torch is loaded: `python -m megatron_eve.preflight --ranks N FLAGS...`.

The flags are those of `megatron_eve.pretrain` or `megatron_eve.train_tower`, which make the same checks on every rank
before their first seconds are spent. The command prints one `error:` line for a mistake, with the remedy, and exits
with status 2; it prints nothing and exits with 0 where nothing is wrong. Ranks that share the memory of a machine are
as many as LOCAL_WORLD_SIZE says, as for a rank under torchrun, or all of them.

A check is a generator over the configuration that yields a sentence for each mistake; `@check("name")` makes it one of
`CHECKS`, where a model family may add its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_eve import __version__
from megatron_eve.config import TRACKER, ConfigError, RunConfig, parse, parse_blend, validate
from megatron_eve.config.describe import preset_of
from megatron_eve.config.memory import in_units, memory_error, rank_memory
from megatron_eve.models.registry import find_family, tower_family
from megatron_eve.runtime.command_line import CommandParser
from megatron_eve.runtime.errors import UserError, run_command

_PROG = "python -m megatron_eve.preflight"
_DESCRIPTION = """\
Check a training run without starting it: flags, recipes, data, checkpoint folders and memory, in a second and without
torch. megatron_eve.pretrain and megatron_eve.train_tower check the same when they start.

Nothing is printed if nothing is wrong. The exit status is 0 then, and 2 after an error: line for each mistake.

All other flags are those of the run: python -m megatron_eve.pretrain --help, or, with the preset of a tower,
python -m megatron_eve.train_tower --help
"""
_EXAMPLES = """\
python -m megatron_eve.preflight --ranks 2 --mock-data --train-iters 5 \\
    --tensor-model-parallel-size 2
"""

Check = Callable[[RunConfig], Iterator[str]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Make a generator one of the checks, under a name; it may import nothing that imports torch."""

    def add(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return add


def check_run(config: RunConfig, ranks: int) -> None:
    """Refuse a run that cannot go well.

    Args:
        config: of the run.
        ranks: that are started, on all nodes.

    Raises:
        UserError: all mistakes at once, a line each.
    """
    validate(config, ranks)
    errors: list[str] = []
    for one in CHECKS.values():
        try:
            errors += one(config)
        except (UserError, OSError) as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))


def describe_start(config: RunConfig, ranks: int) -> str:
    """What is going to run, in a line: model, stage, ranks, data and length; and a line for each warning."""
    model = preset_of(config) or "a model of its own sizes"
    data = "mock data" if config.data.mock_data else " ".join(config.data.data_path)
    return "\n".join(
        [
            f"megatron_eve {__version__}: {model}, stage {config.training.stage}, on {ranks} "
            f"{'ranks' if ranks > 1 else 'rank'}; data: {data}; {config.total_iterations:,} iterations of "
            f"{config.training.global_batch_size} samples",
            *(f"warning: {warning}" for warning in _warnings(config)),
        ]
    )


def _warnings(config: RunConfig) -> Iterator[str]:
    """What can run, and is seldom meant."""
    from megatron_eve.data.format.manifest import read_info
    from megatron_eve.data.text.templates import without_conversation

    stage = config.training.stage
    wanted = find_family(config.family).stages[stage].template
    if not without_conversation(wanted):
        for prefix in parse_blend(config.data.data_path).prefixes:
            template = read_info(prefix).template
            if samples := without_conversation(template):
                yield (
                    f"{prefix} was made with --template {template}, whose samples are {samples} "
                    f"without a question; stage {stage} trains on conversations (tools/preprocess_data.py --template "
                    f"{wanted})"
                )


def check_memory(config: RunConfig, ranks: int, *, started_here: bool = True) -> str:
    """What a rank is expected to need, and what it has.

    Args:
        config: of the run, checked.
        ranks: that are started, on all nodes.
        started_here: some of them on this machine; else what it has counts only where it tells of theirs.

    Raises:
        ConfigError: it cannot fit.
    """
    from megatron_eve.runtime.machine import memory_of_a_rank

    needed = rank_memory(config, ranks)
    capacity = memory_of_a_rank(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)), started_here=started_here)
    if capacity is None:
        return str(needed)
    available, what = capacity
    error = memory_error(needed, available, what, tower_family(config.family) is None)
    if error:
        raise ConfigError(error)
    return f"{needed}; a rank has {in_units(available * 2**30)} ({what})"


@check("folders that are written")
def _folders(config: RunConfig) -> Iterator[str]:
    for flag, folder in (
        ("--save", config.checkpoint.save),
        ("--tensorboard-dir", config.logging.tensorboard_dir),
        ("--data-cache-path", config.data.data_cache_path),
    ):
        if folder is None:
            continue
        path = Path(folder).absolute()
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if not there.is_dir():
            yield f"{flag} {folder}: {there} is a file; name a folder"
        elif not os.access(there, os.W_OK | os.X_OK):
            yield f"{flag} {folder}: nothing may be written to {there}; name a folder of yours"


@check("folder of another run")
def _in_use(config: RunConfig) -> Iterator[str]:
    from megatron_eve.checkpoint.save_lock import in_use

    message = in_use(config.checkpoint.save) if config.checkpoint.save else None
    if message:
        yield message


@check("datasets and tokenizer")
def _datasets(config: RunConfig) -> Iterator[str]:
    from megatron_eve.data.opening import open_datasets
    from megatron_eve.data.text.load_tokenizer import load_tokenizer

    if config.data.mock_data:
        if config.data.tokenizer_model:
            load_tokenizer(config.data.tokenizer_model, legacy=True)
        return
    open_datasets(config).joined()
    yield from ()


@check("checkpoint to resume from")
def _resume(config: RunConfig) -> Iterator[str]:
    from megatron_eve.checkpoint.compatibility import check_resume
    from megatron_eve.checkpoint.saved_state import read_common
    from megatron_eve.checkpoint.store import CheckpointStore, path_to_resume

    load = config.checkpoint.load
    if load is None:
        return
    if Path(load).exists() and not Path(load).is_dir():
        yield f"--load {load}: is a file; name the folder that --save of a run wrote"
        return
    path = path_to_resume(config.checkpoint)
    assert path is not None
    store = CheckpointStore(path)
    candidates = store.candidates()
    saved = read_common(store.folder(candidates[0])) if candidates else None
    if saved is None or not {"config", "dataset"} <= set(saved):
        return
    fingerprint = None
    if not config.data.mock_data:
        from megatron_eve.data.opening import open_datasets

        try:
            fingerprint = open_datasets(config).fingerprint
        except UserError:  # which the datasets' own check says
            return
    check_resume(store.folder(candidates[0]), saved, config, fingerprint, None)


@check("weights to start from")
def _pretrained(config: RunConfig) -> Iterator[str]:
    from megatron_eve.checkpoint.compatibility import check_weights
    from megatron_eve.checkpoint.saved_state import read_common
    from megatron_eve.checkpoint.store import CheckpointStore, path_of_pretrained

    name, folder = config.checkpoint.pretrained_checkpoint, path_of_pretrained(config.checkpoint)
    if folder is None:
        return
    flag = f"--pretrained-checkpoint {name}"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        yield (
            f"{flag}: {what}; name the folder that --save of a run or an import wrote, or one in Hugging Face layout"
        )
        return
    if family := tower_family(config.family):
        yield from family.check_pretrained(config, folder)
        return
    from megatron_eve.checkpoint.hf.config import check_config, refuse_adapter

    refuse_adapter(folder, flag)
    store = CheckpointStore(folder)
    if (folder / "config.json").exists():
        check_config(folder, config)
    elif (iteration := store.latest()) is None:
        yield (
            f"{flag}: neither a checkpoint (no {TRACKER} there) nor a folder in Hugging Face layout (no config.json); "
            "name the folder that --save of a run or an import wrote"
        )
        return
    elif "config" in (saved := read_common(store.folder(iteration)) or {}):
        check_weights(store.folder(iteration), saved, config)
    _check_pretrained_tokenizer(config, folder)


def _check_pretrained_tokenizer(config: RunConfig, folder: Path) -> None:
    """Are the run's token ids those of the weights that it starts from?"""
    from megatron_eve.checkpoint.tokenizer_record import check_pretrained_tokenizer, recorded_tokenizer
    from megatron_eve.data.format.manifest import read_info

    if config.data.mock_data:
        return
    try:
        info = read_info(parse_blend(config.data.data_path).prefixes[0])
    except UserError:  # which the datasets' own check says
        return
    kinds = {"tokenizer_sha256": info.tokenizer_sha256, "tokenizer_kind": info.tokenizer_kind}
    data = recorded_tokenizer({"dataset": kinds})
    if data is not None:
        check_pretrained_tokenizer(folder, data)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the flags of a run; returns the exit status."""

    def work() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help"} & set(words):
            _help_page().print_help()
            return 0
        ranks, flags = _split_ranks(words)
        config = parse(flags)
        check_run(config, ranks)
        check_memory(config, ranks, started_here=False)
        return 0

    return run_command(work)


def _help_page() -> CommandParser:
    """The page of this command, whose other flags are on another command's."""
    parser = CommandParser(
        prog=_PROG,
        usage=f"{_PROG} [--ranks N] [flags of megatron_eve.pretrain]",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--ranks", metavar="N", default=1, help="ranks that will be started, on all nodes together"
    )
    return parser


def _split_ranks(words: list[str]) -> tuple[int, list[str]]:
    """The number behind --ranks (1 without it), and the words without both."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--ranks":
            taken = 1 if equals else 2
            text = value if equals else "".join(words[place + 1 : place + 2])
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError(f"--ranks {text}: the number of ranks that will be started, at least 1")
            return int(text), words[:place] + words[place + taken :]
    return 1, words


if __name__ == "__main__":
    sys.exit(main())
