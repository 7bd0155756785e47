"""Pace against latency: what a camera's frames wait at different rates, and the highest rate that loses none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.scoring import Scorer

from .harness import BenchOptions, Report, run_bench

SCHEMA = "edge-anomaly.bench-sweep/1"
SHOWN = ("p50", "p90", "p95", "p99", "max")

# Parts of the rate that frames back to back reach: beyond 1 frames must be missed, which the last one is to show.
_SHARES = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.15)
_SINGLE_RUNS = 100
_LONGEST_S = 86_400


def sweep(
    scorer: Scorer,
    *,
    rates: Sequence[float] = (),
    seconds: float = 10.0,
    images: Sequence[str] = (),
    progress: Callable[[Sequence[BenchOptions]], Iterable[BenchOptions]] = iter,
) -> dict[str, Any]:
    """Measure a loaded bundle at each rate (frames a second) for `seconds`, and return a JSON-ready report.

    rates: with none, eight from 10 to 115 % of what frames back to back reach, which is measured first. Rows hold the
    rate, frames scored and missed, percentiles in ms from the moment at which a frame was due (None with too few
    samples), and the CPU time per frame. highest_rate: the highest one at which, as at all below, no frame was missed;
    None if there is none. warnings: what makes the figures doubtful. progress: goes through the measurements.

    Raises:
        UsageError: a rate or a duration that cannot be measured.
    """
    if not 1 <= seconds <= _LONGEST_S:
        raise UsageError(f"--seconds {seconds:g} is not possible.", f"Give 1 to {_LONGEST_S} for each rate.")
    options = [_paced(rate, seconds, images) for rate in sorted(rates)]
    if not options:
        alone = run_bench([scorer], BenchOptions(runs=_SINGLE_RUNS, images=tuple(images)))
        reached = 1e3 / alone["latency_ms"]["total"]["p50"]
        options = [_paced(float(f"{share * reached:.3g}"), seconds, images) for share in _SHARES]
    rows: list[dict[str, Any]] = []
    doubts: dict[str, None] = {}
    report: Report = {}
    for chosen in progress(options):
        report = run_bench([scorer], replace(chosen, warm_up=not rows))
        doubts |= dict.fromkeys(text for text in report["warnings"] if "missed" not in text)
        total = report["latency_ms"]["total"]
        rows.append(
            {
                "rate": chosen.rate,
                "scored": report["runs"],
                "missed": report["missed"],
                **{f"{name}_ms": total[name] for name in SHOWN},
                "cpu_ms_per_image": report["cpu_ms_per_image"],
            }
        )
        say(describe(rows[-1]))
    return {
        "schema": SCHEMA,
        "bundle": scorer.bundle.manifest.name,
        "engine": scorer.engine,
        "precision": scorer.precision,
        "seconds": seconds,
        "rates": rows,
        "highest_rate": highest_rate(rows),
        "full_size_images": report["full_size_images"],
        "environment": report["environment"],
        "warnings": list(doubts),
    }


def _paced(rate: float, seconds: float, images: Sequence[str]) -> BenchOptions:
    checked = BenchOptions("paced", rate=rate, images=tuple(images))
    return replace(checked, runs=max(1, round(rate * seconds)))


def highest_rate(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the highest rate up to which no frame was missed, of rows with rising rates."""
    kept = None
    for row in rows:
        if row["missed"]:
            break
        kept = float(row["rate"])
    return kept


def describe(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    shown = ", ".join(f"{name} {row[f'{name}_ms']:.2f}" for name in SHOWN if row[f"{name}_ms"] is not None)
    return f"{row['rate']:g} a second: {row['scored']} scored, {row['missed']} missed, {shown} ms"
