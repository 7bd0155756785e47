"""Pace against latency: what a camera's frames wait at different rates, and the highest rate that loses none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.scoring import Scorer

from .harness import BenchOptions, run_bench

SCHEMA = "edge-anomaly.bench-sweep/1"
SHOWN = ("p50", "p90", "p95", "p99", "max")

# Parts of the rate that frames back to back reach: beyond 1 frames must be missed, which the last one is to show.
_SHARES = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.15)
_SINGLE_RUNS = 100


def sweep(
    scorer: Scorer,
    *,
    rates: Sequence[float] = (),
    seconds: float = 10.0,
    images: Sequence[str] = (),
    progress: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> dict[str, Any]:
    """Measure a loaded bundle at each rate (frames a second) for `seconds`, and return a JSON-ready report.

    rates: with none, eight from 10 to 115 % of what frames back to back reach, which is measured first. Rows hold the
    rate, frames scored and missed, percentiles in ms from the moment at which a frame was due (None with too few
    samples), and the CPU time per frame. highest_rate: the highest one at which, as at all below, no frame was missed;
    None if there is none. progress: goes through the rates.

    Raises:
        UsageError: a rate or a duration that cannot be measured.
    """
    if not seconds >= 1:
        raise UsageError(f"--seconds {seconds:g} is too short.", "Give 1 or more for each rate.")
    if not rates:
        alone = run_bench([scorer], BenchOptions(runs=_SINGLE_RUNS, images=tuple(images)))
        rates = [share * 1e3 / alone["latency_ms"]["total"]["p50"] for share in _SHARES]
    rows, around = [], {}
    for rate in progress(sorted(float(f"{rate:.3g}") for rate in rates)):
        runs = max(1, round(rate * seconds))
        options = BenchOptions("paced", runs, rate, images=tuple(images), warm_up=not rows)
        report = run_bench([scorer], options)
        around = report["environment"]
        total = report["latency_ms"]["total"]
        rows.append(
            {
                "rate": rate,
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
        "environment": around,
    }


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
