"""The folders of VILA-U's towers, for tools/convert_checkpoint.py. Imports no torch at its top."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eve.models.image_codes import CodeTower
from megatron_eve.models.vila_u.tower_folder import is_published, is_tower, tower_record
from megatron_eve.models.vila_u.tower_names import (
    HEAD,
    copies,
    is_codebook,
    is_used,
    published_name,
    stored_name,
    stored_names,
)
from megatron_eve.models.vila_u.tower_settings import TowerSettings


class VILAUFolders:
    """See `TowerFolders`."""

    def is_tower(self, folder: Path) -> bool:
        """See `TowerFolders.is_tower`."""
        return is_tower(folder)

    def is_published(self, folder: Path) -> bool:
        """See `TowerFolders.is_published`."""
        return is_published(folder)

    def record(self, tower: CodeTower) -> dict[str, Any]:
        """See `TowerFolders.record`."""
        return asdict(tower_record(_settings(tower)))

    def stored_names(self, keys: Iterable[str], tower: CodeTower) -> Mapping[str, tuple[str, ...]]:
        """See `TowerFolders.stored_names`."""
        return stored_names(keys, _settings(tower))

    def published_names(self, name: str, tower: CodeTower) -> tuple[str, ...]:
        """See `TowerFolders.published_names`."""
        return copies(name, _settings(tower))

    def shapes(self, tower: CodeTower) -> Mapping[str, tuple[int, ...]]:
        """See `TowerFolders.shapes`."""
        import torch

        from megatron_eve.models.vila_u.tower import UnifiedTower

        settings, found = _settings(tower), {}
        with torch.device("meta"):
            for name, tensor in UnifiedTower(settings).state_dict().items():
                stored = stored_name(published_name(name), settings)
                assert stored is not None
                found[stored] = tuple(tensor.shape)
        return found

    def keeps_dtype(self, name: str) -> bool:
        """See `TowerFolders.keeps_dtype`."""
        return is_codebook(name)

    def left_out(self, name: str, tower: CodeTower) -> str | None:
        """See `TowerFolders.left_out`."""
        if name.startswith(HEAD):
            return "the decoder's head, which draws and is no part of the tower"
        return None if is_used(name, _settings(tower)) else "neither codes nor pictures need it"

    def register(self) -> Mapping[str, type]:
        """See `TowerFolders.register`."""
        from megatron_eve.models.vila_u.hf.register import register

        return register()

    def write_files(self, folder: Path, tower: CodeTower, dtype: str, published: bool) -> None:
        """See `TowerFolders.write_files`."""
        settings = _settings(tower)
        if not published:
            from megatron_eve.models.vila_u.hf.tower_folder import write_transformers_tower

            write_transformers_tower(folder, settings, dtype)
            return
        files = tower_record(settings).files
        for name, fields in files.items():
            changed = {"torch_dtype": dtype} if "torch_dtype" in fields else {}
            text = json.dumps({**fields, **changed}, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def _settings(tower: CodeTower) -> TowerSettings:
    assert isinstance(tower, TowerSettings)
    return tower
