"""Percentiles that say when there are too few samples for them, and a test whether one side is slower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

# Reported of every stage, in this order.
PERCENTS = (50.0, 90.0, 95.0, 99.0, 99.9)
CONFIDENCE = 0.99


def summary(samples_ms: Sequence[float]) -> dict[str, float | int | None]:
    """Return n, min, nearest-rank percentiles, max, mean and standard deviation of latencies in milliseconds.

    No sample is left out. A percentile is None below `samples_needed`. The nearest rank is the ceil(n p / 100)-th
    smallest: a latency that was measured, never one in between.
    """
    ordered = sorted(samples_ms)
    count, mean = len(ordered), sum(ordered) / len(ordered)
    result: dict[str, float | int | None] = {"n": count, "min": round(ordered[0], 4)}
    for percent in PERCENTS:
        result[f"p{percent:g}"] = round(percentile(ordered, percent), 4) if count >= samples_needed(percent) else None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in ordered) / count)
    return {**result, "max": round(ordered[-1], 4), "mean": round(mean, 4), "stdev": round(deviation, 4)}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of samples in ascending order.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.0
    """
    # 99.9 is no binary number: 99.9 / 100 * 1000 must not become 1000 of 1000.
    return ordered[max(1, math.ceil(round(len(ordered) * percent / 100, 9))) - 1]


def upper_bound(samples: Sequence[float], percent: float) -> float | None:
    """Return a value that the percentile is below with 99 % confidence; None with too few samples.

    Of n samples, t lie above the true percentile with binomial probability; the t-th largest is the bound for the
    largest t whose tail is below 1 % (the early stopping of MLPerf's LoadGen).
    """
    chance, count = 1 - percent / 100, len(samples)
    below = 0
    while below < count and _binomial_tail(count, chance, below) <= 1 - CONFIDENCE:
        below += 1
    return sorted(samples)[-below] if below else None


@cache
def samples_needed(percent: float) -> int:
    """Return how many samples a percentile needs: with 99 % confidence, two of them are above it.

    >>> [samples_needed(percent) for percent in (50, 90, 95, 99, 99.9)]
    [11, 64, 130, 662, 6636]
    """
    chance, count = 1 - percent / 100, 1
    while _binomial_tail(count, chance, 1) > 1 - CONFIDENCE:
        count = max(count + 1, int(count * 1.01))
    while _binomial_tail(count - 1, chance, 1) <= 1 - CONFIDENCE:
        count -= 1
    return count


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the one-sided p-value of `second` not being larger than `first` (Mann & Whitney 1947), ties counted half.

    The normal approximation with correction for continuity and ties; from about 8 samples a side it is within a factor
    of 1.5 of the exact value.

    >>> round(mann_whitney([1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]), 4)
    0.0005
    """
    m, n = len(first), len(second)
    larger = sum((b > a) + 0.5 * (b == a) for a in first for b in second)
    counts: dict[float, int] = {}
    for value in (*first, *second):
        counts[value] = counts.get(value, 0) + 1
    ties = sum(count**3 - count for count in counts.values())
    variance = m * n / 12 * ((m + n + 1) - ties / ((m + n) * (m + n - 1)))
    if variance <= 0:
        return 1.0
    return 0.5 * math.erfc((larger - m * n / 2 - 0.5) / math.sqrt(2 * variance))


def _binomial_tail(count: int, chance: float, most: int) -> float:
    """Return the probability of `most` or fewer successes of `count`."""
    log_chance, log_rest = math.log(chance), math.log1p(-chance)
    return sum(
        math.exp(
            math.lgamma(count + 1)
            - math.lgamma(hits + 1)
            - math.lgamma(count - hits + 1)
            + hits * log_chance
            + (count - hits) * log_rest
        )
        for hits in range(min(most, count) + 1)
    )
