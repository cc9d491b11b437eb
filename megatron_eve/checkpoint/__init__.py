"""Checkpoints: contents, writing that survives a kill at any time, and checks before a run resumes."""
