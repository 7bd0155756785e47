"""The drift rule, by simulation: how often it warns for nothing, how soon it finds a change, and what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from time import process_time

import numpy as np
import numpy.typing as npt
import pytest

from edge_anomaly_runtime.bundle import Threshold, Thresholds
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream import drift
from edge_anomaly_runtime.stream.drift import (
    PERCENTS,
    DriftMonitor,
    DriftReport,
    Figures,
    Reference,
    figures_of,
    independent,
    look_at,
    reference_of,
)
from edge_anomaly_runtime.thresholds import fit_thresholds

Scores = npt.NDArray[np.float64]
Random = np.random.Generator
Make = Callable[[Random, int], Scores]


def normal(rng: Random, n: int) -> Scores:
    return rng.standard_normal(n)


def correlated(rng: Random, n: int, correlation: float = 0.95) -> Scores:
    """AR(1) with variance 1: each score keeps `correlation` of the one before."""
    steps = rng.standard_normal(n) * math.sqrt(1 - correlation**2)
    value, values = float(rng.standard_normal()), []
    for step in steps.tolist():
        value = correlation * value + step
        values.append(value)
    return np.array(values)


def parts(rng: Random, n: int, frames: int = 25) -> Scores:
    """Every part is seen in some frames, which differ only by a little noise."""
    values = np.repeat(rng.standard_normal(n // frames + 1), frames)[:n]
    return values * math.sqrt(0.9) + rng.standard_normal(n) * math.sqrt(0.1)


def reference_from(scores: Iterable[float]) -> Reference:
    values = np.array(list(scores))
    return reference_of(fit_thresholds(values, values, alpha_warn=0.05, alpha_fail=0.01))


def calibrated(rng: Random, n: int) -> Reference:
    return reference_from(rng.standard_normal(n))


def warnings(monitor: DriftMonitor, scores: Scores) -> list[tuple[int, DriftReport]]:
    """Return the reports that begin an episode, with the number of scores seen by then."""
    reports = ((seen, monitor.update(score)) for seen, score in enumerate(scores.tolist(), 1))
    return [(seen, report) for seen, report in reports if report is not None and report.state == "drifting"]


EXACT = Reference(100_000, (-2.326, -1.645, -0.6745, 0.0, 0.6745, 1.645, 2.326), 1.0)


# False warnings


@pytest.mark.parametrize(
    ("make", "images"),
    [(normal, 60), (normal, 200), (correlated, 60), (correlated, 200), (parts, 60)],
    ids=["independent-60", "independent-200", "correlated-60", "correlated-200", "parts-60"],
)
def test_scores_like_the_calibrations_raise_no_warning_in_150_windows(make: Make, images: int) -> None:
    """Fifteen bundles with ten windows each. Of 3600 windows of a longer run two had a warning."""
    count = 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        count += len(warnings(DriftMonitor(calibrated(rng, images)), make(rng, 10_000)))
    assert count == 0


@pytest.mark.parametrize("make", [normal, correlated])
def test_four_per_cent_of_defects_raise_a_warning_in_less_than_one_of_100_windows(make: Make) -> None:
    """A defect is seen in 25 frames in a row, and scores five sigma higher."""
    count = 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        scores = make(rng, 10_000) + 5 * np.repeat(rng.random(400) < 0.04, 25)
        count += len(warnings(DriftMonitor(calibrated(rng, 100)), scores))
    assert count < 15 * 10 * 0.01


@pytest.mark.parametrize(
    "shape",
    [lambda z: np.exp(z), lambda z: z + 6 * (z > 0)],
    ids=["skewed", "two kinds of parts"],
)
def test_the_shape_of_the_distribution_does_not_matter(shape: Callable[[Scores], Scores]) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        monitor = DriftMonitor(reference_from(shape(rng.standard_normal(100))))
        assert warnings(monitor, shape(correlated(rng, 12_000))) == []


def test_the_error_of_a_share_is_that_of_correlated_frames() -> None:
    """With the textbook's error, of independent draws, two of three windows would be significant at 5 %."""
    rng = np.random.default_rng(3)
    own, textbook = [], []
    for _ in range(300):
        scores = correlated(rng, 1000)
        deviation = abs(float((scores > 0).mean()) - 0.5)
        own.append(deviation / math.sqrt(0.25 / independent(scores > np.median(scores))))
        textbook.append(deviation / math.sqrt(0.25 / 1000))
    assert np.mean(np.array(own) > 1.96) < 0.1
    assert np.mean(np.array(textbook) > 1.96) > 0.6


def test_the_uncertainty_of_a_small_calibration_counts() -> None:
    """The same shift is drift against 300 normal images, and may be the calibration's own error against 12."""
    scores = np.random.default_rng(0).standard_normal(3000) + 0.7
    large, small = (Reference(n, EXACT.quantiles, EXACT.sigma) for n in (300, 12))
    assert len(warnings(DriftMonitor(large), scores)) == 1
    assert warnings(DriftMonitor(small), scores) == []


def test_a_line_that_stands_still_on_a_normal_part_is_no_drift() -> None:
    rng = np.random.default_rng(1)
    for score in (-1.0, 0.0, 1.2):
        still = score + 0.02 * rng.standard_normal(3000)
        assert warnings(DriftMonitor(EXACT), np.concatenate([correlated(rng, 6000), still])) == []
    still = 4 + 0.02 * rng.standard_normal(3000)
    assert len(warnings(DriftMonitor(EXACT), np.concatenate([correlated(rng, 6000), still]))) == 1


# Detection


@pytest.mark.parametrize("change", ["higher", "lower", "wider"])
@pytest.mark.parametrize(
    ("make", "images", "frames"),
    [(normal, 60, 2000), (normal, 200, 2000), (correlated, 60, 5000), (correlated, 200, 4000)],
    ids=["independent-60", "independent-200", "correlated-60", "correlated-200"],
)
def test_one_sigma_or_twice_the_spread_is_found(make: Make, images: int, frames: int, change: str) -> None:
    """In nine of ten bundles, within the stated number of frames."""
    found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        monitor = DriftMonitor(calibrated(rng, images))
        assert warnings(monitor, make(rng, 2000)) == []
        after = make(rng, frames)
        after = after * 2 if change == "wider" else after + (1 if change == "higher" else -1)
        found += bool(warnings(monitor, after))
    assert found >= 9


def test_a_change_in_one_of_two_kinds_of_parts_is_found() -> None:
    """The median lies in the kind that stays as it was, and the spread grows by a quarter only."""
    rng = np.random.default_rng(0)
    kinds = np.repeat(rng.random(400) < 0.4, 25)
    before = normal(rng, 10_000) + 12 * kinds
    monitor = DriftMonitor(reference_from(rng.permutation(before)[:100]))
    assert warnings(monitor, before) == []
    [(_, report)] = warnings(monitor, before + 3 * kinds)
    assert report.shift_sigma == pytest.approx(0, abs=0.3)
    assert report.spread == pytest.approx(1.25, abs=0.15)
    assert re.search("About (3|4).% of the scores lie where they did not", report.advice)


def test_a_large_shift_of_correlated_scores_is_found_within_a_window_and_a_half() -> None:
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(calibrated(rng, 100))
    assert warnings(monitor, correlated(rng, 3000)) == []
    [(seen, report)] = warnings(monitor, correlated(rng, 3000) + 3)
    assert seen <= 1500
    assert report.shift_sigma is not None and report.shift_sigma > 2


def test_a_window_grows_until_it_holds_enough_parts() -> None:
    rng = np.random.default_rng(0)
    alone, alike = DriftMonitor(EXACT, window=200), DriftMonitor(EXACT, window=200)
    for one, other in zip(normal(rng, 4000).tolist(), correlated(rng, 4000).tolist(), strict=True):
        alone.update(one)
        alike.update(other)
    assert (alone.report().n, alone.report().state) == (200, "ok")
    assert alike.report().n >= 1600
    assert alike.report().n_independent > 20


# Episodes


def test_an_episode_is_told_once_when_it_begins_and_once_when_it_has_ended() -> None:
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(calibrated(rng, 200), window=500)
    told = []
    for shift in (0.0, 2.0, 0.0, -2.0):
        for score in (normal(rng, 5000) + shift).tolist():
            if (report := monitor.update(score)) is not None:
                told.append((report.state, shift))
    assert told == [("drifting", 2.0), ("ok", 0.0), ("drifting", -2.0)]


def test_a_shift_that_hovers_around_the_limit_does_not_make_the_state_flap() -> None:
    """The looks cross the limit many times; the state may change a few."""
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(EXACT, window=500)
    shift = 0.5 + 0.06 * np.sin(np.arange(30_000) / 500)
    scores = normal(rng, 30_000) + shift
    looks = [look_at(scores[end - 500 : end], EXACT).shift >= 1 for end in range(500, 30_000, 50)]
    told = [report for score in scores.tolist() if (report := monitor.update(score)) is not None]
    assert sum(before != after for before, after in pairwise(looks)) > 40
    assert 1 <= len(told) <= 3


def test_an_episode_takes_four_looks() -> None:
    """Half a window that has just enough of a shift, and then none: the limit is crossed in three looks at most."""
    rng = np.random.default_rng(0)
    quiet = rng.permutation(np.linspace(-1.5, 1.5, 100))
    monitor = DriftMonitor(EXACT, window=100)
    assert look_at(quiet + 0.6, EXACT).worst > 1
    assert warnings(monitor, np.concatenate([quiet + 0.6, np.tile(quiet, 20)])) == []
    assert len(warnings(DriftMonitor(EXACT, window=100), np.tile(quiet + 0.6, 20))) == 1


def test_a_burst_of_less_than_half_a_window_is_no_episode() -> None:
    rng = np.random.default_rng(0)
    scores = normal(rng, 6000)
    scores[3000:3400] += 4
    assert warnings(DriftMonitor(EXACT), scores) == []


# Reports


def test_nothing_is_said_before_the_first_window_is_full() -> None:
    monitor = DriftMonitor(EXACT, window=100)
    assert monitor.report() == DriftReport("learning", None, None, None, 0, 0.0, "0 scores so far; a window holds 100.")
    for score in np.random.default_rng(0).standard_normal(99) + 5:
        assert monitor.update(score) is None
    report = monitor.report()
    assert (report.state, report.n, report.advice) == ("learning", 99, "99 scores so far; a window holds 100.")
    assert report.shift_sigma is not None and report.shift_sigma > 4


def test_frames_of_too_few_parts_are_not_judged() -> None:
    """Twenty-four parts, each in 100 frames: those are hardly twenty scores, and certainly not 2400."""
    rng = np.random.default_rng(5)
    monitor = DriftMonitor(EXACT, window=800)
    scores = np.repeat(3 + rng.standard_normal(24), 100) + 0.01 * rng.standard_normal(2400)
    assert warnings(monitor, scores) == []
    report = monitor.report()
    assert report.state == "learning"
    assert 9 < report.n_independent < 20
    assert "more parts have to pass" in report.advice
    # The same scores, each a part of its own.
    assert len(warnings(DriftMonitor(EXACT), rng.permutation(scores))) == 1


def test_the_report_of_scores_as_calibrated() -> None:
    monitor = DriftMonitor(EXACT)
    for score in np.random.default_rng(0).standard_normal(5000):
        monitor.update(score)
    report = monitor.report()
    assert (report.state, report.n, report.advice) == ("ok", 1000, "")
    assert report.shift_sigma == pytest.approx(0, abs=0.15)
    assert report.spread == pytest.approx(1, abs=0.15)
    assert report.ks is not None and report.ks < 0.06
    assert report.n_independent > 500


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (1, 3, r"higher than at calibration \(\+[23]\.\d sigma\): .* more false alarms"),
        (1, -3, r"lower than at calibration \(-[23]\.\d sigma\): .* expect misses"),
        (3, 0, r"[23]\.\d times as wide as at calibration: .*false alarms and misses"),
    ],
    ids=["higher", "lower", "wide"],
)
def test_the_advice_says_which_way_and_what_to_check(
    scale: float, shift: float, words: str, request: pytest.FixtureRequest
) -> None:
    scores = np.random.default_rng(0).standard_normal(3000) * scale + shift
    [(_, report)] = warnings(DriftMonitor(EXACT), scores)
    assert re.search(words, report.advice)
    for word in ("light", "lens", "camera position", "new lot", "new normal images"):
        assert word in report.advice
    named = [word for word in ("higher", "lower", "wide") if word in report.advice]
    assert named == [request.node.callspec.id]


def test_a_score_that_is_not_finite_is_refused() -> None:
    monitor = DriftMonitor(EXACT)
    for score in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the score is"):
            monitor.update(score)
    assert monitor.report().n == 0


def test_a_window_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="A drift window of 49 scores is too short"):
        DriftMonitor(EXACT, window=49)


def test_an_update_costs_microseconds() -> None:
    scores = correlated(np.random.default_rng(0), 20_000).tolist()
    monitor = DriftMonitor(EXACT)
    start = process_time()
    for score in scores:
        monitor.update(score)
    assert (process_time() - start) / len(scores) < 100e-6


# Arithmetic


def test_the_latest_scores_are_kept_in_order() -> None:
    monitor = DriftMonitor(EXACT, window=50)
    for score in range(2000):
        monitor.update(score)
    for n in (1, 50, 399, 400, 401, 800):
        assert monitor._latest(n).tolist() == list(range(2000 - n, 2000))


def test_figures_of_a_shifted_and_stretched_sample() -> None:
    reference = reference_from(np.arange(101.0))
    assert reference.quantiles == (1, 5, 25, 50, 75, 95, 99)
    assert reference.sigma == pytest.approx(50 / 1.349)
    same = figures_of(np.arange(101.0), reference)
    assert (same.shift_sigma, same.spread, round(same.ks, 2)) == (0.0, 1.0, 0.0)
    moved = figures_of(np.arange(101.0) * 2 + 10, reference)
    assert moved.shift_sigma == pytest.approx(60 / 50 * 1.349)
    assert moved.spread == pytest.approx(2)
    # 75 is the value of 75 % of the calibration's scores and of 33 of the 101 here.
    assert moved.ks == pytest.approx(max(0.75 - 33 / 101, 0.95 - 43 / 101, 0.99 - 45 / 101))


def test_ties_are_no_difference() -> None:
    """A coarse score: most are equal to the median and both quartiles, here and at calibration."""
    coarse = np.array([1.0] * 10 + [2.0] * 80 + [3.0] * 10)
    assert figures_of(coarse, reference_from(coarse)) == Figures(0.0, 0.0, 0.0)
    rng = np.random.default_rng(0)
    assert warnings(DriftMonitor(reference_from(coarse)), rng.choice(coarse, 5000)) == []


@pytest.mark.parametrize("block", [1, 4])
def test_independent_scores_of_a_known_correlation(block: int) -> None:
    """Of AR(1) with a per step, the sign has an integrated correlation of about ln 2 / (1 - a), twice."""
    counts = [
        independent(scores > np.median(scores), block)
        for scores in (correlated(np.random.default_rng(seed), 16_000, 0.95) for seed in range(20))
    ]
    expected = 16_000 / (2 * math.log(2) / -math.log(0.95))
    assert np.mean(counts) == pytest.approx(expected, rel=0.15)


def test_independent_events_of_the_simplest_series() -> None:
    rng = np.random.default_rng(0)
    assert independent(rng.random(10_000) < 0.3) > 8000
    assert independent(np.repeat(rng.random(400) < 0.5, 25)) == pytest.approx(400, rel=0.3)
    assert independent(np.ones(1000, dtype=bool)) == 1
    assert independent(np.arange(1000) < 500) < 5


@pytest.mark.parametrize("n", [12, 60, 300])
def test_the_calibrations_share_of_the_limit_is_that_of_a_beta_distribution(n: int) -> None:
    """Of many calibrations: the true share above their median, and outside of their 5 % and 95 % quantiles."""
    rng = np.random.default_rng(0)
    scores = rng.random((4000, n))  # uniform: a value is the share below it
    low, median, high = np.percentile(scores, (5, 50, 95), axis=1)
    expected = drift._expected_outside(n)
    outside = 1 - (high - low)
    assert outside.mean() == pytest.approx(expected, abs=0.004)
    for shares, share in ((median, 0.5), (outside, expected)):
        two_sigma = drift._limit(share, math.inf, n)
        assert np.std(shares) == pytest.approx(two_sigma / 2, rel=0.15)


def test_a_bundle_without_a_distribution_is_refused() -> None:
    limit = Threshold(value=1, alpha=0.01, method="conformal", n=30, order=30, upper95=0.1)
    bare = Thresholds(warn=limit, fail=limit, pixel=limit, scores={"mean": 50.0})
    with pytest.raises(UsageError, match="does not say how its normal scores were distributed"):
        reference_of(bare)


def test_normal_scores_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(UsageError, match="The 30 normal scores of the bundle are all the same"):
        reference_from([2.5] * 30)


def test_the_standard_deviation_measures_where_half_of_the_scores_are_the_same() -> None:
    values = [1.0] * 10 + [2.0] * 80 + [3.0] * 10
    assert reference_from(values).sigma == pytest.approx(np.std(values))
    assert len(PERCENTS) == len(reference_from(values).quantiles)
