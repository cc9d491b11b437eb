"""Inference: greedy generation with a key-value cache, through the same model and schedules as training."""
