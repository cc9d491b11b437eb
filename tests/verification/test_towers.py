"""`tools/verify_golden.py` compares what the public code computed of towers that make codes of pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config import ConfigError, ParallelConfig
from megatron_eve.models.process_groups import process_group
from megatron_eve.verification.forms import is_case
from megatron_eve.verification.run import check_folder
from tests.golden_dir import find_golden
from tests.models.vila_u.towers import CONFIG, changed, write_tower
from tests.test_commands import command


def misses(folder: Path) -> tuple[int, set[str]]:
    """How many rows a case has, and the names of those that are out of tolerance."""
    with process_group(ParallelConfig()):
        rows = check_folder(folder, ParallelConfig())
    return len(rows), {row.name for row in rows if not row.ok}


@pytest.mark.parametrize(
    ("case", "count"), [("vilau_tower", 26), ("vilau_quantizer", 102), ("rqvae_losses", 30)]
)
def test_every_row_of_a_case(case: str, count: int) -> None:
    assert misses(find_golden(f"vila/{case}")) == (count, set())


@pytest.mark.slow
def test_cases_under_tensor_parallelism() -> None:
    folders = [str(find_golden(f"vila/{case}")) for case in ("vilau_tower", "vilau_quantizer")]
    found = command("tools/verify_golden.py", *folders, "--tensor-model-parallel-size", "2")
    assert found.returncode == 0 and "128 of 128 rows within tolerance" in found.stdout, found.stderr


def test_a_wrong_number_is_a_miss(tmp_path: Path) -> None:
    case = shutil.copytree(find_golden("vila/vilau_quantizer"), tmp_path / "case")
    path = case / "separate_restart.safetensors"
    tensors = load_file(path)
    tensors["before.codebooks.3.weight"][0] += 100
    tensors["eval_z_q"][0, 0, 0, 0] += 1e-3
    tensors["eval_codes"][1, 2, 3, 0] += 1
    tensors["after1.codebooks.0.embed_ema"][5] += 1e-3
    save_file(tensors, path)
    missed = misses(case)[1]
    assert missed >= {"separate_restart.eval_z_q", "separate_restart.eval_codes"}
    assert "separate_restart.after1.codebooks.0.embed_ema" in missed


def test_a_case_with_a_tower_of_its_own_and_other_sizes(tmp_path: Path) -> None:
    """Separate codebooks, blocks of features, and features that are resized for the decoder."""
    from megatron_eve.models.vila_u.tower import load_tower
    from megatron_eve.models.vila_u.tower_folder import read_tower_folder

    config = changed(
        CONFIG, shared_codebook=False, n_embed=[64, 32], code_shape=[2, 2, 2], decoder_latent_shape=[6, 6],
        resolution=48,
    )  # fmt: skip
    case = tmp_path / "some_tower"
    case.mkdir()
    tower = load_tower(
        read_tower_folder(write_tower(case / "vision_tower", config)), torch.device("cpu"), torch.float32
    )
    shown = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    codes = tower.encode(shown)
    values = shown.float().div(255).sub(0.5).div(0.5).permute(0, 3, 1, 2).contiguous()
    save_file({"images": values}, case / "inputs.safetensors")
    outputs = {"codes": codes, "tower_tokens_offset_70": codes.flatten(1, 2) + 70}
    outputs["recon_uint8_range"] = tower.decode(codes).permute(0, 3, 1, 2).contiguous()
    save_file(outputs, case / "outputs.safetensors")
    assert misses(case) == (3, set())
    shutil.rmtree(case / "vision_tower")
    assert is_case(case)
    with pytest.raises(ConfigError, match="no weights of its tower there"):
        misses(case)
