"""Parts of the pages that show data: one self-contained HTML file each, without network access."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1010px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 24px; overflow-wrap: anywhere; } h2 { font-size: 19px; margin-top: 32px; }
h3 { font-size: 15px; margin: 0 0 4px; }
table { border-collapse: collapse; } td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, 480px); gap: 20px 24px; }
.charts p { margin: 0; color: #555; font-size: 13px; }
svg text { font: 11px system-ui, sans-serif; fill: #555; } svg text.axis { font-size: 12px; fill: #1c1c1c; }
figure { margin: 0 0 28px; border: 1px solid #ccc; } figure img { width: 100%; display: block; }
details { padding: 6px 12px; } .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.trains { background: #bee8be; } .image { background: #ffd696; } .role { color: #555; font-weight: 600; }
.wrong { color: #a00; }
"""


def html_page(title: str, body: str) -> str:
    """The text of the file.

    Args:
        title: as text.
        body: as HTML.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def chart(name: str, note: str, svg: str) -> str:
    """A chart of `charts.py` with its name and a note above it."""
    return f"<section><h3>{escape(name)}</h3><p>{escape(note)}</p>{svg}</section>"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of a name and a value."""
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{lines}</table>"


def figure(name: str, png: bytes, below: str = "") -> str:
    """A picture over the width of the page.

    Args:
        name: for those who cannot see it.
        png: the file.
        below: HTML beneath it.
    """
    drawn = base64.b64encode(png).decode()
    return f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{drawn}">{below}</figure>'
