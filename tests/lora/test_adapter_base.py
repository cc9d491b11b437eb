"""An adapter remembers the model that it was trained on: another of the same sizes is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.convert.adapter_base import METADATA, sample_of
from tests.convert.test_conversion import convert, llama
from tests.lora.test_wrong_adapters import tensors, write

REFUSED = "was trained on a model of these sizes with other weights than --source; name the model that it was"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base") / "llama", num_key_value_heads=2)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkpoint: an adapter of peft on its model, exported again."""
    folder = tmp_path_factory.mktemp("adapter")
    of_peft = write(folder / "peft", tensors())
    assert convert("import", "--source", base, "--adapter", of_peft, "--target", folder / "run") == 0
    words = ("--source", folder / "run", "--target", folder / "ours", "--format", "adapter")
    assert convert("export", *words) == 0
    return folder / "ours"


def taken(source: Path, adapter: Path, target: Path) -> int:
    words = ("import", "--source", source, "--adapter", adapter, "--target", target, "--dry-run")
    return convert(*words)


def changed(base: Path, folder: Path, dtypes: tuple[torch.dtype, ...], noise: float = 0.0) -> Path:
    """A copy of the model that went through these dtypes, with noise on its weights."""
    folder.mkdir()
    torch.manual_seed(5)
    found = load_file(base / "model.safetensors")
    for name, tensor in found.items():
        tensor = tensor * (1 + noise * torch.randn_like(tensor))
        for dtype in dtypes:
            tensor = tensor.to(dtype)
        found[name] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    "dtypes", [(), (torch.bfloat16,), (torch.float16,)], ids=["float32", "bfloat16", "float16"]
)
def test_its_model_is_taken_whatever_it_is_stored_as(
    base: Path, adapter: Path, tmp_path: Path, dtypes: tuple[torch.dtype, ...]
) -> None:
    assert taken(changed(base, tmp_path / "model", dtypes), adapter, tmp_path / "run") == 0


def test_another_model_of_its_sizes_is_refused(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that was trained on a little; where a folder does not know its model, nothing is compared."""
    other = changed(base, tmp_path / "model", (), noise=0.01)
    assert taken(other, adapter, tmp_path / "run") == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: --adapter {adapter}: {REFUSED}")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(load_file(adapter / "adapter_model.safetensors"), unknown / "adapter_model.safetensors")
    assert taken(other, unknown, tmp_path / "run") == 0
    torch.save(load_file(adapter / "adapter_model.safetensors"), unknown / "adapter_model.bin")
    (unknown / "adapter_model.safetensors").unlink()
    assert taken(other, unknown, tmp_path / "run") == 0


def test_a_sample_is_small(base: Path) -> None:
    found = load_file(base / "model.safetensors")
    assert len(sample_of(found.__getitem__, 4)) == 2048 and METADATA.startswith("megatron_eve.")
