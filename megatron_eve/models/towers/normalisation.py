"""How pixels are normalised for vision towers. Pixels travel as uint8; the model normalises on its device."""

from __future__ import annotations

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of R, G, B on the scale 0..1."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of R, G, B on the scale 0..1."""

NORMALISATION = {"clip": (CLIP_MEAN, CLIP_STD), "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
"""Mean and standard deviation by the type of the tower."""
