"""The house around the package: commands, pins, documents, and nothing of any one machine in the repository."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
EVALUATION = ROOT / "constraints" / "eval.txt"
# Of a whole environment; what evaluation adds stands in a file of its own.
CONSTRAINTS = sorted(set((ROOT / "constraints").glob("*.txt")) - {EVALUATION})

# Where a developer's machine shows: absolute paths of homes and scratch folders, addresses of package indexes.
PRIVATE = {
    "a path of one machine": re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|tmp|work|mnt|opt|scratch)/\w"),
    "a package index": re.compile(
        r"https?://[^\s\"'`)]*(?:/simple\b|/whl\b|pypi|artifactory|nexus)", re.IGNORECASE
    ),
    "an address": re.compile(
        r"(?<![\d.])(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}(?![\d.])"
    ),
}


def tracked_texts() -> list[Path]:
    """Files of the repository that hold text: those git tracks or would, or all beside what is built here."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        files = [ROOT / name for name in names]
    else:
        built = re.compile(r"(?:\.(?!ci|gitignore)|quickstart|build|dist)")
        files = [path for path in ROOT.rglob("*") if not built.match(str(path.relative_to(ROOT)))]
    binary = {".png", ".jpg", ".model", ".safetensors", ".bin", ".idx", ".npy", ".pyc"}
    return [path for path in files if path.is_file() and path.suffix not in binary]


def pins(path: Path) -> dict[str, str]:
    """Package -> version of a constraints file, names normalised."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_nothing_of_one_machine_is_in_the_repository() -> None:
    found = []
    for path in tracked_texts():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
        ):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}: {line.strip()[:100]}"
                for what, pattern in PRIVATE.items()
                if pattern.search(line)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ["see /home/ann/x", "'/tmp/a'", "https://pypi.example.org/simple", "at 10.0.0.7"]
)
def test_the_patterns_find_what_they_look_for(line: str) -> None:
    assert any(pattern.search(line) for pattern in PRIVATE.values())


def test_readme_names_both_commands_and_nothing_before_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line]
    assert commands.index("make quickstart") == 1 and commands[0].startswith("git clone")
    assert "make test" in commands


def test_readme_and_tour_name_only_files_that_exist() -> None:
    for document in ("README.md", "docs/architecture.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        named = re.findall(
            r"`((?:megatron_eve|tools|examples|benchmarks|constraints|tests|docs)/[\w./-]*)`", text
        )
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        missing = [name for name in named if not (ROOT / name).exists()]
        missing += [name for name in links if not (ROOT / document).parent.joinpath(name).exists()]
        assert not missing, f"{document}: {missing}"


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_exact_and_agree_on_megatron_core(path: Path) -> None:
    versions = pins(path)
    assert versions["megatron-core"] == "0.16.1"
    # A local label (+cpu) would tie the pin to one wheel index.
    assert all(re.fullmatch(r"[\w.]+", version) for version in versions.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = (
        project["dependencies"] + extras["quickstart"] + extras["dev"] + extras["chat"] + extras["curate"]
    )
    wanted += extras["dali" if path.stem == "cpu" else "gpu"]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", want)[0]).lower() for want in wanted}
    assert names <= set(versions), f"not pinned: {sorted(names - set(versions))}"


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_of_evaluation_add_to_the_others(path: Path) -> None:
    versions = pins(EVALUATION)
    assert versions["lmms-eval"] == "0.7.3"  # of what its task files and utils are like
    assert not versions.keys() & pins(path).keys()
    assert pins(path)["filelock"].startswith("3.")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = extras["optional-dependencies"]["eval"]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", want)[0]).lower() for want in wanted}
    # pandas, accelerate and loguru come with the chat's page, the tests and curation elsewhere
    assert names - {"pandas", "accelerate", "filelock", "loguru"} <= set(versions)


def test_constraints_for_gpus_take_one_cuda() -> None:
    assert {path.stem for path in CONSTRAINTS} == {"cpu", "cu12", "cu13"}
    for cuda in ("12", "13"):
        versions = pins(ROOT / "constraints" / f"cu{cuda}.txt")
        assert versions["transformer-engine"] == versions["transformer-engine-torch"] == "2.11.0"
        assert versions[f"transformer-engine-cu{cuda}"] == "2.11.0"
        assert f"nvidia-dali-cuda{cuda}0" in versions


def test_only_the_package_is_installed() -> None:
    from setuptools import find_packages

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = find_packages(str(ROOT), **tool["packages"]["find"])
    assert "megatron_eve" in packages
    assert all(package.split(".")[0] == "megatron_eve" for package in packages)
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "megatron_eve").rglob("*.py")}
    assert folders == {package.replace(".", "/") for package in packages}, "a folder without __init__.py"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)

    def test_help_is_the_default_and_lists_every_command(self) -> None:
        plain = self.make()
        assert plain.returncode == 0 and plain.stdout == self.make("help").stdout
        for command in (
            "install", "install-eval", "install-curate", "install-dev", "install-gpu", "quickstart", "test",
            "test-slow", "lint", "clean",
        ):  # fmt: skip
            assert re.search(rf"^  make {command} +\w", plain.stdout, re.MULTILINE), command

    def test_a_python_that_is_not_there(self) -> None:
        found = self.make("install", "PYTHON=no-such-python", "VENV=no-such-folder")
        assert found.returncode != 0 and "no-such-python is not there" in found.stderr

    def test_an_old_python(self, tmp_path: Path) -> None:
        old = tmp_path / "python"
        # What an old interpreter would answer: version_info is all the check reads.
        old.write_text(
            f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])" "$2"\n'
        )
        old.chmod(0o755)
        found = self.make("install", f"PYTHON={old}", "VENV=no-such-folder")
        assert found.returncode != 0 and "is 3.9" in found.stderr

    def test_a_gpu_install_says_which_cuda_it_wants(self) -> None:
        found = self.make("install-gpu")
        assert found.returncode != 0 and "CUDA=12" in found.stderr

    def test_a_gpu_install_needs_nvcc(self, tmp_path: Path) -> None:
        for tool in ("sh", "make", "cat", "sed", "echo", "grep"):
            (tmp_path / tool).symlink_to(shutil.which(tool) or "")
        command = [str(tmp_path / "make"), "install-gpu", "CUDA=13"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": str(tmp_path)})
        assert found.returncode != 0 and "nvcc is not on the PATH" in found.stderr


def test_every_quickstart_photo_has_a_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(str(QUICKSTART))
    photos = importlib.import_module("photos")
    captions = photos.load_captions()
    rows = json.loads(photos.export(tmp_path / "data").read_text(encoding="utf-8"))
    files = {path.name for path in (tmp_path / "data" / "images").iterdir()}
    assert {row["image"] for row in rows} == files and len(files) == len(captions) >= 24
    for row in rows:
        text = row["conversations"][-1]["value"]
        assert text == captions[row["id"]] and re.fullmatch(r"[A-Z][^\n]*\.", text)
    assert len(set(captions.values())) == len(captions)


def test_the_quickstart_tokenizer_is_one_that_preprocessing_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_eve.data.text.tokenizer import Tokenizer

    monkeypatch.syspath_prepend(str(QUICKSTART))
    monkeypatch.delitem(sys.modules, "tokenizer", raising=False)
    trainer = importlib.import_module("tokenizer")
    captions = json.loads((QUICKSTART / "captions.json").read_text(encoding="utf-8")).values()
    made = Tokenizer(trainer.train(captions, tmp_path / "tokenizer.model"))
    again = Tokenizer(trainer.train(captions, tmp_path / "again.model"))
    assert (made.vocab_size, made.unk_id, made.bos_id, made.eos_id) == (trainer.VOCAB_SIZE, 0, 1, 2)
    assert made.sha256 == again.sha256
    assert all(made.decode(made.encode(caption)) == caption for caption in captions)
