"""A measurement as pictures: SVG without a library, and a page that holds all of them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge_anomaly_runtime.errors import UsageError

from .formats import fact_lines, headline, stage_rows
from .gates import Gate
from .harness import Report
from .statistics import percentile, samples_needed

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 260, 62, 44, 30, 14
_BINS = 60
_BLUE, _TAIL, _LOST = "#2f6fb3", "#8896a5", "#b3261e"
# The curve shows the tail as large as the rest: 90, 99 and 99.9 are equally far apart.
_CURVE = (0.0, 10.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.99)
Point = tuple[float, float]
To = Callable[[float, float], Point]  # from values to pixels
Marks = Callable[[To], str]
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:46rem;padding:0 1rem;color:#1c2733}"
    "table{border-collapse:collapse}td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #dde3ea}"
    "td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto}.bad{color:#b3261e}"
)


@dataclass(frozen=True)
class Axis:
    """Values along one side of a plot, from `low` to `high`; ticks are (value, text)."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


def plots(report: Report) -> dict[str, str]:
    """Return SVG pictures by name: latency over time, histogram, percentile curve, and pace against latency."""
    samples = report["samples_ms"]
    made = {
        "over-time": _over_time(samples),
        "histogram": _histogram(samples),
        "percentiles": _percentiles(samples),
    }
    if report["scenario"]["rate"] is not None and report["started_s"]:
        made["pace"] = _pace(report)
    return made


def pace_curve(rows: Sequence[dict[str, Any]]) -> str:
    """Return an SVG picture of a sweep's rows: median and 95th percentile by rate, in red where frames were missed.

    Raises:
        UsageError: no rate has enough frames for a median.
    """
    high = max(row["rate"] for row in rows)
    shown = [(row["rate"], row["p50_ms"], row["p95_ms"], row["missed"]) for row in rows if row["p50_ms"] is not None]
    if not shown:
        raise UsageError("Too few frames for a plot.", "Measure longer with --seconds.")
    x = Axis("frames a second", 0, high, _ticks(0, high))
    medians = [(rate, p50) for rate, p50, _, _ in shown]
    tails = [(rate, p95) for rate, _, p95, _ in shown if p95 is not None]
    lost = [(rate, p50) for rate, p50, _, missed in shown if missed]

    def marks(to: To) -> str:
        return _line(medians)(to) + _line(tails, _TAIL)(to) + _dots(lost, _LOST, 4)(to)

    title = "Latency from when a frame was due: median (blue), 95 % (grey); red: frames missed"
    return _drawn(title, x, _latency_axis([value for _, value in medians + tails]), marks)


def page(report: Report, gates: Sequence[Gate] = ()) -> str:
    """Return one HTML page with figures, gates, warnings and pictures; it loads nothing from elsewhere."""
    heading, *rows = stage_rows(report)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heading)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in fact_lines(report))
    limits = "".join(f"<li class={'ok' if gate.ok else 'bad'}>{html.escape(str(gate))}</li>" for gate in gates)
    doubts = "".join(f"<li class=bad>{html.escape(text)}</li>" for text in report["warnings"])
    pictures = "".join(f"<h2>{name.replace('-', ' ').capitalize()}</h2>{svg}" for name, svg in plots(report).items())
    around = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in report["environment"].items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(report['name'])}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<h1>{html.escape(report['name'])}</h1><p>{html.escape(headline(report))}</p>"
        f"<table><tr>{head}</tr>{body}</table><ul>{facts}</ul>"
        + (f"<h2>Gates</h2><ul>{limits}</ul>" if gates else "")
        + (f"<h2>Warnings</h2><ul>{doubts}</ul>" if doubts else "")
        + f"{pictures}<h2>Environment</h2><table>{around}</table></html>\n"
    )


def _over_time(samples: Sequence[float]) -> str:
    x = Axis("image", 0, max(1, len(samples) - 1), _ticks(0, max(1, len(samples) - 1)))
    return _drawn("Latency of every image, in order", x, _latency_axis(samples), _dots(list(enumerate(samples))))


def _histogram(samples: Sequence[float]) -> str:
    low, high = min(samples), max(samples)
    width = (high - low) / _BINS or 1e-6
    counts = [0] * _BINS
    for value in samples:
        counts[min(_BINS - 1, int((value - low) / width))] += 1
    x = Axis("ms", low, low + _BINS * width, _ticks(low, low + _BINS * width))
    y = Axis("images", 0, max(counts), _ticks(0, max(counts)))

    def bars(to: To) -> str:
        corners = [
            (to(low + index * width, 0), to(low + (index + 1) * width, count))
            for index, count in enumerate(counts)
            if count
        ]
        return "".join(
            f"<rect x='{left:.1f}' y='{top:.1f}' width='{max(1.0, right - left - 0.5):.1f}' "
            f"height='{floor - top:.1f}' fill='{_BLUE}'/>"
            for (left, floor), (right, top) in corners
        )

    return _drawn("How often each latency occurred", x, y, bars)


def _percentiles(samples: Sequence[float]) -> str:
    ordered = sorted(samples)
    shown = [percent for percent in _CURVE if percent < 50 or len(ordered) >= samples_needed(percent)]
    points = [(_nines(percent), percentile(ordered, percent)) for percent in shown]
    ticks = [(_nines(percent), f"{percent:g}") for percent in shown if percent in (0, 50, 90, 99, 99.9, 99.99)]
    x = Axis("percentile", 0.0, max(points[-1][0], 1e-9), ticks)
    return _drawn("Latency by percentile", x, _latency_axis([value for _, value in points]), _line(points))


def _pace(report: Report) -> str:
    rate = report["scenario"]["rate"]
    x = Axis(
        "s since the first frame was due", 0, max(report["started_s"]) or 1, _ticks(0, max(report["started_s"]) or 1)
    )
    points = list(zip(report["started_s"], report["samples_ms"], strict=True))
    title = f"Latency from when a frame was due, {rate:g} a second ({1000 / rate:.1f} ms each)"
    return _drawn(title, x, _latency_axis(report["samples_ms"]), _dots(points))


def _dots(points: Sequence[Point], colour: str = _BLUE, radius: float = 1.4) -> Marks:
    def marks(to: To) -> str:
        places = (to(*point) for point in points)
        return "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{colour}'/>" for x, y in places)

    return marks


def _line(points: Sequence[Point], colour: str = _BLUE) -> Marks:
    def marks(to: To) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (to(*point) for point in points))
        line = f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"
        return line + _dots(points, colour)(to)

    return marks


def _nines(percent: float) -> float:
    """Return how many nines a percentile has: 0 of 0 %, 1 of 90 %, 2 of 99 %."""
    return -math.log10(1 - percent / 100)


def _latency_axis(samples: Sequence[float]) -> Axis:
    high = max(samples) * 1.05
    return Axis("ms", 0, high, _ticks(0, high))


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return about five round values between two others."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [(index * step, f"{index * step:g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _drawn(title: str, x: Axis, y: Axis, marks: Marks) -> str:
    """Return an SVG picture: frame, ticks and what `marks` draws with a function from values to pixels."""

    def to(horizontal: float, vertical: float) -> tuple[float, float]:
        across = (horizontal - x.low) / ((x.high - x.low) or 1)
        up = (vertical - y.low) / ((y.high - y.low) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"font-family='system-ui,sans-serif' font-size='12' fill='#1c2733'><title>{html.escape(title)}</title>"
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#fff'/><text x='{_LEFT}' y='18'>{html.escape(title)}</text>"
    ]
    for value, text in x.ticks:
        at, floor = to(value, y.low)
        parts.append(f"<text x='{at:.1f}' y='{floor + 16:.1f}' text-anchor='middle'>{text}</text>")
    for value, text in y.ticks:
        left, at = to(x.low, value)
        parts.append(
            f"<line x1='{left:.1f}' x2='{_WIDTH - _RIGHT}' y1='{at:.1f}' y2='{at:.1f}' stroke='#e3e8ee'/>"
            f"<text x='{left - 6:.1f}' y='{at + 4:.1f}' text-anchor='end'>{text}</text>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f"<text x='{middle}' y='{_HEIGHT - 8}' text-anchor='middle'>{html.escape(x.label)}</text>")
    parts.append(f"<text x='14' y='{_TOP - 6}'>{html.escape(y.label)}</text>")
    return "".join(parts) + marks(to) + "</svg>"
