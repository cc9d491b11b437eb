"""Memory that preprocessing takes for inputs that say, or hold, more than they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.data.helpers import ROOT

MEMORY = """
import json, os, resource, sys
from pathlib import Path
import pyarrow
from pyarrow import parquet
from megatron_eve.data.errors import DataError
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from tests.data.preprocessing.test_bad_inputs import JPEG
from tests.data.preprocessing.test_bad_pictures import png_of_zeros
from tests.data.sources.test_webdataset import broken

folder, tokenizer = Path(sys.argv[1]), sys.argv[2]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

def measure(name, file, **settings):
    given = {"image_root": str(folder), "output_prefix": str(folder / "out" / name), "tokenizer_model": tokenizer}
    given |= {"image_settings": {"image_size": 224, "teacher_size": 112}}
    before = peak()
    try:
        info = preprocess(PreprocessConfig(input=str(file), **given | settings), progress=False)
        said = [info.num_samples, info.skipped]
    except DataError as error:
        said = str(error)
    print(json.dumps([name, said, peak() - before]), flush=True)

def turns(text):
    return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]

(folder / "ok.jpg").write_bytes(JPEG)
rows = [{"image": "ok.jpg", "conversations": turns("A car.")}]
(folder / "a.json").write_text(json.dumps(rows))
measure("imports", folder / "a.json")
(folder / "bomb.png").write_bytes(png_of_zeros(50_000, 50_000, 100))
(folder / "a.json").write_text(json.dumps(rows + [{"image": "bomb.png", "conversations": turns("A car.")}] * 50))
for storage in ("encoded", "jpeg", "pixels"):
    measure(f"bombs {storage}", folder / "a.json", image_storage=storage)
(folder / "large.jpg").touch()
os.truncate(folder / "large.jpg", 64 << 20)
(folder / "a.json").write_text(json.dumps(rows + [{"image": "large.jpg", "conversations": turns("A car.")}] * 15))
measure("files of 64 MiB", folder / "a.json", image_storage="jpeg")
broken(folder / "a.tar", "1 TB")
measure("1 TB", folder / "a.tar")
with (folder / "long.jsonl").open("w") as lines:
    for row in rows + [{"image": "ok.jpg", "conversations": turns("A car. " * 1_500_000)}] * 5:
        lines.write(json.dumps(row) + "\\n")
measure("captions of 10 MB", folder / "long.jsonl")
big = pyarrow.array([bytes(1 << 20)])
columns = {"image": pyarrow.chunked_array([pyarrow.array([JPEG])] + [big] * 2100), "caption": ["A car."] * 2101}
options = {"row_group_size": 2101, "compression": "zstd", "use_dictionary": False}
parquet.write_table(pyarrow.table(columns), folder / "a.parquet", **options)
group = parquet.read_metadata(folder / "a.parquet").row_group(0)
assert group.num_rows == 2101 and group.total_byte_size > 2 << 30
measure("a row group of 2 GiB", folder / "a.parquet")
"""


def test_memory_stays_bounded(tmp_path: Path, tokenizer_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(tokenizer_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    found = {name: (said, grown) for name, said, grown in map(json.loads, done.stdout.splitlines())}
    assert found.pop("imports")[0] == [1, {}]
    said = {name: said for name, (said, _) in found.items()}
    assert str(said.pop("1 TB")).startswith(
        f"{tmp_path}/a.tar breaks off: 'a.jpg' at byte 0 says that it has"
    )
    assert said == {
        **{f"bombs {storage}": [1, {"image_too_large": 50}] for storage in ("encoded", "jpeg", "pixels")},
        "files of 64 MiB": [1, {"image_format": 15}],
        "captions of 10 MB": [1, {"text_too_long": 5}],
        "a row group of 2 GiB": [1, {"image_format": 2100}],
    }
    grown = {name: grown for name, (_, grown) in found.items()}  # MiB
    assert all(value < 200 for value in grown.values()), grown
