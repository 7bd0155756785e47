"""Thresholds: the order statistics and bounds of the literature, and what they promise, by simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.thresholds import beta_quantile, fit_threshold, fit_thresholds


def one_to(n: int) -> npt.NDArray[np.float64]:
    return np.arange(1, n + 1, dtype=np.float64)


# Split conformal


@pytest.mark.parametrize(
    ("alpha", "n", "order", "mean_percent", "upper95_percent"),
    [
        (0.05, 50, 49, 3.9, 9.1),
        (0.05, 100, 96, 5.0, 8.9),
        (0.05, 200, 191, 5.0, 7.7),
        (0.05, 500, 476, 5.0, 6.7),
        (0.01, 100, 100, 1.0, 2.95),
        (0.01, 200, 199, 1.0, 2.35),
        (0.01, 500, 496, 1.0, 1.82),
        (0.01, 1000, 991, 1.0, 1.57),
        (0.001, 1000, 1000, 0.1, 0.30),
        (0.001, 2000, 1999, 0.1, 0.24),
        (0.001, 5000, 4996, 0.1, 0.18),
    ],
)
def test_order_statistic_mean_rate_and_bound(
    alpha: float, n: int, order: int, mean_percent: float, upper95_percent: float
) -> None:
    scores = np.random.default_rng(0).permutation(one_to(n))
    threshold = fit_threshold(scores, alpha)
    assert (threshold.value, threshold.order, threshold.n) == (order, order, n)
    assert (threshold.method, threshold.alpha) == ("conformal", alpha)
    assert 100 * (n + 1 - order) / (n + 1) == pytest.approx(mean_percent, abs=0.1)
    assert 100 * threshold.upper95 == pytest.approx(upper95_percent, abs=0.1)
    assert threshold.upper95 == pytest.approx(stats.beta.ppf(0.95, n + 1 - order, order), abs=1e-9)


@pytest.mark.parametrize(("rate", "n"), [(0.05, 59), (0.01, 299), (0.001, 2995)])
def test_how_many_images_make_the_largest_score_a_safe_limit(rate: float, n: int) -> None:
    assert beta_quantile(0.95, 1, n) <= rate < beta_quantile(0.95, 1, n - 1)


@pytest.mark.parametrize(
    ("alpha", "n", "order"),
    [
        (0.05, 19, 19),
        (0.05, 39, 38),
        (0.05, 99, 95),
        (0.05, 999, 950),
        (0.7, 9, 3),  # 10 * (1 - 0.7) is 3.0000000000000004
        (0.9, 19, 2),  # 20 * (1 - 0.9) is 1.9999999999999996
        (0.3, 9, 7),
    ],
)
def test_whole_numbers_are_not_rounded_up_by_a_float_error(alpha: float, n: int, order: int) -> None:
    assert fit_threshold(one_to(n), alpha).order == order


@pytest.mark.parametrize("alpha", ["0.001", "0.002", "0.01", "0.02", "0.05", "0.1", "0.15", "0.2", "0.3", "0.7"])
def test_order_equals_exact_arithmetic(alpha: str) -> None:
    for n in [*range(max(9, round(1 / float(alpha))), 400, 7), 999, 4999, 9999, 19999, 99999]:
        exact = math.ceil((n + 1) * (1 - Fraction(alpha)))
        if exact <= n and n + 1 - exact <= 5000:  # the bound's own cost grows with this
            assert fit_threshold(one_to(n), float(alpha)).order == exact, n


def test_true_rate_follows_the_stated_distribution() -> None:
    """With uniform scores the true false-alarm rate of a limit t is 1 - t."""
    thresholds = [fit_threshold(np.random.default_rng(seed).random(100), 0.05) for seed in range(2000)]
    rates = np.array([1 - threshold.value for threshold in thresholds])
    bound = thresholds[0].upper95
    assert bound == pytest.approx(0.0892, abs=1e-4)
    assert 0.045 <= rates.mean() <= 0.055
    slack = 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert 0.05 - slack <= (rates > bound).mean() <= 0.05 + slack


def test_ties_never_raise_more_alarms_than_promised() -> None:
    scores = np.repeat([1.0, 2.0, 3.0], [50, 40, 10])
    limit = fit_threshold(scores, 0.05).value
    assert limit == 3.0
    assert (scores > limit).mean() <= 0.05


# Beta quantile


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("a", "b"),
    [(1, 1), (1, 2), (2, 1), (5, 96), (1, 100), (100, 1), (37, 37), (1, 5000), (5, 4996), (250, 4751), (2500, 2501)],
)
def test_beta_quantile_equals_scipy(probability: float, a: int, b: int) -> None:
    assert beta_quantile(probability, a, b) == pytest.approx(stats.beta.ppf(probability, a, b), abs=1e-9)


@pytest.mark.parametrize(("a", "b"), [(1, 100_000), (5000, 1), (4751, 250)])
def test_beta_quantile_at_the_ends(a: int, b: int) -> None:
    assert beta_quantile(0.95, a, b) == pytest.approx(stats.beta.ppf(0.95, a, b), rel=1e-9)


# The tail


def test_tail_limit_lies_above_every_score_and_rises_as_alpha_falls() -> None:
    alphas = [0.3, 0.1, 0.05, 0.02, 0.01, 0.006, 1 / 201, 0.0049, 0.004, 0.002, 1e-3, 1e-4, 1e-5, 1e-6]
    rises = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = [rng.exponential(size=200), rng.normal(size=200), rng.random(200), rng.pareto(3, 200)][seed % 4]
        thresholds = [fit_threshold(scores, alpha) for alpha in alphas]
        assert [threshold.method for threshold in thresholds] == ["conformal"] * 7 + ["pareto"] * 7
        values = [threshold.value for threshold in thresholds]
        assert values == sorted(values), seed
        assert all(value >= scores.max() for value in values[6:]), seed
        rises += values[-1] > values[6]
    assert rises >= 15, "a short tail may end at the largest score, most must not"


@pytest.mark.parametrize("distribution", ["expon", "norm"])
def test_tail_limit_keeps_its_promise_on_average(distribution: str) -> None:
    """Where 200 scores alone would only support 1 in 201, the tail's 1 in 1000 is right within a factor of two."""
    law = getattr(stats, distribution)
    samples = [law.rvs(size=200, random_state=seed) for seed in range(200)]
    true_rate = float(np.mean([law.sf(fit_threshold(scores, 0.001).value) for scores in samples]))
    assert 0.0005 <= true_rate <= 0.002
    largest_alone = float(np.mean([law.sf(scores.max()) for scores in samples]))
    assert largest_alone == pytest.approx(1 / 201, rel=0.2)
    assert true_rate < 0.7 * largest_alone


def test_tail_states_the_bound_of_the_largest_score() -> None:
    threshold = fit_threshold(np.random.default_rng(0).exponential(size=200), 1e-4)
    assert (threshold.method, threshold.n, threshold.order) == ("pareto", 200, 200)
    assert threshold.upper95 == pytest.approx(1 - 0.05 ** (1 / 200), abs=1e-9)


def test_tail_moves_and_scales_with_the_scores() -> None:
    scores = np.random.default_rng(3).exponential(size=300)
    value = fit_threshold(scores, 1e-4).value
    assert fit_threshold(1000 * scores - 7, 1e-4).value == pytest.approx(1000 * value - 7, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("one score", one_to(1)),
        ("too few for a tail", one_to(20)),
        ("constant", np.full(500, 2.5)),
        ("constant tail", np.concatenate([one_to(100), np.full(100, 1000.0)])),
    ],
)
def test_without_a_tail_the_largest_score_is_the_limit(name: str, scores: npt.NDArray[np.float64]) -> None:
    threshold = fit_threshold(scores, 1e-4)
    assert (threshold.method, threshold.value, threshold.order) == ("maximum", scores.max(), scores.size), name
    assert threshold.upper95 == pytest.approx(1 - 0.05 ** (1 / scores.size), abs=1e-9)


def test_a_tail_needs_more_than_twenty_scores() -> None:
    assert fit_threshold(np.random.default_rng(0).exponential(size=21), 1e-4).method == "pareto"


# All limits of a graph


def test_fit_thresholds_sets_warn_fail_and_pixel_limits() -> None:
    thresholds = fit_thresholds(one_to(100), one_to(100) * 10, alpha_warn=0.05, alpha_fail=0.01)
    assert (thresholds.warn.value, thresholds.warn.alpha) == (96.0, 0.05)
    assert (thresholds.fail.value, thresholds.fail.alpha) == (100.0, 0.01)
    assert (thresholds.pixel.value, thresholds.pixel.alpha) == (960.0, 0.05)


def test_fit_thresholds_describes_the_normal_scores() -> None:
    described = fit_thresholds(one_to(101), one_to(101), alpha_warn=0.05, alpha_fail=0.05).scores
    expected = {"n": 101.0, "mean": 51.0, "std": 29.154759, "min": 1.0, "max": 101.0}
    quantiles = {"q1": 2.0, "q5": 6.0, "q25": 26.0, "q50": 51.0, "q75": 76.0, "q95": 96.0, "q99": 100.0}
    assert described == pytest.approx(expected | quantiles)


def test_maps_may_come_in_any_shape_and_type() -> None:
    maxima = one_to(100).reshape(10, 10).astype(np.float32)
    assert fit_thresholds([1.0, 2.0], maxima, alpha_warn=0.05, alpha_fail=0.01).pixel.value == 96.0


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([], "no held-out normal image"),
        ([1.0, math.nan, 2.0], "1 of 3 normal scores are not finite"),
        ([math.inf, math.nan], "2 of 2 normal scores are not finite"),
    ],
)
def test_unusable_scores_are_refused(scores: list[float], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        fit_thresholds(scores, [1.0], alpha_warn=0.05, alpha_fail=0.01)
    with pytest.raises(UsageError, match=text):
        fit_thresholds([1.0], scores, alpha_warn=0.05, alpha_fail=0.01)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_impossible_rates_are_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="false-alarm rate"):
        fit_threshold(one_to(100), alpha)


def test_fail_must_be_the_rarer_verdict() -> None:
    with pytest.raises(UsageError, match=r"fail rate 0\.1 is above the warn rate 0\.05"):
        fit_thresholds(one_to(100), one_to(100), alpha_warn=0.05, alpha_fail=0.1)
    both = fit_thresholds(one_to(100), one_to(100), alpha_warn=0.05, alpha_fail=0.05)
    assert both.warn == both.fail
