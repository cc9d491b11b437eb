"""Conversion between Hugging Face folders and checkpoints, by one table of names for both directions."""
