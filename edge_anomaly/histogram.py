"""Histogram of anomaly scores, one row of bars per label, as an inline SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_anomaly_runtime.bundle import Thresholds

from .data import GOOD, UNSURE
from .html import escape

_LOG_FROM = 8.0  # largest score / smallest score from which the axis is logarithmic
_NAME_LENGTH = 26

Scores = NDArray[np.float64]

_LEAD = (
    "One row per label, each with its own height scale: the small number is its tallest bar. Bars right of the NG line "
    "are false alarms in the first row and found defects in the others."
)


def histogram_section(
    scores: Scores, labels: Sequence[str], thresholds: Thresholds, *, title: str
) -> tuple[str, str, str]:
    """Return heading, histogram and lead; without defective images there is nothing to tell apart."""
    svg = score_histogram_svg(scores, labels, thresholds, title=title)
    if set(labels) <= {GOOD, UNSURE}:
        return "Scores of the test images", svg, "Bars right of the NG line are false alarms."
    return "How far apart good and defective parts score", svg, _LEAD


@dataclass(frozen=True)
class ScoreAxis:
    """The score axis: edges of the bars, and where a score lies between the first and the last, 0 to 100 %."""

    edges: Scores
    logarithmic: bool

    def percent(self, value: float) -> float:
        first, last = float(self.edges[0]), float(self.edges[-1])
        if self.logarithmic:
            return 100 * math.log(value / first) / math.log(last / first)
        return 100 * (value - first) / (last - first)

    def ticks(self) -> list[float]:
        first, last = float(self.edges[0]), float(self.edges[-1])
        return _log_ticks(first, last) if self.logarithmic else _linear_ticks(first, last)


def score_histogram_svg(scores: Scores, labels: Sequence[str], thresholds: Thresholds, *, title: str) -> str:
    """Return an inline SVG: one row of bars per label on a common axis, with the WARN and NG limits through all rows.

    Good comes first, `unsure` last. Each row has its own height scale, as kinds differ in number. An edge of the bars
    lies exactly at the NG limit, so that what stands right of the line is what is NG. The SVG is as wide as its
    container (x in %, text in pixels), takes colours from the page and has its own for use elsewhere; as a file of
    its own it needs the SVG namespace added. Scores that are not finite are left out.
    """
    values, names = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.str_)
    finite = np.isfinite(values)
    values, names = values[finite], names[finite]
    axis = score_axis(values, thresholds)
    kinds = kinds_in_order(names)
    height = 132 if len(kinds) == 1 else 58 if len(kinds) <= 6 else 42
    top, pitch = 38, height + 34
    bottom = top + pitch * len(kinds)
    bars, headings = [], []
    for index, kind in enumerate(kinds):
        y, chosen = top + pitch * index, values[names == kind]
        bars.append(_histogram_row(kind, chosen, axis, thresholds, top=y + 24, height=height))
        headings.append(_row_heading(kind, chosen.size, int((chosen > thresholds.fail.value).sum()), y))
    counts = ", ".join(f"{(names == kind).sum()} {kind}" for kind in kinds)
    summary = f"{title}. {counts}. {_limits_in_words(thresholds)}"
    return (
        f'<svg class="hist" role="img" width="100%" height="{bottom + 36}" font-size="12" fill="currentColor" '
        f'aria-label="{escape(summary)}">{"".join(bars)}{_limit_lines(axis, thresholds, bottom)}{"".join(headings)}'
        f"{_tick_marks(axis, bottom)}</svg>"
    )


def bin_edges(values: Scores, anchor: float, *, bins: int = 36, logarithmic: bool = False) -> Scores:
    """Return edges of equal width, or of equal ratio, around all values; one of them is exactly `anchor`.

    >>> bin_edges(np.array([1.0, 5.0]), 3.0, bins=2)
    array([-3., -1.,  1.,  3.,  5.,  7.])
    """
    position = np.log(values / anchor) if logarithmic else values - anchor
    low, high = min(position.min(initial=0.0), 0.0), max(position.max(initial=0.0), 0.0)
    width = (high - low) / bins or abs(anchor) / bins or 1.0
    # One empty bar at both ends: bars are open to the left, and labels need air.
    steps = np.arange(math.ceil(low / width) - 2, math.ceil(high / width) + 2) * width
    return np.asarray(anchor * np.exp(steps) if logarithmic else anchor + steps, dtype=np.float64)


def bin_counts(scores: Scores, edges: Scores) -> NDArray[np.intp]:
    """Return how many scores lie in each (edge, next edge]; the edges must span the scores.

    Bars are closed to the right because a score equal to a limit is no alarm.

    >>> bin_counts(np.array([1.5, 2.0, 2.5]), np.array([1.0, 2.0, 3.0]))
    array([2, 1])
    """
    return np.bincount(np.searchsorted(edges, scores, side="left") - 1, minlength=len(edges) - 1)


def score_axis(values: Scores, thresholds: Thresholds) -> ScoreAxis:
    marks = np.append(values, [thresholds.warn.value, thresholds.fail.value])
    logarithmic = bool(marks.min() > 0 and marks.max() / marks.min() > _LOG_FROM)
    bins = int(np.clip(2.6 * math.sqrt(values.size), 12, 40))
    return ScoreAxis(bin_edges(marks, thresholds.fail.value, bins=bins, logarithmic=logarithmic), logarithmic)


def kinds_in_order(names: NDArray[np.str_]) -> list[str]:
    """Return the labels in the order of the page."""
    return sorted({str(name) for name in names}, key=lambda name: (name != GOOD, name == UNSURE, name))


def _histogram_row(kind: str, scores: Scores, axis: ScoreAxis, thresholds: Thresholds, *, top: int, height: int) -> str:
    """Return the zones and bars of one row, and the number of its tallest bar."""
    base, counts = top + height, bin_counts(scores, axis.edges)
    largest = int(counts.max(initial=1))
    colour, css = {GOOD: ("#2368b0", "good"), UNSURE: ("#6b7785", "unsure")}.get(kind, ("#c2500c", "bad"))
    bars = "".join(
        _bar(axis, index, count, base=base, tall=max(2.0, height * count / largest))
        for index, count in enumerate(counts.tolist())
        if count
    )
    return (
        f"{_zones(axis, thresholds, top, height)}"
        f'<line x1="0" x2="100%" y1="{top}" y2="{top}" stroke="currentColor" stroke-opacity=".15"/>'
        f'<g class="{css}" fill="{colour}">{bars}</g>'
        f'<line x1="0" x2="100%" y1="{base}" y2="{base}" stroke="currentColor" stroke-opacity=".5"/>'
        f'<text class="faint" x="2" y="{top + 11}" font-size="10">{largest}</text>'
    )


def _row_heading(kind: str, images: int, alarms: int, y: int) -> str:
    """Return name and numbers of a row, on plates that hide the limit lines behind the text."""
    name, number = _shortened(kind), f"{images} image{'s' if images != 1 else ''}"
    result = f"{alarms} of {images} NG"
    # A letter is about 6.7 pixels wide; a bold one more.
    left, right = round(7.4 * len(name) + 6.7 * len(number) + 14), round(6.7 * len(result) + 8)
    return (
        f'<rect class="plate" fill="none" x="0" y="{y + 3}" width="{left}" height="19"/>'
        f'<rect class="plate" fill="none" x="100%" y="{y + 3}" width="{right}" height="19" '
        f'transform="translate(-{right})"/>'
        f'<text x="0" y="{y + 17}"><tspan font-weight="600">{escape(name)}</tspan>'
        f'<tspan class="faint" dx="7">{number}</tspan></text>'
        f'<text x="100%" y="{y + 17}" text-anchor="end">{result}</text>'
    )


def _bar(axis: ScoreAxis, index: int, count: int, *, base: int, tall: float) -> str:
    low, high = float(axis.edges[index]), float(axis.edges[index + 1])
    left, right = axis.percent(low), axis.percent(high)
    return (
        f'<rect x="{left:.2f}%" width="{right - left:.2f}%" y="{base - tall:.1f}" height="{tall:.1f}">'
        f"<title>{count} from {low:.4g} to {high:.4g}</title></rect>"
    )


def _zones(axis: ScoreAxis, thresholds: Thresholds, top: int, height: int) -> str:
    warn, fail = axis.percent(thresholds.warn.value), axis.percent(thresholds.fail.value)
    return (
        f'<rect class="warn" fill="#9a6700" fill-opacity=".10" x="{warn:.2f}%" width="{max(0.0, fail - warn):.2f}%" '
        f'y="{top}" height="{height}"/><rect class="fail" fill="#b4123f" fill-opacity=".08" x="{fail:.2f}%" '
        f'width="{100 - fail:.2f}%" y="{top}" height="{height}"/>'
    )


def _limit_lines(axis: ScoreAxis, thresholds: Thresholds, bottom: int) -> str:
    """Return both limit lines with their labels, staggered so that no line crosses a label: warn is left of fail."""
    warn, fail = thresholds.warn.value, thresholds.fail.value
    rightwards = axis.percent(fail) < 60
    anchor, shift = ("start", 5) if rightwards else ("end", -5)
    lines = []
    for css, colour, dash, name, value in (
        ("warn", "#9a6700", ' stroke-dasharray="4 3"', "WARN", warn),
        ("fail", "#b4123f", "", "NG", fail),
    ):
        x, y = axis.percent(value), 2 if rightwards == (css == "warn") else 19
        lines.append(
            f'<line class="{css}" stroke="{colour}" stroke-width="1.5"{dash} x1="{x:.2f}%" x2="{x:.2f}%" y1="{y}" '
            f'y2="{bottom - 10}"/><text class="{css}" fill="{colour}" font-weight="600" x="{x:.2f}%" dx="{shift}" '
            f'y="{y + 10}" text-anchor="{anchor}">{name} above {value:.4g}</text>'
        )
    return "".join(lines)


def _tick_marks(axis: ScoreAxis, bottom: int) -> str:
    marks = []
    for value in axis.ticks():
        percent = axis.percent(value)
        x, anchor = f"{percent:.2f}%", "start" if percent < 3 else "end" if percent > 97 else "middle"
        marks.append(
            f'<line x1="{x}" x2="{x}" y1="{bottom - 10}" y2="{bottom - 5}" stroke="currentColor" stroke-opacity=".5"/>'
            f'<text class="faint" x="{x}" y="{bottom + 8}" text-anchor="{anchor}">{value:g}</text>'
        )
    scale = ", logarithmic scale" if axis.logarithmic else ""
    return (
        f'{"".join(marks)}<text class="faint" x="50%" y="{bottom + 30}" text-anchor="middle">'
        f"anomaly score{scale}</text>"
    )


def _linear_ticks(first: float, last: float) -> list[float]:
    """Return about five round numbers between two scores."""
    raw = (last - first) / 5
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    return [round(index * step, 12) for index in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _log_ticks(first: float, last: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two scores, or powers of ten alone over a wide range."""
    factors = (1, 2, 5) if last / first < 500 else (1,)
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in values if first <= value <= last]


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _limits_in_words(thresholds: Thresholds) -> str:
    return f"WARN above {thresholds.warn.value:.4g}, NG above {thresholds.fail.value:.4g}."
