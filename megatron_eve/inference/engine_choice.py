"""Which engine answers an evaluation: a model of this project, a baseline that transformers loads, or a server.

The flags are those of the other commands that answer (`inference/opening.py`), and two for a server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_eve.config import ConfigError
from megatron_eve.inference.checkpoint_model import say
from megatron_eve.inference.code_tower import ModelTower
from megatron_eve.inference.conv_mode import check_conv_mode
from megatron_eve.inference.engine import OWN_TEMPLATE, Engine
from megatron_eve.inference.opening import (
    add_model_flags,
    chat_template,
    check_model_flags,
    is_exported,
    run_on_rank,
    run_with_engine,
)
from megatron_eve.inference.origin import model_fingerprint
from megatron_eve.models.registry import loaded_families
from megatron_eve.runtime.ranks import world_size


def add_engine_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags of `add_model_flags`, and those that name a server instead; returns their group."""
    group = add_model_flags(
        parser,
        required=False,
        also=", or another model's that transformers loads with its processor, such as LLaVA-1.5 or Fuyu",
    )
    group.add_argument(
        "--base-url",
        metavar="URL",
        help="in place of --model-path: address of a running server with OpenAI's interface, such as vLLM or SGLang: "
        "http://HOST:8000/v1; a key, if it wants one, is taken from the environment variable OPENAI_API_KEY",
    )
    group.add_argument(
        "--model", metavar="NAME", help="with --base-url: the name that the server gives its model"
    )
    return group


def check_engine_flags(flags: argparse.Namespace, conv_mode: str | None = None) -> str:
    """Refuse what can be refused before torch is imported; returns the template of the prompts, or OWN_TEMPLATE.

    Args:
        flags: of `add_engine_flags`; filled in as `check_model_flags` does.
        conv_mode: the template that the user asks for, if any; models with one of their own take none.

    Raises:
        ConfigError, CheckpointError: naming the flag and the remedy.
    """
    if (flags.model_path is None) == (flags.base_url is None):
        raise ConfigError("name one model: --model-path DIR, or --base-url URL with --model NAME")
    if flags.base_url is None and flags.model is not None:
        raise ConfigError("--model: is the name of a server's model and goes with --base-url; leave it out")
    if flags.base_url is not None and flags.model is None:
        raise ConfigError("--base-url: name the model, as the server calls it, with --model")
    if not has_own_template(flags, conv_mode):
        check_model_flags(flags)
        found = conv_mode or chat_template(flags.model_path)
        check_conv_mode(flags, found)
        return found
    what = "a server" if flags.base_url is not None else "a model with a chat template of its own"
    sizes = flags.tensor_model_parallel_size * flags.pipeline_model_parallel_size
    if max(sizes, world_size()) > 1:
        raise ConfigError(f"{what} is asked by one process; leave torchrun and the parallel sizes out")
    for flag, value in (
        ("--conv-mode", conv_mode),
        ("--tokenizer-model", flags.tokenizer_model),
        ("--ckpt-step", flags.ckpt_step),
    ):
        if value is not None:
            raise ConfigError(f"{flag}: {what} has its own; leave this out")
    if flags.base_url is not None:
        from megatron_eve.inference.http_client import check_base_url

        flags.base_url = check_base_url(flags.base_url)
    return OWN_TEMPLATE


def has_own_template(flags: argparse.Namespace, conv_mode: str | None = None) -> bool:
    """Is it a server, or a folder of transformers that is asked with a chat template of its own?

    A folder is if it holds a model of none of the families here, or one of transformers' own LLaVA with another chat
    template than an export writes, unless a template is asked for.
    """
    if flags.base_url is not None:
        return True
    if flags.model_path is None or not is_exported(flags.model_path):
        return False
    kind = _json(flags.model_path / "config.json").get("model_type")
    ours = {name for family in loaded_families() for name in family.hugging_face().model_types}
    if kind is None:
        return False
    if kind not in ours:
        return True
    return conv_mode is None and kind == "llava" and _has_foreign_template(flags.model_path)


def engine_fingerprint(flags: argparse.Namespace) -> tuple[str, int | None, str]:
    """What answers, for the origin of its answers: its name, its iteration (None but of a checkpoint) and a digest of
    its weights; of a server, whose weights cannot be read, a digest of the model's name, and of the folder that it says
    it serves (vLLM does). The address is not in it: a server that is started again may have another.

    Raises:
        ConfigError: a file is missing or cannot be read.
        ServerError: the server cannot be reached, or serves no such model.
    """
    if flags.base_url is not None:
        from megatron_eve.inference.http_client import HTTPClient, listed_model

        folder = listed_model(HTTPClient(flags.base_url), flags.model).get("root")
        served = f"{flags.model} of {folder}" if isinstance(folder, str) else flags.model
        digest = hashlib.sha256(f"model of a server: {served}".encode()).hexdigest()
        return f"{flags.base_url}, model {flags.model}", None, digest
    return str(flags.model_path), *model_fingerprint(flags.model_path)


def open_engine_and_work(
    flags: argparse.Namespace,
    conv_mode: str,
    work: Callable[[Engine], int] | None,
    tower: ModelTower | None = None,
) -> int:
    """`run_with_engine` for the flags of `add_engine_flags`; `conv_mode` is what `check_engine_flags` returned.

    Returns:
        The exit status.
    """
    if conv_mode != OWN_TEMPLATE:
        return run_with_engine(flags, conv_mode, work, tower)
    return run_on_rank(lambda: _with_own_template(flags, work))


def _with_own_template(flags: argparse.Namespace, work: Callable[[Engine], int] | None) -> int:
    assert work is not None, "there is one process"
    apply_exif = not flags.ignore_exif_orientation
    if flags.base_url is not None:
        from megatron_eve.inference.http_engine import HTTPEngine

        say(f"model: {flags.model} of the server at {flags.base_url}")
        return work(HTTPEngine(flags.base_url, flags.model, apply_exif))
    from megatron_eve.inference.transformers_engine import TransformersEngine

    say(f"weights: {flags.model_path}, asked with its own chat template")
    return work(TransformersEngine(flags.model_path, apply_exif))


def _has_foreign_template(folder: Path) -> bool:
    from megatron_eve.convert.transformers_folder import is_our_chat_template

    path = folder / "chat_template.jinja"
    if path.is_file():
        text: Any = path.read_text(encoding="utf-8", errors="replace")
    else:
        text = next(
            (
                found
                for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json")
                if (found := _json(folder / name).get("chat_template"))
            ),
            None,
        )
    return text is not None and not (isinstance(text, str) and is_our_chat_template(text))


def _json(path: Path) -> dict[str, Any]:
    """A file's settings; none of one that is missing or damaged, which the opening of the model says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
