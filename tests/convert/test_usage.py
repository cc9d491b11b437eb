"""Wrong flags and folders of the converter: one line that says what to do, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import ConfigError
from megatron_eve.convert.folders import check_room
from megatron_eve.convert.usage import shard_bytes
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.convert.test_conversion import convert, edited
from tests.golden_dir import find_golden
from tests.hf.test_export import spoilt_tokenizer

Capture = pytest.CaptureFixture[str]


def trained_tokenizer(folder: Path, **settings: Any) -> Path:
    """A tokenizer.model with Llama's way of cutting texts."""
    import sentencepiece

    folder.mkdir()
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((find_golden("tokenize") / "corpus.txt").read_text().splitlines()),
            model_writer=file, model_type="bpe", byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
            remove_extra_whitespaces=False, **{"vocab_size": 384, "pad_id": -1, **settings},
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: right, smaller, larger, shifted (other control ids), spoilt (another of the same size), empty."""
    root = tmp_path_factory.mktemp("tokenizers")
    shutil.copytree(find_golden("tokenize"), root / "right")
    trained_tokenizer(root / "smaller", vocab_size=310)
    trained_tokenizer(root / "larger", vocab_size=400)
    trained_tokenizer(root / "shifted", pad_id=0, unk_id=1, bos_id=2, eos_id=3)
    spoilt_tokenizer(root / "spoilt")
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def runs(tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that know the tokenizer of their data: `right`, and `shifted`; `silent` does not know it."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("right", "shifted", "silent"):
        shutil.copytree(find_golden("_shared/hf_mini224"), root / "source")
        if name != "silent":
            shutil.copyfile(tokenizers / name / "tokenizer.model", root / "source" / "tokenizer.model")
        assert convert("import", "--source", root / "source", "--target", root / name) == 0
        shutil.rmtree(root / "source")
    return root


def refused(capsys: Capture, *words: object) -> str:
    """The line with which a command is refused."""
    assert convert(*words) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("run", "tokenizer", "message"),
    [
        ("right", "smaller", "is another tokenizer (sha256"),
        ("right", "larger", "is another tokenizer (sha256"),
        ("right", "spoilt", "is another tokenizer (sha256"),
        ("silent", "smaller", "has 310 pieces, and the model 384"),
        ("silent", "larger", "has 400 pieces, and the model 384"),
        ("right", "typo", "typo/tokenizer.model (No such file or directory): give the path of a tokenizer.model"),
        ("right", "empty", "empty/tokenizer.model (No such file or directory): give the path of a tokenizer.model"),
        ("right", "right/corpus.txt", "corpus.txt is not a sentencepiece model: use the tokenizer.model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format_", ["published", "transformers"])
def test_an_export_with_a_wrong_tokenizer_is_refused(
    runs: Path, tokenizers: Path, tmp_path: Path, capsys: Capture, run: str, tokenizer: str, message: str, format_: str
) -> None:  # fmt: skip
    words = (
        "--target",
        tmp_path / "deep" / "out",
        "--tokenizer",
        tokenizers / tokenizer,
        "--format",
        format_,
    )
    line = refused(capsys, "export", "--source", runs / run, *words)
    assert line.startswith("error: --tokenizer") and message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_", ["published", "transformers"])
@pytest.mark.parametrize("name", ["right", "shifted"])
def test_an_export_holds_the_ids_of_its_tokenizer(
    runs: Path, tokenizers: Path, tmp_path: Path, format_: str, name: str
) -> None:
    """`--tokenizer` may name the file itself; what its folder says of other ids is not taken over."""
    folder = shutil.copytree(tokenizers / name, tmp_path / "tokenizer")
    (folder / "generation_config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8, "top_p": 0.5}')
    words = ("--target", tmp_path / "out", "--tokenizer", folder / "tokenizer.model", "--format", format_)
    assert convert("export", "--source", runs / name, *words) == 0
    made = tmp_path / "out"
    assert (made / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    right = Tokenizer(folder / "tokenizer.model")
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((made / file).read_text())
        found = [fields[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")]
        assert found == [right.bos_id, right.eos_id, right.unk_id], file
    assert json.loads((made / "generation_config.json").read_text()).get("top_p") == (
        0.5 if format_ == "published" else None
    )
    if format_ == "transformers":
        from transformers import AutoTokenizer

        text = "USER: a word</s>"
        ids = AutoTokenizer.from_pretrained(made)(text)["input_ids"]
        assert ids == right.encode(text, bos=True)


def test_an_embedding_with_a_row_that_no_piece_has(
    runs: Path, tokenizers: Path, tmp_path: Path, capsys: Capture
) -> None:
    """It is exported with its tokenizer, and no answer of the folder holds the row that `<image>` falls on."""
    import torch

    from megatron_eve.hf import EVELlamaForCausalLM

    def add_row(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], 9 * tensors[name][:1]])

    source = edited(tmp_path / "source", find_golden("_shared/hf_mini224"), add_row, vocab_size=385)
    shutil.copyfile(tokenizers / "right" / "tokenizer.model", source / "tokenizer.model")
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    words = ("--tokenizer", tokenizers / "right", "--format", "transformers")
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "out", *words) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["vocab_size"], fields["image_token_index"]) == (385, 384)
    model = EVELlamaForCausalLM.from_pretrained(tmp_path / "out")
    model.lm_head.weight.data[384] = 1e6 * model.lm_head.weight.data[5]
    prompt = torch.tensor([[1, 40, 50, 60]])
    out = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 12) and not (out == 384).any()


@pytest.mark.parametrize(
    ("size", "count"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("5GiB", 5 * 2**30), ("1.5kb", 1500), (" 2 TB ", 2 * 10**12)],
)
def test_a_shard_size(size: str, count: int) -> None:
    assert shard_bytes(size) == count


@pytest.mark.parametrize(
    "size", ["", "5G", "abc", "0", "-1", "-1GB", "0GB", "0.0001KB", "1e400GB", "nanGB", "infGB", "٣GB", "9" * 99 + "GB"]
)  # fmt: skip
def test_no_shard_size(size: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-shard-size .* such as 2GB, 500MB or 5GiB"):
        shard_bytes(size)


def a_file(folder: Path) -> dict[str, object]:
    (folder / "file").touch()
    return {"target": folder / "file" / "out"}


def closed(folder: Path) -> dict[str, object]:
    (folder / "closed").mkdir(mode=0o500)
    return {"target": folder / "closed" / "out"}


def source_file(folder: Path) -> dict[str, object]:
    (folder / "model.safetensors").touch()
    return {"source": folder / "model.safetensors"}


WRONG: dict[str, tuple[Callable[[Path], dict[str, object]], str, str]] = {
    "the same folder": (lambda _: {"target": "SOURCE"}, "both", "is the --source; choose another --target"),
    "below a file": (a_file, "both", "file is a file, not a folder; choose another --target"),
    "closed": (closed, "both", "closed cannot be written to; choose another --target"),
    "source is a file": (source_file, "both", "is a file; name its folder"),
    "source is not there": (lambda folder: {"source": folder / "typo"}, "both", "/typo"),
    "a model to export": (
        lambda _: {"source": find_golden("_shared/hf_mini224")}, "export", "is a model in Hugging Face layout already",
    ),
    "target is there": (lambda folder: {"target": folder}, "export", "exists already; choose another --target"),
    "shard size": (lambda _: {"max-shard-size": "5G"}, "export", "error: --max-shard-size 5G: is no size"),
    "seed": (lambda _: {"seed": -1}, "import", "error: --seed -1: must be 0 or more"),
    "width": (lambda _: {"patch-embedding-size": 0}, "import", "error: --patch-embedding-size 0: must be above 0"),
    "image size": (lambda _: {"image-size": 0}, "import", "error: --image-size 0: "),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (c, kind)
        for kind, (_, which, _) in WRONG.items()
        for c in ("import", "export")
        if which in (c, "both")
    ],
)
def test_wrong_usage(
    runs: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    from megatron_eve.convert import usage

    monkeypatch.setattr(
        usage.os, "access", lambda place, mode: place.name != "closed"
    )  # root may write anywhere
    make, _, message = WRONG[kind]
    source = runs / "right" if command == "export" else find_golden("_shared/hf_mini224")
    flags: dict[str, object] = {"source": source, "target": tmp_path / "out", **make(tmp_path)}
    flags = {name: source if value == "SOURCE" else value for name, value in flags.items()}
    line = refused(capsys, command, *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def full_in_torch(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def full_in_safetensors(*_: object, **__: object) -> None:
    from safetensors import SafetensorError

    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("command", "place", "failure"),
    [
        ("export", "megatron_eve.checkpoint.hf.folder.save_file", full_in_safetensors),
        ("export", "megatron_eve.convert.folders.sync_to_disk", no_space),
        ("export", "megatron_eve.convert.exporting.write_json", no_space),
        ("import", "megatron_eve.convert.dist_folder.torch.save", full_in_torch),
        ("import", "megatron_eve.convert.dist_folder.save_config", no_space),
        ("import", "megatron_eve.convert.importing.write_checksums", no_space),
    ],
)
def test_a_full_disk_leaves_nothing(
    runs: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str, place: str, failure: Any
) -> None:  # fmt: skip
    monkeypatch.setattr(place, failure)
    source = runs / "right" if command == "export" else find_golden("_shared/hf_mini224")
    assert convert(command, "--source", source, "--target", tmp_path / "out") in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The numbers are those of the run that follows."""
    for size in ("2GB", "500KB"):
        words = ("export", "--source", runs / "right", "--target", tmp_path / size, "--max-shard-size", size)
        assert convert(*words, "--dry-run") == 0
        *_, last = capsys.readouterr().out.splitlines()
        assert not (tmp_path / size).exists()
        assert convert(*words) == 0
        shards = list((tmp_path / size).glob("*.safetensors"))
        what = "1 file" if len(shards) == 1 else f"{len(shards)} files"
        assert last.startswith(f"would write {what} of weights, ")
        assert last.endswith(f" MB, to {tmp_path / size}; nothing is written (--dry-run)")
        capsys.readouterr()
    assert len(shards) > 2


def test_a_dry_run_ends_as_the_run_would(
    runs: Path, tokenizers: Path, tmp_path: Path, capsys: Capture
) -> None:
    """With the same sentence and status."""
    import torch

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][0, 0] = torch.nan

    published = find_golden("_shared/hf_mini224")
    spoilt = edited(tmp_path / "spoilt", published, spoil)
    larger = Path(shutil.copytree(published, tmp_path / "larger"))
    shutil.copyfile(tokenizers / "larger" / "tokenizer.model", larger / "tokenizer.model")
    damaged = Path(shutil.copytree(runs / "right", tmp_path / "damaged"))
    next((damaged / "iter_0000000").glob("*.distcp")).write_bytes(b"")
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    for words, message in (
        (("import", "--source", spoilt, "--target", out), "lm_head.weight holds values that are not finite"),
        (("import", "--source", larger, "--target", out), "has 400 pieces, and the embedding 384 rows"),
        (("export", "--source", damaged, "--target", out), "holds 0 of"),
        (("export", "--source", runs / "right", "--target", tmp_path / "there"), "there: exists already"),
        (("export", "--source", runs / "right", "--target", out, "--ckpt-step", 7), "has no iteration 7; there are 0"),
    ):  # fmt: skip
        lines = [refused(capsys, *words, *more) for more in ((), ("--dry-run",))]
        assert lines[0] == lines[1] and message in lines[0]
    assert not out.exists()


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    check_room(tmp_path / "deep" / "out", 1000)
    with pytest.raises(
        ConfigError, match=r"are free there, and the weights take 1,000,000,000\.0 GB; free some"
    ):
        check_room(tmp_path / "deep" / "out", 10**18)


def test_an_export_takes_the_tokenizer_that_the_checkpoint_names(
    tokenizers: Path, tmp_path: Path, capsys: Capture
) -> None:
    source = Path(shutil.copytree(find_golden("_shared/hf_mini224"), tmp_path / "source"))
    shutil.copyfile(tokenizers / "right" / "tokenizer.model", source / "tokenizer.model")
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    words = ("export", "--source", tmp_path / "run" / "iter_0000000", "--format", "transformers")
    assert convert(*words, "--target", tmp_path / "out") == 0
    assert (
        f"tokenizer: {source}/tokenizer.model, with which the checkpoint was trained"
        in capsys.readouterr().err
    )
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    shutil.rmtree(source)
    line = refused(capsys, *words, "--target", tmp_path / "again")
    assert (
        f"add --tokenizer DIR: a checkpoint does not hold its tokenizer, and {source}/tokenizer.model" in line
    )
