"""The doctor: what this machine has and lacks, and what follows for a run. `tools/doctor.py` is its command.

It is for machines where something is missing, so nothing outside the standard library is imported before it is known to
be there; and what a run would take is asked of the very functions that choose it when training.
"""
