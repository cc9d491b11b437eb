"""VILA's golden cases: see `GoldenFormat`."""

from __future__ import annotations

from megatron_eve.models.golden_format import LanguageGolden


class VILAGolden(LanguageGolden):
    """See `GoldenFormat`."""
