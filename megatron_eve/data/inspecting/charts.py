"""Charts as plain SVG, without a library. A tooltip shows the count under the pointer."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 470, 220
_LEFT, _RIGHT, _BOTTOM, _TOP = 56, 24, 44, 10
_BAR = "#4a7fb5"


def bar_chart(
    edges: NDArray[np.float64],
    counts: NDArray[np.int64],
    axis: str,
    label: Callable[[float], str] = lambda value: f"{value:,.0f}",
    *,
    centred: bool = False,
    used_only: bool = False,
) -> str:
    """A histogram: one bar between each two edges.

    Args:
        edges: [n + 1].
        counts: [n].
        axis: label of the x axis, with its unit.
        label: formats an edge.
        centred: each bar stands for one whole number, its left edge, written beneath its middle.
        used_only: leave out the empty bars at both ends.
    """
    if used_only:
        low, stop = _used(counts)
        edges, counts = edges[low : stop + 1], counts[low:stop]
    inner, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM - _TOP
    most = max(int(counts.max(initial=0)), 1)
    step = inner / len(counts)
    parts = [_open(_HEIGHT)]
    for value in sorted({0, most // 2, most}):
        y = _TOP + high * (1 - value / most)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for number, count in enumerate(counts.tolist()):
        size = max(high * count / most, 1.0 if count else 0.0)
        span = label(edges[number]) if centred else f"{label(edges[number])} to {label(edges[number + 1])}"
        parts.append(
            f'<rect x="{_LEFT + number * step:.1f}" y="{_TOP + high - size:.1f}" width="{max(step - 1, 1):.1f}" '
            f'height="{size:.1f}" fill="{_BAR}"><title>{escape(span)}: {count:,}</title></rect>'
        )
    every = -(-len(counts) // 8)
    for number in range(0, len(counts) + (0 if centred else 1), every):
        x = _LEFT + (number + (0.5 if centred else 0)) * step
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(label(edges[number]))}</text>'
        )
    parts.append(_axis_name(axis, _HEIGHT))
    return "".join([*parts, "</svg>"])


def size_chart(sides: NDArray[np.float64], counts: NDArray[np.int64]) -> str:
    """Pictures by width (x) and height (y), both in logarithmic boxes; the darker, the more.

    Args:
        sides: [n + 1], edges of both.
        counts: [n, n], by width, then height.
    """
    low, stop = _used(counts.sum(0) + counts.sum(1))
    number, inner = stop - low, 300
    step, most = inner / number, max(int(counts.max(initial=0)), 1)
    height = inner + _TOP + _BOTTOM
    parts = [_open(height)]
    parts.append(f'<rect x="{_LEFT}" y="{_TOP}" width="{inner}" height="{inner}" fill="#f6f6f6"/>')
    for x in range(number):
        for y in range(number):
            count = int(counts[low + x, low + y])
            if count:
                # Logarithmic shades, so that one picture is visible beside a million.
                shade = 0.15 + 0.85 * np.log1p(count) / np.log1p(most)
                spans = [f"{sides[low + at]:,.0f} to {sides[low + at + 1]:,.0f}" for at in (x, y)]
                parts.append(
                    f'<rect x="{_LEFT + x * step:.1f}" y="{_TOP + inner - (y + 1) * step:.1f}" width="{step:.1f}" '
                    f'height="{step:.1f}" fill="{_BAR}" fill-opacity="{shade:.2f}">'
                    f"<title>width {spans[0]}, height {spans[1]}: {count:,}</title></rect>"
                )
    for at in range(0, number + 1, -(-number // 8)):
        label = f"{sides[low + at]:,.0f}"
        parts.append(
            f'<text x="{_LEFT + at * step:.1f}" y="{_TOP + inner + 16}" text-anchor="middle">{label}</text>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{_TOP + inner - at * step + 4:.1f}" text-anchor="end">{label}</text>'
        )
    parts.append(_axis_name("width across, height up, pixels", height))
    return "".join([*parts, "</svg>"])


def _used(counts: NDArray[np.int64]) -> tuple[int, int]:
    """Range of the boxes that are not empty, with one more at each end."""
    used = np.flatnonzero(counts)
    if not len(used):
        return 0, len(counts)
    return max(int(used[0]) - 1, 0), min(int(used[-1]) + 2, len(counts))


def _open(height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">'


def _axis_name(name: str, height: int) -> str:
    return f'<text x="{_LEFT}" y="{height - 8}" class="axis">{escape(name)}</text>'


def _short(value: int) -> str:
    for unit, size in (("M", 1_000_000), ("k", 10_000)):
        if value >= size:
            return f"{value / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(value)
