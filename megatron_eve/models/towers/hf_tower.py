"""A vision tower from a folder in Hugging Face layout, loaded by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_eve.config import ConfigError
from megatron_eve.models.towers.sizes import remote_code_lock
from megatron_eve.runtime.digests import file_digest
from megatron_eve.runtime.wrong_content import wrong_content


def weight_files(folder: Path, flag: str) -> list[Path]:
    """Files of weights that are read: *.safetensors, or else *.bin.

    Args:
        folder: in Hugging Face layout.
        flag: that names it, for messages.

    Raises:
        ConfigError: a file that is something else (a pointer of git-lfs).
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in files:
        if other := wrong_content(file):
            raise ConfigError(f"{flag} {folder}: {file.name} cannot be read: it {other}")
    return files


def file_digests(folder: Path, flag: str) -> dict[str, str]:
    """The sha256 of each file that decides what a tower computes, by its name.

    These are the configuration, the weight files that are read, and Python files that may be.

    Args:
        folder: in Hugging Face layout.
        flag: that names it, for messages.

    Raises:
        ConfigError: a file of weights that is something else (a pointer of git-lfs).
    """
    weights = weight_files(folder, flag)
    files = [*sorted(folder.glob("*config.json")), *weights, *sorted(folder.glob("*.py"))]
    return {file.name: file_digest(file) for file in files}


def load_tower(folder: Path, trust_remote_code: bool, flag: str) -> Any:
    """The vision tower of a folder, of a model with a text tower too; from local files only.

    Args:
        folder: in Hugging Face layout.
        trust_remote_code: let Python files in the folder run.
        flag: that names the folder, for messages.

    Raises:
        ConfigError: a folder that cannot be loaded or lacks weights.
    """
    import transformers

    weight_files(folder, flag)
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    towers: Any = transformers.MODEL_MAPPING  # from configurations to models
    quiet = transformers.logging
    verbosity = quiet.get_verbosity()
    quiet.set_verbosity_error()  # the text tower's weights are left over on purpose
    quiet.disable_progress_bar()
    try:
        with remote_code_lock(trust_remote_code):
            config = transformers.AutoConfig.from_pretrained(folder, **common)
            vision = getattr(config, "vision_config", None)
            known = vision is not None and type(vision) in towers
            loader = towers[type(vision)] if known else transformers.AutoModel
            tower, report = loader.from_pretrained(
                folder, config=vision if known else config, output_loading_info=True, **common
            )
    except Exception as error:  # transformers raises nearly anything on a folder it cannot read
        reason = " ".join(str(error).split())
        if "weights_only" in reason:  # torch's advice to run the code of a pickle
            reason = "its weights are no file that torch saved, or a damaged one; copy the folder again"
        raise ConfigError(f"{flag} {folder}: cannot be loaded: {reason}") from error
    finally:
        quiet.set_verbosity(verbosity)
    # transformers fills what is missing with random numbers.
    missing = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if missing:
        raise ConfigError(
            f"{flag} {folder}: {len(missing)} weights are missing or of another shape, {missing[0]} among "
            "them; copy the folder again"
        )
    if vision is None or known:
        return tower
    if not hasattr(tower, "vision_model"):  # a model with a text tower, known to code of its own folder only
        raise ConfigError(f"{flag} {folder}: its {type(tower).__name__} has no part named vision_model")
    return tower.vision_model
