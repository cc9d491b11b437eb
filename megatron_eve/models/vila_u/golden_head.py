"""Golden cases of VILA-U's depth transformer alone: logits, loss and gradients for given hidden states and codes, and
the most likely codes for hidden states alone (generate.safetensors).

Imports no torch at its top.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_eve.models.golden_format import Comparison, tensor_names
from megatron_eve.models.vila_u.config import VILAUConfig
from megatron_eve.models.vila_u.golden_towers import case_tower
from megatron_eve.models.vila_u.hf.config import stated
from megatron_eve.models.vila_u.hf.layouts import DEPTH_KEYS, TOWER_KEYS

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.name_rules import Rule
    from megatron_eve.models.vila_u.visual_head import VisualHead

_INPUTS, _OUTPUTS, _GENERATED = "inputs.safetensors", "outputs.safetensors", "generate.safetensors"
_ARGMAX = re.compile(r"(argmax_cfg([\d.]+))\.code")


def is_head_case(folder: Path) -> bool:
    """Does a folder hold hidden states and codes, and the logits that the public code made of them?"""
    needed = tensor_names(folder / _INPUTS) >= {"embed_from_body", "code"}
    return needed and {"logits", "loss", "grad_body", "code_emb_with_depth"} <= tensor_names(
        folder / _OUTPUTS
    )


def head_comparisons(folder: Path) -> Iterator[Comparison]:
    """Logits, sums of codebook vectors, loss and gradients. Collective over tensor-parallel ranks."""
    import torch
    from megatron.core import parallel_state
    from safetensors.torch import load_file

    from megatron_eve.models.vila_u.visual_head import VisualHeadInputs
    from megatron_eve.runtime.accelerator import accelerator

    inputs, golden = load_file(folder / _INPUTS), load_file(folder / _OUTPUTS)
    device = accelerator().device
    hidden = inputs["embed_from_body"].flatten(0, 1)[:, None].to(device).requires_grad_()
    codes = inputs["code"].flatten(0, 1).to(device)
    head, rules = case_head(folder, hidden.shape[-1])
    given = VisualHeadInputs(torch.arange(len(codes), device=device), codes)
    with torch.no_grad():
        sums, logits = head.codebook.cumulative(codes), head.logits(hidden, given)
    expected = golden["code_emb_with_depth"].cumsum(
        -2
    )  # of the public code, not summed over the depths before
    yield Comparison("code_emb_with_depth, summed", _like(sums, expected), expected, "activation")
    yield Comparison("logits", _like(logits, golden["logits"]), golden["logits"], "activation")
    loss = head(hidden, None, None, given).mean()
    yield Comparison("loss", loss.detach(), golden["loss"], "activation")
    loss.backward()
    assert hidden.grad is not None
    yield Comparison("grad_body", _like(hidden.grad, golden["grad_body"]), golden["grad_body"], "gradient")
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, (rule, key) in rules.items():
        whole = golden.get(f"grad.{key.removeprefix(DEPTH_KEYS)}")
        if whole is not None:
            gradient = head.get_parameter(name).grad
            assert gradient is not None
            yield Comparison(f"grad.{key}", gradient, rule.layout.shard(whole, rank, size), "gradient")
    if (folder / _GENERATED).is_file():
        yield from _drawing_comparisons(head, load_file(folder / _GENERATED))


def _drawing_comparisons(head: VisualHead, golden: Mapping[str, torch.Tensor]) -> Iterator[Comparison]:
    """Most likely codes and their guided logits, of conditional rows and as many unconditional ones behind them."""
    import torch

    from megatron_eve.runtime.accelerator import accelerator

    hidden = golden["embed_from_body"].flatten(0, 1).to(accelerator().device)
    for name in sorted(golden):
        if not (case := _ARGMAX.fullmatch(name)):
            continue
        guidance, guided = float(case[2]), list[torch.Tensor]()

        def choose(
            logits: torch.Tensor,
            depth: int,
            guidance: float = guidance,
            guided: list[torch.Tensor] = guided,
        ) -> torch.Tensor:
            conditional, unconditional = logits.chunk(2)
            guided.append(unconditional + guidance * (conditional - unconditional))
            return guided[-1].argmax(-1).repeat(2)

        with torch.no_grad():
            codes = head.draw_codes(hidden, choose)
            sums = head.codebook.embed(codes)
        theirs = golden[name]
        yield Comparison(f"{case[1]}.code", _like(codes, theirs), theirs, "exact")
        logits, features = f"{case[1]}.guided_logits", f"{case[1]}.out_features"
        if logits in golden:
            ours = _like(torch.stack(guided, dim=1), golden[logits])
            yield Comparison(logits, ours, golden[logits], "activation")
        if features in golden:
            yield Comparison(features, _like(sums, golden[features]), golden[features], "rounding")


def _like(ours: torch.Tensor, golden: torch.Tensor) -> torch.Tensor:
    """Rows of positions as [samples, positions] of the case; another number of values is left for the comparison."""
    return ours.reshape(golden.shape) if ours.numel() == golden.numel() else ours


def case_head(folder: Path, hidden_size: int) -> tuple[VisualHead, Mapping[str, tuple[Rule, str]]]:
    """The head with the case's weights, without dropout, and the rule and the published key of each parameter."""
    import torch
    from megatron.core import parallel_state

    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.hf_folder import HFFolder
    from megatron_eve.models.name_rules import rule_for
    from megatron_eve.models.vila_u.names import rules
    from megatron_eve.models.vila_u.visual_head import VisualHead
    from megatron_eve.runtime.accelerator import accelerator

    tower = case_tower(folder)
    sizes = {one.setting: one.value for one in stated({}, tower.parent)}
    vision = replace(VILAUConfig(), depth_dropout=0.0, **sizes)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    config = RunConfig(
        model=ModelConfig(hidden_size=hidden_size), parallel=ParallelConfig(tensor_model_parallel_size=size)
    )
    head = VisualHead(transformer_config(config), vision).to(accelerator().device)
    weights, names, found = HFFolder(tower.parent, {tower.name: {"": TOWER_KEYS}}), rules(vision), {}
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            rule, keys = rule_for(f"visual_head.{name}", names)
            found[name] = rule, keys[0]
            whole = rule.layout.merge([weights.tensor(key) for key in keys], None)  # type: ignore[arg-type]
            parameter.copy_(rule.layout.shard(whole, rank, size))
    return head, found
