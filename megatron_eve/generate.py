"""The command that captions: `torchrun --nproc-per-node N -m megatron_eve.generate --load DIR --image a.jpg ...`.

Prints one JSON line an image: {"image": ..., "text": ...}.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class GenerateArguments:
    """Answer a question about each picture (or caption it), greedily, from a checkpoint of any layout."""

    load: str
    """Folder that --save of a run wrote."""
    tokenizer_model: str
    """The sentencepiece tokenizer.model that the run was trained with."""
    image: list[str]
    """Picture files; each gets its own answer."""
    question: str = ""
    """What to ask (template vicuna_v1); plain captions without a question."""
    template: Literal["plain", "vicuna_v1"] = "plain"
    """plain after stages 1 and 2, vicuna_v1 after stage 3."""
    max_new_tokens: int = 128
    """Stop an answer after so many tokens."""
    ignore_exif_orientation: bool = False
    """Leave pictures as they lie in the file, if their dataset was made so."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""


def main() -> None:
    """Parse, check what can be checked without torch, generate, print."""
    import tyro

    arguments = tyro.cli(
        tyro.conf.FlagCreatePairsOff[GenerateArguments], prog="python -m megatron_eve.generate"
    )
    problems = [f"--image {path}: no such file" for path in arguments.image if not Path(path).is_file()]
    if not Path(arguments.tokenizer_model).is_file():
        problems.append(f"--tokenizer-model {arguments.tokenizer_model}: no such file")
    ranks = arguments.tensor_model_parallel_size * arguments.pipeline_model_parallel_size
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != started:
        problems.append(
            f"--tensor-model-parallel-size x --pipeline-model-parallel-size = {ranks} ranks, but {started} were "
            f"started; use torchrun --nproc-per-node {ranks}"
        )
    if problems:
        if int(os.environ.get("RANK", "0")) == 0:
            print("error: " + "\n".join(problems), file=sys.stderr)
        sys.exit(2)
    from megatron_eve.training.initialize import run_rank

    run_rank(lambda: _generate(arguments))


def _generate(arguments: GenerateArguments) -> None:
    from megatron_eve.accelerator import accelerator

    accelerator()
    import torch

    from megatron_eve.config import from_dict, validate
    from megatron_eve.data.conversation import encode_prompt
    from megatron_eve.data.tokenizer import Tokenizer
    from megatron_eve.inference.generate import Prompt, generate, generation_config
    from megatron_eve.training.checkpoint import load_weights, saved_config
    from megatron_eve.training.initialize import distributed
    from megatron_eve.training.model import build_chunks

    config = generation_config(
        from_dict(saved_config(arguments.load), arguments.load),
        arguments.tensor_model_parallel_size,
        arguments.pipeline_model_parallel_size,
    )
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    tokenizer = Tokenizer(arguments.tokenizer_model)
    tokens = encode_prompt(arguments.question, tokenizer, arguments.template, num_images=1)
    # Stages 1 and 2 train no end-of-sequence token: a caption ends with its newline.
    stop_ids = (
        {tokenizer.eos_id, tokenizer.encode("\n")[-1]}
        if arguments.template == "plain"
        else {tokenizer.eos_id}
    )
    with distributed(config):
        (model,) = build_chunks(config, freeze=False)
        load_weights(arguments.load, [model], config.model)
        answers = generate(
            model,
            [Prompt(tokens, [Path(path).read_bytes()]) for path in arguments.image],
            config.model,
            max_new_tokens=arguments.max_new_tokens,
            stop_ids=stop_ids,
            apply_exif=not arguments.ignore_exif_orientation,
        )
        if torch.distributed.get_rank() == 0:
            for path, answer in zip(arguments.image, answers, strict=True):
                print(
                    json.dumps({"image": path, "text": tokenizer.decode(answer).strip()}, ensure_ascii=False)
                )


if __name__ == "__main__":
    main()
