"""The three training stages as data (arXiv 2406.11832, section 3.2 and Table 8).

A stage says which parameters train; rates, batch sizes and templates are settings of its recipe in `examples/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from megatron_eve.models.vlm import ALIGNING_PARAMETERS, VisionLanguageModel


@dataclass(frozen=True)
class Stage:
    """What trains in one stage.

    Attributes:
        name: for plans and logs.
        trainable: globs over global parameter names; everything else is frozen before the DDP wrap.
    """

    name: str
    trainable: tuple[str, ...]

    def freeze(self, chunk: VisionLanguageModel) -> None:
        """Freeze every parameter of a bare model chunk that this stage does not train."""
        for name, parameter in chunk.global_named_parameters():
            if not any(fnmatch(name, pattern) for pattern in self.trainable):
                parameter.requires_grad_(False)


STAGES: dict[int, Stage] = {
    # The decoder stays as the language model left it, so that noisy early visual rows cannot break it.
    1: Stage("LLM-guided pre-alignment", ("vision_model.*", *ALIGNING_PARAMETERS)),
    2: Stage("generative pretraining", ("*",)),
    3: Stage("supervised fine-tuning", ("*",)),
}
