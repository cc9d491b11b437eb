"""Readers of input files: one module for each layout, each with a `Source`."""
