"""Memory and time of an import and an export, compared with a plain script that loads everything.

    python benchmarks/conversion.py --layers 32

Makes a random model of EVE-7B's shapes in the published layout (`--layers` of them), imports it, exports it again and
compares a digest of every tensor. Each step runs in its own process, whose anonymous memory (RssAnon, without
pages of mapped files) is sampled fifty times a second. Needs four times the model's bytes on the disk: 55 GB
at 32 layers.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_eve.runtime.command_line import command_parser_of

ROOT = Path(__file__).parents[1]
# The plain script: loads all tensors, then writes them.
PLAIN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
source, target = map(Path, sys.argv[1:])
tensors = {}
for shard in sorted(source.glob("*.safetensors")):
    tensors.update({key: tensor.clone() for key, tensor in load_file(shard).items()})
torch.save(tensors, target)
"""


def make_model(folder: Path, layers: int) -> int:
    """Write a random model of the published shapes; returns its size in bytes."""
    from megatron_eve.checkpoint.hf.config import token_ids
    from megatron_eve.checkpoint.hf.folder import LazyTensor, write_shards
    from megatron_eve.checkpoint.hf.rules import rules_of
    from megatron_eve.config import PRESETS, RunConfig
    from megatron_eve.convert.meta_model import meta_model
    from megatron_eve.convert.summary import size_of
    from megatron_eve.models.name_rules import rule_for
    from megatron_eve.models.registry import find_family
    from megatron_eve.models.tensor_layouts import Sizes
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    sizes_of_7b = PRESETS["eve_7b"]
    model = replace(sizes_of_7b.model, num_layers=layers)
    config = RunConfig(model=model, vision=sizes_of_7b.vision)
    tensors = {}
    with meta_model(config) as whole:
        for entry in whole.entries:
            rule, names = rule_for(entry.name, rules_of(config))
            sizes = Sizes.of(model, whole.padded_vocab_size)
            for name, part in zip(
                names,
                rule.layout.split(torch.empty(entry.shape, device="meta"), sizes, len(names)),
                strict=True,
            ):
                make = partial(torch.randn, part.shape, dtype=torch.bfloat16)
                tensors[name] = LazyTensor(part.shape, torch.bfloat16, make)
    folder.mkdir()
    write_shards(folder, tensors, 2_000_000_000, lambda _: None)
    family = find_family(config.family).hugging_face()
    files = family.published_files(model, config.vision, "bfloat16", token_ids(None), {})
    (folder / "config.json").write_text(json.dumps(files["config.json"]))
    return size_of(tensors)


def measured(*words: str) -> tuple[float, float]:
    """Run a command; returns its seconds and its peak anonymous memory in GiB."""
    started, most = time.perf_counter(), 0
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(
                most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0
            )
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.02)
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(words)}: exit status {process.returncode}")
    return time.perf_counter() - started, most / 2**20


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each tensor and the sha256 of its bytes."""
    from megatron_eve.models.hf_folder import HFFolder

    source = HFFolder(folder)
    for key in sorted(source.keys()):
        if not key.endswith("inv_freq"):
            yield key, hashlib.sha256(source.tensor(key).view(torch.uint8).numpy().data).hexdigest()


def main() -> None:
    """Make the model, convert it both ways, compare, and print the table."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the model")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conversion_") as name:
        folder = Path(name)
        size = make_model(folder / "published", flags.layers)
        print(f"{flags.layers} layers, {size:,} bytes in bfloat16")
        tool = (sys.executable, "tools/convert_checkpoint.py")
        print("| | seconds | GB/s written | anonymous memory at most, GiB |")
        print("|---|---|---|---|")
        for what, words in (
            ("import", (*tool, "import", "--source", f"{folder}/published", "--target", f"{folder}/run")),
            ("export", (*tool, "export", "--source", f"{folder}/run", "--target", f"{folder}/back")),
            (
                "a plain script, one way",
                (sys.executable, "-c", PLAIN, f"{folder}/published", f"{folder}/plain.pt"),
            ),
        ):
            seconds, memory = measured(*words)
            print(f"| {what} | {seconds:.0f} | {size / seconds / 1e9:.2f} | {memory:.2f} |", flush=True)
            if what == "export":
                same = dict(digests(folder / "published")) == dict(digests(folder / "back"))
                print(f"| every tensor the same afterwards | {same} | | |", flush=True)
                if not same:
                    raise SystemExit("the folder that came back differs")


if __name__ == "__main__":
    main()
