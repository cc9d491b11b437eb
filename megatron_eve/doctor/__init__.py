"""Checks a machine: its hardware, packages and problems, and what a run would use. The command is `tools/doctor.py`.

Packages may be missing, so the top of these modules imports only the standard library. What a run would use comes from
the same functions that choose it in training.
"""
