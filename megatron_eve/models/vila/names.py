"""Names of VILA's tensors, beside the decoder's, as VILA 1.0 published them; `hf/layouts.py` has other layouts'."""

from __future__ import annotations

from megatron_eve.models.name_rules import Rule
from megatron_eve.models.tensor_layouts import Column, Layout, Replicated, Row
from megatron_eve.models.vila.config import ProjectorType
from megatron_eve.models.vila.hf.layouts import PROJECTOR_KEYS, TOWER_KEYS

_OURS = "vision_model.projector"
_FC1, _FC2 = "encoder.linear_fc1", "encoder.linear_fc2"

# By type: modules of ours, each with its number in the published `nn.Sequential` ("" where that is no sequence), and
# how its matrix and its bias are spread over tensor-parallel ranks.
_NORM, _COLUMN, _ROW = (Replicated(), Replicated()), (Column(), Column()), (Row(), Replicated())
_DOWNSAMPLE = {"norm": ("1", _NORM), _FC1: ("2", _COLUMN), _FC2: ("4", _ROW)}
_MODULES: dict[ProjectorType, dict[str, tuple[str, tuple[Layout, Layout]]]] = {
    "linear": {"encoder": ("", _COLUMN)},
    "mlp2x_gelu": {_FC1: ("0", _COLUMN), _FC2: ("2", _ROW)},
    "mlp3x_gelu": {"input": ("0", _COLUMN), _FC1: ("2", _COLUMN), _FC2: ("4", _ROW)},
    "mlp_downsample": _DOWNSAMPLE,
    "mlp_downsample_2x2_fix": _DOWNSAMPLE,
    "mlp_downsample_3x3_fix": {
        "norm": ("1", _NORM),
        "reduction": ("2", _COLUMN),
        "reduced_norm": ("4", _NORM),
        _FC1: ("5", _COLUMN),
        _FC2: ("7", _ROW),
    },
}


def rules(projector_type: ProjectorType) -> tuple[Rule, ...]:
    """All rules beside the decoder's; those of a qformer, which no published layout has, keep our names."""
    found = [Rule("vision_model.tower.*", (f"{TOWER_KEYS}*",), Replicated())]
    if projector_type == "qformer":
        last = Rule(f"{_OURS}.encoder.*", (f"{PROJECTOR_KEYS}encoder.*",), Column())
        return (*found, last, Rule(f"{_OURS}.*", (f"{PROJECTOR_KEYS}*",), Replicated()))
    for module, (number, layouts) in _MODULES[projector_type].items():
        theirs = f"{PROJECTOR_KEYS}{number}." if number else PROJECTOR_KEYS
        for tensor, layout in zip(("weight", "bias"), layouts, strict=True):
            found.append(Rule(f"{_OURS}.{module}.{tensor}", (f"{theirs}{tensor}",), layout))
    return tuple(found)
