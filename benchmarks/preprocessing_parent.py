"""Measures the CPU time of the parent process of preprocessing; benchmarks/preprocessing.py runs this script.

    python benchmarks/preprocessing_parent.py specification.json

The specification is `{"rounds": int, "one": settings of an input of one row, "inputs": [settings, ...]}`; settings are
fields of PreprocessConfig. Prints `{"start": [seconds], "preprocess": [[seconds], ...], "rows": [[seconds], ...]}`:
CPU time of this process alone (`time.process_time`) in each round, for each input. It imports only preprocessing, since
each worker imports this file again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from megatron_eve.data.errors import DataError
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_eve.data.sources.recognise import open_source


def of_preprocess(settings: dict[str, Any]) -> float:
    """CPU seconds of this process while two workers encode."""
    began = time.process_time()
    try:
        preprocess(PreprocessConfig(**settings, overwrite=True), progress=False)
    except DataError as error:  # OpenImages has no captions, so all rows are skipped
        if "can be used" not in str(error):
            raise
    return time.process_time() - began


def of_rows(settings: dict[str, Any]) -> float:
    """CPU seconds of `source.rows()` alone, over all rows."""
    source = open_source([settings["input"]], None, settings.get("image_root"))
    began = time.process_time()
    for _ in source.rows():
        pass
    return time.process_time() - began


def main() -> None:
    """Measure all inputs in turns, after a warm-up round."""
    from megatron_eve.runtime.command_line import command_parser_of

    parser = command_parser_of(__doc__)
    parser.add_argument("specification", type=Path, metavar="FILE", help="what to measure, as JSON (above)")
    wanted = json.loads(parser.parse_args().specification.read_text())
    found: dict[str, Any] = {"start": [], "preprocess": [[] for _ in wanted["inputs"]]}
    found["rows"] = [[] for _ in wanted["inputs"]]
    of_preprocess(wanted["one"])
    for _ in range(wanted["rounds"]):
        found["start"].append(of_preprocess(wanted["one"]))
        for number, settings in enumerate(wanted["inputs"]):
            found["preprocess"][number].append(of_preprocess(settings))
            found["rows"][number].append(of_rows(settings))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
