"""Hold this model against golden tensors: numbers that the published model produced (see tools/verify_golden.py)."""
