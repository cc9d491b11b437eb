"""Evaluation: how answers to the questions of published benchmarks are scored."""
