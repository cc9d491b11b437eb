#!/usr/bin/env python
"""Draw pictures or videos from texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config import ConfigError, RunConfig
from megatron_eve.config.early_flags import flag_value
from megatron_eve.data.tokenizing.flags import tower_family
from megatron_eve.inference.checkpoint_model import read_saved
from megatron_eve.inference.code_tower import ModelTower, add_tower_flags, drawn_sizes, find_tower
from megatron_eve.inference.conv_mode import check_conv_mode
from megatron_eve.inference.drawn_pictures import VIDEO_FRAMES, DrawnPictures, Place
from megatron_eve.inference.opening import (
    add_checkpoint_flags,
    add_conv_mode_flag,
    chat_template,
    check_model_flags,
    is_exported,
    run_on_rank,
    show_any_text,
)
from megatron_eve.inference.origin import model_fingerprint
from megatron_eve.inference.sampling import (
    DRAWING,
    Sampling,
    add_guidance_flag,
    add_sampling_flags,
    guidance_problem,
)
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.digests import file_digest
from megatron_eve.runtime.errors import run_command
from megatron_eve.runtime.ranks import global_rank

if TYPE_CHECKING:
    from megatron_eve.inference.drawing import Drawing

DESCRIPTION = """\
Draw pictures or videos from texts, with a checkpoint of a model that draws.

--output-dir gets, of each picture,
  00012_00.png  the picture (of prompt 12, the first one); of a video 00012_00_0.png and so on, a file a frame
  00012_00.npy  its codes, [h, w, D]; of a video [8, h, w, D]
and sheet.png of the first ones, and drawing.json, which says what they were drawn with.

Codes are drawn by guidance: with --cfg S the logits are u + S (c - u), where c are those after the prompt and u those
after a prompt that asks for nothing. 1 is without guidance. A picture depends on the seed, its prompt, its number, and
these settings, not on the layout or --batch-size.

The same command again goes on with what is missing: after a stop the folder holds whole pictures only. Prompts may be
added at the end, and --num-images may be another; other settings are refused.
"""
EXAMPLES = """\
python tools/draw.py --model-path runs/unified --prompt "A red car" \\
    --cfg 3 --num-images 4 --output-dir drawn
torchrun --nproc-per-node 2 tools/draw.py --tensor-model-parallel-size 2 \\
    --model-path runs/unified --prompt-file prompts.txt --video \\
    --output-dir drawn
"""


SAMPLED = ("--top-k", "--top-p", "--seed")
"""Flags that say how codes are drawn at random."""


class Plan(NamedTuple):
    """What a command draws.

    Attributes:
        config: of the checkpoint's run.
        tower: makes pictures of the codes.
        sampling: how codes are chosen.
        prompts: texts.
        tokens: ids of each prompt.
        unconditional: ids of the prompt that asks for nothing.
        frames: pictures of each drawing.
    """

    config: RunConfig
    tower: ModelTower
    sampling: Sampling
    prompts: list[str]
    tokens: list[list[int]]
    unconditional: list[int]
    frames: int

    def drawing(self, place: Place) -> Drawing:
        """What is drawn there. It loads torch."""
        from megatron_eve.inference.drawing import Drawing, drawing_key

        key = drawing_key(self.sampling, self.prompts[place.prompt], place.number)
        return Drawing(self.tokens[place.prompt], self.unconditional, key)


def build_parser(family: str | None) -> argparse.ArgumentParser:
    """The flags, with those that the towers of a family need."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    model = parser.add_argument_group("model", "Which model draws, and on how many processes.")
    add_checkpoint_flags(
        model, "folder of a checkpoint: what --save of a run or an import wrote, or one iter_ folder in it"
    )
    model.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="FILE",
        help="tokenizer.model or tokenizer.json that the checkpoint was trained with (default: the one whose path the "
        "checkpoint holds, if it is still there and the same)",
    )
    add_conv_mode_flag(model)
    add_tower_flags(model, family)
    texts = parser.add_argument_group("prompts", "What is drawn, and where it goes.")
    given = texts.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to draw; several are drawn each")
    given.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="texts, one a line; empty lines are left out"
    )
    texts.add_argument(
        "--num-images",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="pictures, or videos, of each prompt (default: %(default)s)",
    )
    texts.add_argument("--video", action="store_true", help="draw videos of 8 frames")
    texts.add_argument(
        "--output-dir", required=True, type=Path, metavar="DIR", help="folder for the pictures"
    )
    how = parser.add_argument_group("drawing", "How codes are chosen, and how many pictures at a time.")
    add_guidance_flag(how)
    add_sampling_flags(how, DRAWING, "code", "pictures")
    how.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=4,
        metavar="N",
        help="pictures drawn together; it changes the speed, not the pictures (default: %(default)s)",
    )
    return parser


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """The texts of `--prompt` or `--prompt-file`.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    if flags.prompt_file is None:
        lines, where = flags.prompt, "--prompt"
    else:
        where = f"--prompt-file {flags.prompt_file}"
        try:
            lines = flags.prompt_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}; name a file of texts, one a line") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: is not UTF-8 text; save it as such") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ConfigError(f"{where}: no text in it; say what to draw")
    return prompts


def plan(flags: argparse.Namespace, given: Container[str]) -> Plan:
    """Check everything that needs no torch.

    Args:
        flags: of the command.
        given: flags of `SAMPLED` that are on the command line.

    Raises:
        UserError: what cannot be drawn, naming the flag and the remedy.
    """
    from megatron_eve.checkpoint.tokenizer_record import tokenizer_kind
    from megatron_eve.config import from_saved
    from megatron_eve.data.text.load_tokenizer import load_kind

    if problem := guidance_problem(flags.cfg):
        raise ConfigError(problem)
    check_greedy(flags, given)
    prompts = read_prompts(flags)
    if flags.output_dir.exists() and not flags.output_dir.is_dir():
        raise ConfigError(f"--output-dir {flags.output_dir}: is a file; name a folder")
    check_model_flags(flags)
    if is_exported(flags.model_path):
        raise ConfigError(
            f"--model-path {flags.model_path}: not a checkpoint; make one of it (tools/convert_checkpoint.py import)"
        )
    saved = read_saved(flags.model_path)
    if "config" not in saved:
        raise ConfigError(f"--model-path {flags.model_path}: its common.pt cannot be read; copy it again")
    config, _ = from_saved(saved["config"], str(flags.model_path))
    sizes = drawn_sizes(config)
    top_k = flags.top_k if "--top-k" in given else min(flags.top_k, sizes.codebook_size)
    sampling = Sampling(flags.temperature, top_k, flags.top_p, flags.seed)
    if problem := sampling.problem():
        raise ConfigError(problem)
    if top_k > sizes.codebook_size:
        raise ConfigError(
            f"--top-k {top_k}: the codebook has {sizes.codebook_size} codes; 0 takes all of them"
        )
    tower = find_tower(flags, config, saved)
    flags.conv_mode = flags.conv_mode or chat_template(flags.model_path)
    check_conv_mode(flags, flags.conv_mode)
    tokenizer = load_kind(flags.tokenizer_model, tokenizer_kind(saved))
    return encoded(flags, config, tower, sampling, prompts, tokenizer)


def check_greedy(flags: argparse.Namespace, given: Container[str]) -> None:
    """Refuse flags that have no effect where the most likely codes are drawn.

    Raises:
        ConfigError: one of those in `given` that is there, or several pictures of a prompt.
    """
    if flags.temperature != 0:
        return
    for name in SAMPLED:
        if name in given:
            raise ConfigError(f"{name}: has no effect with --temperature 0; leave one of them out")
    if flags.num_images > 1:
        raise ConfigError(
            f"--num-images {flags.num_images}: all pictures of a prompt are the same with --temperature 0; leave one "
            "of them out"
        )


def encoded(
    flags: argparse.Namespace,
    config: RunConfig,
    tower: ModelTower,
    sampling: Sampling,
    prompts: list[str],
    tokenizer: Any,
) -> Plan:
    """The plan with the ids of its prompts.

    Raises:
        ConfigError: a template that draws nothing, or a prompt that the model has no room for.
    """
    from megatron_eve.data.text.prompts import drawing_prompt, encode_text
    from megatron_eve.data.text.turns import ConversationError

    def ids(text: str) -> list[int]:
        return encode_text(
            drawing_prompt(text, flags.conv_mode, video=flags.video), tokenizer, flags.conv_mode
        )

    frames, tokens = VIDEO_FRAMES if flags.video else 1, []
    height, width = tower.settings.grid
    room = config.model.max_position_embeddings - frames * height * width + 1
    if room < 1:
        needed = f"{frames} x {height} x {width} positions"
        there = f"the model has {config.model.max_position_embeddings}"
        raise ConfigError(
            f"--video: takes {needed}, and {there}; leave it out"
            if flags.video
            else f"--model-path: a picture takes {needed}, and {there}; name another model"
        )
    for number, prompt in enumerate(prompts):
        try:
            tokens.append(ids(prompt))
        except ConversationError:
            raise ConfigError(
                f"prompt {number}: holds <image>, which stands for a picture, and a text alone is drawn; take it out"
            ) from None
        except ValueError as error:
            raise ConfigError(f"--conv-mode {flags.conv_mode}: {error}; name one that does") from None
        if len(tokens[-1]) > room:
            raise ConfigError(
                f"prompt {number}: takes {len(tokens[-1])} tokens, and the model has {room} positions in front "
                f"of {frames} x {height} x {width} of {'a video' if flags.video else 'a picture'}; shorten it"
            )
    return Plan(config, tower, sampling, prompts, tokens, ids(""), frames)


def settings(flags: argparse.Namespace, drawn: Plan) -> dict[str, Any]:
    """What pictures depend on beside their prompts, by name."""
    _, sha256 = model_fingerprint(flags.model_path)
    return {
        "--model-path sha256": sha256,
        "--tokenizer-model sha256": file_digest(flags.tokenizer_model),
        "--tower sha256": drawn.tower.check_weights(),
        "--conv-mode": flags.conv_mode,
        "--video": flags.video,
        "--cfg": flags.cfg,
        **{
            f"--{name.replace('_', '-')}": value
            for name, value in (drawn.sampling.to_metadata() or {"temperature": 0.0}).items()
        },
    }


def draw_all(flags: argparse.Namespace, drawn: Plan, output: DrawnPictures | None) -> int:
    """Open the model, draw what is missing; rank 0, which has the output, writes it. Returns the exit status."""
    import torch
    from tqdm import tqdm

    from megatron_eve.inference.checkpoint_model import checkpoint_config, checkpoint_model
    from megatron_eve.inference.drawing import draw
    from megatron_eve.inference.picture_codes import PictureCodes

    config = checkpoint_config(flags)
    with checkpoint_model(flags, config) as model:
        box: list[Any] = [None]
        prompts = range(len(drawn.prompts))
        wanted = [Place(prompt, number) for prompt in prompts for number in range(flags.num_images)]
        if output is not None:
            box = [[place for place in wanted if not output.is_whole(place)]]
        torch.distributed.broadcast_object_list(box, src=0)
        missing: list[Place] = box[0]
        tower = (
            PictureCodes(drawn.tower._replace(dtype="float32")) if output is not None and missing else None
        )
        with tqdm(total=len(missing), desc="pictures", disable=output is None) as bar:
            for places in batches(missing, flags.batch_size):
                codes = draw(
                    model,
                    [drawn.drawing(place) for place in places],
                    config,
                    sampling=drawn.sampling,
                    guidance=flags.cfg,
                    frames=drawn.frames,
                )
                if output is not None and tower is not None:
                    for place, some in zip(places, codes, strict=True):
                        output.write(place, some.numpy(), tower.pictures(some))
                bar.update(len(places))
        if output is not None:
            kept = len(wanted) - len(missing)
            print(f"drawn     {len(missing)}, and {kept} that were there\nsheet     {output.write_sheet()}")
    return 0


def batches(places: Sequence[Place], size: int) -> Iterator[Sequence[Place]]:
    """The places in groups of `size`, the last one smaller."""
    return (places[first : first + size] for first in range(0, len(places), size))


def main(argv: Sequence[str] | None = None) -> int:
    """Check flags, prompts and folders, draw; returns the exit status."""

    def work() -> int:
        flags = build_parser(tower_family(argv)).parse_args(argv)
        show_any_text()
        drawn = plan(flags, [name for name in SAMPLED if flag_value(argv, name) is not None])
        output = None
        if global_rank() == 0:
            output = DrawnPictures(flags.output_dir, drawn.prompts, settings(flags, drawn), drawn.frames)
        return run_on_rank(lambda: draw_all(flags, drawn, output))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
