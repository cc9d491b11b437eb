"""The colour of EVE's margins."""

from megatron_eve.models.towers.normalisation import CLIP_MEAN

PAD_COLOUR = (int(255 * CLIP_MEAN[0]), int(255 * CLIP_MEAN[1]), int(255 * CLIP_MEAN[2]))
"""What surrounds a picture on the teacher's square, as published (122, 116, 104)."""
