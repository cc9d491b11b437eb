"""The tasks of text that are asked through lm-eval, with their shots."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextTask:
    """A task or group of lm-eval's, and how it is asked.

    Attributes:
        name: in lm-eval.
        shots: examples in front of the question; None: as the task file has it.
        chat: as a conversation in the model's template, each example a turn; else the text is continued as it is.
        main: the metric that stands for it in a table.
    """

    name: str
    shots: int | None
    chat: bool
    main: str

    @property
    def protocol(self) -> str:
        """As a table names it."""
        shots = "" if self.shots is None else f", {self.shots} shots"
        return f"lm-eval{shots}{', chat template' if self.chat else ''}"


_STOCK = {
    "mmlu": ("mmlu", 5, "acc"),
    "bbh_cot_fewshot": ("bbh_cot_fewshot", None, "exact_match"),
    "drop": ("drop", 3, "f1"),
}
TEXT_TASKS = {
    f"{name}{'_chat' if chat else ''}": TextTask(stock, shots, chat, main)
    for chat in (False, True)
    for name, (stock, shots, main) in _STOCK.items()
}
"""By the names that --tasks takes."""
