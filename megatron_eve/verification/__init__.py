"""Compares this model with golden tensors of the published one (tools/verify_golden.py), and runs with each other."""
