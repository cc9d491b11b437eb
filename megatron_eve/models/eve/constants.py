"""CLIP's normalisation, which EVE keeps. Pixels travel as uint8; the model normalises on its device."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of R, G, B on the scale 0..1."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of R, G, B on the scale 0..1."""

PAD_COLOUR = (int(255 * CLIP_MEAN[0]), int(255 * CLIP_MEAN[1]), int(255 * CLIP_MEAN[2]))
"""What surrounds a picture on the teacher's square, as published (122, 116, 104)."""
