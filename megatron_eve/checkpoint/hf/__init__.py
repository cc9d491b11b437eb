"""Folders in the layout of Hugging Face: what they hold, and how it is read into this rank's part of a model."""
