"""tools/generate.py and tools/chat.py without a model: what they refuse, and a conversation in the terminal."""

from __future__ import annotations

import importlib.util
import io
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from megatron_eve.config import ConfigError
from megatron_eve.inference.chat import Limits
from megatron_eve.inference.opening import chat_template
from tests.golden_dir import find_golden
from tests.hf.test_export import spoilt_tokenizer
from tests.inference.scripted import ScriptedDrawer, ScriptedEngine
from tests.test_commands import ROOT, command


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module, to be run in this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generate_and_chat_refuse_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and before the model is opened."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tokenizer = str(find_golden("tokenize") / "tokenizer.model")
    questions, exported = tmp_path / "questions.jsonl", tmp_path / "exported"
    questions.write_text('{"image": "a.jpg", "text": "What?"}\n')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    exported.mkdir()
    for part in ("config.json", "tokenizer.json", "processor_config.json"):
        (exported / part).write_text("{}")
    alone = tmp_path / "model alone"
    alone.mkdir()
    (alone / "config.json").write_text("{}")
    model = {"--model-path": str(tmp_path), "--tokenizer-model": tokenizer}
    asking = {**model, "--question-file": str(questions), "--answers-file": str(tmp_path / "answers.jsonl")}
    for name, flags, changed, message in (
        (
            "chat",
            model,
            {"--model-path": "nowhere"},
            "--model-path nowhere: neither a checkpoint (no latest_",
        ),
        ("chat", model, {"--tokenizer-model": "nowhere"}, "--tokenizer-model nowhere: no such file"),
        ("chat", {"--model-path": str(tmp_path)}, {}, "--tokenizer-model: a checkpoint does not hold"),
        ("chat", model, {"--model-path": str(exported)}, f"{exported} has a tokenizer of its own"),
        ("chat", {"--model-path": str(alone)}, {}, f"{alone}: has no tokenizer.json; if transformers saved"),
        (
            "chat",
            model,
            {"--model-path": str(alone)},
            f"{alone}: has no tokenizer.json; if transformers saved",
        ),
        ("chat", model, {"--tensor-model-parallel-size": "2"}, "use torchrun --nproc-per-node 2"),
        ("chat", {"--model-path": str(exported)}, {"--tensor-model-parallel-size": "2"}, "by one process"),
        ("chat", model, {"--image": "nowhere.jpg"}, "--image nowhere.jpg: no such file"),
        ("generate", asking, {"--question-file": "nowhere"}, "No such file or directory: 'nowhere'"),
        ("generate", asking, {"--image-folder": "nowhere"}, "--image-folder nowhere: no such folder"),
        ("generate", asking, {}, f'{questions}, line 1: no "question_id"'),
    ):
        words = [word for pair in {**flags, **changed}.items() for word in pair]
        assert tool(name).main(words) == 2
        found = capsys.readouterr().err
        assert message in found and found.startswith("error: ") and found.count("error") == 1
        assert not (tmp_path / "answers.jsonl").exists()
    for flag, value in (("--chunk-idx", "1"), ("--batch-size", "0"), ("--conv-mode", "v0")):
        with pytest.raises(SystemExit):
            tool("generate").main([*[word for pair in asking.items() for word in pair], flag, value])
        assert flag in capsys.readouterr().err
    questions.write_text('{"question_id": 1, "text": "What?"}\n')
    done = command("tools/generate.py", *[word for pair in asking.items() for word in pair])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: --model-path {tmp_path}" in done.stderr and "is not whole" in done.stderr


def test_chat_in_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question a line, each with those before it; one that is refused is left out and makes the status 1."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (30, 30)).save(picture)
    pictures = tool("chat").read_pictures([picture], Limits(), apply_exif=True)
    engine, limits = ScriptedEngine(), Limits(new_tokens=10)
    for asked, status, answers in (
        ("What?\n\nAnd why?\n", 0, "1 pictures, 1 questions\n1 pictures, 2 questions\n"),
        (
            "What?\nWhat is an <image> <image>?\nAnd why?",
            1,
            "1 pictures, 1 questions\n1 pictures, 2 questions\n",
        ),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
        assert tool("chat").in_terminal(engine, pictures, limits) == status
        found = capsys.readouterr()
        assert found.out == answers
        assert found.err.startswith("error: <image> stands for a picture") == bool(status)
    assert "What? ASSISTANT: 1 pictures, 1 questions</s>USER: And why? ASSISTANT:" in engine.queries[-1].text


def test_chat_draws_in_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into new files, each with the next seed; what is not drawn is said, also of a model that draws nothing."""
    chat, engine, folder = tool("chat"), ScriptedDrawer(), tmp_path / "drawn"
    drawing = chat.TerminalDrawing(folder, 2.0, 5)
    lines = "/draw A red car.\nWhat?\n/draw\n/drawing?\n/draw A red car.\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert chat.in_terminal(engine, (), Limits(), drawing=drawing) == 1
    found = capsys.readouterr()
    files = [folder / f"picture_{number:05d}.png" for number in range(2)]
    said = ["0 pictures, 1 questions", "0 pictures, 2 questions"]
    assert found.out.splitlines() == [f"{files[0]} (seed 5)", *said, f"{files[1]} (seed 7)"]
    assert found.err == "error: Say what to draw.\n"
    assert [drawn[:3] for drawn in engine.drawn] == [("A red car.", 1, 2.0)] * 2
    assert sorted(folder.iterdir()) == files
    with Image.open(files[1]) as picture:
        assert picture.size == (48, 48) and picture.getpixel((0, 0)) == (0, 280 % 256, 280 % 256)
    blocked = chat.TerminalDrawing(files[0], 2.0, 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/draw A car.\n"))
    assert chat.in_terminal(engine, (), Limits(), drawing=blocked) == 1
    assert f"error: --output-dir {files[0]}: File exists" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/draw A car.\n"))
    assert chat.in_terminal(engine, (), Limits()) == 1
    assert capsys.readouterr().err.startswith("error: This model draws no pictures here")


def test_chat_refuses_a_line_that_is_no_text_and_answers_the_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latin-1 under a UTF-8 locale. A byte order mark, Windows line ends and a last line without an end do no harm."""
    lines = (
        b"\xef\xbb\xbfecho 1\r\ncaf\xe9?\necho \xe7\x8c\xab\x00!\n\xff\n"
        + b"x" * 30_000
        + b"\n\x0b\necho end"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    engine = ScriptedEngine()
    engine.max_length = 50_000
    assert tool("chat").in_terminal(engine, (), Limits(new_tokens=10)) == 1
    found = capsys.readouterr()
    assert found.out == "1\n猫\x00!\nend\n"
    assert found.err.splitlines() == [
        "error: this line is not utf-8 text; ask it again in that encoding",
        "error: this line is not utf-8 text; ask it again in that encoding",
        "error: A conversation has at most 20,000 characters. Begin a new one, or ask in fewer words.",
    ]


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["--model-path", str(exported), "--web", "--port"]
        assert tool("chat").main([*words, str(port)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: --port {port}: is taken, perhaps by another page (127.0.0.1); give another one, or 0, which takes a "
        "free one\n"
    )
    assert tool("chat").main([*words, "70000"]) == 2
    assert "--port 70000: must lie between 1 and 65535" in capsys.readouterr().err


def test_an_answer_that_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_eve.inference.opening import show_any_text

    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("echo 猫"))
    show_any_text()
    assert tool("chat").in_terminal(ScriptedEngine(), (), Limits(new_tokens=10)) == 0
    sys.stdout.flush()
    assert shown.getvalue() == b"\\u732b\n"


def test_chat_looks_at_its_pictures_before_it_opens_the_model(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for name, data, message in (
        ("empty.png", b"", "image_empty"),
        ("cut.png", content[:-40], "image_damaged"),
        ("text.png", b"no picture", "image_format"),
        ("large.png", content + bytes(21 << 20), "may have 20 MiB"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=f"--image .*{name}: .*{message}"):
            tool("chat").read_pictures([tmp_path / "a.png", tmp_path / name], Limits(), apply_exif=True)
    with pytest.raises(ConfigError, match="not a file"):
        tool("chat").read_pictures([tmp_path], Limits(), apply_exif=True)


def test_more_new_tokens_than_the_model_takes_are_refused(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = str(find_golden("tokenize") / "tokenizer.model")
    words = ["--model-path", str(exported.parent / "run"), "--tokenizer-model", tokenizer]
    assert tool("chat").main([*words, "--max-new-tokens", "2048"]) != 0
    assert "error: --max-new-tokens 2048: the model takes 2048 tokens, prompt and" in capsys.readouterr().err


def test_a_checkpoint_is_run_in_the_precision_of_its_weights(tmp_path: Path, exported: Path) -> None:
    """An import has no run that could have said --bf16."""
    from megatron_eve.inference.checkpoint_model import saved_in_bfloat16

    words = [
        "--source",
        str(find_golden("_shared/hf_mini224")),
        "--target",
        str(tmp_path / "half"),
        "--dtype",
        "bfloat16",
    ]
    assert tool("convert_checkpoint").main(["import", *words]) == 0
    assert saved_in_bfloat16(tmp_path / "half") and not saved_in_bfloat16(exported.parent / "run")


def test_a_tokenizer_of_another_model_is_told(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = spoilt_tokenizer(tmp_path / "other", vocab_size=350) / "tokenizer.model"
    assert (
        tool("chat").main(["--model-path", str(exported.parent / "run"), "--tokenizer-model", str(other)])
        == 2
    )
    assert f"--tokenizer-model {other}: has 350 pieces, and the model 384" in capsys.readouterr().err


def test_the_family_says_how_a_model_is_talked_with(tmp_path: Path) -> None:
    """Of a checkpoint and of a folder for transformers; one from before there were families is of the first."""
    for family, template in (
        ("tests.families.toy.family", "plain"),
        ("eve", "vicuna_v1"),
        (None, "vicuna_v1"),
    ):
        run = tmp_path / str(family)
        (run / "iter_0000001").mkdir(parents=True)
        (run / "latest_checkpointed_iteration.txt").write_text("1")
        (run / "iter_0000001" / "config.yaml").write_text(f"family: {family}\n" if family else "model: {}\n")
        assert chat_template(run) == template
    assert chat_template(find_golden("_shared/hf_mini224")) == "vicuna_v1"
