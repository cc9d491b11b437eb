"""What a family says of its folders in Hugging Face layout: the typed interface, without a format in it.

`ModelFamily.hugging_face()` gives an object of the type `HFFormat`. Its methods are asked by `checkpoint/hf/` (weights
that a run starts from), `convert/` (imports and exports), `inference/hf_engine.py` and `megatron_eve.hf`. Checks of
flags are asked for before torch is loaded, so its module imports no torch at its top.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_eve.config.schema import ModelConfig, RunConfig

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.name_rules import Rule

Flags = Mapping[str, Any]
"""Values of the flags of tools/convert_checkpoint.py by name (`dtype`), the family's own among them."""

JSONFiles = dict[str, dict[str, Any]]
"""What files of a folder hold, by path in it."""


class CopiedTensors(NamedTuple):
    """Tensors of another folder that an export holds, too.

    Attributes:
        folder: where they are: in Hugging Face layout, or a checkpoint of that part alone.
        names: their names in the export, as `HFFormat.rules` has them, each with its key in that folder. Of those that
            the checkpoint holds, too, these are written; both must have the same values.
        origin: for the summary, such as "the vision tower".
        keeps_dtype: they have the dtypes that they have there, unless one is asked for; else all get the model's.
    """

    folder: Path
    names: Mapping[str, str]
    origin: str
    keeps_dtype: bool = False


class Stated(NamedTuple):
    """A setting of the family that a folder states.

    Attributes:
        setting: its name among the family's settings.
        value: as the family's settings have it.
        field: where the folder states it, for messages; usually a name in config.json.
        assumed: it is of a model that the folder names and does not hold; a run is not compared with it.
    """

    setting: str
    value: Any
    field: str
    assumed: bool = False


class PartFolder(NamedTuple):
    """A folder that holds one part of a model: it is read where the model's own folder lacks that part.

    Attributes:
        part: as `ModelFamily.parts` names it; one of `HFFormat.optional_parts`.
        folder: in Hugging Face layout.
        flag: that names it, for messages.
        prefixes: what its keys begin with, each with what stands there instead in `HFFormat.rules`. The first that any
            key begins with counts, and keys that begin otherwise are left out.
    """

    part: str
    folder: Path
    flag: str
    prefixes: Mapping[str, str]


class FolderTensors(Protocol):
    """The tensors of a folder in Hugging Face layout, read one at a time (`models.hf_folder.HFFolder`)."""

    def keys(self) -> Iterable[str]:
        """Their names, as `HFFormat.rules` have them."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read one."""
        ...


class HFFormat(Protocol):
    """Folders of a family in Hugging Face layout.

    A format is a subclass with what has no default: methods with a default suit a family whose conversions have no
    flags of their own and whose folders hold all parts.

    Attributes:
        title: what messages call a model of this family.
        model_types: `model_type` in config.json of its folders.
        other_model_types: `model_type`s that are easily taken for one of those, and what such a folder is, with the
            remedy.
        fields: numbers above 0 in config.json, where they are stated, and the family's settings that they are.
        run_decides: settings that a run may have otherwise than the folder that it starts from.
        optional_parts: which keys hold a part, as `ModelFamily.parts` names them, that a folder may lack.
        ignored_keys: patterns of keys that nothing is made of, and why.
        left_out: what an export leaves out of a checkpoint, and why.
        chat_templates: the family's own templates (`TextRules.templates`) in Jinja, for transformers, by name.
        rotary_buffers: does the published code expect the frequencies of the rotary embedding with every layer?
        qkv_bias: have query, key and value of every model of the family biases?
    """

    title: str
    model_types: tuple[str, ...]
    other_model_types: Mapping[str, str] = {}
    fields: Mapping[str, str] = {}
    run_decides: Collection[str] = ()
    optional_parts: Mapping[str, re.Pattern[str]] = {}
    ignored_keys: Mapping[str, str] = {}
    left_out: str = "what only training needs"
    rotary_buffers: bool = False
    qkv_bias: bool = False
    chat_templates: Mapping[str, str] = {}

    # --- config.json of a folder ---

    def check_fields(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """Why a model with this config.json cannot be computed here: a sentence each, which begins with the field."""
        return iter(())

    def has_experts(self, fields: Mapping[str, Any]) -> bool:
        """Has the decoder of a model with this config.json experts for rows of images?"""
        return False

    def folders(self, fields: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
        """The folders in which a model lies, each with weights, and the names of tensors in them.

        Args:
            fields: of the config.json of the model's folder itself.

        Returns:
            Their names, relative to the model's folder; the first holds the language model with its tokenizer, and a
            config.json. Each has what keys begin with there, and what stands there instead in `rules`; the longest
            beginning counts, and a key with none of them is the same in both. By default all is in the model's folder,
            under the names of `rules`.
        """
        return {".": {}}

    def language_fields(self, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What config.json says of the language model, where it says it in a section; None where it has none."""
        return None

    def stated(self, fields: Mapping[str, Any], folder: Path) -> Sequence[Stated]:
        """The family's settings that a folder states: by default those of `fields`.

        Args:
            fields: of its config.json.
            folder: of this family.

        Raises:
            ConfigError: a file beside config.json that cannot be read.
        """
        return [Stated(ours, fields[name], name) for name, ours in self.fields.items() if name in fields]

    # --- weights ---

    def rules(self, model: ModelConfig, vision: Any) -> Sequence[Rule]:
        """The names of a model's tensors, beside the decoder's."""
        ...

    def has_part(self, part: str, vision: Any) -> bool:
        """Has a model of these settings this part, as `ModelFamily.parts` names them?"""
        return True

    def part_folders(self, vision: Any) -> Sequence[PartFolder]:
        """Folders that hold parts of a model of these settings, such as a frozen tower's."""
        return ()

    def keeps_dtype(self, name: str) -> bool:
        """Does a tensor of this name in `rules` stay as it is under `--dtype`? Codebooks do."""
        return False

    def check_weights(self, vision: Any, source: FolderTensors) -> Iterator[str]:
        """Why a model of these settings cannot take the weights of a folder: a sentence each.

        Args:
            vision: of the model.
            source: the folder's tensors, with those of `part_folders` that it lacks.
        """
        return iter(())

    def module_names(self, vision: Any) -> Mapping[str, str]:
        """What names in `rules` begin with, and where that is in the model for transformers, on which peft works.

        By default modules there are called as in `rules`.
        """
        return {}

    # --- import ---

    def add_import_flags(self, parser: argparse.ArgumentParser) -> None:
        """Flags of an import that are the family's own; names are none of `tools/convert_checkpoint.py`."""
        return None

    def check_import_flags(self, flags: Flags) -> Iterator[str]:
        """Errors in those flags: a sentence each, with the flag and the remedy.

        Raises:
            ConfigError: a folder that they name and that cannot be read.
        """
        return iter(())

    def import_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> Any:
        """The family's settings of a checkpoint that is made of a folder.

        Args:
            fields: of its config.json.
            folder: one of this family, or of a language model alone.
            flags: of the import.
        """
        ...

    def adds_experts(self, flags: Flags) -> bool:
        """Does the decoder get experts for rows of images, which begin as copies where the folder has none?"""
        return False

    def import_fingerprint(self, flags: Flags) -> dict[str, Any] | None:
        """What identifies the frozen models that these flags name, as `ModelFamily.fingerprint`."""
        return None

    # --- export ---

    def add_export_flags(self, parser: argparse.ArgumentParser) -> None:
        """Flags of an export that are the family's own."""
        return None

    def check_export_flags(self, published: bool, flags: Flags) -> Iterator[str]:
        """Errors in those flags: a sentence each.

        Args:
            published: the export is in the published format, not in that for transformers.
            flags: of the export.
        """
        return iter(())

    def check_export(self, config: RunConfig, published: bool, flags: Flags) -> Iterator[str]:
        """Why a checkpoint cannot be exported: a sentence each.

        Args:
            config: it was made with.
            published: in the published format, not in that for transformers.
            flags: of the export.
        """
        return iter(())

    def export_settings(self, vision: Any, flags: Flags) -> Any:
        """The family's settings of the model that an export holds."""
        return vision

    def export_folders(self, published: bool, vision: Any, flags: Flags) -> Mapping[str, Mapping[str, str]]:
        """The folders of an export, as `folders`: by default one, with the names of `rules`.

        Args:
            published: in the published format, not in that for transformers.
            vision: settings of the model that it holds.
            flags: of the export.
        """
        return {".": {}}

    def rows(self, model: ModelConfig, image_token_id: int) -> int:
        """Rows of the embedding and of the output layer in a folder for transformers: by default the vocabulary's.

        Args:
            model: sizes of the decoder.
            image_token_id: id of `<image>` in the tokenizer that the folder gets.
        """
        return model.vocab_size

    def copied_tensors(
        self, config: RunConfig, frozen: Mapping[str, Any] | None, published: bool, flags: Flags
    ) -> CopiedTensors | None:
        """What an export holds of another folder, such as a frozen model's weights.

        Args:
            config: of the model that the export holds (`export_settings`).
            frozen: what identified the frozen models of the run (`ModelFamily.fingerprint`); None where it had none.
            published: in the published format, not in that for transformers.
            flags: of the export.

        Raises:
            ConfigError: the folder is not there, or is another model's.
        """
        return None

    def published_files(
        self, model: ModelConfig, vision: Any, dtype: str, ids: Mapping[str, int], flags: Flags
    ) -> JSONFiles:
        """What the published format holds beside weights and tokenizer, by path in the folder.

        `models/rope_scaling.py` gives `rope_scaling` of config.json.

        Args:
            model: sizes of the decoder.
            vision: the family's settings.
            dtype: of the weights, such as "bfloat16".
            ids: of control tokens, as config.json has them (`bos_token_id`).
            flags: of the export.
        """
        ...

    def transformers_files(
        self, model: ModelConfig, vision: Any, dtype: str, ids: Mapping[str, int], image_token_id: int
    ) -> JSONFiles:
        """What the format for transformers holds beside weights, code and tokenizer; likewise.

        Args:
            image_token_id: id of `<image>` in the tokenizer that the folder gets.

        Returns:
            The files, with config.json and processor_config.json, which names the class of the processor.
        """
        ...

    def chat_template(self, flags: Flags) -> str | None:
        """Name of the template of conversations that an export for transformers holds; None for the family's own."""
        return None

    def code(self, vision: Any) -> Sequence[Path]:
        """Files with the model for transformers, which an export holds and which import nothing of this package.

        None, by default, for a model that transformers has itself.
        """
        return ()

    def register(self) -> Mapping[str, type]:
        """Register the model with transformers, so that no code from a folder has to run.

        Returns:
            The classes, by name: what `megatron_eve.hf` holds.
        """
        return {}
