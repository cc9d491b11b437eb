"""Facts of the published EVE folders (baaivision/EVE, `EVEv1`) that are known without torch."""

from __future__ import annotations

import re

# The aligning layer's depths are named by number, and the number means a depth by the published interval only.
PUBLISHED_TAP_INTERVAL = 4
# Keys of the aligning layer, which a folder may lack.
ALIGNING_HF_KEYS = re.compile(r"model\.vision_tower_compressor\.(norm_layer|input_layer|output_layer)\..*")
# Keys that nothing is made of, and why: the teacher, which the published folders list twice.
IGNORED_KEYS = {
    r"model\.vision_tower_compressor\.clip_layer\..*|model\.vision_clip\..*": (
        "the teacher, which runs name by --teacher-model"
    )
}
