"""Percentiles by nearest rank, how many samples they need, and Mann-Whitney against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, mannwhitneyu

from edge_anomaly_runtime.bench.statistics import mann_whitney, percentile, samples_needed, summary, upper_bound


def test_percentiles_are_the_nearest_rank() -> None:
    figures = summary([float(value) for value in range(10_000, 0, -1)])
    assert {name: figures[name] for name in ("n", "min", "p50", "p90", "p95", "p99", "p99.9", "max", "mean")} == {
        "n": 10_000,
        "min": 1.0,
        "p50": 5000.0,
        "p90": 9000.0,
        "p95": 9500.0,
        "p99": 9900.0,
        "p99.9": 9990.0,
        "max": 10_000.0,
        "mean": 5000.5,
    }
    assert figures["stdev"] == pytest.approx(np.arange(1, 10_001).std(), abs=1e-3)
    # 13 samples: the 7th is the smallest with at least half of them at or below it.
    assert summary([3, 1, 2, 4, 5, 6, 70, 8, 9, 10, 11, 12, 13])["p50"] == 8


@pytest.mark.parametrize(("percent", "count", "rank"), [(99.9, 1000, 999), (50, 1, 1), (50, 2, 1), (100, 7, 7)])
def test_a_percentile_is_a_sample(percent: float, count: int, rank: int) -> None:
    assert percentile([float(value) for value in range(1, count + 1)], percent) == rank


@pytest.mark.parametrize(("percent", "needed"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636)])
def test_a_percentile_needs_so_many_samples_that_two_lie_above_it(percent: float, needed: int) -> None:
    assert samples_needed(percent) == needed
    assert binom.cdf(1, needed, 1 - percent / 100) <= 0.01 < binom.cdf(1, needed - 1, 1 - percent / 100)
    assert summary([1.0] * needed)[f"p{percent:g}"] == 1.0
    assert summary([1.0] * (needed - 1))[f"p{percent:g}"] is None


def test_no_sample_is_dropped() -> None:
    figures = summary([1.0] * 99 + [1000.0])
    assert (figures["max"], figures["mean"], figures["p90"]) == (1000.0, 10.99, 1.0)


def test_the_upper_bound_is_above_the_true_percentile_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    bounds = [upper_bound(rng.random(1000).tolist(), 95) for _ in range(400)]
    covered = np.mean([bound is not None and bound >= 0.95 for bound in bounds])
    assert 0.98 <= covered <= 1.0
    assert upper_bound([1.0] * 458, 99) is None
    assert upper_bound([1.0] * 459, 99) == 1.0  # 0.99**459 is below 1 %


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.5, 3.0])
def test_mann_whitney_is_scipys(shift: float) -> None:
    rng = np.random.default_rng(int(10 * shift))
    first, second = rng.random(15).round(1), (rng.random(12) + shift).round(1)
    expected = mannwhitneyu(second, first, alternative="greater", method="asymptotic").pvalue
    assert mann_whitney(first.tolist(), second.tolist()) == pytest.approx(expected, rel=1e-6)


def test_equal_samples_are_no_evidence() -> None:
    assert mann_whitney([1.0] * 8, [1.0] * 8) == 1.0
