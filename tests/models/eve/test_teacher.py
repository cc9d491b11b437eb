"""Teachers: what is loaded, what is refused and how, and that nothing runs that was not asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config import ConfigError
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.teacher import Teacher, teacher_fingerprint
from tests.checkpoint.hf.test_tables import Code
from tests.golden_dir import find_golden

VISION = EVEConfig()  # 112 pixels, 8 x 8 patches, width 48
VIT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 112,
    "patch_size": 14,
}  # fmt: skip


def load(folder: Path, vision: EVEConfig = VISION, **settings: Any) -> Teacher:
    aligning = replace(vision, patch_aligning=True, teacher_model=str(folder), **settings)
    return Teacher(aligning, dtype=torch.float32, device=torch.device("cpu"))


def pictures(side: int = 112, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.manual_seed(0))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A copy of the golden teacher."""
    return Path(shutil.copytree(find_golden("_shared/openai/clip-mini-patch14-112"), tmp_path / "clip"))


def test_features_are_those_of_a_plain_clip(clip: Path) -> None:
    """Last hidden state but one, CLS dropped, quick_gelu as the config says, no gradients."""
    from transformers import CLIPVisionModel

    images = pictures()
    teacher = load(clip)
    found = teacher(images)
    plain = CLIPVisionModel.from_pretrained(clip)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    states = plain(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, states[-2][:, 1:])
    assert found.shape == (2, 64, 48) and not found.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.tower.parameters())
    torch.testing.assert_close(load(clip, teacher_hidden_state=-1)(images), states[-1][:, 1:])
    fields = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({**fields, "hidden_act": "gelu"}))
    assert not torch.allclose(load(clip)(images), found, atol=1e-6)


def test_bfloat16(clip: Path) -> None:
    settings = EVEConfig(patch_aligning=True, teacher_model=str(clip))
    found = Teacher(settings, dtype=torch.bfloat16, device=torch.device("cpu"))(pictures())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), load(clip)(pictures()), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_other_towers(kind: str, tmp_path: Path) -> None:
    """The vision half of a CLIP with text; SigLIP, which has no CLS; DINOv2 at another size than it was made for."""
    import transformers

    torch.manual_seed(0)
    if kind == "clip":
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VIT))
        tower = whole.vision_model
        whole.save_pretrained(tmp_path)
    elif kind == "siglip":
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT))
        tower.save_pretrained(tmp_path)
    else:
        tower = transformers.Dinov2Model(transformers.Dinov2Config(**{**VIT, "image_size": 518}))
        tower.save_pretrained(tmp_path)
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    found = load(tmp_path)(pictures())
    pixels = ((pictures() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = tower.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, states[-2][:, -64:])
    assert states[-2].shape[1] - 64 == {"clip": 1, "siglip": 0, "dinov2": 1}[kind]


def test_a_tower_with_larger_patches(tmp_path: Path) -> None:
    """Its pictures are as much larger: the grid is the model's."""
    import transformers

    config = transformers.CLIPVisionConfig(**{**VIT, "patch_size": 16, "image_size": 128})
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    teacher = load(tmp_path)
    assert (teacher.side, teacher.grid) == (128, 8)
    assert teacher(pictures(128)).shape == (2, 64, 48)


def test_refusals(clip: Path) -> None:
    with pytest.raises(ConfigError, match=r"of width 48 .*\n?.*width 64 \(--teacher-hidden-size\)"):
        load(clip, replace(VISION, teacher_hidden_size=64))
    with pytest.raises(ConfigError, match="does not take pictures of 140 x 140 pixels"):
        load(clip, replace(VISION, teacher_size=140))
    with pytest.raises(ConfigError, match=r"--teacher-hidden-state -9: .* has 4 of them"):
        load(clip, teacher_hidden_state=-9)
    weights = load_file(clip / "model.safetensors")
    lost = next(name for name in weights if "layers.1." in name)
    save_file({n: w for n, w in weights.items() if n != lost}, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing.*copy the folder again"):
        load(clip)
    (clip / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ConfigError, match=f"--teacher-model {clip}: cannot be loaded"):
        load(clip)


REMOTE = """
from pathlib import Path
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
Path({note!r}).touch()
class TowerConfig(CLIPVisionConfig):
    model_type = "other_tower"
class Tower(CLIPVisionModel):
    config_class = TowerConfig
"""


def test_no_code_of_a_folder_runs_without_the_flag(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPVisionModel

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    note = tmp_path / "ran"
    (clip / "tower.py").write_text(REMOTE.format(note=str(note)))
    # Names as this transformers has them; it renames those of its own models only.
    weights = CLIPVisionModel.from_pretrained(clip).state_dict()
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    fields = json.loads((clip / "config.json").read_text())
    classes = {"AutoConfig": "tower.TowerConfig", "AutoModel": "tower.Tower"}
    (clip / "config.json").write_text(
        json.dumps({**fields, "model_type": "other_tower", "auto_map": classes})
    )
    with pytest.raises(ConfigError, match=r"(?s)does not describe a vision tower.*trust_remote_code"):
        load(clip)
    assert not note.exists()
    assert load(clip, teacher_trust_remote_code=True)(pictures()).shape == (2, 64, 48)
    assert note.exists()
    assert "tower.py" in teacher_fingerprint(str(clip))["sha256"]


def test_code_of_a_folder_is_loaded_by_one_process_at_a_time(clip: Path) -> None:
    """Another process, here the test, holds the lock of transformers' cache of such code."""
    from filelock import FileLock
    from transformers.utils import HF_MODULES_CACHE

    loading = threading.Thread(target=load, args=(clip,), kwargs={"teacher_trust_remote_code": True})
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(HF_MODULES_CACHE) / "megatron_eve.lock"):
        load(clip)  # without code of the folder nobody waits
        loading.start()
        loading.join(timeout=0.5)
        assert loading.is_alive()
    loading.join(timeout=60)
    assert not loading.is_alive()


@pytest.mark.parametrize("trusted", [False, True])
def test_no_code_of_a_pickle_runs_ever(clip: Path, tmp_path: Path, trusted: bool) -> None:
    weights = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    torch.save(weights, clip / "pytorch_model.bin")
    assert load(clip, teacher_trust_remote_code=trusted)(pictures()).shape == (2, 64, 48)
    torch.save({**weights, "code": Code(tmp_path / "ran")}, clip / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=f"--teacher-model {clip}: cannot be loaded"):
        load(clip, teacher_trust_remote_code=trusted)
    assert not (tmp_path / "ran").exists()


def test_fingerprint(clip: Path) -> None:
    fingerprint = teacher_fingerprint(str(clip))
    assert fingerprint["path"] == str(clip)
    assert set(fingerprint["sha256"]) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    expected = hashlib.sha256((clip / "model.safetensors").read_bytes()).hexdigest()
    assert fingerprint["sha256"]["model.safetensors"] == expected
