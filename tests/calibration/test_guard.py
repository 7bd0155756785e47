"""The guard: tie-aware figures against scipy, and limits that trip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from edge_anomaly_calibration.guard import (
    GuardLimits,
    GuardReport,
    auroc,
    compare,
    rank_correlation,
    tied_ranks,
)
from edge_anomaly_runtime.bundle import Threshold, Thresholds

Scores = npt.NDArray[np.float64]
LIMITS = GuardLimits(auroc_drop=0.01, flips=0.1, distinct=0.9)
N, A = False, True  # normal, anomalous


def f(*values: float) -> Scores:
    return np.array(values, dtype=np.float64)


def b(*values: bool) -> npt.NDArray[np.bool_]:
    return np.array(values, dtype=np.bool_)


def fail_above(value: float) -> Thresholds:
    limit = Threshold(value=value, alpha=0.01, method="conformal", n=100, order=100, upper95=0.03)
    return Thresholds(warn=limit.model_copy(update={"value": value / 2}), fail=limit, pixel=limit, scores={})


def guard(
    reference: Scores,
    scores: Scores,
    defective: npt.NDArray[np.bool_] | None = None,
    *,
    reference_limit: float = 10.0,
    limit: float = 10.0,
    limits: GuardLimits = LIMITS,
) -> GuardReport:
    return compare(
        reference,
        scores,
        reference_thresholds=fail_above(reference_limit),
        thresholds=fail_above(limit),
        defective=defective,
        limits=limits,
    )


# Ranks


@pytest.mark.parametrize(
    ("scores", "defective", "expected"),
    [
        (f(1, 2, 3, 4), b(N, N, A, A), 1.0),
        (f(4, 3, 2, 1), b(N, N, A, A), 0.0),
        (f(7, 7, 7, 7), b(N, N, A, A), 0.5),
        (f(1, 2, 2, 3), b(N, N, A, A), 0.875),
        (f(1, 2, 5, 9, 5), b(N, N, N, N, A), 0.625),
    ],
)
def test_auroc_counts_ties_half(scores: Scores, defective: npt.NDArray[np.bool_], expected: float) -> None:
    assert auroc(scores, defective) == expected


@pytest.mark.parametrize("levels", [3, 20, 10_000])
def test_ranks_auroc_and_correlation_equal_scipy(levels: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        first = rng.integers(0, levels, 50).astype(np.float64)
        second = first + rng.integers(0, levels, 50)
        defective = np.arange(50) < 15
        assert tied_ranks(first).tolist() == stats.rankdata(first).tolist()
        statistic = stats.mannwhitneyu(first[defective], first[~defective]).statistic
        assert auroc(first, defective) == pytest.approx(statistic / (15 * 35), abs=1e-12)
        assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (f(1, 2, 3), f(10, 200, 3000), 1.0),
        (f(1, 2, 3), f(3, 2, 1), -1.0),
        (f(5), f(9), 1.0),
        (f(2, 2, 2), f(7, 7, 7), 1.0),  # both say nothing: the same nothing
        (f(1, 2, 3), f(7, 7, 7), 0.0),  # an INT8 graph that saturates has lost the order
    ],
)
def test_rank_correlation_of_special_cases(first: Scores, second: Scores, expected: float) -> None:
    assert rank_correlation(first, second) == pytest.approx(expected)


# The verdict


def test_equal_scores_pass() -> None:
    scores = f(1, 2, 3, 11, 12, 13)
    assert guard(scores, scores, b(N, N, N, A, A, A)) == GuardReport(0.0, 0, 6, 1.0, 1.0, ())


def test_each_graph_is_judged_by_its_own_fail_limit() -> None:
    """All INT8 scores are 5 higher, and so is the limit that was fitted for them: no verdict flips."""
    reference = f(1, 9, 11, 12)
    assert guard(reference, reference + 5, reference_limit=10, limit=15).flips == 0
    assert guard(reference, reference + 5, reference_limit=10, limit=10).flips == 1


def test_flips_count_both_directions_and_a_score_on_the_limit_is_no_alarm() -> None:
    report = guard(f(9, 11, 10, 3, 4, 5, 6, 7), f(11, 9, 10.5, 3, 4, 5, 6, 10), limits=replace(LIMITS, flips=0.3))
    assert (report.flips, report.images) == (3, 8)
    assert report.failures == ("3 of 8 verdicts flip (limit 30.0%)",)


def test_flips_up_to_the_limit_pass() -> None:
    reference, scores = np.arange(20.0), np.arange(20.0)
    scores[[9, 11]] = [11.5, 8.5]  # over the limit of 10 now, and no longer over it
    assert guard(reference, scores, limits=replace(LIMITS, flips=0.1)).failures == ()
    assert guard(reference, scores, limits=replace(LIMITS, flips=0.09)).failures == (
        "2 of 20 verdicts flip (limit 9.0%)",
    )


def test_one_flip_of_few_images_proves_nothing() -> None:
    reference, moved = f(*range(1, 21)), f(*range(1, 21))
    moved[9:11] = moved[10], moved[9]  # one falls below the limit of 10.5, another rises above it
    strict = replace(LIMITS, flips=0.01)
    assert guard(reference, moved, reference_limit=10.5, limit=10.5, limits=strict).failures == (
        "2 of 20 verdicts flip (limit 1.0%)",
    )
    assert guard(reference, reference, reference_limit=10.5, limit=9.5, limits=strict).flips == 1
    assert guard(reference, reference, reference_limit=10.5, limit=9.5, limits=strict).failures == ()


def test_a_loss_of_auroc_fails() -> None:
    defective = b(N, N, N, N, A, A, A, A)
    report = guard(f(1, 2, 3, 4, 5, 6, 7, 8), f(1, 2, 3, 5, 4, 6, 7, 8), defective)
    assert report.auroc_drop == pytest.approx(1 / 16)
    assert report.failures == ("image AUROC falls by 0.0625 (limit 0.01)",)
    assert report.rank_correlation == pytest.approx(stats.spearmanr(range(8), [0, 1, 2, 4, 3, 5, 6, 7]).statistic)


def test_a_gain_of_auroc_passes() -> None:
    report = guard(f(1, 3, 2, 4), f(1, 2, 3, 4), b(N, N, A, A))
    assert (report.auroc_drop, report.failures) == (-0.25, ())


def test_saturation_fails_and_cannot_hide_behind_its_ties() -> None:
    """INT8 scores that are all alike: AUROC 0.5, not whatever the sort makes of it."""
    report = guard(f(1, 2, 3, 4), f(7, 7, 7, 7), b(N, N, A, A))
    assert (report.auroc_drop, report.distinct, report.rank_correlation) == (0.5, 0.25, 0.0)
    assert report.failures == (
        "image AUROC falls by 0.5000 (limit 0.01)",
        "only 25% of the scores are distinct: the graph saturates",
    )


@pytest.mark.parametrize("defective", [None, b(N, N, N, N), b(A, A, A, A)])
def test_without_both_kinds_of_images_there_is_no_auroc(defective: npt.NDArray[np.bool_] | None) -> None:
    report = guard(f(1, 2, 3, 4), f(4, 3, 2, 1), defective)
    assert (report.auroc_drop, report.failures) == (None, ())


def test_scores_that_are_not_finite_fail() -> None:
    report = guard(f(*range(1, 11)), f(1, 2, 3, 4, 5, 6, 7, 8, 9, float("nan")))
    assert report.failures, "a NaN is above no limit, so no verdict flips, but it must not pass"


def test_limits_say_what_they_are() -> None:
    assert str(GuardLimits(auroc_drop=0.005, flips=0.02)) == "ΔAUROC<=0.005, flips<=2%"
