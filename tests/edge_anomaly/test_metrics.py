"""Metrics on small arrays with written-out values, and against slow independent implementations."""

from __future__ import annotations

import doctest
import itertools
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from edge_anomaly import metrics
from edge_anomaly_runtime.errors import UsageError

Array = npt.NDArray[Any]
TOLERANCE = 1e-9
N, A = False, True  # normal, anomalous


def f(*values: float) -> Array:
    return np.array(values, dtype=np.float64)


def b(*values: int) -> Array:
    return np.array(values, dtype=np.bool_)


# Image level


@pytest.mark.parametrize(
    ("name", "scores", "labels", "expected"),
    [
        ("separated", f(1, 2, 3, 4), b(N, N, A, A), 1.0),
        ("reversed", f(4, 3, 2, 1), b(N, N, A, A), 0.0),
        ("constant is chance, not 0 or 1", f(7, 7, 7, 7), b(N, N, A, A), 0.5),
        ("one tie between classes: 3.5 of 4 pairs", f(1, 2, 2, 3), b(N, N, A, A), 0.875),
        ("ties inside a class change nothing", f(1, 1, 2, 2), b(N, N, A, A), 1.0),
        ("unbalanced: 2 wins and 1 tie of 4 pairs", f(1, 2, 5, 9, 5), b(N, N, N, N, A), 0.625),
        ("negative zero equals zero", f(-0.0, 0.0), b(N, A), 0.5),
    ],
)
def test_auroc_counts_a_tie_as_half(name: str, scores: Array, labels: Array, expected: float) -> None:
    assert metrics.auroc(scores, labels) == expected, name


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_equals_all_pairs_and_sklearn(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, levels, 60) / levels, rng.random(60) < 0.3
    pairs = [(a > n) + 0.5 * (a == n) for a in scores[labels] for n in scores[~labels]]
    assert metrics.auroc(scores, labels) == pytest.approx(float(np.mean(pairs)), abs=TOLERANCE)
    assert metrics.auroc(scores, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=TOLERANCE)


def test_auroc_does_not_depend_on_order() -> None:
    scores, labels = f(0.1, 0.5, 0.5, 0.5, 0.9), b(N, N, A, A, A)
    values = {metrics.auroc(scores[list(p)], labels[list(p)]) for p in itertools.permutations(range(5))}
    assert values == {5 / 6}


@pytest.mark.parametrize(
    ("name", "scores", "labels", "expected"),
    [
        ("separated", f(1, 2, 3, 4), b(N, N, A, A), 1.0),
        ("constant: the share of anomalies", f(7, 7, 7, 7), b(N, N, N, A), 0.25),
        ("hit, miss, hit: (1 + 2/3) / 2", f(3, 2, 1), b(A, N, A), 5 / 6),
        ("tie at the top: precision 1/2 for the only step", f(3, 3, 1), b(A, N, N), 0.5),
    ],
)
def test_average_precision(name: str, scores: Array, labels: Array, expected: float) -> None:
    assert metrics.average_precision(scores, labels) == pytest.approx(expected, abs=TOLERANCE), name


def test_roc_curve_has_one_point_for_each_distinct_score() -> None:
    """Points on a straight stretch stay too: 5, 4 and 3 each find one more anomaly."""
    fpr, tpr, thresholds = metrics.roc_curve(f(1, 2, 2, 3, 4, 5), b(N, N, A, A, A, A))
    assert thresholds.tolist() == [np.inf, 5, 4, 3, 2, 1]
    assert fpr.tolist() == [0, 0, 0, 0, 0.5, 1]
    assert tpr.tolist() == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, 2 * 2 / (4 + 2)),  # alarms on all four
        (2.0, 2 * 1 / (1 + 2)),  # a score equal to the threshold is no alarm
        (1.5, 2 * 2 / (3 + 2)),
        (9.0, 0.0),
        (np.inf, 0.0),
        (-np.inf, 2 * 2 / (4 + 2)),
    ],
)
def test_f1_alarms_above_the_threshold_only(threshold: float, expected: float) -> None:
    assert metrics.f1_at(f(1, 2, 2, 3), b(N, N, A, A), threshold) == pytest.approx(expected, abs=TOLERANCE)


def test_f1_equals_sklearn_and_needs_no_normal_image() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 10, 50).astype(float), rng.random(50) < 0.4
    expected = sklearn_metrics.f1_score(labels, scores > 4)
    assert metrics.f1_at(scores, labels, 4) == pytest.approx(expected, abs=TOLERANCE)
    assert metrics.f1_at(f(1, 3), b(A, A), 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("scores", "expected"), [(f(1, 1, 1, 1), 0.25), (f(1, 2, 3, 4), 1.0), (f(0.0, -0.0, 5, 5), 0.5)]
)
def test_distinct_share(scores: Array, expected: float) -> None:
    assert metrics.distinct_share(scores) == expected


# Pixel level

MAP = np.array([[5, 1, 3], [2, 2, 0], [4, 0, 0]], dtype=np.float64)
MASK = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=np.bool_)  # three regions of one pixel: 5, 3, 4


def random_case(seed: int, levels: int) -> tuple[list[Array], list[Array]]:
    """Four images of different sizes, the last one good; few levels give many ties."""
    rng = np.random.default_rng(seed)
    shapes = [(7, 5), (6, 6), (4, 9), (5, 5)]
    maps = [rng.integers(0, levels, shape) / 8 for shape in shapes]  # eighths: exact in float32
    masks = [rng.random(shape) < share for shape, share in zip(shapes, (0.2, 0.4, 0.1, 0.0), strict=True)]
    return maps, masks


def regions_by_flood_fill(mask: Array) -> list[list[tuple[int, int]]]:
    """The 8-connected regions, found without scipy."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        regions.append(region)
    return regions


def slow_pro_curve(maps: list[Array], masks: list[Array]) -> list[tuple[float, float]]:
    """One point for each distinct value of any pixel, by counting at each threshold."""
    normal = [float(v) for m, k in zip(maps, masks, strict=True) for v in m[~k]]
    regions = [
        [float(m[p]) for p in region] for m, k in zip(maps, masks, strict=True) for region in regions_by_flood_fill(k)
    ]
    points = [(0.0, 0.0)]
    for t in sorted({float(v) for m in maps for v in m.ravel()}, reverse=True):
        overlap = [sum(v >= t for v in region) / len(region) for region in regions]
        points.append((sum(v >= t for v in normal) / len(normal), sum(overlap) / len(overlap)))
    return points


def slow_area(points: list[tuple[float, float]], limit: float) -> float:
    """Trapezoids, each segment cut at the limit."""
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def test_pixel_auroc_written_out() -> None:
    """Normal 1 2 2 0 0 0, anomalous 5 3 4: all 18 pairs right; with the mask turned round all wrong."""
    assert metrics.pixel_auroc([MAP], [MASK]) == 1.0
    assert metrics.pixel_auroc([MAP], [~MASK]) == 0.0
    assert metrics.pixel_auroc([np.ones((2, 2))], [MASK]) == 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 100_000])
def test_pixel_auroc_equals_sklearn_over_all_pixels(seed: int, levels: int) -> None:
    maps, masks = random_case(seed, levels)
    scores, labels = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))
    expected = sklearn_metrics.roc_auc_score(labels, scores)
    assert metrics.pixel_auroc(maps, masks) == pytest.approx(expected, abs=TOLERANCE)


def test_good_images_count_in_pixel_auroc_and_aupro() -> None:
    """A good image hotter than the defect halves the pairs won and delays the overlap."""
    maps, masks = [f(0, 0, 5)[None], f(9, 9, 0)[None]], [b(0, 0, 1)[None], b(0, 0, 0)[None]]
    assert metrics.pixel_auroc(maps, masks) == 3 / 5
    assert metrics.aupro(maps, masks, max_fpr=0.4) == 0.0
    assert metrics.aupro(maps[:1], masks[:1], max_fpr=0.4) == 1.0


def test_maps_are_upsampled_bilinearly_to_the_mask() -> None:
    """[0, 1] at width 4 is [0, 0.25, 0.75, 1] (half-pixel centres): the second pixel beats the first only."""
    ramp = np.array([[0.0, 1.0]])
    mask = np.array([[0, 1, 0, 0]] * 3, dtype=np.bool_)
    assert metrics.pixel_auroc([ramp], [mask]) == pytest.approx(1 / 3)
    nearest_would_tie = np.array([[0, 1, 0, 0]], dtype=np.bool_)
    assert metrics.pro_curve([ramp], [nearest_would_tie])[0].tolist() == pytest.approx([0, 2 / 3, 2 / 3, 1])


def test_a_constant_map_stays_constant_when_upsampled() -> None:
    mask = np.zeros((31, 17), dtype=np.bool_)
    mask[3:5, 2:9] = True
    assert metrics.pixel_auroc([np.full((7, 3), 0.1)], [mask]) == 0.5
    assert metrics.aupro([np.full((7, 3), 0.1)], [mask]) == pytest.approx(0.15)


def test_height_and_width_are_not_swapped() -> None:
    tall = np.array([[0.0], [1.0]])
    mask = np.zeros((2, 3), dtype=np.bool_)
    mask[1] = True
    assert metrics.pixel_auroc([tall], [mask]) == 1.0


def test_pro_curve_written_out() -> None:
    """Regions {9, 5} and {5}; normal 7 5 5 1. At 5 two normal pixels tie with two anomalous: a slope."""
    maps = [f(9, 5, 7, 5, 5, 1)[None]]
    masks = [b(1, 1, 0, 1, 0, 0)[None]]
    fpr, pro = metrics.pro_curve(maps, masks)
    assert fpr.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert pro.tolist() == pytest.approx([0, 0.25, 0.25, 1, 1])


def test_every_region_weighs_the_same() -> None:
    """A missed pixel beside a found bar of five: the overlap is 1/2, not 5/6."""
    maps = [f(9, 9, 9, 9, 9, 1, 0, 1)[None]]
    masks = [b(1, 1, 1, 1, 1, 0, 1, 0)[None]]
    assert metrics.aupro(maps, masks, max_fpr=0.5) == pytest.approx(0.5)


def test_diagonal_neighbours_are_one_region() -> None:
    """8-connected: {8, 0} is one region beside {8}, overlap (1/2 + 1) / 2; 4-connected it would be 2/3."""
    values = np.array([[8, 1, 1, 8], [1, 0, 1, 1]], dtype=np.float64)
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0]], dtype=np.bool_)
    assert metrics.aupro([values], [mask], max_fpr=1.0) == pytest.approx(0.75)


@pytest.mark.parametrize("max_fpr", [1e-6, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("seed", "levels"), [(0, 2), (1, 4), (2, 30), (3, 100_000), (4, 100_000)])
def test_aupro_equals_all_thresholds_counted_one_by_one(seed: int, levels: int, max_fpr: float) -> None:
    maps, masks = random_case(seed, levels)
    expected = slow_area(slow_pro_curve(maps, masks), max_fpr)
    assert metrics.aupro(maps, masks, max_fpr=max_fpr) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("seed", "levels"), [(0, 3), (1, 100_000)])
def test_pro_curve_passes_through_every_slow_point(seed: int, levels: int) -> None:
    maps, masks = random_case(seed, levels)
    fpr, pro = metrics.pro_curve(maps, masks)
    assert (fpr[0], pro[0], fpr[-1], pro[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(fpr) >= 0) and np.all(np.diff(pro) >= 0)
    for x, y in slow_pro_curve(maps, masks):
        left = np.interp(x, fpr, pro) if x not in fpr else pro[fpr == x].min()
        right = np.interp(x, fpr, pro) if x not in fpr else pro[fpr == x].max()
        assert left - TOLERANCE <= y <= right + TOLERANCE


@pytest.mark.parametrize(
    ("max_fpr", "expected"),
    [
        (1.0, (0.5 * 0.5 + 0.5 * 1) / 1.0),  # PRO rises 0 -> 1 over FPR 0 -> 0.5, then stays
        (0.5, 0.5),
        (0.3, 0.3),  # cut inside the slope: PRO 0.6 there, mean 0.3
        (0.1, 0.1),
    ],
)
def test_aupro_interpolates_at_the_limit(max_fpr: float, expected: float) -> None:
    """Half of the normal pixels tie with the defect, so the first segment is a slope of 2."""
    maps, masks = [f(5, 5, 0, 5)[None]], [b(0, 1, 0, 1)[None]]
    assert metrics.aupro(maps, masks, max_fpr=max_fpr) == pytest.approx(expected)


def test_a_perfect_map_gives_one_and_a_constant_one_half_the_limit() -> None:
    assert metrics.aupro([MASK.astype(np.float32)], [MASK]) == pytest.approx(1.0)
    assert metrics.aupro([np.zeros((3, 3))], [MASK], max_fpr=0.3) == pytest.approx(0.15)
    assert metrics.aupro([-MASK.astype(np.float32)], [MASK]) == 0.0


def test_arguments_are_left_unchanged() -> None:
    maps, masks = [MAP.astype(np.float32)], [MASK.copy()]
    metrics.aupro(maps, masks)
    metrics.pixel_auroc(maps, masks)
    assert np.array_equal(maps[0], MAP) and np.array_equal(masks[0], MASK)


@pytest.mark.parametrize("metric", [metrics.pixel_auroc, metrics.aupro])
def test_memory_stays_near_eight_bytes_a_pixel(metric: Any) -> None:
    """2000 images of 256 x 256 then need about 1.3 GB; a float64 copy with an index would need twice that."""
    rng = np.random.default_rng(0)
    maps = [rng.random((8, 8)) for _ in range(60)]
    mask = np.zeros((128, 128), dtype=np.bool_)
    mask[:20, :20] = True
    tracemalloc.start()
    metric(maps, [mask] * len(maps))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(maps) * mask.size


# Uncertainty


def test_bootstrap_keeps_the_class_sizes_and_the_pairing() -> None:
    """Scores equal their label, so the drawn scores must match the drawn labels in every resample."""
    seen: list[tuple[int, int, bool]] = []

    def record(scores: Array, labels: Array) -> float:
        seen.append((len(labels), int(labels.sum()), bool(np.array_equal(scores > 0, labels))))
        return 0.0

    labels = b(A, N, N, A, N)
    metrics.bootstrap_interval(record, labels.astype(np.float64), labels, n=20)
    assert seen == [(5, 2, True)] * 20


def test_bootstrap_draws_with_replacement_and_takes_percentiles() -> None:
    """The mean of one anomalous score drawn from {0, 1} x 100: about normal with sd 0.05 around 0.5."""
    scores = np.append(np.arange(100) % 2, 0.0).astype(np.float64)
    labels = np.append(np.ones(100, dtype=np.bool_), False)

    def mean(s: Array, t: Array) -> float:
        return float(s[t].mean())

    low, high = metrics.bootstrap_interval(mean, scores, labels, n=4000, level=0.9)
    assert low == pytest.approx(0.5 - 1.645 * 0.05, abs=0.011)
    assert high == pytest.approx(0.5 + 1.645 * 0.05, abs=0.011)


def test_bootstrap_percentiles_of_a_known_sequence() -> None:
    """The statistic returns 0, 1, ..., 100 in turn: the 80 % interval ends at 10 and 90."""
    counter = itertools.count()
    interval = metrics.bootstrap_interval(lambda s, t: float(next(counter)), f(0, 1), b(N, A), n=101, level=0.8)
    assert interval == pytest.approx((10.0, 90.0))


def test_bootstrap_is_fixed_by_its_seed_and_wider_at_a_higher_level() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(40) % 2 == 0
    scores = rng.normal(size=40) + labels
    first, again, other = (metrics.bootstrap_interval(metrics.auroc, scores, labels, n=200, seed=s) for s in (0, 0, 1))
    wide = metrics.bootstrap_interval(metrics.auroc, scores, labels, n=200, level=0.99)
    assert first == again != other
    assert wide[0] < first[0] < metrics.auroc(scores, labels) < first[1] < wide[1]


def test_bootstrap_of_separated_classes_has_no_width() -> None:
    assert metrics.bootstrap_interval(metrics.auroc, f(1, 2, 3, 4), b(N, N, A, A), n=50) == (1.0, 1.0)


def located(seed: int, images: int = 10) -> tuple[list[Array], list[Array]]:
    """Smooth maps of 24 x 24 pixels; in every other image a marked square stands out more or less."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for index in range(images):
        values, mask = rng.normal(size=(24, 24)), np.zeros((24, 24), dtype=np.bool_)
        if index % 2:
            row, column = rng.integers(0, 18, 2)
            mask[row : row + 6, column : column + 5] = True
            values[mask] += rng.uniform(0, 3)
        maps.append(values)
        masks.append(mask)
    return maps, masks


def test_pixel_intervals_equal_exact_figures_of_the_same_draws() -> None:
    """Every resample is judged by the exact functions on the drawn images, good and defective drawn apart."""
    maps, masks = located(0)
    rng = np.random.default_rng(5)
    exact = []
    for _ in range(30):
        rows = [*rng.choice(np.arange(0, 10, 2), 5), *rng.choice(np.arange(1, 10, 2), 5)]
        drawn = [maps[row] for row in rows], [masks[row] for row in rows]
        exact.append((metrics.pixel_auroc(*drawn), metrics.aupro(*drawn)))
    expected = np.quantile(np.array(exact), [0.1, 0.9], axis=0)
    intervals = metrics.pixel_intervals(maps, masks, n=30, seed=5, level=0.8)
    assert intervals["auroc"] == pytest.approx(tuple(expected[:, 0]), abs=1e-3)
    assert intervals["aupro"] == pytest.approx(tuple(expected[:, 1]), abs=1e-3)


def test_pixel_intervals_of_images_that_are_alike_have_no_width() -> None:
    maps, masks = located(1, images=2)
    intervals = metrics.pixel_intervals(maps * 3, masks * 3, n=10)
    assert intervals["auroc"] == pytest.approx((metrics.pixel_auroc(maps, masks),) * 2, abs=1e-3)
    assert intervals["aupro"] == pytest.approx((metrics.aupro(maps, masks),) * 2, abs=1e-3)


def test_pixel_intervals_of_constant_maps_are_those_of_chance() -> None:
    _, masks = located(2)
    intervals = metrics.pixel_intervals([np.full((24, 24), 3.0)] * 10, masks, n=10)
    assert intervals["auroc"] == pytest.approx((0.5, 0.5))
    assert intervals["aupro"] == pytest.approx((0.15, 0.15))


def test_pixel_intervals_are_fixed_by_their_seed() -> None:
    maps, masks = located(3)
    first, again, other = (metrics.pixel_intervals(maps, masks, n=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_pixel_intervals_name_the_missing_class() -> None:
    with pytest.raises(UsageError, match="no anomalous pixel"):
        metrics.pixel_intervals([np.zeros((2, 2))], [np.zeros((2, 2), dtype=np.bool_)])


@pytest.mark.parametrize(
    ("k", "n", "level", "expected"),
    [
        (0, 10, 0.95, (0.0, 1 - 0.025 ** (1 / 10))),  # closed forms at the ends
        (10, 10, 0.95, (0.025 ** (1 / 10), 1.0)),
        (1, 1, 0.90, (0.05, 1.0)),
        (5, 10, 0.95, (0.187086, 0.812914)),  # printed in tables of the Clopper-Pearson interval
    ],
)
def test_binomial_interval_written_out(k: int, n: int, level: float, expected: tuple[float, float]) -> None:
    assert metrics.binomial_interval(k, n, level) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(1, 7), (3, 50), (49, 50)])
def test_binomial_interval_solves_its_definition(k: int, n: int) -> None:
    """Each end leaves exactly half of 1 - level in the tail beyond k."""
    low, high = metrics.binomial_interval(k, n, 0.9)
    assert stats.binom.sf(k - 1, n, low) == pytest.approx(0.05, abs=TOLERANCE)
    assert stats.binom.cdf(k, n, high) == pytest.approx(0.05, abs=TOLERANCE)


# Errors

BOTH_CLASSES: list[Any] = [metrics.auroc, metrics.average_precision, metrics.roc_curve]
IMAGE_METRICS: list[Any] = [*BOTH_CLASSES, lambda s, t: metrics.f1_at(s, t, 0.5)]
PIXEL_METRICS: list[Any] = [metrics.pixel_auroc, metrics.aupro, metrics.pro_curve]


@pytest.mark.parametrize("metric", BOTH_CLASSES)
@pytest.mark.parametrize(("labels", "missing"), [(b(A, A), "no normal image"), (b(N, N), "no anomalous image")])
def test_a_missing_class_is_named(metric: Any, labels: Array, missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        metric(f(1, 2), labels)


def test_f1_and_bootstrap_name_the_missing_class() -> None:
    with pytest.raises(UsageError, match="no anomalous image"):
        metrics.f1_at(f(1, 2), b(N, N), 0)
    with pytest.raises(UsageError, match="no normal image"):
        metrics.bootstrap_interval(metrics.auroc, f(1, 2), b(A, A))


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_a_missing_class_of_pixels_is_named(metric: Any) -> None:
    with pytest.raises(UsageError, match="no anomalous pixel"):
        metric([MAP], [np.zeros_like(MASK)])
    with pytest.raises(UsageError, match="no normal pixel"):
        metric([MAP], [np.ones_like(MASK)])
    with pytest.raises(UsageError, match="no normal pixel"):
        metric([], [])


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_scores_that_are_not_finite_are_counted(metric: Any) -> None:
    with pytest.raises(UsageError, match="3 of 4 values are NaN or infinite"):
        metric(f(np.nan, np.inf, -np.inf, 1), b(N, N, A, A))


def test_distinct_share_refuses_scores_that_are_not_finite() -> None:
    with pytest.raises(UsageError, match="1 of 2 values"):
        metrics.distinct_share(f(np.nan, 1))


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_map_values_that_are_not_finite_are_counted_and_the_map_named(metric: Any) -> None:
    broken = MAP.copy()
    broken[0, :2] = np.nan, np.inf
    with pytest.raises(UsageError, match=r"Map 1.*2 of 9 values"):
        metric([MAP, broken], [MASK, MASK])
    with pytest.raises(UsageError, match=r"Map 0.*9 of 9 values"):
        metric([np.full((3, 3), 1e300)], [MASK])


@pytest.mark.parametrize("metric", IMAGE_METRICS)
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (f(1, 2, 3), b(N, A), r"scores have shape \(3,\) and labels \(2,\)"),
        (np.ones((2, 1)), b(N, A), r"scores have shape \(2, 1\) and labels \(2,\)"),
        (np.ones((1, 2)), np.array([[N, A]]), r"Scores have shape \(1, 2\)"),
        (f(), b(), r"Scores have shape \(0,\)"),
    ],
)
def test_shapes_that_do_not_match_are_named(metric: Any, scores: Array, labels: Array, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        metric(scores, labels)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([MAP], [MASK, MASK], "1 maps but 2 masks"),
        ([MAP[None]], [MASK], r"map 0 has shape \(1, 3, 3\) and its mask \(3, 3\)"),
        ([MAP, MAP], [MASK, MASK[0]], r"map 1 has shape \(3, 3\) and its mask \(3,\)"),
        ([np.empty((0, 3))], [MASK], r"map 0 has shape \(0, 3\)"),
        ([MAP], [np.empty((0, 3), dtype=np.bool_)], r"its mask \(0, 3\)"),
    ],
)
def test_maps_and_masks_that_do_not_match_are_named(metric: Any, maps: Any, masks: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        metric(maps, masks)


def test_zero_and_one_are_labels_but_0_and_255_are_not() -> None:
    assert metrics.auroc(f(1, 2), np.array([0, 1])) == 1.0
    numbers: Any = MASK.astype(np.uint8)
    assert metrics.aupro([MAP], [numbers]) == metrics.aupro([MAP], [MASK])
    with pytest.raises(UsageError, match="other than 0 and 1"):
        metrics.auroc(f(1, 2), np.array([-1, 1]))
    with pytest.raises(UsageError, match="Mask 0 holds values other than 0 and 1"):
        metrics.aupro([MAP], [numbers * 255])


@pytest.mark.parametrize("max_fpr", [0.0, -0.1, 1.01, np.nan])
def test_aupro_refuses_a_limit_outside_its_range(max_fpr: float) -> None:
    with pytest.raises(UsageError, match=r"outside \(0, 1\]"):
        metrics.aupro([MAP], [MASK], max_fpr=max_fpr)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_binomial_interval_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(UsageError, match=f"{k} successes in {n} trials"):
        metrics.binomial_interval(k, n)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, np.nan])
def test_intervals_refuse_a_level_outside_their_range(level: float) -> None:
    with pytest.raises(UsageError, match="level is"):
        metrics.binomial_interval(1, 2, level)
    with pytest.raises(UsageError, match="level is"):
        metrics.bootstrap_interval(metrics.auroc, f(1, 2), b(N, A), level=level)


def test_bootstrap_refuses_no_resamples_and_nan() -> None:
    with pytest.raises(UsageError, match="n is 0"):
        metrics.bootstrap_interval(metrics.auroc, f(1, 2), b(N, A), n=0)
    with pytest.raises(UsageError, match="7 of 7 values"):
        metrics.bootstrap_interval(lambda s, t: float("nan"), f(1, 2), b(N, A), n=7)


def test_f1_refuses_a_threshold_that_is_nan() -> None:
    with pytest.raises(UsageError, match="threshold is NaN"):
        metrics.f1_at(f(1, 2), b(N, A), float("nan"))


def test_docstring_examples_run() -> None:
    failed, attempted = doctest.testmod(metrics)
    assert attempted >= 6
    assert failed == 0
