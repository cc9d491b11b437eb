"""VILA-U's towers, for the tools that write codes and pictures of them. Imports no torch at its top."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.models.image_codes import CodeModel, CodeTower, ContrastModel
from megatron_eve.models.vila_u.golden_towers import TowerGolden
from megatron_eve.models.vila_u.tower_export import VILAUFolders
from megatron_eve.models.vila_u.tower_folder import SIGLIP_FLAG, read_tower_folder, text_folder
from megatron_eve.models.vila_u.tower_settings import TowerSettings

if TYPE_CHECKING:
    import torch


class VILAUCodes:
    """See `ImageCodes`."""

    tower = "the tower: vision_tower of a VILA-U, the folder that has it, or what an import made of it"
    pad_colour = (127, 127, 127)
    golden = TowerGolden()
    folders = VILAUFolders()

    def add_flags(self, parser: argparse._ActionsContainer) -> None:
        """See `ImageCodes.add_flags`."""
        parser.add_argument(
            SIGLIP_FLAG,
            type=Path,
            metavar="DIR",
            help="folder of the tower's SigLIP, of which config.json is read (default: the one that it names, if "
            "that is beside or in its folder or is one of the published two; nothing is fetched)",
        )

    def read_tower(self, folder: Path, flags: Mapping[str, Any]) -> TowerSettings:
        """See `ImageCodes.read_tower`."""
        return read_tower_folder(folder, flags.get("siglip_config"))

    def sha256(self, tower: CodeTower) -> str:
        """See `ImageCodes.sha256`."""
        from megatron_eve.models.vila_u.tower_weights import fingerprint

        assert isinstance(tower, TowerSettings)
        return fingerprint(tower)

    def square_size(self, tower: CodeTower) -> int:
        """See `ImageCodes.square_size`."""
        assert isinstance(tower, TowerSettings)
        return tower.image_size

    def load_tower(self, tower: CodeTower, device: torch.device, dtype: torch.dtype) -> CodeModel:
        """See `ImageCodes.load_tower`."""
        from megatron_eve.models.vila_u.tower import load_tower

        assert isinstance(tower, TowerSettings)
        return load_tower(tower, device, dtype)

    def text_folder(self, tower: CodeTower, flags: Mapping[str, Any]) -> Path:
        """See `ImageCodes.text_folder`."""
        assert isinstance(tower, TowerSettings)
        return text_folder(tower, flags.get("siglip_config"))

    def load_contrast(self, tower: CodeTower, texts: Path, device: torch.device) -> ContrastModel:
        """See `ImageCodes.load_contrast`."""
        from megatron_eve.models.vila_u.contrast import load_contrast

        assert isinstance(tower, TowerSettings)
        return load_contrast(tower, texts, device)


IMAGE_CODES = VILAUCodes()
