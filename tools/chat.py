#!/usr/bin/env python
"""Talk with a model about a picture, in the terminal or in a web page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.config import ConfigError
from megatron_eve.inference.chat import Asked, Limits, Refused
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.opening import add_model_flags, check_model_flags, global_rank, run_with_engine

if TYPE_CHECKING:
    from megatron_eve.inference.web import ChatPage

DESCRIPTION = """\
Talk with a model about a picture, in the terminal or in a web page.

In the terminal, each line of stdin is a question, and the answer streams to stdout; a question is asked with those
before it in mind. With --web, a page on this machine's loopback address does the same: drop a picture there, and ask.
The model is one after stage 3 (template vicuna_v1); tools/generate.py --conv-mode plain captions after stages 1 and 2.
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
        help="of the page; 0 takes a free one (default: %(default)s)",
    )
    talk.add_argument(
        "--max-new-tokens",
        type=int,
        default=Limits.new_tokens,
        metavar="N",
        help="of one answer (default: %(default)s)",
    )
    return parser


def in_terminal(engine: Engine, images: Sequence[Path], limits: Limits) -> int:
    """Answer the lines of stdin; returns 1 if one of them could not be answered."""
    pictures = tuple(path.read_bytes() for path in images)
    earlier: list[tuple[str, str]] = []
    status, asking = 0, sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return status
        if not line.strip():
            continue
        asked = Asked(line.strip(), tuple(earlier), pictures)
        pieces = []
        try:
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
    if flags.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {flags.max_new_tokens}: at least 1")
    limits = Limits(new_tokens=flags.max_new_tokens)
    try:
        check_model_flags(flags)
        for path in flags.image:
            if not path.is_file():
                raise ConfigError(f"--image {path}: no such file")
        if global_rank():
            return run_with_engine(flags, "vicuna_v1", work=None)
        if not flags.web:
            return run_with_engine(
                flags, "vicuna_v1", lambda engine: in_terminal(engine, flags.image, limits)
            )
        try:
            from megatron_eve.inference.web import ChatPage
        except ModuleNotFoundError as error:
            raise ConfigError(f"--web: {error.name} is not installed; pip install '.[chat]'") from None
        with ChatPage(limits, flags.model_path.resolve().name, flags.port) as page:
            return run_with_engine(flags, "vicuna_v1", lambda engine: in_page(engine, page))
    except (ConfigError, OSError) as error:
        if global_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
