"""New captions a second by batch size, as `tools/curate.py caption` writes them.

    python benchmarks/captioning.py --toy
    python benchmarks/captioning.py --model-path llava-1.5-13b-hf --batch-size 1 8 16 32 64 --new-tokens 256

Pictures of 640 x 480 are decoded, captioned, and the answers written to disk, all in one process; the time to open the
model is left out. --toy takes a LLaVA of two layers with random weights: on a CPU it shows no more than that a batch is
answered together.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from gpu_common import parser, photos
from tables import Table

from megatron_eve.curation.caption_answers import CaptionAnswers
from megatron_eve.curation.captioner import Captioner, Picture
from megatron_eve.inference.sampling import GREEDY
from megatron_eve.inference.transformers_engine import TransformersEngine

PROMPT = "Describe the picture."


def caption(engine: TransformersEngine, files: Sequence[bytes], batch: int, new_tokens: int) -> float:
    """Seconds to caption pictures in batches."""
    pictures = [Picture(row, PROMPT, data) for row, data in enumerate(files)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with CaptionAnswers(Path(folder) / "answers.jsonl", range(len(files)), batch) as answers:
            Captioner(engine, new_tokens, GREEDY).fill(answers, pictures, batch)
        return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    flags_of = parser(__doc__)
    flags_of.add_argument("--model-path", type=Path, metavar="DIR", help="folder of the model")
    flags_of.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N", help="to compare"
    )
    flags_of.add_argument("--pictures", type=int, default=32, metavar="N", help="pictures of each run")
    flags_of.add_argument("--new-tokens", type=int, default=32, metavar="N", help="--max-new-tokens")
    flags = flags_of.parse_args(argv)
    if (flags.model_path is None) != flags.toy:
        flags_of.error("give --model-path, or --toy for a random model")
    with tempfile.TemporaryDirectory() as folder:
        if flags.toy:
            flags.model_path = import_module("tests.inference.baseline_models").make_llava(Path(folder))
        engine = TransformersEngine(flags.model_path)
        files = photos(flags.pictures, 640, 480)
        caption(engine, files[:2], 2, 4)  # warm up
        best: dict[int, float] = {}
        for _ in range(3):  # in turns, so that what else the machine does meets all of them
            for batch in flags.batch_size:
                seconds = caption(engine, files, batch, flags.new_tokens)
                best[batch] = min(seconds, best.get(batch, seconds))
        table = Table("captioning", ("batch size", "captions/s, best of 3"), flags.out)
        for batch, seconds in best.items():
            table.add(batch, f"{len(files) / seconds:.2f}")
        table.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
