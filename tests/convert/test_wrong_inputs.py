"""What an import is told of folders that will not do, before anything is written; and no code of a folder runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.convert.test_conversion import TEACHER, convert, edited, llama
from tests.golden_dir import find_golden

Make = Callable[[Path, Path], Path]


@pytest.fixture
def published() -> Path:
    return find_golden("_shared/hf_mini224")


@pytest.fixture
def teacher() -> Path:
    return find_golden(TEACHER)


def config(**fields: Any) -> Make:
    """Other fields in config.json."""
    return lambda folder, source: edited(folder, source, lambda tensors: None, **fields)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    """Other tensors."""
    return lambda folder, source: edited(folder, source, change)


def files(change: Callable[[Path], object]) -> Make:
    """Other files."""

    def make(folder: Path, source: Path) -> Path:
        shutil.copytree(source, folder)
        change(folder)
        return folder

    return make


def pickled(change: Callable[[Path], object] = lambda folder: None, **more: object) -> Make:
    """Two pickled shards with an index, as published; `more` goes into the first."""

    def make(folder: Path, source: Path) -> Path:
        shutil.copytree(source, folder)
        held = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(held)
        halves = {"1.bin": names[::2], "2.bin": names[1::2]}
        for shard, some in halves.items():
            content = {name: held[name] for name in some}
            torch.save({**content, **(more if shard == "1.bin" else {})}, folder / shard)
        index = {"weight_map": {name: shard for shard, some in halves.items() for name in some}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        change(folder)
        return folder

    return make


def cut(path: Path, part: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


def also_named(folder: Path) -> None:
    """The index names a tensor that its shard lacks."""
    path = folder / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.8.mlp.up_proj.weight"] = "2.bin"
    path.write_text(json.dumps(index))


def set_value(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[key].view(-1)[3] = value

    return change


class Code:
    """Unpickled, it would make a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 9976576152\n" % 5
WEB_PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


WRONG: dict[str, tuple[Make, str]] = {
    "mistral": (
        config(model_type="mistral"),
        "/config.json: model_type is 'mistral', and Llama, Qwen2, EVE v1, EVE v2, VILA and VILA-U are known",
    ),
    "experts of the MLP alone": (
        config(model_type="eve-qwen2", add_moe=True, moe_part="mlp"),
        "/config.json: moe_part is 'mlp', and experts are of all parts here ('layernorm-self_attn-mlp')",
    ),
    "clip": (
        lambda folder, source: Path(shutil.copytree(find_golden(TEACHER), folder)),
        "/config.json: model_type is 'clip_vision_model', and a vision tower is the teacher (--teacher-model)",
    ),
    "vocabulary": (
        config(vocab_size=640),
        ": model.embed_tokens.weight (384, 64): does not make embedding.word_embeddings.weight of shape (640, 64) with "
        "640 pieces",
    ),
    "width": (config(intermediate_size=128), "does not make decoder.layers.0.mlp.linear_fc1.weight"),
    "heads": (config(num_key_value_heads=2), "does not make decoder.layers.0.self_attention.linear_qkv.weight"),
    "no sizes": (config(hidden_size=None), "/config.json: has no hidden_size above 0"),
    "heads that do not divide": (config(num_attention_heads=7), "/config.json: head_dim is 9"),
    "scaled rope": (
        config(rope_scaling={"type": "dynamic", "factor": 2}),
        "/config.json: rope_type is 'dynamic', and rotary embeddings are not scaled here but by linear and llama3",
    ),
    "other JSON": (files(lambda folder: (folder / "config.json").write_text("[]")), "/config.json: holds no settings"),
    "no JSON": (files(lambda folder: cut(folder / "config.json")), "/config.json: not JSON"),
    "no config.json": (files(lambda folder: (folder / "config.json").unlink()), "/config.json: No such file"),
    "no weights": (
        files(lambda folder: (folder / "model.safetensors").unlink()), ": holds no weights (model.safetensors or",
    ),
    "missing tensor": (
        tensors(lambda held: held.pop("model.layers.3.self_attn.k_proj.weight")),
        ": has no tensor model.layers.3.self_attn.k_proj.weight; this is not a whole model, copy it again",
    ),
    "missing head": (tensors(lambda held: held.pop("lm_head.weight")), ": has no tensor lm_head.weight"),
    "unexpected tensor": (
        tensors(lambda held: held.update({"model.moe.weight": torch.ones(1)})),
        ": holds 1 tensors that no rule knows (model.moe.weight)",
    ),
    "integers": (
        tensors(lambda held: held.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
        "/model.safetensors: model.norm.weight is I8; quantised weights cannot be trained",
    ),
    "nan": (
        tensors(set_value("model.norm.weight", float("nan"))), ": model.norm.weight holds values that are not finite",
    ),
    "infinity": (
        tensors(set_value("model.layers.7.mlp.up_proj.weight", float("-inf"))),
        ": model.layers.7.mlp.up_proj.weight holds values that are not finite; copy the folder again",
    ),
    "truncated": (files(lambda folder: cut(folder / "model.safetensors")), "/model.safetensors: cannot be read"),
    "empty": (files(lambda folder: cut(folder / "model.safetensors", 0)), "/model.safetensors: cannot be read"),
    "truncated pickle": (pickled(lambda folder: cut(folder / "2.bin")), "/2.bin: cannot be read"),
    "pickle cut at its end": (pickled(lambda folder: cut(folder / "2.bin", 0.999)), "/2.bin: cannot be read"),
    "empty pickle": (pickled(lambda folder: cut(folder / "2.bin", 0)), "/2.bin: cannot be read"),
    "missing shard": (
        pickled(lambda folder: (folder / "2.bin").unlink()),
        "/2.bin: named by pytorch_model.bin.index.json and missing; copy the folder again",
    ),
    "named and not there": (
        pickled(also_named),
        "/2.bin: holds no model.layers.8.mlp.up_proj.weight, which pytorch_model.bin.index.json says it does",
    ),
    "git-lfs pointer": (
        files(lambda folder: (folder / "model.safetensors").write_bytes(LFS_POINTER)),
        "/model.safetensors: cannot be read: it is a git-lfs pointer, not the file itself: run git lfs pull",
    ),
    "git-lfs pointer of a pickle": (
        pickled(lambda folder: (folder / "2.bin").write_bytes(LFS_POINTER)), "/2.bin: cannot be read: it is a git-lfs",
    ),
    "git-lfs pointer of the index": (
        pickled(lambda folder: (folder / "pytorch_model.bin.index.json").write_bytes(LFS_POINTER)),
        "/pytorch_model.bin.index.json: cannot be read: it is a git-lfs pointer",
    ),
    "git-lfs pointer of config.json": (
        files(lambda folder: (folder / "config.json").write_bytes(LFS_POINTER)),
        "/config.json: not JSON; it is a git-lfs pointer",
    ),
    "git-lfs pointer of the tokenizer": (
        files(lambda folder: (folder / "tokenizer.model").write_bytes(LFS_POINTER)),
        "/tokenizer.model: cannot be read: it is a git-lfs pointer",
    ),
    "web page": (
        files(lambda folder: (folder / "model.safetensors").write_bytes(WEB_PAGE)),
        "/model.safetensors: cannot be read: it is a web page",
    ),
    "web page for a pickle": (
        pickled(lambda folder: (folder / "1.bin").write_bytes(WEB_PAGE)), "/1.bin: cannot be read: it is a web page",
    ),
    "words for a pickle": (
        pickled(lambda folder: (folder / "1.bin").write_bytes(b"Entry not found")), "/1.bin: cannot be read (no file",
    ),
    "other names": (
        files(lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors")),
        "; it has weights.safetensors, and no index that says what is in them",
    ),
    "no index": (
        pickled(lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}")),
        "/pytorch_model.bin.index.json: no index of a model's shards",
    ),
    "code in a pickle": (pickled(code=Code()), "/1.bin: asks for posix.mkdir, and no code of a model folder runs"),
    "other things in a pickle": (pickled(step=5), "/1.bin: holds other things than tensors by name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_source_is_refused_before_anything_is_written(
    tmp_path: Path,
    published: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = WRONG[kind]
    source = make(tmp_path / "source", published)
    assert convert("import", "--source", source, "--target", tmp_path / "start") == 2
    found = capsys.readouterr().err.split("error: ")[-1]
    assert message in found and found.startswith(str(source)) and "weights_only" not in found, found
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_whole_file_counts_before_an_index_that_was_left(tmp_path: Path, published: Path) -> None:
    """As transformers has it; the shards of the index are gone."""
    source = Path(shutil.copytree(published, tmp_path / "source"))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert("import", "--source", source, "--target", tmp_path / "start", "--dry-run") == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_no_teacher(
    tmp_path: Path, published: Path, teacher: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tower = Path(shutil.copytree(teacher, tmp_path / "clip"))
    (tower / name).write_bytes(LFS_POINTER)
    words = ("--target", tmp_path / "start", "--teacher-model", tower)
    assert convert("import", "--source", published, *words) in (1, 2)
    assert (
        f"--teacher-model {tower}: {name} cannot be read: it is a git-lfs pointer" in capsys.readouterr().err
    )


def test_a_pointer_of_git_lfs_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(LFS_POINTER)
    with pytest.raises(DataError, match=r"tokenizer\.model is a git-lfs pointer"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher-model", "LLAMA"), "config.json does not describe a vision tower with a patch grid"),
        (("--teacher-model", "NOWHERE"), "no config.json there; name a model folder in Hugging Face layout"),
        (("--trust-remote-code",), "--trust-remote-code: is about the teacher's folder; add --teacher-model"),
        (("--image-size", "700", "--teacher-model", "CLIP"), "--image-size 700: must be an even multiple of"),
    ],
    ids=["a language model", "nowhere", "no teacher to trust", "geometry"],
)
def test_a_wrong_teacher_is_refused(
    tmp_path: Path,
    published: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    folders = {"LLAMA": llama(tmp_path / "llama"), "NOWHERE": tmp_path / "nowhere", "CLIP": teacher}
    some = [folders.get(word, word) for word in words]
    assert convert("import", "--source", published, "--target", tmp_path / "start", *some) == 2
    found = capsys.readouterr().err
    assert message in found
    if "--teacher-model" in words and "--image-size" not in words:
        assert f"error: --teacher-model {some[1]}: " in found
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("kind", ["a run", "a model", "a file"])
def test_a_target_that_exists_is_found_before_the_weights_are_read(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    start = tmp_path / "start"
    if kind == "a run":
        assert convert("import", "--source", published, "--target", start) == 0
    elif kind == "a model":
        shutil.copytree(published, start)
    else:
        start.write_text("")
    # A source of which nothing but its place is ever looked at.
    assert convert("import", "--source", tmp_path / "nowhere", "--target", start) == 2
    message = {"a run": "holds a run already", "a model": "holds a model in", "a file": "is a file"}[kind]
    assert f"error: {start}: {message}" in capsys.readouterr().err


# A module that a folder brings along, and what a config.json says that wants it.
REMOTE = """
from pathlib import Path
from transformers.models.clip.configuration_clip import CLIPVisionConfig
Path({note!r}).touch()
class OtherConfig(CLIPVisionConfig):
    model_type = "other_tower"
"""


def with_code(folder: Path, note: Path, **fields: Any) -> Path:
    """Have a folder ask in every way that there is for its own Python file to be run."""
    classes = {
        "AutoConfig": "other.OtherConfig",
        "AutoModel": "other.Other",
        "AutoModelForCausalLM": "other.Other",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        more = fields if name == "config.json" else {}
        path.write_text(
            json.dumps({**found, "auto_map": {**classes, "AutoTokenizer": ["other.Other", None]}, **more})
        )
    for name in ("other.py", "__init__.py", "setup.py"):
        (folder / name).write_text(REMOTE.format(note=str(note)))
    return folder


def test_no_code_of_a_folder_runs_without_the_flag(
    tmp_path: Path,
    teacher: Path,
    published: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Source, teacher and tokenizer; the teacher's alone may run, and only when it is told to."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    note = tmp_path / "ran"
    source = with_code(Path(shutil.copytree(published, tmp_path / "source")), note)
    start = ("--source", source, "--target", tmp_path / "start")
    tower = with_code(Path(shutil.copytree(teacher, tmp_path / "clip")), note, model_type="other_tower")
    assert convert("import", *start, "--teacher-model", tower) == 2
    assert "--trust-remote-code of an import" in capsys.readouterr().err
    assert not note.exists() and not (tmp_path / "start").exists()
    # A tower that transformers knows does not need its folder's code, so it does not run.
    known = with_code(Path(shutil.copytree(teacher, tmp_path / "known")), note)
    assert convert("import", *start, "--teacher-model", known) == 0
    tokenizer = with_code(Path(shutil.copytree(find_golden("tokenize"), tmp_path / "tokenizer")), note)
    words = ("--tokenizer", tokenizer, "--teacher-model", known)
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back", *words) == 0
    assert not note.exists() and not list((tmp_path / "back").glob("*.py"))
    words = ("--teacher-model", tower, "--trust-remote-code")
    assert convert("import", "--source", source, "--target", tmp_path / "trusting", *words) == 0
    assert note.exists()


def test_a_folder_that_is_read_by_a_run_is_no_more_trusted(tmp_path: Path, published: Path) -> None:
    """config.json is read as JSON alone, whatever it asks for."""
    from megatron_eve.checkpoint.hf.config import settings_of

    source = with_code(Path(shutil.copytree(published, tmp_path / "source")), tmp_path / "ran")
    assert settings_of(source, image_size=224, teacher_size=112).model.num_layers == 8
    assert not (tmp_path / "ran").exists()
