"""The page about a dataset: one self-contained HTML file without network access."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from megatron_eve.data.format.drawn import drawn_counts
from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.data.inspecting.charts import bar_chart, size_chart
from megatron_eve.data.inspecting.checking import parts_of
from megatron_eve.data.inspecting.codes import Codes, describe_codes
from megatron_eve.data.inspecting.html import chart, figure, html_page, table
from megatron_eve.data.inspecting.layout import RowLayout
from megatron_eve.data.inspecting.statistics import MOST_IMAGES, SIDES, Histogram, Statistics
from megatron_eve.data.reasons import REASONS


@dataclass(frozen=True)
class ShownRow:
    """One row of the page.

    Attributes:
        row: its number.
        layout: its contents, and
        png: the file of its drawing; or, of a damaged row,
        problem: why it cannot be shown.
    """

    row: int
    layout: RowLayout | None = None
    png: bytes = b""
    problem: str = ""


def dataset_page(
    dataset: AnyDataset,
    prefix: str,
    statistics: Statistics,
    samples: Sequence[ShownRow],
    *,
    ids_only: bool,
    codes: Sequence[Codes] = (),
) -> str:
    """The text of the HTML file.

    Args:
        dataset: an open dataset.
        prefix: of the dataset, for the page.
        statistics: of its records.
        samples: rows to show.
        ids_only: the rows were laid out without a tokenizer.
        codes: of its images.
    """
    shown = "".join(_sample(sample) for sample in samples)
    note = "<p>The rows show token ids: give --tokenizer-model to see their text.</p>" if ids_only else ""
    legend = (
        '<p>Grounds of the text: <span class="trains">trains</span>, <span class="image">a picture\'s place</span>; '
        "the rest is read and does not train.</p>"
    )
    return html_page(
        prefix,
        f"<h1>Dataset {escape(prefix)}</h1>"
        f"<h2>Counts</h2>{_counts(dataset, codes)}"
        f"<h2>Text and tokens</h2>{_token_charts(statistics)}"
        f"{_picture_part(dataset, statistics)}"
        f"<h2>Rows left out</h2>{_skipped(dataset)}"
        f"{_licences(statistics)}"
        f"<h2>Rows drawn at random</h2>{legend}{note}{shown}",
    )


def _counts(dataset: AnyDataset, codes: Sequence[Codes]) -> str:
    info, stored = dataset.info, sum(part.info.stored_bytes for part in parts_of(dataset))
    rows = [
        ("samples", f"{info.num_samples:,} of {info.num_rows:,} rows read"),
        ("template", info.template),
        ("images", f"{info.num_images:,}"),
        (
            "tokens",
            f"{info.num_tokens:,} with images expanded; {info.num_text_tokens:,} with an image as one",
        ),
        (
            "labels that train",
            f"{info.num_labels:,} ({info.num_labels / max(info.num_tokens, 1):.1%} of the tokens)",
        ),
        ("longest sample", f"{info.longest_length:,} tokens, row {info.longest_sample:,}"),
        ("samples cut", f"{info.num_cut:,} at {info.model_max_length:,} tokens"),
        (
            "bytes",
            f"{_bytes(info.text_bytes)} of text, {_bytes(stored)} of images ({info.image_storage})",
        ),
        (
            "made for",
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in info.made_for.items())
            if info.num_images
            else "any model: there are no images",
        ),
        ("EXIF orientation", "applied" if info.apply_exif else "ignored"),
        ("tokenizer", f"{info.vocab_size:,} pieces, sha256 {info.tokenizer_sha256}"),
        ("content_sha256", info.content_sha256 or "none"),
    ]
    images, labels = drawn_counts(info)
    rows += [("images to draw", f"{images:,}, of {labels:,} rows")] if images else []
    rows += [("codes", describe_codes(one)) for one in codes]
    rows += [("part", f"{part['prefix']}, {part['num_samples']:,} samples") for part in info.datasets]
    return table(rows)


def _token_charts(statistics: Statistics) -> str:
    shares = statistics.label_shares
    charts = [
        ("Expanded tokens of a sample", statistics.lengths, "tokens"),
        ("Tokens of a sample, an image as one", statistics.text_lengths, "tokens"),
    ]
    parts = [
        chart(name, _span(histogram), bar_chart(histogram.edges, histogram.counts, axis))
        for name, histogram, axis in charts
    ]
    percent = bar_chart(shares.edges, shares.counts, "labels that train, of a sample's tokens", _percent)
    parts.append(chart("Share of labels that train", _span(shares, _percent), percent))
    images = statistics.images
    by_number = bar_chart(
        images.edges,
        images.counts,
        "images of a sample",
        lambda value: f"{value:.0f}{'+' if value == MOST_IMAGES else ''}",
        centred=True,
    )
    parts.append(chart("Images of a sample", _span(images), by_number))
    return f'<div class="charts">{"".join(parts)}</div>'


def _picture_part(dataset: AnyDataset, statistics: Statistics) -> str:
    if not dataset.info.num_images:
        return "<h2>Pictures</h2><p>There are none.</p>"
    widths, heights, files = statistics.widths, statistics.heights, statistics.picture_bytes
    sizes = f"width {_span(widths)}; height {_span(heights)}"
    aspects = bar_chart(statistics.aspects.edges, statistics.aspects.counts, "width : height", _ratio)
    parts = [
        chart("Sizes of pictures", sizes, size_chart(SIDES, statistics.sizes)),
        chart("Aspect ratios", "tall on the left, wide on the right", aspects)
        + chart(
            "Bytes of a picture",
            _span(files, _bytes),
            bar_chart(files.edges, files.counts, "bytes", _bytes, used_only=True),
        ),
    ]
    return f'<h2>Pictures</h2><div class="charts"><div>{parts[0]}</div><div>{parts[1]}</div></div>'


def _skipped(dataset: AnyDataset) -> str:
    skipped = dataset.info.skipped
    if not skipped:
        return "<p>None.</p>"
    return _counted(
        (_reason(reason), count) for reason, count in sorted(skipped.items(), key=lambda item: -item[1])
    )


def _reason(reason: str) -> str:
    known = REASONS.get(reason)  # a later version may have others
    return reason if known is None else f"{reason}: {known.what}. To do: {known.remedy}."


def _licences(statistics: Statistics) -> str:
    if not statistics.licences or set(statistics.licences) == {"not said"}:
        return ""
    return f"<h2>Licences</h2>{_counted(statistics.licences.most_common())}"


def _sample(sample: ShownRow) -> str:
    if sample.layout is None:
        return f'<p class="wrong">Row {sample.row}: {escape(sample.problem)}</p>'
    below = f"<details><summary>Row {sample.row} as text</summary>{_text(sample.layout)}</details>"
    return figure(f"row {sample.row}", sample.png, below)


def _text(row: RowLayout) -> str:
    """The pieces as HTML text, so that the browser finds fonts for every script; like neighbours are joined."""
    parts: list[str] = []
    role, kind, text = None, "", ""

    def close() -> None:
        if text:
            parts.append(f'<span class="{kind}">{escape(text)}</span>' if kind else escape(text))

    for piece in row.pieces:
        this = "trains" if piece.trains else "image" if piece.image is not None else ""
        if piece.role != role or this != kind:
            close()
            text, kind = "", this
        if piece.role != role:
            role = piece.role
            parts.append(f'{"</div>" if parts else ""}<div class="text"><span class="role">{role}</span> ')
        text += piece.text
    close()
    return "".join([*parts, "</div>"])


def _counted(rows: Iterable[tuple[str, int]]) -> str:
    lines = "".join(
        f'<tr><td class="number">{count:,}</td><td>{escape(name)}</td></tr>' for name, count in rows
    )
    return f"<table>{lines}</table>"


def _span(histogram: Histogram, write: Callable[[float], str] | None = None) -> str:
    write = write or _number
    if not histogram.counts.sum():
        return "none"
    return f"{write(histogram.low)} to {write(histogram.high)}, mean {write(histogram.mean)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _ratio(aspect: float) -> str:
    return f"{aspect:.2g}:1" if aspect >= 1 else f"1:{1 / aspect:.2g}"


def _bytes(value: float) -> str:
    """A number of bytes with a unit; 1 kB is 1,000 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value:.0f} B"
