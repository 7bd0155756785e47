"""Pace against latency: what a sweep finds of a scorer whose speed is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edge_anomaly_runtime.bench.plots import pace_curve
from edge_anomaly_runtime.bench.sweep import highest_rate, sweep
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.scoring import Scorer, open_scorer

BUSY_S = 0.02


@pytest.fixture
def slow_scorer(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scorer]:
    """A real scorer whose engine takes 20 ms more: 50 frames a second and never more."""
    with open_scorer(tiny_bundle, engine="onnxruntime", threads=1) as scorer:
        run = scorer.session.run

        def slowly(images: object) -> object:
            time.sleep(BUSY_S)
            return run(images)  # type: ignore[arg-type]

        monkeypatch.setattr(scorer.session, "run", slowly)
        yield scorer


def test_a_sweep_finds_where_frames_are_missed(slow_scorer: Scorer) -> None:
    report = sweep(slow_scorer, rates=[200.0, 10.0], seconds=2)
    slow, fast = report["rates"]
    assert (slow["rate"], fast["rate"]) == (10, 200)
    assert (slow["scored"], slow["missed"]) == (20, 0)
    assert slow["p50_ms"] > BUSY_S * 1e3
    assert fast["missed"] > 200
    assert fast["scored"] + fast["missed"] == 400
    assert report["highest_rate"] == 10
    assert report["full_size_images"] in (True, False)
    assert not any("missed" in text for text in report["warnings"])
    assert slow["p95_ms"] is None  # 20 samples are too few


def test_without_rates_the_scorer_is_measured_first(slow_scorer: Scorer) -> None:
    rates = [row["rate"] for row in sweep(slow_scorer, seconds=1)["rates"]]
    assert len(rates) == 8
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(11.5 * rates[0], rel=0.02)
    assert 20 < rates[-2] <= 50  # all that 20 ms a frame allow


def test_a_missed_frame_below_counts_against_every_rate_above() -> None:
    rows = [{"rate": rate, "missed": missed} for rate, missed in ((1.0, 0), (2.0, 0), (4.0, 3), (8.0, 0))]
    assert highest_rate(rows) == 2
    assert highest_rate(rows[2:]) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rates": [10], "seconds": 0.5}, "--seconds 0.5"),
        ({"rates": [10], "seconds": float("inf")}, "--seconds inf"),
        ({"rates": [10, 0]}, "--rate 0 "),
        ({"rates": [float("inf")]}, "--rate inf"),
        ({"rates": [float("nan")]}, "--rate nan"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    tiny_bundle: Path, arguments: dict[str, Any], named: str
) -> None:
    with open_scorer(tiny_bundle, engine="onnxruntime") as scorer, pytest.raises(UsageError, match=named):
        sweep(scorer, progress=lambda options: pytest.fail("it began"), **arguments)


def test_given_rates_are_measured_as_they_are(tiny_bundle: Path) -> None:
    with open_scorer(tiny_bundle, engine="onnxruntime") as scorer:
        assert [row["rate"] for row in sweep(scorer, rates=[29.97], seconds=1)["rates"]] == [29.97]


def test_the_plot_has_both_curves_and_marks_what_was_missed() -> None:
    row = {"rate": 10.0, "p50_ms": 5.0, "p95_ms": 6.0, "missed": 0}
    picture = ElementTree.fromstring(pace_curve([row, {**row, "rate": 20.0, "missed": 4}]))
    lines = picture.findall("{*}polyline")
    lost = [circle for circle in picture.findall("{*}circle") if circle.get("fill") == "#b3261e"]
    assert len(lines) == 2
    assert len(lost) == 1
    with pytest.raises(UsageError, match="Too few frames"):
        pace_curve([{**row, "p50_ms": None}])
