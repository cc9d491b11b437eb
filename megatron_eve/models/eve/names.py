"""Names of EVE's tensors in the published folders (baaivision/EVE, `EVEv1`), beside the decoder's."""

from __future__ import annotations

from functools import cache

from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.name_rules import Rule
from megatron_eve.models.tensor_layouts import Column, Replicated, Row

_PROJECTOR = "vision_model.projector.encoder"

FRONT_END_RULES: tuple[Rule, ...] = (
    Rule(f"{_PROJECTOR}.linear_fc1.weight", ("model.mm_projector.0.weight",), Column()),
    Rule(f"{_PROJECTOR}.linear_fc1.bias", ("model.mm_projector.0.bias",), Column()),
    Rule(f"{_PROJECTOR}.linear_fc2.weight", ("model.mm_projector.2.weight",), Row()),
    Rule(f"{_PROJECTOR}.linear_fc2.bias", ("model.mm_projector.2.bias",), Replicated()),
    Rule("vision_model.patch_embedding.*", ("model.vision_tower.*",), Replicated()),
)


def rules(vision: EVEConfig, num_layers: int) -> tuple[Rule, ...]:
    """All rules beside the decoder's: those of the front end and of the aligning layer.

    Its intermediate features are numbered by depth: the published `norm_layer.j` belongs to the depth
    `num_layers - 4 j`, ours to that by `--tap-interval`. 0 is the last, behind the final norm, and the last of them the
    decoder's input.

    Args:
        vision: EVE's settings.
        num_layers: of the decoder.
    """
    return (*FRONT_END_RULES, *aligning_rules(vision.tap_depths(num_layers)))


@cache
def aligning_rules(tap_depths: tuple[int, ...]) -> tuple[Rule, ...]:
    """The rules of an aligning layer of these depths, last first."""
    compressor = "model.vision_tower_compressor"
    found = []
    for j, depth in enumerate(tap_depths):
        last, first = "aligning_layer.query_tap", "input_tap"
        tap = last if j == 0 else first if depth == 0 else f"decoder.layers.{depth - 1}.tap"
        theirs = f"{compressor}.norm_layer.{j}"
        found += [
            Rule(f"{tap}.norm.weight", (f"{theirs}.0.weight",), Replicated()),
            Rule(f"{tap}.norm.bias", (f"{theirs}.0.bias",), Replicated()),
            Rule(f"{tap}.projection.weight", (f"{theirs}.1.weight",), Replicated()),
        ]
    for layer in ("input_layer", "output_layer"):
        found.append(Rule(f"aligning_layer.{layer}.*", (f"{compressor}.{layer}.*",), Replicated()))
    return tuple(found)
