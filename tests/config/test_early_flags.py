"""Flags that are read before the parser is built."""

from __future__ import annotations

import pytest

from megatron_eve.config import ConfigError
from megatron_eve.config.early_flags import flag_value, flag_values


def test_values_are_those_of_the_last_time() -> None:
    words = ["import", "--family", "a", "--source=x", "--config", "one", "two", "--family=b", "--dry-run"]
    assert flag_value(words, "--family") == "b"
    assert flag_value(words, "--source") == "x"
    assert flag_values(words, "--config") == ("one", "two")
    assert flag_values(words, "--preset") == () and flag_value(words, "--preset") is None


@pytest.mark.parametrize("words", [["--family"], ["--family", "--seed", "1"], ["--family="]])
def test_a_flag_without_a_value_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--family: a value is missing behind it"):
        flag_value(words, "--family")
