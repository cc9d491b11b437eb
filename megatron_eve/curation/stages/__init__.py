"""The stages of `tools/curate.py`, one in each file: its dataclass, `add_flags(parser)` and `from_flags(flags)`."""
