"""Pages to look at: what is in a bundle, and how the demo went.

A page is one HTML file that fetches nothing: inline CSS and SVG, pictures as data URIs, no script. Here a private
function that returns `str` returns HTML, and text from outside passes `_esc` on its way in.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as _esc
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from edge_anomaly_runtime.bundle import Manifest, ParityRow, Threshold, Thresholds
from edge_anomaly_runtime.overlay import draw_overlay
from edge_anomaly_runtime.preprocess import WHOLE_IMAGE, Preprocess

from .data import GOOD, UNSURE

_SIDE = 320  # longest side of a picture in the page, in pixels
_NA = "n/a"
_NONE = "none"
_NBSP = "\u00a0"
_MARKED = (0, 190, 255)
_RAMP_END = 2.5  # where the colour scale ends, in pixel limits
_LOG_FROM = 8.0  # largest score / smallest score from which the axis is logarithmic
_NAME_LENGTH = 26

Scores = NDArray[np.float64]
Figures = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One picture of the gallery.

    name: such as "scratch/003.png". label: good, unsure or the kind of defect. verdict: OK, WARN, NG or INVALID.
    picture, overlay: RGB, the same size, without and with heat map. mask: where people marked the defect, mode L.
    """

    name: str
    label: str
    verdict: str
    score: float
    picture: Image.Image
    overlay: Image.Image
    mask: Image.Image | None


def bundle_report(manifest: Manifest, normal_scores: Mapping[str, Scores]) -> str:
    """Return the page that a bundle carries: model, parity, thresholds, calibration.

    `normal_scores`: float64 [n] by 'engine/precision', the held-out normal scores that set the thresholds.
    """
    body = [
        _header(f"Bundle {manifest.name}", f"{_model_line(manifest)} · made {_esc(_time_text(manifest.created_utc))}"),
        _tiles(_bundle_tiles(manifest)),
        _section("Parity with the trained model", _parity(manifest), _PARITY_LEAD),
        _section("Alarm limits", _limit_cards(manifest, normal_scores), _LIMITS_LEAD),
        _section("INT8 calibration", _calibration(manifest)),
        _section("Model", _facts(_model_facts(manifest))),
        _section("Training", _facts(_training_facts(manifest))),
        _section("Versions", _facts(manifest.versions)),
    ]
    return _page(f"{manifest.name}: bundle report", body)


def demo_report(
    *,
    title: str,
    manifest: Manifest,
    figures: Figures,
    scores: Mapping[str, Scores],
    labels: Sequence[str],
    examples: Sequence[Example],
    bench: Figures,
    commands: Sequence[str],
    note: str,
) -> str:
    """Return the page that the demo ends in: figures, histogram, FP32 against INT8, pictures, how it was made.

    figures, scores, bench: what `evaluate_items` and `run_bench` return, and float64 [n] scores in the order of
    `labels`, each by 'engine/precision'; at least one. Most of the page is about openvino at the bundle's precision,
    or the first key where that is absent. examples: their scores and verdicts are those of that key, too.
    """
    main = _main_key(manifest, figures)
    limits = manifest.thresholds[main]
    body = [
        _header(title, f"{_model_line(manifest)} · figures of <b>{_esc(main)}</b>"),
        _tiles(_demo_tiles(main, figures[main], bench)),
        _section(*_histogram_section(main, scores, labels, limits)),
        _section("By kind of defect", _defect_table(figures[main])),
        _section(*_comparison(manifest, main, figures, bench)),
        _section(*_gallery_section(examples, limits)),
        _section("Alarm limits", _measured_limits(manifest, main, figures) + _methods([limits]), _LIMITS_LEAD),
        _section("How it was made", _commands(commands)),
        _section("Data", f"<p>{_esc(note)}</p>" if note else ""),
        _section("Environment", _environment(bench.get(main, {}))),
    ]
    return _page(title, body)


# Histogram


def _histogram_section(
    main: str, scores: Mapping[str, Scores], labels: Sequence[str], limits: Thresholds
) -> tuple[str, str, str]:
    """Return title, histogram and lead; without defective images there is nothing to tell apart."""
    if main not in scores:
        return "Scores", "", ""
    svg = score_histogram_svg(scores[main], labels, limits, title=f"Scores of the test images, {main}")
    if set(labels) <= {GOOD, UNSURE}:
        return "Scores of the test images", svg, "Bars right of the NG line are false alarms."
    return "How far apart good and defective parts score", svg, _HISTOGRAM_LEAD


@dataclass(frozen=True)
class _Axis:
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
    axis = _axis(values, thresholds)
    kinds = _kinds(names)
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
        f'aria-label="{_esc(summary)}">{"".join(bars)}{_limit_lines(axis, thresholds, bottom)}{"".join(headings)}'
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


def _axis(values: Scores, thresholds: Thresholds) -> _Axis:
    marks = np.append(values, [thresholds.warn.value, thresholds.fail.value])
    logarithmic = bool(marks.min() > 0 and marks.max() / marks.min() > _LOG_FROM)
    bins = int(np.clip(2.6 * math.sqrt(values.size), 12, 40))
    return _Axis(bin_edges(marks, thresholds.fail.value, bins=bins, logarithmic=logarithmic), logarithmic)


def _kinds(names: NDArray[np.str_]) -> list[str]:
    """Return the labels in the order of the page."""
    return sorted({str(name) for name in names}, key=lambda name: (name != GOOD, name == UNSURE, name))


def _histogram_row(kind: str, scores: Scores, axis: _Axis, thresholds: Thresholds, *, top: int, height: int) -> str:
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
        f'<text x="0" y="{y + 17}"><tspan font-weight="600">{_esc(name)}</tspan>'
        f'<tspan class="faint" dx="7">{number}</tspan></text>'
        f'<text x="100%" y="{y + 17}" text-anchor="end">{result}</text>'
    )


def _bar(axis: _Axis, index: int, count: int, *, base: int, tall: float) -> str:
    low, high = float(axis.edges[index]), float(axis.edges[index + 1])
    left, right = axis.percent(low), axis.percent(high)
    return (
        f'<rect x="{left:.2f}%" width="{right - left:.2f}%" y="{base - tall:.1f}" height="{tall:.1f}">'
        f"<title>{count} from {low:.4g} to {high:.4g}</title></rect>"
    )


def _zones(axis: _Axis, thresholds: Thresholds, top: int, height: int) -> str:
    warn, fail = axis.percent(thresholds.warn.value), axis.percent(thresholds.fail.value)
    return (
        f'<rect class="warn" fill="#9a6700" fill-opacity=".10" x="{warn:.2f}%" width="{max(0.0, fail - warn):.2f}%" '
        f'y="{top}" height="{height}"/><rect class="fail" fill="#b4123f" fill-opacity=".08" x="{fail:.2f}%" '
        f'width="{100 - fail:.2f}%" y="{top}" height="{height}"/>'
    )


def _limit_lines(axis: _Axis, thresholds: Thresholds, bottom: int) -> str:
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


def _tick_marks(axis: _Axis, bottom: int) -> str:
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


# Headline


@dataclass(frozen=True)
class _Tile:
    """One big figure: what it is, the figure, and one line below it (HTML)."""

    name: str
    value: str
    detail: str


def _header(title: str, line: str) -> str:
    return f"<header><h1>{_esc(title)}</h1><p>{line}</p></header>"


def _model_line(manifest: Manifest) -> str:
    spec, backbone = manifest.input.preprocess, manifest.model.parameters.get("backbone")
    on = f" on {backbone}" if backbone else ""
    return _esc(f"{manifest.model.kind}{on} · {spec.width} × {spec.height} pixels · {manifest.precision.upper()}")


def _tiles(tiles: Sequence[_Tile]) -> str:
    cells = "".join(
        f"<div><dt>{tile.name}</dt><dd><b>{tile.value}</b><span>{tile.detail}</span></dd></div>" for tile in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _demo_tiles(main: str, figures: dict[str, Any], bench: Figures) -> list[_Tile]:
    tiles = []
    if image := figures.get("image"):
        low, high = image["auroc_interval"]
        interval = f"95{_NBSP}% interval {low:.3f} to {high:.3f}"
        tiles.append(_Tile("Image AUROC", f"{image['auroc']:.3f}", interval))
    if pixel := figures.get("pixel"):
        tiles.append(_Tile("Pixel AUROC", f"{pixel['auroc']:.3f}", "over all pixels of good and marked images"))
        if pixel.get("aupro") is not None:
            detail = f"overlap per defect, up to 30{_NBSP}% false pixels"
            tiles.append(_Tile("AUPRO", f"{pixel['aupro']:.3f}", detail))
    tiles.append(_alarm_tile(figures["false_alarms"]["fail"]))
    if image:
        share = f"{_percent(image['found'])} of the defective images are NG"
        found, total = _found_counts(figures)
        tiles.append(_Tile("Defects found", f"{found} of {total}", share))
    if main in bench:
        tiles.append(_latency_tile(main, bench))
    return tiles


def _alarm_tile(alarms: dict[str, Any]) -> _Tile:
    promise = f"promised {_per_many(alarms['promised'])}, bound {_per_many(alarms['bound'], like=alarms['promised'])}"
    if not alarms["images"]:
        return _Tile("Good parts stopped", _NA, f"no good test images; {promise}")
    kept = _chip("within the bound", "ok") if alarms["inside_bound"] else _chip("ABOVE the bound", "ng")
    detail = f"{_percent(alarms['rate'])}; {promise} {kept}"
    return _Tile("Good parts stopped", f"{alarms['alarms']} of {alarms['images']}", detail)


def _latency_tile(main: str, bench: Figures) -> _Tile:
    p50 = bench[main]["latency_ms"]["infer"]["p50"]
    engine, _, precision = main.partition("/")
    base = bench.get(f"{engine}/fp32", {}).get("latency_ms", {}).get("infer", {}).get("p50")
    if precision == "fp32" or p50 is None or base is None:
        return _Tile("Latency p50", _ms(p50), "inference of one image")
    words = f"{base / p50:.1f} × as fast" if base >= p50 else f"takes {p50 / base:.1f} × as long"
    words = words.replace(" ", _NBSP)
    return _Tile("Latency p50", _ms(p50), f"inference of one image; <b>{words}</b> as FP32 ({_ms(base)})")


def _bundle_tiles(manifest: Manifest) -> list[_Tile]:
    rows, main = manifest.parity, _main_key(manifest, manifest.thresholds)
    fail = manifest.thresholds[main].fail
    passed = sum(row.ok for row in rows)
    verdict = _chip("all pass", "ok") if passed == len(rows) else _chip("not all pass", "ng")
    tiles = [_Tile("Graphs at parity", f"{passed} of {len(rows)}", verdict)] if rows else []
    if row := _parity_row(manifest, main):
        changed = f"{_esc(main)} against the trained model"
        tiles.append(_Tile("Verdicts changed", f"{row.flips} of {row.images}", changed))
        if row.auroc is not None:
            tiles.append(_Tile("Image AUROC", f"{row.auroc:.3f}", f"{_esc(main)}, {row.images} images"))
    bound = f"good parts stopped; bound {_per_many(fail.upper95, like=fail.alpha)}"
    tiles.append(_Tile("Promised false alarms", _per_many(fail.alpha), bound))
    if (head := manifest.model.parameters.get("head_bytes")) is not None:
        tiles.append(_Tile("Head size", _megabytes(head), "weights of the head, always float"))
    return tiles


# Tables


def _defect_table(figures: dict[str, Any]) -> str:
    rows = [
        [_esc(name), str(row["images"]), f"{row['auroc']:.4f}", _meter(row["found"], row["images"])]
        for name, row in figures.get("defects", {}).items()
    ]
    if not rows:
        return "<p>There are no defective test images, so nothing can be said about finding defects.</p>"
    table = _table(["Defect", "Images", "AUROC", "Found (NG)"], rows)
    if unsure := figures.get("unsure"):
        flagged = f"{_percent(unsure['flagged'])} of them are NG. They count in no figure above."
        table += f"<p class=faint>{unsure['images']} images are labelled unsure; {flagged}</p>"
    return table


def _comparison(manifest: Manifest, main: str, figures: Figures, bench: Figures) -> tuple[str, str, str]:
    """Return title, table and lead of the comparison of all keys; a change is given where there are two."""
    keys = sorted(figures, key=lambda key: (not key.endswith("/fp32"), key != main))
    rows = [*_quality_rows(manifest, keys, figures), *_speed_rows(manifest, keys, bench)]
    cells = [_comparison_row(row, keys) for row in rows]
    change = ["Change"] if len(keys) == 2 else []
    table = _table(["", *map(_esc, keys), *change], [row for row in cells if row])
    precisions = {key.partition("/")[2] for key in keys}
    title = "FP32 against INT8" if precisions >= {"fp32", "int8"} else "Quality and speed"
    return title, table, _COMPARISON_LEAD if bench else ""


@dataclass(frozen=True)
class _Compared:
    """One line of the comparison: its name, the value of a key (None: not known), how to print value and change."""

    name: str
    value: Callable[[str], float | None]
    show: Callable[[str, float], str]
    change: Callable[[float, float], str] = lambda first, second: _signed(second - first, 4)
    always: bool = False  # print the line although no key has a value


def _comparison_row(row: _Compared, keys: Sequence[str]) -> list[str]:
    """Return the cells of one line, or nothing where no key has a value."""
    values = [row.value(key) for key in keys]
    if not row.always and all(value is None for value in values):
        return []
    cells = [_NA if value is None else row.show(key, value) for key, value in zip(keys, values, strict=True)]
    if len(keys) != 2:
        return [row.name, *cells]
    first, second = values
    return [row.name, *cells, "" if first is None or second is None else row.change(first, second)]


def _quality_rows(manifest: Manifest, keys: Sequence[str], figures: Figures) -> list[_Compared]:
    def figure(part: str, name: str) -> Callable[[str], float | None]:
        return lambda key: figures[key].get(part, {}).get(name)

    def alarms(key: str) -> float | None:
        row = figures[key]["false_alarms"]["fail"]
        return row["alarms"] if row["images"] else None

    def flips(key: str) -> float | None:
        row = _parity_row(manifest, key)
        return None if row is None else row.flips

    def flips_of(key: str, value: float) -> str:
        row = _parity_row(manifest, key)
        return f"{value:.0f} of {row.images}" if row else _NA

    def alarms_of(key: str, value: float) -> str:
        return f"{value:.0f} of {figures[key]['false_alarms']['fail']['images']}"

    def found(key: str) -> float | None:
        return _found_counts(figures[key])[0] if figures[key].get("defects") else None

    def found_of(key: str, value: float) -> str:
        return f"{value:.0f} of {_found_counts(figures[key])[1]}"

    return [
        _Compared("Image AUROC", figure("image", "auroc"), _four_digits),
        _Compared("Pixel AUROC", figure("pixel", "auroc"), _four_digits),
        _Compared("AUPRO", figure("pixel", "aupro"), _four_digits),
        _Compared("Good parts stopped", alarms, alarms_of, _count_change),
        _Compared("Defects found", found, found_of, _count_change),
        _Compared("Verdicts unlike the trained model", flips, flips_of, _count_change),
    ]


def _speed_rows(manifest: Manifest, keys: Sequence[str], bench: Figures) -> list[_Compared]:
    def latency(stage: str, name: str) -> Callable[[str], float | None]:
        return lambda key: bench.get(key, {}).get("latency_ms", {}).get(stage, {}).get(name)

    def cpu_time(key: str) -> float | None:
        return bench.get(key, {}).get("infer_cpu_ms")

    def milliseconds(key: str, value: float) -> str:
        return _ms(value)

    def size(key: str) -> float | None:
        return _graph_bytes(manifest, key)

    measured = any(key in bench for key in keys)
    return [
        *(
            _Compared(f"Inference {name}", latency("infer", name), milliseconds, _ratio_change, always=measured)
            for name in ("p50", "p90", "p99")
        ),
        _Compared("Resize and inference p50", latency("resize_and_infer", "p50"), milliseconds, _ratio_change),
        _Compared("CPU time per image", cpu_time, milliseconds, _ratio_change),
        _Compared("Model file", size, lambda key, value: _megabytes(value), _ratio_change),
    ]


def _four_digits(key: str, value: float) -> str:
    return f"{value:.4f}"


def _count_change(first: float, second: float) -> str:
    return _signed(second - first, 0)


def _ratio_change(first: float, second: float) -> str:
    if not first:
        return ""
    change = _signed((second / first - 1) * 100, 0)
    return change if change == _NONE else f"{change}{_NBSP}%"


def _signed(change: float, digits: int) -> str:
    text = f"{change:+.{digits}f}"
    return _NONE if float(text) == 0 else text.replace("-", "−")


def _parity(manifest: Manifest) -> str:
    head = ["Graph", "Result", "Verdicts changed", "AUROC", "Score differs by", "Map differs by", "Distinct", "Limit"]
    rows = [
        [
            f"<b>{_esc(row.backend)}</b>",
            _chip("pass", "ok") if row.ok else _chip("FAIL", "ng"),
            f"{row.flips} of {row.images}",
            "–" if row.auroc is None else f"{row.auroc:.4f}",
            f"{row.score_difference:.1e}",
            f"{row.map_difference:.1e}",
            _percent(row.distinct, 0),
            _esc(row.limit),
        ]
        for row in manifest.parity
    ]
    accepted = ""
    if manifest.model.parameters.get("allow_drop"):
        accepted = f"<p>{_chip('note', 'warn')} Exported with --allow-drop: a failed gate did not stop it.</p>"
    return (_table(head, rows, css="stack") if rows else "<p>No graph was compared.</p>") + accepted


def _parity_row(manifest: Manifest, key: str) -> ParityRow | None:
    return next((row for row in manifest.parity if row.backend == key.replace("/", " ")), None)


# Limits


def _limit_cards(manifest: Manifest, normal_scores: Mapping[str, Scores]) -> str:
    cards = []
    for key, thresholds in _main_first(manifest, manifest.thresholds):
        histogram = ""
        if key in normal_scores:
            scores = normal_scores[key]
            name = f"Held-out normal scores, {key}"
            svg = score_histogram_svg(scores, [GOOD] * len(scores), thresholds, title=name)
            histogram = f'<p class="faint">The held-out normal scores that set these limits:</p>{svg}'
        cards.append(f'<div class="card"><h3>{_esc(key)}</h3>{_limits(thresholds)}{histogram}</div>')
    return f'<div class="cards">{"".join(cards)}</div>{_methods(list(manifest.thresholds.values()))}'


def _measured_limits(manifest: Manifest, main: str, figures: Figures) -> str:
    cards = []
    for key, thresholds in _main_first(manifest, {key: manifest.thresholds[key] for key in figures}):
        measured = {name: _measured(row) for name, row in figures[key]["false_alarms"].items()}
        cards.append(f'<div class="card"><h3>{_esc(key)}</h3>{_limits(thresholds, measured)}</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _limits(thresholds: Thresholds, measured: Mapping[str, str] | None = None) -> str:
    rows = [
        ("fail", _chip("NG", "ng"), "good parts would be stopped", thresholds.fail),
        ("warn", _chip("WARN", "warn"), "good parts would be WARN or NG", thresholds.warn),
        ("pixel", "Outline", "good pictures would show an outline anywhere", thresholds.pixel),
    ]
    items = "".join(
        f"<dt>{mark} above {limit.value:.4g}</dt><dd>{_in_counts(limit, what)} {(measured or {}).get(name, '')}</dd>"
        for name, mark, what, limit in rows
    )
    return f'<dl class="limits">{items}</dl>'


def _in_counts(limit: Threshold, what: str) -> str:
    """Say what a limit means for people who stop lines; `maximum` promises no rate, so its expected one is said."""
    bound = (
        f"with 95{_NBSP}% confidence not more than {_per_many(limit.upper95, like=limit.alpha)} "
        f"({limit.method}, n{_NBSP}={_NBSP}{limit.n}, order statistic {limit.order})."
    )
    if limit.method == "maximum":
        expected = _per_many(1 / (limit.n + 1), like=limit.alpha)
        return f"Wanted: {_per_many(limit.alpha)}. {limit.n} images allow: about {expected} {what}; {bound}"
    return f"About {_per_many(limit.alpha)} {what}; {bound}"


def _measured(alarms: dict[str, Any]) -> str:
    if not alarms["images"]:
        return ""
    low, high = alarms["rate_interval"]
    interval = f"95{_NBSP}% interval {_percent(low)} to {_percent(high)}"
    return f"<b>Measured: {alarms['alarms']} of {alarms['images']}</b>, {_percent(alarms['rate'])} ({interval})."


def _methods(thresholds: Sequence[Thresholds]) -> str:
    """Return one sentence on each method that is used."""
    used = {limit.method for each in thresholds for limit in (each.warn, each.fail, each.pixel)}
    items = "".join(f"<li><b>{name}</b>: {text}</li>" for name, text in _METHODS.items() if name in used)
    return f'<ul class="faint">{items}</ul>'


def _calibration(manifest: Manifest) -> str:
    record = manifest.calibration
    if record is None:
        return "<p>No INT8: this bundle holds float graphs only, so nothing was calibrated.</p>"
    return _facts(
        {
            "Method": record.method,
            "Images": f"{record.images} normal images, {record.synthetic} of them with a synthetic anomaly",
            "Seed": record.seed,
            "Images SHA-256": record.images_sha256,
            "Float model SHA-256": record.float_model_sha256,
        }
    )


# Facts


def _model_facts(manifest: Manifest) -> dict[str, object]:
    spec = manifest.input.preprocess
    parameters = dict(manifest.model.parameters)
    head = parameters.pop("head_bytes", None)
    maps = [" × ".join(map(str, output.shape[1:])) for output in manifest.outputs if output.role == "map"]
    return {
        "Detector": manifest.model.kind,
        **{_PARAMETER_NAMES.get(name, name.replace("_", " ")): value for name, value in parameters.items()},
        "Head size": None if head is None else _megabytes(head),
        "Input": f"{spec.width} × {spec.height} pixels, {spec.policy}",
        "Region of interest": None if spec.roi == WHOLE_IMAGE else spec.roi,
        "Map": maps,
        "Precision": manifest.precision.upper(),
    }


def _training_facts(manifest: Manifest) -> dict[str, object]:
    named = {_TRAINING_NAMES.get(name, name.replace("_", " ")): value for name, value in manifest.training.items()}
    return {**named, "Seed": manifest.seed, "Created": _time_text(manifest.created_utc), "Sequence": manifest.seq}


def _environment(report: dict[str, Any]) -> str:
    environment = report.get("environment", {})
    named = {_ENVIRONMENT_NAMES.get(name, name.replace("_", " ")): value for name, value in environment.items()}
    return _facts({**named, "Runs": report.get("runs")}) if named else ""


def _facts(facts: Mapping[str, object]) -> str:
    """Return names and values as a list; what has no value (None, empty) is left out."""
    texts = {name: "" if value is None else _value_text(value) for name, value in facts.items()}
    items = "".join(
        f"<div><dt>{_esc(name)}</dt><dd>{_esc(text[:16] + '…' if name.endswith('SHA-256') else text)}</dd></div>"
        for name, text in texts.items()
        if text
    )
    return f'<dl class="facts">{items}</dl>'


def _time_text(utc: str) -> str:
    return utc.replace("T", " ").replace("Z", " UTC")


def _value_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _commands(commands: Sequence[str]) -> str:
    return f'<pre tabindex="0">{_esc(chr(10).join(commands))}</pre>' if commands else ""


# Gallery


def _gallery_section(examples: Sequence[Example], limits: Thresholds) -> tuple[str, str, str]:
    """Return title, gallery with colour scale, and lead; examples without masks are shown as pairs."""
    if not examples:
        return "Examples", "", ""
    masks = any(example.mask is not None for example in examples)
    figures = "".join(_example(example, limits.fail, masks=masks) for example in examples)
    gallery = f'<div class="gallery{" three" if masks else ""}">{figures}</div>'
    pictures = "heat map and, as a blue line, what people marked" if masks else "and heat map"
    lead = f"Picture{',' if masks else ''} {pictures}. The limit is the one that makes a part NG."
    return "Examples", gallery + _colour_scale(limits.pixel), lead


def _example(example: Example, limit: Threshold, *, masks: bool) -> str:
    """Return one figure; `masks` keeps the third place also where there is no mask."""
    pictures = [
        _img(example.picture.convert("RGB"), f"Picture of {example.name}"),
        _img(example.overlay.convert("RGB"), f"Heat map of {example.name}"),
    ]
    if example.mask is not None:
        pictures.append(_img(marked(example.picture, example.mask), f"Marked defect of {example.name}"))
    elif masks:
        pictures.append('<div class="empty">nothing marked</div>')
    css = {"OK": "ok", "WARN": "warn", "NG": "ng"}.get(example.verdict, "plain")
    return (
        f'<figure class="card"><div class="pictures">{"".join(pictures)}</div>'
        f"<figcaption>{_chip(example.verdict, css)} <b>{_esc(example.label)}</b> "
        f"{_relative(example.score, limit.value)}{_remark(example.label, example.verdict)}"
        f'<span class="faint">{_esc(example.name)}</span></figcaption></figure>'
    )


def _remark(label: str, verdict: str) -> str:
    """Name a wrong verdict."""
    if label == UNSURE or verdict == "INVALID":
        return ""
    if label == GOOD:
        return _chip("false alarm", "plain") if verdict == "NG" else ""
    return {"OK": _chip("missed", "plain"), "WARN": _chip("warned only", "plain")}.get(verdict, "")


def _relative(score: float, limit: float) -> str:
    if not math.isfinite(score):
        return "<span>no score</span>"
    digits = 2 if 0.9 * limit < score < 1.1 * limit else 1
    text = f"{score / limit:.{digits}f} × the limit" if limit > 0 else f"score {score:.4g}, limit {limit:.4g}"
    return f'<span title="score {score:.4g}, NG above {limit:.4g}">{text}</span>'


def marked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the picture, at most 320 pixels a side, with a line just outside of what the mask marks."""
    small = _small(picture.convert("RGB"))
    region = mask.convert("L").resize(small.size, Image.Resampling.BOX).point(lambda value: 255 if value else 0)
    near, far = region.filter(ImageFilter.MaxFilter(3)), region.filter(ImageFilter.MaxFilter(7))
    small.paste(_MARKED, mask=ImageChops.subtract(far, near))
    return small


def _colour_scale(limit: Threshold) -> str:
    """Return the legend of the heat maps, drawn by the function that draws them: a ramp over a grey picture."""
    width, height = 600, 28
    ramp = np.tile(np.linspace(0.0, _RAMP_END, width, dtype=np.float32), (height, 1))
    grey = Image.new("RGB", (width, height), (142, 146, 150))
    strip = draw_overlay(grey, ramp, Preprocess(height, width), 1.0)
    ticks = {0.5: f"half: {limit.value / 2:.3g}", 1: f"limit: {limit.value:.3g}", 2: f"twice: {limit.value * 2:.3g}"}
    marks = "".join(f'<span style="left:{100 * at / _RAMP_END:g}%">{text}</span>' for at, text in ticks.items())
    return (
        f'<div class="scale"><h3>Colour scale</h3><img src="{_data_uri(strip, "PNG")}" width="{width}" '
        f'height="{height}" alt="Colour scale from transparent over yellow to dark red">'
        f'<div class="ticks">{marks}</div><p class="faint">{_SCALE_TEXT}</p></div>'
    )


def _img(picture: Image.Image, alt: str) -> str:
    small = _small(picture)
    return f'<img src="{_data_uri(small, "JPEG")}" alt="{_esc(alt)}" width="{small.width}" height="{small.height}">'


def _small(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return small


def _data_uri(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    # Full colour resolution: thin red lines blur otherwise.
    options: dict[str, Any] = {"quality": 85, "subsampling": 0} if kind == "JPEG" else {}
    picture.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Small parts


def _main_key(manifest: Manifest, mapping: Mapping[str, object]) -> str:
    wanted = f"openvino/{manifest.precision}"
    return wanted if wanted in mapping else next(iter(mapping))


def _main_first(manifest: Manifest, mapping: Mapping[str, Thresholds]) -> list[tuple[str, Thresholds]]:
    main = _main_key(manifest, mapping)
    return sorted(mapping.items(), key=lambda item: item[0] != main)


def _graph_bytes(manifest: Manifest, key: str) -> float | None:
    """Return the size of what the engine reads; an OpenVINO .xml has its weights in a .bin beside it."""
    name = manifest.graphs.get(key, "")
    if name not in manifest.files:
        return None
    weights = manifest.files.get(name.removesuffix(".xml") + ".bin") if name.endswith(".xml") else None
    return manifest.files[name].size + (weights.size if weights else 0)


def _found_counts(figures: dict[str, Any]) -> tuple[int, int]:
    """Return how many of how many defective images are NG, over all kinds of defect."""
    rows = list(figures.get("defects", {}).values())
    return sum(round(row["found"] * row["images"]) for row in rows), sum(row["images"] for row in rows)


def _per_many(rate: float, like: float | None = None) -> str:
    """Say a rate in counts, '10 of 1000', by the first of 1000, 10000 ... that makes `like` (or itself) at least 1.

    A bound (with `like`) is rounded up: 'not more than 42' must stay true.
    """
    base = 1000
    while (rate if like is None else like) * base < 1 - 1e-9 and base < 10**9:
        base *= 10
    count = f"{rate * base:.3g}" if like is None else f"{math.ceil(rate * base - 1e-9)}"
    return f"{count} of {base}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}".replace("%", f"{_NBSP}%")


def _ms(value: float | None) -> str:
    if value is None:
        return _NA
    return f"{value:.{2 if value < 10 else 1}f}{_NBSP}ms"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}{_NBSP}MB"


def _chip(text: str, css: str) -> str:
    return f'<span class="chip {css}">{_esc(text)}</span>'


def _meter(share: float, images: int) -> str:
    found = f"{round(share * images)} of {images} ({_percent(share, 0)})"
    return f'{found} <span class="meter"><i style="width:{100 * share:.1f}%"></i></span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """Return a table whose first column names the row; too wide, it scrolls sideways, or on a phone falls in lines.

    `css`: "stack" for the latter, one line per cell.
    """
    top = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in head)
    lines = "".join(f"<tr>{_cells(head, row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cells(head: Sequence[str], row: Sequence[str]) -> str:
    cells = "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(head[1:], row[1:], strict=True))
    return f'<th scope="row">{row[0]}</th>{cells}'


def _section(title: str, body: str, lead: str = "") -> str:
    """Return a titled part of the page, or nothing where it has no body."""
    intro = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{_esc(title)}</h2>{intro}{body}</section>" if body else ""


def _page(title: str, body: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_esc(title)}</title><style>{_CSS}</style></head>\n'
        f"<body><main>\n{chr(10).join(part for part in body if part)}\n</main>"
        "<footer>Made by edge-anomaly. This page fetches nothing.</footer></body></html>\n"
    )


_PARITY_LEAD = (
    "Every graph scores the same real images as the trained model. A float graph must give the same scores; an INT8 "
    "graph is fitted anew on its own features and must give the same verdicts and the same AUROC. Differences are "
    "relative: of scores the largest, of maps the 99th percentile."
)
_LIMITS_LEAD = (
    "Set from normal images that the model was not fitted on, apart for every engine and precision, in counts of "
    "good parts."
)
_HISTOGRAM_LEAD = (
    "One row per label, each with its own height scale: the small number is its tallest bar. Bars right of the NG line "
    "are false alarms in the first row and found defects in the others."
)
_COMPARISON_LEAD = (
    f"Times are of one image after the other on the machine below. {_NA}: not measured, or too few runs for that "
    "percentile."
)
_SCALE_TEXT = (
    "The scale is fixed: it is tied to the pixel limit, not to the picture, so the same colour means the same in every "
    "one. Heat maps are transparent below half the limit, yellow at the limit and dark red from twice the limit on. "
    "The red line encloses what is above the limit."
)

_METHODS = {
    "conformal": "the limit is a score of the n held-out ones (the order statistic), and new good parts of the same "
    "kind exceed it at the stated rate, whatever the scores' distribution.",
    "pareto": "n images cannot show so small a rate, so the limit is extrapolated from the largest scores with a "
    "generalised Pareto tail and rests on that model; the bound is the one of the largest score.",
    "maximum": "n images are too few even for a tail, so the limit is the largest score and only the bound holds.",
}

_PARAMETER_NAMES = {
    "backbone": "Backbone",
    "layers": "Layers",
    "dims": "Channels kept",
    "reduction": "Reduction",
    "covariance": "Covariance",
    "shrinkage": "Shrinkage",
    "epsilon": "Epsilon",
    "smoothing": "Smoothing",
    "seed": "Seed",
    "opset": "ONNX opset",
    "images": "Images fitted on",
    "allow_drop": "Gate overridden",
}
_TRAINING_NAMES = {
    "name": "Data set",
    "train": "Normal images",
    "test": "Labelled test images",
    "note": "Note",
    "fitted": "Fitted on",
    "held_out": "Held out for the limits",
    "skipped": "Unreadable, skipped",
    "images_sha256": "Images SHA-256",
    "weights": "Backbone weights",
}
_ENVIRONMENT_NAMES = {
    "cpu": "CPU",
    "int8_instructions": "INT8 instructions",
    "threads": "Threads",
    "engine_version": "Engine version",
    "device": "Device",
    "float_precision": "Float precision",
    "python": "Python",
    "system": "System",
}

_CSS = """
:root{--bg:#f3f5f7;--card:#fff;--ink:#17212b;--faint:#566371;--line:#dbe1e7;--good:#2368b0;--bad:#c2500c;
--unsure:#6b7785;--ok:#11653b;--okbg:#dcf3e5;--warn:#7c5300;--warnbg:#fcefcd;--fail:#a80f39;--failbg:#fde1e7;--plainbg:#e8ecf0}
@media screen and (prefers-color-scheme:dark){:root{--bg:#0e1318;--card:#161d24;--ink:#e5eaf0;--faint:#9fadbb;
--line:#2b3640;--good:#6aaef2;--bad:#f39a5b;--unsure:#94a1ae;--ok:#7fdba6;--okbg:#123524;--warn:#f0c060;--warnbg:#3a2d0c;
--fail:#ff8ba3;--failbg:#451825;--plainbg:#27313b}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 -apple-system,"Segoe UI",Roboto,Inter,"Noto Sans",
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
body::before{content:"";display:block;height:4px;background:linear-gradient(90deg,#8e9296 20%,#ffd200 40%,
#f05a00 60%,#960014 80%);print-color-adjust:exact;-webkit-print-color-adjust:exact}
main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding:34px 0 18px}
h1{font-size:clamp(25px,4.5vw,36px);line-height:1.15;letter-spacing:-.02em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;letter-spacing:-.01em;margin:0 0 4px}
h3{font-size:15px;margin:0 0 10px}
p{margin:0 0 12px}
header p,.lead,.faint,footer{color:var(--faint)}
header b{color:var(--ink);font-weight:600}
.lead{max-width:760px;margin-bottom:16px;text-wrap:pretty}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:0 0 16px}
section>:last-child{margin-bottom:0}
footer{padding-bottom:36px;font-size:13px}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:0 0 16px;
background:var(--line);border:1px solid var(--line);border-radius:12px;overflow:hidden}
.tiles div{flex:1 1 165px;background:var(--card);padding:16px 18px}
.tiles dt{font-size:13px;color:var(--faint)}
.tiles dd{margin:0}
.tiles dd>b{display:block;font-size:29px;line-height:1.25;letter-spacing:-.025em;font-weight:650;white-space:nowrap}
.tiles span{font-size:13px;line-height:1.4;color:var(--faint)}
.tiles dd>span{display:block}
.tiles span b{color:var(--ink);font-weight:600}
.chip{display:inline-block;padding:1px 8px;border-radius:99px;font-size:12px;font-weight:650;line-height:18px;
white-space:nowrap;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.tiles .chip{display:table;margin-top:4px}
.chip.ok{color:var(--ok);background:var(--okbg)}
.chip.warn{color:var(--warn);background:var(--warnbg)}
.chip.ng{color:var(--fail);background:var(--failbg)}
.chip.plain{color:var(--ink);background:var(--plainbg)}
.hist{display:block;overflow:visible;font-family:inherit}
.hist text{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.hist .plate{fill:var(--card)}
.hist g rect{stroke:var(--card);stroke-width:1px}
.hist .good{fill:var(--good)}.hist .bad{fill:var(--bad)}.hist .unsure{fill:var(--unsure)}
.hist .faint{fill:var(--faint)}
.hist text.warn,.hist rect.warn{fill:var(--warn)}.hist line.warn{stroke:var(--warn)}
.hist text.fail,.hist rect.fail{fill:var(--fail)}.hist line.fail{stroke:var(--fail)}
.scroll{overflow-x:auto;margin:0 -8px}
table{border-collapse:collapse;min-width:min(100%,820px);font-size:14px}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--line);font-weight:400;vertical-align:top}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--faint);font-size:13px;vertical-align:bottom;white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
td{white-space:nowrap}
.meter{display:inline-block;width:84px;height:8px;border-radius:4px;background:var(--plainbg);overflow:hidden;margin-left:6px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.meter i{display:block;height:100%;background:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px;margin-top:14px}
.card{border:1px solid var(--line);border-radius:10px;padding:16px;margin:0;break-inside:avoid}
.limits{margin:0 0 14px}
.limits dt{font-weight:600}
.limits dd{margin:1px 0 10px;font-size:14px}
.limits:last-child,.limits dd:last-child{margin-bottom:0}
ul{margin:16px 0 0;padding-left:18px;font-size:14px}
ul b{color:var(--ink)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:12px 24px;margin:10px 0 0}
.facts dt{font-size:13px;color:var(--faint)}
.facts dd{margin:0;overflow-wrap:anywhere}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:14px;margin-top:14px}
.gallery .card{padding:10px}
.gallery:not(.three){grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.pictures{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.three .pictures{grid-template-columns:repeat(3,1fr)}
.pictures img{display:block;width:100%;height:auto;border-radius:5px}
.empty{display:grid;place-items:center;border:1px dashed var(--line);border-radius:5px;font-size:12px;
color:var(--faint);text-align:center}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:3px 9px;font-size:14px;margin-top:9px}
figcaption .faint{margin-left:auto;font-size:13px;overflow-wrap:anywhere}
.scale{max-width:600px;margin-top:22px}
.scale img{display:block;width:100%;height:24px;border-radius:5px}
.ticks{position:relative;height:28px;font-size:13px;margin-bottom:6px}
.ticks span{position:absolute;transform:translateX(-50%);white-space:nowrap;line-height:18px}
.ticks span::before{content:"";display:block;width:1px;height:5px;margin:0 auto 1px;background:currentColor}
pre{margin:12px 0 0;padding:14px 16px;background:var(--bg);border:1px solid var(--line);border-radius:8px;
overflow-x:auto;font:13px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
:focus-visible{outline:2px solid var(--good);outline-offset:2px}
@media (max-width:640px){main,footer{padding:0 10px}header{padding:22px 6px 14px}section{padding:16px 14px}
.tiles div{flex-basis:40%;padding:12px}.tiles dd>b{font-size:24px}.meter{display:block;margin:4px 0 3px auto}
.stack thead{display:none}.stack tr{display:block;padding:10px 0;border-bottom:1px solid var(--line)}
.stack th,.stack td{display:flex;justify-content:space-between;gap:12px;padding:2px 6px;border:0}
.stack td::before{content:attr(data-name);color:var(--faint)}.stack tr:last-child{border:0}
th,td{padding:7px 6px}.scroll{margin:0 -6px}}
@media print{:root{--bg:#fff}body{font-size:11pt}.hist,tr,.tiles{break-inside:avoid}
h2,.lead{break-after:avoid}section{padding:12px 0;border:0}
.gallery{grid-template-columns:1fr 1fr}.scroll{overflow:visible}pre{white-space:pre-wrap}}
"""
