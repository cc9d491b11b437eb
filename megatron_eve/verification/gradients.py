"""Compares the gradients of a step with those of a golden case."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from megatron_eve.checkpoint.hf.rules import optional_part
from megatron_eve.models.registry import find_family
from megatron_eve.verification.cases import ModelCase
from megatron_eve.verification.results import GRADIENTS, CheckResult, distance, equal, relative


def check_gradients(
    case: ModelCase, objectives: Collection[str], gradients: dict[str, torch.Tensor]
) -> list[CheckResult]:
    """`grad.*` is of the total loss. Where the run lacks an objective of it, only gradients of the language loss can be
    compared: those whose other parts are given apart, and lm_head's, which gets none of them."""
    outputs, rows, golden_cases = case.outputs, list[CheckResult](), find_family(case.family).golden()
    noise = golden_cases.without_gradient
    apart = [
        golden_cases.gradients[loss]
        for loss, objective in golden_cases.losses.items()
        if objective not in objectives and float(outputs.get(loss, torch.zeros(()))) != 0.0
    ]
    for key, golden in outputs.items():
        if key.startswith("gradnorm.") and not apart:
            rows.append(_compare_norm(key, golden, gradients, noise))
        if not key.startswith("grad."):
            continue
        name = key.removeprefix("grad.")
        if not apart:
            if name in gradients and noise is not None and noise.fullmatch(name):
                rows.append(distance(key, gradients[name], golden, GRADIENTS))
            elif name in gradients:
                rows.append(relative(key, gradients[name], golden, GRADIENTS))
            elif not optional_part(find_family(case.family), name):  # a batch without any image needs none
                rows.append(equal(f"{key} is missing", 1))
        elif all(f"{prefix}{name}" in outputs for prefix in apart):
            language = golden - sum(outputs[f"{prefix}{name}"] for prefix in apart)
            rows.append(relative(f"language {key}", gradients[name], language, GRADIENTS))
        elif name == "lm_head.weight":
            rows.append(relative(f"language {key}", gradients[name], golden, GRADIENTS))
    return rows


def _compare_norm(
    key: str, golden: torch.Tensor, gradients: dict[str, torch.Tensor], noise: re.Pattern[str] | None
) -> CheckResult:
    """The norm of a gradient of which a case holds no more."""
    name = key.removeprefix("gradnorm.")
    if name not in gradients:
        return equal(f"{key} is missing", 1)
    norm = gradients[name].double().norm()
    compare = distance if noise is not None and noise.fullmatch(name) else relative
    return compare(key, norm, golden, GRADIENTS)
