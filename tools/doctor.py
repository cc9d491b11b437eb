#!/usr/bin/env python3
r"""Say what this machine has and lacks, and what follows for a run.

    python tools/doctor.py
    python tools/doctor.py --perceptual-weights vgg16.pth \
        --perceptual-linear vgg.pth

It needs nothing installed, starts nothing and writes nothing. The exit status is 0 if a run can start here, and 1 if
something that it needs is missing, or something installed, or a file that is named, is broken or wrong.
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

    parser = command_parser_of(__doc__)
    files = parser.add_argument_group("files", "Files of a run that trains a vision tower, to be looked at.")
    files.add_argument(
        "--perceptual-weights", type=Path, metavar="FILE", help="weights of the VGG-16 of the perceptual loss"
    )
    files.add_argument(
        "--perceptual-linear", type=Path, metavar="FILE", help="its five maps, if they are not in that file"
    )
    flags = parser.parse_args()
    if flags.perceptual_linear and not flags.perceptual_weights:
        parser.error("--perceptual-linear: only used with --perceptual-weights; add that, or leave it out")
    from megatron_eve.doctor.machine_report import examine

    report, sound = examine(ROOT / "pyproject.toml", flags.perceptual_weights, flags.perceptual_linear)
    print(report)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
