"""Hold this model against golden tensors of the published one (tools/verify_golden.py), and runs against each other."""
