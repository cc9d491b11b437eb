"""The page about a selection: sizes of clusters, distances, and contact sheets; one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.inspecting.charts import bar_chart
from megatron_eve.data.inspecting.html import chart, figure, html_page, table
from megatron_eve.data.inspecting.statistics import Histogram

DISTANCES = np.linspace(0, 2, 101)
"""Edges of the histograms of distances."""
_SIZES = np.array([0, 1, *(step * 10**power for power in range(7) for step in (1, 2, 5))], dtype=np.float64)[
    1:
]


def selection_page(
    name: str,
    facts: Sequence[tuple[str, str]],
    sizes: NDArray[np.int64],
    distances: tuple[Histogram, Histogram],
    sheets: Sequence[tuple[str, bytes]],
) -> str:
    """The text of the page.

    Args:
        name: of the work folder.
        facts: rows of the summary.
        sizes: int64 [K], pictures of each cluster.
        distances: of all pictures, and of those that were selected.
        sheets: title and PNG file of each contact sheet.
    """
    filled = Histogram(_SIZES)
    filled.add(sizes[sizes > 0])
    charts = [
        _histogram("Sizes of clusters", filled, "pictures of a cluster", lambda value: f"{value:,.0f}"),
        _histogram("Distances, all pictures", distances[0], "1 - cosine", lambda value: f"{value:.2f}"),
        _histogram("Distances, selected pictures", distances[1], "1 - cosine", lambda value: f"{value:.2f}"),
    ]
    note = (
        "<p>First line: the pictures nearest to the centre. Second line: the farthest that were selected. Below each "
        "picture is its distance.</p>"
    )
    return html_page(
        name,
        f"<h1>Selection in {escape(name)}</h1>"
        f"<h2>Counts</h2>{table(facts)}"
        f'<h2>Clusters</h2><div class="charts">{"".join(charts)}</div>'
        f"<h2>{len(sheets)} clusters, from the largest to the smallest</h2>{note}"
        + "".join(figure(title, png) for title, png in sheets),
    )


def _histogram(name: str, values: Histogram, axis: str, write: Callable[[float], str]) -> str:
    span = "none"
    if values.counts.sum():
        span = f"{write(values.low)} to {write(values.high)}, mean {write(values.mean)}"
    return chart(name, span, bar_chart(values.edges, values.counts, axis, write, used_only=True))
