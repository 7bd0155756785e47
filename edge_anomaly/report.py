"""Pages to look at: what is in a bundle, and how the demo went.

Here a private function that returns `str` returns HTML, and text from outside passes `html.escape` on its way in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_anomaly_runtime.bundle import Manifest, ParityRow, Threshold, Thresholds
from edge_anomaly_runtime.preprocess import WHOLE_IMAGE

from . import html
from .data import GOOD
from .gallery import Example, gallery_section
from .histogram import Scores, histogram_section, score_histogram_svg

__all__ = ["Example", "bundle_report", "demo_report"]

_NONE = "none"

Figures = Mapping[str, dict[str, Any]]


def bundle_report(manifest: Manifest, normal_scores: Mapping[str, Scores]) -> str:
    """Return the page that a bundle carries: model, parity, thresholds, calibration.

    `normal_scores`: float64 [n] by 'engine/precision', the held-out normal scores that set the thresholds.
    """
    body = [
        html.header(
            f"Bundle {manifest.name}",
            f"{_model_line(manifest)} · made {html.escape(html.time_text(manifest.created_utc))}",
        ),
        html.tiles(_bundle_tiles(manifest)),
        html.section("Parity with the trained model", _parity(manifest), _PARITY_LEAD),
        html.section("Alarm limits", _limit_cards(manifest, normal_scores), LIMITS_LEAD) if manifest.thresholds else "",
        html.section("INT8 calibration", _calibration(manifest)),
        html.section("Model", html.facts(_model_facts(manifest))),
        html.section("Training", html.facts(_training_facts(manifest))),
        html.section("Versions", html.facts(manifest.versions)),
    ]
    return html.page(f"{manifest.name}: bundle report", body)


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
        html.header(title, f"{_model_line(manifest)} · figures of <b>{html.escape(main)}</b>"),
        html.tiles(_demo_tiles(main, figures[main], bench)),
        _histogram(main, scores, labels, limits),
        html.section("By kind of defect", defect_table(figures[main])),
        html.section(*_comparison(manifest, main, figures, bench)),
        html.section(*gallery_section(examples, limits)),
        html.section("Alarm limits", _measured_limits(manifest, main, figures) + methods_list([limits]), LIMITS_LEAD),
        html.section("How it was made", html.code_block(commands)),
        html.section("Data", f"<p>{html.escape(note)}</p>" if note else ""),
        html.section("Environment", _environment(bench.get(main, {}))),
    ]
    return html.page(title, body)


def _histogram(main: str, scores: Mapping[str, Scores], labels: Sequence[str], limits: Thresholds) -> str:
    if main not in scores:
        return ""
    return html.section(*histogram_section(scores[main], labels, limits, title=f"Scores of the test images, {main}"))


# Headline


def _model_line(manifest: Manifest) -> str:
    spec, backbone = manifest.input.preprocess, manifest.model.parameters.get("backbone")
    on = f" on {backbone}" if backbone else ""
    return html.escape(
        f"{manifest.model.kind}{on} · {spec.width} × {spec.height} pixels · {manifest.precision.upper()}"
    )


def _demo_tiles(main: str, figures: dict[str, Any], bench: Figures) -> list[html.Tile]:
    tiles = quality_tiles(figures)
    if main in bench:
        tiles.append(_latency_tile(main, bench))
    return tiles


def quality_tiles(figures: dict[str, Any]) -> list[html.Tile]:
    """Return the headline of a detector: AUROC, AUPRO, false alarms, defects found; `figures` as of `evaluate`."""
    tiles = []
    if image := figures.get("image"):
        low, high = image["auroc_interval"]
        interval = f"95{html.NBSP}% interval {low:.3f} to {high:.3f}"
        tiles.append(html.Tile("Image AUROC", f"{image['auroc']:.3f}", interval))
    if pixel := figures.get("pixel"):
        tiles.append(html.Tile("Pixel AUROC", f"{pixel['auroc']:.3f}", "over all pixels of good and marked images"))
        if pixel.get("aupro") is not None:
            detail = f"overlap per defect, up to 30{html.NBSP}% false pixels"
            tiles.append(html.Tile("AUPRO", f"{pixel['aupro']:.3f}", detail))
    tiles.append(_alarm_tile(figures["false_alarms"]["fail"]))
    if image:
        share = f"{html.percent(image['found'])} of the defective images are NG"
        found, total = _found_counts(figures)
        tiles.append(html.Tile("Defects found", f"{found} of {total}", share))
    return tiles


def _alarm_tile(alarms: dict[str, Any]) -> html.Tile:
    promise = (
        f"promised {html.per_many(alarms['promised'])}, bound {html.per_many(alarms['bound'], like=alarms['promised'])}"
    )
    if not alarms["images"]:
        return html.Tile("Good parts stopped", html.NA, f"no good test images; {promise}")
    kept = html.chip("within the bound", "ok") if alarms["inside_bound"] else html.chip("ABOVE the bound", "ng")
    detail = f"{html.percent(alarms['rate'])}; {promise} {kept}"
    return html.Tile("Good parts stopped", f"{alarms['alarms']} of {alarms['images']}", detail)


def _latency_tile(main: str, bench: Figures) -> html.Tile:
    p50 = bench[main]["latency_ms"]["infer"]["p50"]
    engine, _, precision = main.partition("/")
    base = bench.get(f"{engine}/fp32", {}).get("latency_ms", {}).get("infer", {}).get("p50")
    if precision == "fp32" or p50 is None or base is None:
        return html.Tile("Latency p50", html.milliseconds(p50), "inference of one image")
    words = f"{base / p50:.1f} × as fast" if base >= p50 else f"takes {p50 / base:.1f} × as long"
    words = words.replace(" ", html.NBSP)
    return html.Tile(
        "Latency p50",
        html.milliseconds(p50),
        f"inference of one image; <b>{words}</b> as FP32 ({html.milliseconds(base)})",
    )


def _bundle_tiles(manifest: Manifest) -> list[html.Tile]:
    rows, main = manifest.parity, _main_key(manifest, manifest.graphs)
    passed = sum(row.ok for row in rows)
    verdict = html.chip("all pass", "ok") if passed == len(rows) else html.chip("not all pass", "ng")
    tiles = [html.Tile("Graphs at parity", f"{passed} of {len(rows)}", verdict)] if rows else []
    if row := _parity_row(manifest, main):
        changed = f"{html.escape(main)} against the trained model"
        what = "Verdicts changed" if manifest.thresholds else "Classes changed"
        tiles.append(html.Tile(what, f"{row.flips} of {row.images}", changed))
        if row.accuracy is not None:
            tiles.append(html.Tile("Accuracy", f"{row.accuracy:.2%}", f"{html.escape(main)}, {row.images} images"))
        if row.auroc is not None:
            tiles.append(html.Tile("Image AUROC", f"{row.auroc:.3f}", f"{html.escape(main)}, {row.images} images"))
    if manifest.thresholds:
        fail = manifest.thresholds[main].fail
        bound = f"good parts stopped; bound {html.per_many(fail.upper95, like=fail.alpha)}"
        tiles.append(html.Tile("Promised false alarms", html.per_many(fail.alpha), bound))
    if (head := manifest.model.parameters.get("head_bytes")) is not None:
        tiles.append(html.Tile("Head size", html.megabytes(head), "weights of the head, always float"))
    return tiles


# Tables


def defect_table(figures: dict[str, Any]) -> str:
    """Return one line per kind of defect, told apart from the good images; `figures` as of `evaluate`."""
    defects = figures.get("defects", {})
    if not defects:
        return "<p>There are no defective test images, so nothing can be said about finding defects.</p>"
    rows = [[html.escape(name), *_defect_cells(row)] for name, row in defects.items()]
    table = html.table(["Defect", "Images", "AUROC", f"95{html.NBSP}% interval", "AP", "Found (NG)"], rows)
    if unsure := figures.get("unsure"):
        flagged = f"{html.percent(unsure['flagged'])} of them are NG. They count in no figure above."
        table += f"<p class=faint>{unsure['images']} images are labelled unsure; {flagged}</p>"
    return table


def _defect_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["auroc_interval"]
    return [
        str(row["images"]),
        f"{row['auroc']:.4f}",
        f"{low:.3f} to {high:.3f}",
        f"{row['average_precision']:.4f}",
        html.meter(row["found"], row["images"]),
    ]


def _comparison(manifest: Manifest, main: str, figures: Figures, bench: Figures) -> tuple[str, str, str]:
    """Return title, table and lead of the comparison of all keys; a change is given where there are two."""
    keys = sorted(figures, key=lambda key: (not key.endswith("/fp32"), key != main))
    rows = [*_quality_rows(manifest, keys, figures), *_speed_rows(manifest, keys, bench)]
    cells = [_comparison_row(row, keys) for row in rows]
    change = ["Change"] if len(keys) == 2 else []
    table = html.table(["", *map(html.escape, keys), *change], [row for row in cells if row])
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
    cells = [html.NA if value is None else row.show(key, value) for key, value in zip(keys, values, strict=True)]
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
        return f"{value:.0f} of {row.images}" if row else html.NA

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
        return bench.get(key, {}).get("cpu_ms_per_image")

    def milliseconds(key: str, value: float) -> str:
        return html.milliseconds(value)

    def size(key: str) -> float | None:
        return graph_bytes(manifest, key)

    measured = any(key in bench for key in keys)
    return [
        *(
            _Compared(f"Inference {name}", latency("infer", name), milliseconds, _ratio_change, always=measured)
            for name in ("p50", "p90", "p99")
        ),
        _Compared("Decoding to verdict p50", latency("total", "p50"), milliseconds, _ratio_change),
        _Compared("CPU time per image", cpu_time, milliseconds, _ratio_change),
        _Compared("Model file", size, lambda key, value: html.megabytes(value), _ratio_change),
    ]


def _four_digits(key: str, value: float) -> str:
    return f"{value:.4f}"


def _count_change(first: float, second: float) -> str:
    return _signed(second - first, 0)


def _ratio_change(first: float, second: float) -> str:
    if not first:
        return ""
    change = _signed((second / first - 1) * 100, 0)
    return change if change == _NONE else f"{change}{html.NBSP}%"


def _signed(change: float, digits: int) -> str:
    text = f"{change:+.{digits}f}"
    return _NONE if float(text) == 0 else text.replace("-", "−")


def _parity(manifest: Manifest) -> str:
    head = ["Graph", "Result", "Verdicts changed", "AUROC", "Score differs by", "Map differs by", "Distinct", "Limit"]
    rows = [
        [
            f"<b>{html.escape(row.backend)}</b>",
            html.chip("pass", "ok") if row.ok else html.chip("FAIL", "ng"),
            f"{row.flips} of {row.images}",
            "–" if row.auroc is None else f"{row.auroc:.4f}",
            f"{row.score_difference:.1e}",
            f"{row.map_difference:.1e}",
            html.percent(row.distinct, 0),
            html.escape(row.limit),
        ]
        for row in manifest.parity
    ]
    accepted = ""
    if manifest.model.parameters.get("allow_drop"):
        accepted = f"<p>{html.chip('note', 'warn')} Exported with --allow-drop: a failed gate did not stop it.</p>"
    return (html.table(head, rows, css="stack") if rows else "<p>No graph was compared.</p>") + accepted


def _parity_row(manifest: Manifest, key: str) -> ParityRow | None:
    name = key.replace("/", " ")
    return next((row for row in manifest.parity if row.backend in (name, f"{name} simulated")), None)


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
        cards.append(f'<div class="card"><h3>{html.escape(key)}</h3>{limits_list(thresholds)}{histogram}</div>')
    return f'<div class="cards">{"".join(cards)}</div>{methods_list(list(manifest.thresholds.values()))}'


def _measured_limits(manifest: Manifest, main: str, figures: Figures) -> str:
    cards = []
    for key, thresholds in _main_first(manifest, {key: manifest.thresholds[key] for key in figures}):
        measured = {name: measured_rate(row) for name, row in figures[key]["false_alarms"].items()}
        cards.append(f'<div class="card"><h3>{html.escape(key)}</h3>{limits_list(thresholds, measured)}</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def limits_list(thresholds: Thresholds, measured: Mapping[str, str] | None = None) -> str:
    """Return the limits in counts of parts; `measured`: HTML to put behind fail, warn or pixel."""
    rows = [
        ("fail", html.chip("NG", "ng"), "good parts would be stopped", thresholds.fail),
        ("warn", html.chip("WARN", "warn"), "good parts would be WARN or NG", thresholds.warn),
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
        f"with 95{html.NBSP}% confidence not more than {html.per_many(limit.upper95, like=limit.alpha)} "
        f"({limit.method}, n{html.NBSP}={html.NBSP}{limit.n}, order statistic {limit.order})."
    )
    if limit.method == "maximum":
        expected = html.per_many(1 / (limit.n + 1), like=limit.alpha)
        return f"Wanted: {html.per_many(limit.alpha)}. {limit.n} images allow: about {expected} {what}; {bound}"
    return f"About {html.per_many(limit.alpha)} {what}; {bound}"


def measured_rate(alarms: dict[str, Any]) -> str:
    """Say the measured false alarms, a row of `evaluate.false_alarms`, with their interval; nothing without images."""
    if not alarms["images"]:
        return ""
    low, high = alarms["rate_interval"]
    interval = f"95{html.NBSP}% interval {html.percent(low)} to {html.percent(high)}"
    return f"<b>Measured: {alarms['alarms']} of {alarms['images']}</b>, {html.percent(alarms['rate'])} ({interval})."


def methods_list(thresholds: Sequence[Thresholds]) -> str:
    """Return one sentence on each method that is used."""
    used = {limit.method for each in thresholds for limit in (each.warn, each.fail, each.pixel)}
    items = "".join(f"<li><b>{name}</b>: {text}</li>" for name, text in _METHODS.items() if name in used)
    return f'<ul class="faint">{items}</ul>'


def _calibration(manifest: Manifest) -> str:
    record = manifest.calibration
    if record is None:
        return "<p>No INT8: this bundle holds float graphs only, so nothing was calibrated.</p>"
    return html.facts(
        {
            "Method": record.method,
            "Images": f"{record.images} images, {record.synthetic} of them with a synthetic anomaly",
            "Left float by the guard": [name for names in record.float_tensors.values() for name in names] or None,
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
        "Head size": None if head is None else html.megabytes(head),
        "Input": f"{spec.width} × {spec.height} pixels, {spec.policy}",
        "Region of interest": None if spec.roi == WHOLE_IMAGE else spec.roi,
        "Map": maps,
        "Precision": manifest.precision.upper(),
    }


def _training_facts(manifest: Manifest) -> dict[str, object]:
    named = {_TRAINING_NAMES.get(name, name.replace("_", " ")): value for name, value in manifest.training.items()}
    return {**named, "Seed": manifest.seed, "Created": html.time_text(manifest.created_utc), "Sequence": manifest.seq}


def _environment(report: dict[str, Any]) -> str:
    environment = report.get("environment", {})
    named = {text: environment[name] for name, text in _ENVIRONMENT_NAMES.items() if name in environment}
    return html.facts({**named, "Runs": report.get("runs")}) if named else ""


# Small parts


def _main_key(manifest: Manifest, mapping: Mapping[str, object]) -> str:
    wanted = f"openvino/{manifest.precision}"
    return wanted if wanted in mapping else next(iter(mapping))


def _main_first(manifest: Manifest, mapping: Mapping[str, Thresholds]) -> list[tuple[str, Thresholds]]:
    main = _main_key(manifest, mapping)
    return sorted(mapping.items(), key=lambda item: item[0] != main)


def graph_bytes(manifest: Manifest, key: str) -> int | None:
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


_PARITY_LEAD = (
    "Every graph scores the same real images as the trained model. A float graph must give the same scores; an INT8 "
    "graph is fitted anew on its own features and must give the same verdicts and the same AUROC. Differences are "
    "relative: of scores the largest, of maps the 99th percentile."
)
LIMITS_LEAD = (
    "Set from normal images that the model was not fitted on, apart for every engine and precision, in counts of "
    "good parts."
)
_COMPARISON_LEAD = (
    f"Times are of one image after the other on the machine below. {html.NA}: not measured, or too few runs for that "
    "percentile."
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
