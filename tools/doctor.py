#!/usr/bin/env python3
"""Say what this machine has and lacks, and what follows for a run.

    python tools/doctor.py

It needs nothing installed, starts nothing and writes nothing. The exit status is 0 if a run can start here, and 1 if
something that it needs is missing, or something installed is broken or wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Examine, and print the report; returns the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036  what this command is there to say
        print(f"error: Python {sys.version.split()[0]}: this project wants 3.11 to 3.13", file=sys.stderr)
        return 1
    # Also where this package has not been installed yet.
    sys.path.insert(0, str(ROOT))
    from megatron_eve.runtime.command_line import command_parser_of

    command_parser_of(__doc__).parse_args()
    from megatron_eve.doctor.machine_report import examine

    report, sound = examine(ROOT / "pyproject.toml")
    print(report)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
