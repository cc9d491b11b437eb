#!/usr/bin/env python
"""Talk with a model about a picture, in the terminal or in a web page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_eve.config import ConfigError
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.inference.chat import CHAT_TEMPLATE, Asked, Limits, Refused
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.opening import (
    add_model_flags,
    check_model_flags,
    global_rank,
    run_with_engine,
    show_any_text,
)
from megatron_eve.runtime.errors import run_command

if TYPE_CHECKING:
    from megatron_eve.inference.web import ChatPage

DESCRIPTION = """\
Talk with a model about a picture, in the terminal or in a web page.

In the terminal, each line of stdin is a question, and the answer streams to stdout; a question is asked with those
before it in mind. With --web, a page on this machine's loopback address does the same: drop a picture there, and ask.
The model is one after stage 3 (template vicuna_v1). After stages 1 and 2 a model only captions, which
tools/generate.py --conv-mode plain does.

The exit status is 0 if every question was answered, and 1 if one was refused, which stderr explains.
"""
EPILOG = """\
examples:
  python tools/chat.py --model-path runs/stage3 --tokenizer-model vicuna-7b/tokenizer.model --image photo.jpg
  echo "What is it?" | python tools/chat.py --model-path runs/stage3 \\
      --tokenizer-model vicuna-7b/tokenizer.model --image photo.jpg
  python tools/chat.py --model-path runs/stage3 --tokenizer-model vicuna-7b/tokenizer.model --web
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    add_model_flags(parser)
    talk = parser.add_argument_group("the conversation")
    where = talk.add_mutually_exclusive_group()
    where.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="picture to talk about in the terminal; repeat it for several",
    )
    where.add_argument("--web", action="store_true", help="serve a page instead, to this machine alone")
    talk.add_argument(
        "--port",
        type=int,
        default=7860,
        metavar="N",
        help="of the page that --web serves; 0 takes a free one (default: %(default)s)",
    )
    talk.add_argument(
        "--max-new-tokens",
        type=int,
        default=Limits.new_tokens,
        metavar="N",
        help="tokens of one answer at most (default: %(default)s)",
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


def in_terminal(engine: Engine, pictures: tuple[bytes, ...], limits: Limits) -> int:
    """Answer the lines of stdin; returns 1 if one of them could not be answered."""
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
            asked = Asked(line.strip(), tuple(earlier), pictures)
            pieces = []
            for piece in engine.stream(asked.query(engine, limits), limits.new_tokens):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except Refused as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = 1
            continue
        print(flush=True)
        earlier.append((asked.question, "".join(pieces)))


def in_page(engine: Engine, page: ChatPage) -> int:
    """Serve the page until Ctrl-C."""
    print(f"{page.name} at {page.url} (Ctrl-C ends it)", flush=True)
    try:
        page.serve_questions(engine)
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check the flags, open the model, talk; returns the exit status."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    show_any_text()
    if flags.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {flags.max_new_tokens}: at least 1")
    limits = Limits(new_tokens=flags.max_new_tokens)
    return run_command(lambda: talk(flags, limits))


def talk(flags: argparse.Namespace, limits: Limits) -> int:
    """Check pictures and folders, open the model, talk; returns the exit status.

    Raises:
        UserError: what cannot be talked about or with; OSError, what cannot be read.
    """
    check_model_flags(flags)
    pictures = read_pictures(flags.image, limits, apply_exif=not flags.ignore_exif_orientation)
    if global_rank():
        return run_with_engine(flags, CHAT_TEMPLATE, work=None)
    if not flags.web:
        return run_with_engine(flags, CHAT_TEMPLATE, lambda engine: in_terminal(engine, pictures, limits))
    try:
        from megatron_eve.inference.web import ChatPage
    except ModuleNotFoundError as error:
        raise ConfigError(f"--web: {error.name} is not installed; pip install 'megatron_eve[chat]'") from None
    with ChatPage(limits, flags.model_path.resolve().name, flags.port) as page:
        return run_with_engine(flags, CHAT_TEMPLATE, lambda engine: in_page(engine, page))


if __name__ == "__main__":
    sys.exit(main())
