#!/usr/bin/env python
"""Talk with a model about a picture, in the terminal or in a web page."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from PIL import Image

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config import ConfigError
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.tokenizing.flags import tower_family
from megatron_eve.inference.chat import Asked, AskedDrawing, Limits, Refused, check_port
from megatron_eve.inference.code_tower import add_tower_flags, model_tower
from megatron_eve.inference.conv_mode import check_conv_mode
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.opening import (
    add_conv_mode_flag,
    add_model_flags,
    chat_template,
    check_model_flags,
    family_title,
    model_name,
    run_with_engine,
    show_any_text,
)
from megatron_eve.inference.sampling import (
    DRAWING,
    GREEDY,
    Sampling,
    add_guidance_flag,
    add_sampling_flags,
    guidance_problem,
    sampling_of,
)
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import run_command
from megatron_eve.runtime.ranks import global_rank

if TYPE_CHECKING:
    from megatron_eve.inference.web import ChatPage

DESCRIPTION = """\
Talk with a model about a picture, in the terminal or in a web page.

In the terminal, each line of stdin is a question, and the answer streams to stdout; a question is asked with those
before it in mind. With --web, a page on this machine's loopback address does the same: drop a picture there, and ask.
A model that draws does so of a line "/draw TEXT", as a PNG file, and on the page by its button "Draw".
The model is one that was trained on conversations, as the last stage of its family does. After earlier stages a model
only captions, which tools/generate.py --conv-mode plain does.

The exit status is 0 if every question was answered, and 1 if one was refused, which stderr explains.
"""
EXAMPLES = """\
python tools/chat.py --model-path runs/stage3 \\
    --tokenizer-model vicuna-7b/tokenizer.model --image photo.jpg
echo "What is it?" | python tools/chat.py --model-path runs/stage3 \\
    --tokenizer-model vicuna-7b/tokenizer.model --image photo.jpg
python tools/chat.py --model-path runs/stage3 \\
    --tokenizer-model vicuna-7b/tokenizer.model --web
"""


DRAW = "/draw"
"""Begins a line of the terminal that asks for a picture."""


def build_parser(family: str | None) -> argparse.ArgumentParser:
    """The flags, with those that the towers of a family need."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    add_tower_flags(add_model_flags(parser), family)
    talk = parser.add_argument_group("conversation", "What is talked about, and where.")
    where = talk.add_mutually_exclusive_group()
    where.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="image to talk about in the terminal; repeat the flag for several (default: no image)",
    )
    where.add_argument(
        "--web",
        action="store_true",
        help="serve a web page to this machine (127.0.0.1) instead of reading the terminal",
    )
    talk.add_argument(
        "--port",
        type=whole_number(0),
        default=7860,
        metavar="PORT",
        help="TCP port of the page that --web serves; 0 takes a free one",
    )
    add_conv_mode_flag(talk)
    talk.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=Limits.new_tokens,
        metavar="N",
        help="longest answer, in tokens",
    )
    add_sampling_flags(talk)
    drawing = parser.add_argument_group("drawing", "Of a model that draws pictures.")
    add_guidance_flag(drawing)
    drawing.add_argument(
        "--output-dir",
        type=Path,
        default=Path("drawn"),
        metavar="DIR",
        help="folder for the pictures of /draw in the terminal (default: %(default)s)",
    )
    return parser


def read_pictures(paths: Sequence[Path], limits: Limits, apply_exif: bool) -> tuple[bytes, ...]:
    """The picture files, each of which can be decoded.

    Raises:
        ConfigError: one that is not there, cannot be read, or is no picture; names it.
    """
    pictures = []
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"--image {path}: {'not a file' if path.exists() else 'no such file'}")
        try:
            data = path.read_bytes()
            decode_image(data, apply_exif=apply_exif, max_pixels=DEFAULT_MAX_PIXELS)
            Asked("?", (), (data,)).check(limits)
        except (OSError, SkipRow, Refused) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"--image {path}: {reason}; give another picture") from None
        pictures.append(data)
    return tuple(pictures)


def read_question(stream: TextIO) -> str | None:
    """The next line; None at the end.

    Raises:
        Refused: its bytes are no text in the stream's encoding.
    """
    if not hasattr(stream, "buffer"):
        return stream.readline() or None
    line = stream.buffer.readline()
    if not line:
        return None
    try:
        return str(line.decode(stream.encoding)).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise Refused(f"this line is not {stream.encoding} text; ask it again in that encoding") from None


class TerminalDrawing:
    """Draws what lines of the terminal ask for.

    Args:
        folder: for the pictures; made when there is one.
        guidance: how far a text counts.
        seed: of the first picture; each one after it has the next.
    """

    def __init__(self, folder: Path, guidance: float, seed: int) -> None:
        self._folder, self._guidance, self._seeds = folder, guidance, itertools.count(seed)

    def draw(self, text: str, engine: Engine, limits: Limits) -> str:
        """Draw a picture of a text into a new file; returns a line that says where.

        Raises:
            Refused: a text that is not drawn, or a folder that cannot be written.
        """
        sampling = replace(DRAWING, seed=next(self._seeds))
        asked = AskedDrawing(text, guidance=self._guidance)
        asked.check(limits)
        try:
            path = self._new_file()
        except OSError as error:
            raise Refused(f"--output-dir {self._folder}: {error.strerror}; name another folder") from None
        try:
            *_, last = asked.pieces(engine, limits, sampling)
            assert last.pictures is not None, "the last step has the pictures"
            Image.fromarray(last.pictures[0]).save(path, "PNG")
        except BaseException as error:  # Ctrl-C, too, leaves no empty file
            path.unlink()
            if isinstance(error, OSError):
                raise Refused(f"{path}: {error.strerror}; make room, or name another --output-dir") from None
            raise
        return f"{path} (seed {sampling.seed})"

    def _new_file(self) -> Path:
        """An empty file with the next free number, before time is spent on its picture."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = self._folder / f"picture_{number:05d}.png"
            with suppress(FileExistsError), path.open("xb"):
                break
        return path


def in_terminal(
    engine: Engine,
    pictures: tuple[bytes, ...],
    limits: Limits,
    sampling: Sampling = GREEDY,
    drawing: TerminalDrawing | None = None,
) -> int:
    """Answer the lines of stdin, and draw where they ask for it; returns 1 if one of them could not be answered."""
    earlier: list[tuple[str, str]] = []
    status, asking = 0, sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", flush=True)
        try:
            line = read_question(sys.stdin)
            if line is None:
                return status
            if not line.strip():
                continue
            if line.split()[0] == DRAW:
                if drawing is None:
                    raise Refused("This model draws no pictures here; a checkpoint of one that draws does.")
                print(drawing.draw(line.strip().removeprefix(DRAW).strip(), engine, limits), flush=True)
                continue
            asked = Asked(line.strip(), tuple(earlier), pictures)
            pieces = []
            for piece in engine.stream(asked.query(engine, limits), sampling):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except Refused as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = 1
            continue
        print(flush=True)
        earlier.append((asked.question, "".join(pieces)))


def in_page(engine: Engine, page: ChatPage, began: float) -> int:
    """Serve the page until Ctrl-C; the loading began at a time of the monotonic clock."""
    seconds = time.monotonic() - began
    print(f"ready in {seconds:.0f} s: {page.name} at {page.url} (Ctrl-C ends it)", flush=True)
    try:
        page.serve_questions(engine)
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check the flags, open the model, talk; returns the exit status."""

    def work() -> int:
        flags = build_parser(tower_family(argv)).parse_args(argv)
        show_any_text()
        return talk(flags, Limits(new_tokens=flags.max_new_tokens))

    return run_command(work)


def talk(flags: argparse.Namespace, limits: Limits) -> int:
    """Check pictures and folders, open the model, talk; returns the exit status.

    Raises:
        UserError: what cannot be talked about or with; OSError, what cannot be read.
    """
    if problem := guidance_problem(flags.cfg):
        raise ConfigError(problem)
    check_model_flags(flags)
    pictures = read_pictures(flags.image, limits, apply_exif=not flags.ignore_exif_orientation)
    template = flags.conv_mode or chat_template(flags.model_path)
    check_conv_mode(flags, template)
    tower = model_tower(flags, needed=True)  # a model that has one draws
    sampling = sampling_of(flags, draws=tower is not None)
    if global_rank():
        return run_with_engine(flags, template, work=None)
    if not flags.web:
        drawing = TerminalDrawing(flags.output_dir, flags.cfg, flags.seed) if tower else None
        return run_with_engine(
            flags, template, lambda engine: in_terminal(engine, pictures, limits, sampling, drawing), tower
        )
    check_port(flags.port)
    began, name = time.monotonic(), model_name(flags.model_path)
    print(f"loading {name} ...", flush=True)
    try:
        from megatron_eve.inference.web import ChatPage
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--web: {error.name} is not installed: make install-dev, or pip install '.[chat]'"
        ) from None
    guidance = flags.cfg if tower else None
    with ChatPage(limits, name, flags.port, family_title(flags.model_path), sampling, guidance) as page:
        return run_with_engine(flags, template, lambda engine: in_page(engine, page, began), tower)


if __name__ == "__main__":
    sys.exit(main())
