"""From a file of rows to a dataset: order, broken files, workers, memory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from megatron_eve.data.errors import DataError
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image, view_of
from megatron_eve.data.preprocessing import preprocess
from megatron_eve.data.preprocessing.encoders import encode_rows
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.sources import json_reader
from megatron_eve.data.sources.fields import parse_json
from megatron_eve.data.sources.json_reader import JsonReader
from megatron_eve.data.sources.llava import LlavaSource
from megatron_eve.data.sources.source import RawRow
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import (
    ROOT,
    MakeConfig,
    caption_row,
    opened,
    run,
    skipped_rows,
    text_row,
)
from tests.golden_dir import find_golden

GOLDEN_FILES = {
    "_dataset.json": "ba64152fc6060f69",
    "_image.bin": "e2baa3c573d9525a",
    "_image.idx": "33aaa8ac6d8ff3bd",
    "_images.npy": "b37052f866721fd9",
    "_samples.npy": "9ab842c101a689f3",
    "_text.bin": "0b3008fb4994b5e4",
    "_text.idx": "7aca7f8621f1fd0c",
}
"""{file of the golden rows' dataset: sha256 of its bytes}."""


def test_the_golden_batch_from_json_to_dataset(tmp_path: Path, tokenizer_path: Path) -> None:
    folder = find_golden("mini224_mixed")
    inputs = load_file(folder / "inputs.safetensors")
    records = json.loads((folder / "records.json").read_text())
    names = {path.name.split("_", 1)[1]: path.name for path in (folder / "raw").iterdir()}
    for record in records:
        if "image" in record:
            record["image"] = names[record["image"]]
    (tmp_path / "data.json").write_text(json.dumps(records))
    config = PreprocessConfig(
        input=str(tmp_path / "data.json"),
        image_root=str(folder / "raw"),
        tokenizer_model=str(tokenizer_path),
        output_prefix=str(tmp_path / "set"),
        template="vicuna_v1",
        image_settings={"image_size": 224, "teacher_size": 112},
    )
    info = run(config)
    # What the files held before there were messages, system turns and data: URIs; the manifest has got a field since.
    written = {name: Path(config.output_prefix + name).read_bytes() for name in GOLDEN_FILES}
    assert {name: hashlib.sha256(data).hexdigest()[:16] for name, data in written.items()} == GOLDEN_FILES
    meta = json.loads((folder / "meta.json").read_text())
    assert info.num_labels == meta["n_label_tokens"]
    dataset = opened(config)
    expanded = load_file(folder / "outputs.safetensors")["expanded_attention_mask"]
    assert dataset.samples["length"].tolist() == expanded.sum(axis=1).tolist()
    image = 0
    for row, record in enumerate(records):
        length = int(inputs["attention_mask"][row].sum())
        tokens, labels = dataset.text(row)
        assert tokens.tolist() == inputs["input_ids"][row, :length].tolist()
        assert labels.tolist() == inputs["labels"][row, :length].tolist()
        if "image" in record:
            plan = dataset.image_plan(image)
            assert list(plan.grid) == meta["patch_hw"][row]
            found = decode_image(dataset.image_bytes(image), apply_exif=True, max_pixels=DEFAULT_MAX_PIXELS)
            view = plan.views["patches"]
            assert view_of(found, view).shape == view.shape == (4 * plan.grid[0] * plan.grid[1], 588)
            image += 1


def test_a_dataset_keeps_rows_in_order_and_files_as_they_were(make_config: MakeConfig) -> None:
    config = make_config([caption_row(n, "ok.jpg", f"Number {n}.") for n in range(5)])
    info = run(config)
    assert (info.num_rows, info.num_samples, info.num_images, info.skipped) == (5, 5, 5, {})
    dataset, tokenizer = opened(config), Tokenizer(config.tokenizer_model)
    assert info.tokenizer_sha256 == tokenizer.sha256
    for n in range(5):
        tokens, labels = dataset.text(n)
        assert tokenizer.decode(labels[labels >= 0].tolist()) == f"Number {n}.\n"
        assert tokens[:2].tolist() == [1, -200]
        assert dataset.image_bytes(n) == (Path(config.image_root) / "ok.jpg").read_bytes()
    assert skipped_rows(config) == []


def test_lines_and_array_give_the_same_dataset(make_config: MakeConfig) -> None:
    rows = [caption_row(n, "ok.jpg", f"Nummer {n} é 猫.") for n in range(3)]
    array = make_config(rows)
    run(array)
    lines = make_config(rows, lines=True, output_prefix=array.output_prefix + "2")
    run(lines)
    for part in ("_text.bin", "_text.idx", "_image.bin", "_samples.npy", "_dataset.json"):
        first, second = Path(array.output_prefix + part), Path(lines.output_prefix + part)
        assert first.read_bytes() == second.read_bytes()


def test_a_broken_line_is_counted_and_the_rest_is_read(make_config: MakeConfig) -> None:
    good = json.dumps(caption_row(1, "ok.jpg"))
    lines = [good + "\n", '{"id": "x", \n', "\n", "[" * 100_000 + "\n", good + "\n", good[:-5]]
    config = make_config(lines, lines=True)
    info = run(config)
    assert (info.num_rows, info.num_samples, info.skipped) == (5, 2, {"broken_json": 3})
    assert [record["row"] for record in skipped_rows(config)] == [2, 4, 6]


@pytest.mark.parametrize(
    ("spoil", "row"),
    [
        (lambda text: text[:-40], 3),
        (lambda text: text[:-1], 3),
        (lambda text: text.replace('"id2"', '"id2'), 2),
        (lambda text: text.replace("}, {", "}}, {", 1), 1),
        (lambda text: text.replace('"}]}', '"}}', 1), 1),
        (lambda text: text + " trailing", 4),
        (lambda text: "{" + text, 1),
        (lambda text: "", 1),
        (lambda text: '"' + text, 1),
    ],
)
def test_a_broken_array_stops_and_leaves_nothing(
    make_config: MakeConfig, spoil: Callable[[str], str], row: int
) -> None:
    config = make_config([caption_row(n, "ok.jpg") for n in (1, 2, 3)])
    path = Path(config.input)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(DataError, match=rf"data\.json, row {row}: "):
        run(config)
    assert list(Path(config.output_prefix).parent.iterdir()) == []


def test_a_failed_run_keeps_the_dataset_that_was_there(make_config: MakeConfig) -> None:
    config = make_config([caption_row(1, "ok.jpg"), caption_row(2, "no.jpg")])
    run(config)
    before = {path: path.read_bytes() for path in Path(config.output_prefix).parent.iterdir()}
    again = replace(config, overwrite=True)
    Path(config.input).write_text("[")
    with pytest.raises(DataError, match=r"data\.json, row 1"):
        run(again)
    Path(config.input).write_text(json.dumps([caption_row(1, "no.jpg")]))
    with pytest.raises(DataError, match="no row of"):
        run(again)
    assert {path: path.read_bytes() for path in Path(config.output_prefix).parent.iterdir()} == before


def test_no_row_at_all(make_config: MakeConfig) -> None:
    config = make_config([caption_row(1, "no.jpg"), caption_row(2, "no.jpg"), 5])
    with pytest.raises(DataError, match=r"no row of .*data\.json can be used \(3 skipped\)") as error:
        run(config)
    assert "2  image_missing: no such file under --image-root" in str(error.value)
    with pytest.raises(DataError, match=r"no row of .*\(0 skipped\)"):
        run(make_config([]))
    assert list(Path(config.output_prefix).parent.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "v1"}, "--template v1"),
        ({"image_size": 700}, "--image-size.*700"),
        ({"workers": 0}, "--workers 0"),
        ({"model_max_length": 1}, "--model-max-length 1"),
        ({"max_image_pixels": 10**9}, "--max-image-pixels"),
        ({"max_image_pixels": 0}, "--max-image-pixels"),
        ({"image_root": "nowhere"}, "--image-root nowhere is not a folder"),
        ({"input": "nothing.json"}, "cannot open nothing.json"),
        ({"tokenizer_model": "no.model"}, "cannot read the tokenizer no.model"),
    ],
)
def test_wrong_settings_are_named(make_config: MakeConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(make_config([caption_row(1, "ok.jpg")], **settings))


def test_workers_change_nothing_but_the_time(make_config: MakeConfig) -> None:
    rows = [caption_row(n, "no.jpg" if n % 7 == 3 else "ok.jpg", f"Number {n}.") for n in range(150)]
    alone = make_config(rows)
    together = make_config(rows, workers=2, output_prefix=alone.output_prefix + "2")
    assert run(alone) == run(together)
    for part in ("_text.bin", "_text.idx", "_image.bin", "_image.idx", "_samples.npy", "_skipped.jsonl"):
        first, second = Path(alone.output_prefix + part), Path(together.output_prefix + part)
        assert first.read_bytes() == second.read_bytes()


def test_workers_read_only_a_little_ahead_and_their_death_is_told(make_config: MakeConfig) -> None:
    config = make_config([], workers=2)
    read = 0

    def rows() -> Iterator[RawRow]:
        nonlocal read
        for number in range(1, 2001):
            read = number
            yield RawRow("data.json", number, json.dumps(caption_row(number, "ok.jpg")).encode())

    others = set(multiprocessing.active_children())  # ranks of other tests
    results = encode_rows(config, LlavaSource([]), rows(), config.output_prefix)
    next(results)
    assert read <= 200
    for child in set(multiprocessing.active_children()) - others:
        child.kill()
    with pytest.raises(DataError, match="a worker died while reading"):
        list(results)


def test_neither_torch_nor_megatron_is_imported(make_config: MakeConfig) -> None:
    config = make_config([caption_row(1, "ok.jpg")])  # their import takes 3 s of each task of an array
    program = f"""
import sys
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
info = preprocess({config!r}, progress=False)
print(info.num_images, [name for name in ("torch", "megatron") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "1 []\n"


def test_memory_does_not_grow_with_the_array(make_config: MakeConfig) -> None:
    config = make_config([text_row()], template="vicuna_v1", overwrite=True)
    run(config)  # so that imports do not count
    row = json.dumps({**text_row("?", "Yes."), "notes": "x" * 20_000})
    with Path(config.input).open("w") as stream:
        stream.write("[" + row)
        for _ in range(999):
            stream.write(",\n" + row)
        stream.write("]")
    assert Path(config.input).stat().st_size > 20_000_000
    tracemalloc.start()
    info = run(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert info.num_samples == 1000
    assert peak < 3_000_000


def test_positions_and_byte_order_marks(tmp_path: Path) -> None:
    for name, text in (("a.json", ' \n[{"a": 1.5}, 2]'), ("b.jsonl", '{"a": 1.5}\n2\n'), ("c.JSONL", "1\n")):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        with JsonReader(path) as reader:
            values = [parse_json(text) for _, text in reader.texts()]
            assert reader.position == reader.num_bytes
        assert values[0] in ({"a": 1.5}, 1)


ENCODE_FOR_EVER = """
import itertools, sys, time
from megatron_eve.data.preprocessing.encoders import encode_rows
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.sources.llava import LlavaSource
from megatron_eve.data.sources.source import RawRow

if __name__ == "__main__":
    names = ("input", "image_root", "tokenizer_model", "output_prefix")
    config = PreprocessConfig(**dict(zip(names, sys.argv[1:], strict=True)), workers=2)
    rows = (RawRow("data.json", n, b"1") for n in itertools.count(1))
    for _ in encode_rows(config, LlavaSource([]), rows, config.output_prefix):
        print("going", flush=True)
        time.sleep(60)
"""


def test_workers_end_with_a_parent_that_is_killed(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config([])
    script = tmp_path / "encode_for_ever.py"
    script.write_text(ENCODE_FOR_EVER)
    command = [sys.executable, str(script), config.input, config.image_root, config.tokenizer_model, "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"going\n"
        workers = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert alive == []


def test_what_the_disk_has_no_room_for_is_refused_early(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "_ESTIMATED_FROM", 20)
    monkeypatch.setattr(json_reader, "_CHUNK", 1000)  # or all of so small a file is read before its first row
    made = [caption_row(n, "ok.jpg") for n in range(300)]
    config = make_config(made, overwrite=True)
    size = run(config)
    whole = size.text_bytes + size.image_bytes
    usage = shutil.disk_usage(config.output_prefix[:-4])
    for free, fits in ((whole, True), (whole // 2, False)):
        monkeypatch.setattr(preprocess.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            assert run(config).num_samples == 300
            continue
        with pytest.raises(
            DataError, match=r"would take about 0.0 GiB, by its first [0-9]+ samples, and the disk of .* left"
        ):
            run(config)
    assert len(opened(config)) == 300
