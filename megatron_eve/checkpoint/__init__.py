"""Checkpoints: what they hold, how they are written so that a kill costs nothing, and who may resume from them."""
