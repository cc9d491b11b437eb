"""What the folder of a VILA-U tower says, read without loading a weight. Imports no torch.

A published model has it in `vision_tower/`: config.json with the sections `rqvaesiglip` and `rqtransformer`, and
weights. The sizes of its SigLIP stand in a config.json elsewhere, which `pretrained_model` names.
A checkpoint that tools/convert_checkpoint.py made of such a folder keeps all that in its config.yaml (`TowerRecord`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_eve.config import TRACKER
from megatron_eve.config.errors import ConfigError
from megatron_eve.config.json_file import read_settings
from megatron_eve.models.towers.sizes import tower_fields
from megatron_eve.models.vila_u.tower_settings import (
    DecoderSizes,
    EncoderSizes,
    TowerSettings,
    size_problems,
)

SIGLIP_FLAG = "--siglip-config"
CONFIG, SETTINGS = "config.json", "config.yaml"
SPIECE = "spiece.model"
"""File of a SigLIP's tokenizer, beside or in place of tokenizer.json."""

TOWER_TYPE = "rqvaesigliptransformer_model"
SECTION, _HEAD_SECTION = "rqvaesiglip", "rqtransformer"
# Files of a published folder beside config.json that a checkpoint keeps.
_OTHER_FILES = ("preprocessor_config.json",)
# Vision sides of the SigLIPs that published towers name as their `pretrained_model` and do not hold.
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "google/siglip-large-patch16-256": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 256, "patch_size": 16,
    },
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TowerRecord:
    """What a checkpoint keeps of a tower beside its tensors, in config.yaml under `tower`.

    Attributes:
        files: the JSON files of its published folder, by name, as they were read.
        siglip: sizes of its SigLIP, which that folder does not hold (`EncoderSizes`).
    """

    files: Mapping[str, Mapping[str, Any]]
    siglip: Mapping[str, Any]


def is_tower(folder: Path) -> bool:
    """Is this the folder of a tower, published or a checkpoint of one?"""
    try:
        return _checkpoint_of(folder) is not None or is_published(folder)
    except ConfigError:
        return False


def tower_record(tower: TowerSettings) -> TowerRecord:
    """What a checkpoint of this tower keeps.

    Raises:
        ConfigError: a file that cannot be read.
    """
    if (record := _checkpoint_of(tower.folder)) is not None:
        return record[1]
    there = [CONFIG, *(name for name in _OTHER_FILES if (tower.folder / name).is_file())]
    return TowerRecord({name: _read(tower.folder / name) for name in there}, asdict(tower.encoder))


def read_tower_folder(folder: Path, siglip_config: Path | None = None) -> TowerSettings:
    """Read what a tower's folder, or the settings of its checkpoint, say of it.

    The sizes of its SigLIP are in the checkpoint; else in the folder that `siglip_config` names, or in one beside or
    inside the tower's that `pretrained_model` names, or known here by its name on the hub. Nothing is fetched, and no
    code of a folder runs.

    Args:
        folder: `vision_tower/` of a published model, the model's folder, or a checkpoint's (one of its iterations, or
            the folder that has them).
        siglip_config: folder of the SigLIP, or its config.json.

    Raises:
        ConfigError: it is not the folder of such a tower, lacks something, or its sizes do not fit each other.
    """
    if (found := _checkpoint_of(folder)) is not None:
        place, record = found
        path = place / SETTINGS
        try:
            fields, sizes = record.files[CONFIG], EncoderSizes(**record.siglip)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: no settings of a tower ({error}); import the tower again") from None
        return _settings(place, path, fields, sizes)
    if (folder / TRACKER).is_file() or (folder / SETTINGS).is_file():
        raise ConfigError(
            f"{folder}: is a checkpoint of another model; name one of a tower (megatron_eve.train_tower), or the "
            "folder vision_tower of a VILA-U"
        )
    if not is_published(folder) and (folder / "vision_tower" / CONFIG).is_file():
        folder = folder / "vision_tower"
    path = folder / CONFIG
    fields = _read(path)
    if fields.get("model_type") != TOWER_TYPE:
        raise ConfigError(
            f"{path}: model_type is {fields.get('model_type')!r}, and {TOWER_TYPE!r} is needed; name the folder "
            "vision_tower of a VILA-U"
        )
    pretrained = _Section(path, fields, SECTION).value("pretrained_model")
    return _settings(folder, path, fields, _encoder(path, pretrained, siglip_config))


def is_published(folder: Path) -> bool:
    """Is it the published folder of a tower?

    Raises:
        ConfigError: its config.json cannot be read.
    """
    path = folder / CONFIG
    return path.is_file() and _read(path).get("model_type") == TOWER_TYPE


def _checkpoint_of(folder: Path) -> tuple[Path, TowerRecord] | None:
    """The folder of the checkpoint that a path names (its latest, where it has several), and what that keeps of a
    tower; None where it is no checkpoint of a tower."""
    place, tracker = folder, folder / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        place = folder / f"iter_{text:0>7}"
    path = place / SETTINGS
    if not path.is_file():
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        return place, TowerRecord(**settings["tower"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        return None


def _settings(folder: Path, path: Path, fields: Mapping[str, Any], encoder: EncoderSizes) -> TowerSettings:
    """Settings from config.json, of which messages name `path`."""
    section = _Section(path, fields, SECTION)
    latent, code = section.numbers("latent_shape", 3), section.numbers("code_shape", 3)
    n_embed, shared = section.value("n_embed"), bool(section.value("shared_codebook"))
    sizes = tuple(n_embed) if isinstance(n_embed, list) else (n_embed,) * code[2]
    resized = section.value("decoder_latent_shape")
    decoder = _Section(path, section.fields, "ddconfig")
    settings = TowerSettings(
        folder,
        encoder,
        DecoderSizes(
            ch=decoder.number("ch"),
            ch_mult=decoder.numbers("ch_mult"),
            num_res_blocks=decoder.number("num_res_blocks"),
            attn_resolutions=decoder.numbers("attn_resolutions"),
            z_channels=decoder.number("z_channels"),
            resolution=decoder.number("resolution"),
            out_ch=decoder.number("out_ch"),
        ),
        latent_shape=(latent[0], latent[1], latent[2]),
        code_shape=(code[0], code[1], code[2]),
        codebook_sizes=sizes,
        shared_codebook=shared,
        decoder_latent_shape=None if resized is None else section.numbers("decoder_latent_shape", 2),  # type: ignore[arg-type]
    )
    for problem in (
        *size_problems(settings, SIGLIP_FLAG),
        *_head_problems(settings, fields.get(_HEAD_SECTION)),
    ):
        raise ConfigError(f"{path}: {problem}")
    return settings


def _head_problems(tower: TowerSettings, head: Any) -> Iterator[str]:
    """Sizes of codes that the section of the decoder's head, where there is one, has otherwise."""
    for name, ours in (("block_size", list(tower.code_shape)), ("vocab_size", tower.codebook_size)):
        if isinstance(head, dict) and head.get(name, ours) != ours:
            yield (
                f"{name} of {_HEAD_SECTION} is {head[name]}, and {SECTION} has codes of {ours}; copy config.json "
                "again"
            )


def _encoder(path: Path, pretrained: Any, siglip_config: Path | None) -> EncoderSizes:
    """Sizes of the SigLIP; see `read_tower_folder`."""
    name = str(pretrained)
    source, fields = f"{path}: pretrained_model {name}", dict(_PUBLISHED.get(name, {}))
    if fields:
        fields = {"model_type": "siglip", "vision_config": fields}
    found = siglip_config
    if found is None:
        # The public code takes it as a hub id or a path; only folders of the model itself are looked at.
        near = [parent / Path(name).name / "config.json" for parent in (path.parent, path.parent.parent)]
        found = next((some for some in near if some.is_file()), None)
    if found is not None:
        found = found / "config.json" if found.is_dir() else found
        source, fields = str(found), _read(found, SIGLIP_FLAG if siglip_config else "")
    if not fields:
        raise ConfigError(
            f"{path}: its SigLIP is {name!r}, whose sizes are not known here, and nothing is fetched; copy that "
            f"model's config.json and name it with {SIGLIP_FLAG}"
        )
    return encoder_sizes(source, fields)


def encoder_sizes(source: str, fields: Mapping[str, Any]) -> EncoderSizes:
    """Sizes of a SigLIP.

    Args:
        source: what messages call its config.json.
        fields: of it.

    Raises:
        ConfigError: it is of another model, or a size is none.
    """
    try:
        vision = tower_fields(fields)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    if vision["model_type"] != "siglip":
        raise ConfigError(
            f"{source}: model_type is {vision['model_type']!r}, and a SigLIP is needed; name its folder"
        )
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    for some in names:
        if type(vision[some]) is not int or vision[some] < 1:
            raise ConfigError(f"{source}: {some} is {vision[some]!r}, and a whole number above 0 is needed")
    return EncoderSizes(
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act=vision["hidden_act"],
        norm_epsilon=vision["layer_norm_eps"],
    )


def text_folder(tower: TowerSettings, siglip: Path | None) -> Path:
    """The folder of the tokenizer of a tower's texts: its SigLIP's.

    Args:
        tower: what its folder says.
        siglip: that SigLIP's folder, or its config.json; None: one beside or in the tower's.

    Raises:
        ConfigError: no tokenizer there.
    """
    folder = tower.folder
    if siglip is not None:
        places = [siglip if siglip.is_dir() else siglip.parent]
    else:
        near = sorted(
            path.parent for path in (*folder.glob("*/config.json"), *folder.parent.glob("*/config.json"))
        )
        places = [folder, *near]
    for place in places:
        if (place / SPIECE).is_file() or (siglip and (place / "tokenizer.json").is_file()):
            return place
    raise ConfigError(
        f"{SIGLIP_FLAG}: texts need the tokenizer of the tower's SigLIP, and {places[0]} has no {SPIECE}; name the "
        "SigLIP's folder, with its tokenizer"
    )


class _Section:
    """A section of config.json."""

    def __init__(self, path: Path, fields: Mapping[str, Any], name: str) -> None:
        found = fields.get(name)
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: no section {name}; copy the folder again")
        self.path, self.name, self.fields = path, name, found

    def value(self, name: str) -> Any:
        if name not in self.fields:
            raise ConfigError(f"{self.path}: {self.name} has no {name}; copy the folder again")
        return self.fields[name]

    def number(self, name: str) -> int:
        return self._whole(name, self.value(name))

    def numbers(self, name: str, count: int | None = None) -> tuple[int, ...]:
        values = self.value(name)
        if not isinstance(values, list) or count not in (None, len(values)):
            wanted = f"{count} numbers are" if count else "a list of numbers is"
            raise ConfigError(f"{self.path}: {name} is {values!r}, and {wanted} needed")
        return tuple(self._whole(name, value) for value in values)

    def _whole(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self.path}: {name} is {value!r}, and whole numbers above 0 are needed")
        return value


def _read(path: Path, flag: str = "") -> dict[str, Any]:
    return read_settings(path, "name a model folder in Hugging Face layout", flag)
