"""Names of the tensors of EVE v2's front end in the published folders (baaivision/EVE, `EVEv2`)."""

from __future__ import annotations

from megatron_eve.models.name_rules import Rule
from megatron_eve.models.tensor_layouts import Replicated

RULES: tuple[Rule, ...] = (Rule("vision_model.patch_embedding.*", ("model.vision_tower.*",), Replicated()),)
