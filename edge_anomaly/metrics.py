"""Evaluation metrics of anomaly detection: numpy arrays in, floats out, equal scores always treated as ties.

A higher score is more anomalous and a label or mask of True means anomalous. Every function raises UsageError when
scores or maps hold NaN or infinity, when shapes do not match, or when a class that it needs is missing.

| level | functions |
|---|---|
| image | auroc, average_precision, f1_at, roc_curve, distinct_share |
| pixel | pixel_auroc, aupro, pro_curve |
| uncertainty | bootstrap_interval, pixel_intervals, binomial_interval |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage, stats
from sklearn import metrics as sklearn_metrics

from edge_anomaly_runtime.errors import UsageError

Floats = npt.NDArray[np.floating[Any]]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

EIGHT_CONNECTED = np.ones((3, 3), dtype=np.int64)


def auroc(scores: Floats, labels: Bools) -> float:
    """Return the probability that an anomalous image scores higher than a normal one, a tie counting one half.

    `scores` float [n], `labels` bool [n]; the result is in [0, 1] and 0.5 for constant scores.
    Raises UsageError when a class is missing. Source: Hanley & McNeil 1982, the area as the Mann-Whitney statistic.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    values, truth = _two_classes(scores, labels)
    return _mann_whitney(np.sort(values[~truth]), values[truth])


def average_precision(scores: Floats, labels: Bools) -> float:
    """Return the area under the precision-recall curve as a step function, without interpolation.

    `scores` float [n], `labels` bool [n]; the result is in (0, 1], and for constant scores the share of anomalies.
    Formula: the sum over distinct scores of (R_k - R_{k-1}) * P_k. Raises UsageError when a class is missing.
    Source: sklearn.metrics.average_precision_score.

    >>> average_precision(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, False, True]))
    1.0
    """
    values, truth = _two_classes(scores, labels)
    falling = np.argsort(-values)  # written out: scikit-learn's checks would take most of a bootstrap's time
    last_of_equals = np.append(np.diff(values[falling]) != 0, True)
    hits, alarms = np.cumsum(truth[falling])[last_of_equals], np.flatnonzero(last_of_equals) + 1
    return float(np.diff(hits, prepend=0) @ (hits / alarms)) / int(hits[-1])


def roc_curve(scores: Floats, labels: Bools) -> tuple[Float64s, Float64s, Float64s]:
    """Return false positive rate, true positive rate and threshold at each distinct score, in falling order.

    `scores` float [n], `labels` bool [n]; three float64 arrays of length 1 + the number of distinct scores, from
    (0, 0, inf) to (1, 1, lowest score). A point counts the scores >= its threshold: an alarm set to score > t has
    the rates of the point just before t. Raises UsageError when a class is missing.
    Source: sklearn.metrics.roc_curve with every point kept.
    """
    values, truth = _two_classes(scores, labels)
    fpr, tpr, thresholds = sklearn_metrics.roc_curve(truth, values, drop_intermediate=False)
    return np.asarray(fpr, np.float64), np.asarray(tpr, np.float64), np.asarray(thresholds, np.float64)


def f1_at(scores: Floats, labels: Bools, threshold: float) -> float:
    """Return the F1 score of the rule "alarm when score > threshold".

    `scores` float [n], `labels` bool [n], `threshold` any number, infinity included; the result is in [0, 1] and
    0 when nothing anomalous is found. Formula: 2 TP / (2 TP + FP + FN). Normal images may be missing; UsageError
    when no image is anomalous (F1 is then 0 / 0 or 0 whatever the scores) or the threshold is NaN.
    Source: van Rijsbergen 1979, chapter 7.

    >>> f1_at(np.array([0.1, 0.4, 0.8]), np.array([False, True, True]), threshold=0.4)
    0.6666666666666666
    """
    values, truth = _checked(scores, labels)
    if not truth.any():
        raise _missing_class("anomalous", "image")
    if np.isnan(threshold):
        raise UsageError("The threshold is NaN.", "Calibrate the threshold again on finite scores.")
    alarm = values > threshold
    hits = np.count_nonzero(alarm & truth)
    return float(2 * hits / (np.count_nonzero(alarm) + np.count_nonzero(truth)))


def distinct_share(scores: Floats) -> float:
    """Return the number of distinct scores over the number of scores: near 0 means a collapsed or saturated score.

    `scores` float [n], n >= 1; the result is in [1/n, 1].

    >>> distinct_share(np.array([0.5, 0.5, 0.5, 1.0]))
    0.5
    """
    values = _finite_vector(scores)
    return len(np.unique(values)) / len(values)


def pixel_auroc(maps: Sequence[Floats], masks: Sequence[Bools]) -> float:
    """Return the AUROC over all pixels of all images, exactly, each map resized to its mask.

    `maps` float [h, w] each, `masks` bool [H, W] each, all False for a good image; sizes may differ between images.
    Maps are cast to float32 and resized with Pillow (mode F, BILINEAR); on these values the result is exact. Peak
    memory is 8 bytes a normal pixel and 24 an anomalous one beyond the arguments. Raises UsageError when a class of
    pixels is missing. Source: Bergmann et al., CVPR 2019; the arithmetic is that of `auroc`.
    """
    normal, anomalous = _sorted_normal_and_anomalous_pixels(maps, masks)
    anomalous.sort()  # not needed for the result: sorted look-ups stay in the cache, several times faster
    return _mann_whitney(normal, anomalous)


def aupro(maps: Sequence[Floats], masks: Sequence[Bools], max_fpr: float = 0.3) -> float:
    """Return the normalised area under the per-region-overlap curve up to a false positive rate of `max_fpr`.

    `maps`, `masks` as in `pixel_auroc`, `max_fpr` in (0, 1]; the result is in [0, 1], and for constant maps
    max_fpr / 2. Formula: (1 / max_fpr) * integral of PRO over FPR from 0 to max_fpr, by trapezoids, the curve
    interpolated at max_fpr. Raises UsageError when a class of pixels is missing or max_fpr is out of range.
    Source: Bergmann et al., CVPR 2019 and IJCV 129 (2021), whose limit is 0.3.
    """
    if not 0 < max_fpr <= 1:
        raise UsageError(f"max_fpr is {max_fpr}, outside (0, 1].", "The usual value is 0.3.")
    return area_up_to(*pro_curve(maps, masks), max_fpr)


def area_up_to(fpr: Float64s, pro: Float64s, max_fpr: float = 0.3) -> float:
    """Return the area under a curve of `pro_curve` from 0 to `max_fpr`, over `max_fpr`: `aupro` of a known curve."""
    below = fpr <= max_fpr
    fpr_up_to = np.append(fpr[below], max_fpr)
    pro_up_to = np.append(pro[below], _value_at(fpr, pro, max_fpr))
    return float(sklearn_metrics.auc(fpr_up_to, pro_up_to)) / max_fpr


def pro_curve(maps: Sequence[Floats], masks: Sequence[Bools]) -> tuple[Float64s, Float64s]:
    """Return the exact curve of per-region overlap against the false positive rate, from (0, 0) to (1, 1).

    `maps`, `masks` as in `pixel_auroc`; two float64 arrays of one length, both never falling. PRO is the mean over
    the 8-connected regions of all masks of the share of the region at or above the threshold, so each region weighs
    the same; FPR is the share of normal pixels of all images, good ones included. Straight stretches keep only
    their ends: between two anomalous values the curve is level, at a value shared with normal pixels it is a slope.
    Peak memory is 8 bytes a normal pixel and at most 90 an anomalous one beyond the arguments.
    Source: Bergmann et al., CVPR 2019 and IJCV 129 (2021).
    """
    normal, anomalous = _sorted_normal_and_anomalous_pixels(maps, masks)
    thresholds, pro = _overlap_at_distinct_values(anomalous, _region_weights(masks))
    above = len(normal) - np.searchsorted(normal, thresholds, side="right")
    at_or_above = len(normal) - np.searchsorted(normal, thresholds, side="left")
    before = np.concatenate([[0.0], pro[:-1]])
    fpr = np.concatenate([[0.0], np.column_stack([above, at_or_above]).ravel() / len(normal), [1.0]])
    overlap = np.concatenate([[0.0], np.column_stack([before, pro]).ravel(), [1.0]])
    moved = np.concatenate([[True], (np.diff(fpr) > 0) | (np.diff(overlap) > 0)])
    return fpr[moved], overlap[moved]


def bootstrap_interval(
    statistic: Callable[[Float64s, Bools], float],
    scores: Floats,
    labels: Bools,
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic`, drawing normal and anomalous images separately.

    `statistic` takes (scores float64 [n], labels bool [n]); `n` >= 1 resamples, each with the class sizes of the
    data; `level` in (0, 1). The same seed gives the same interval. It has no width when the statistic cannot change,
    as the AUROC of separated classes: that is no proof of certainty. An error of `statistic` passes through.
    Raises UsageError when both classes are not there, `n` or `level` is out of range or a resample gives NaN.
    Source: Efron & Tibshirani 1993, chapter 13.
    """
    if n < 1:
        raise UsageError(f"n is {n}, but at least one resample is needed.", "The usual value is 1000.")
    tail = _tail(level)
    values, truth = _two_classes(scores, labels)
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(~truth), np.flatnonzero(truth)]
    drawn = (np.concatenate([rng.choice(rows, len(rows)) for rows in classes]) for _ in range(n))
    replicates = np.array([statistic(values[rows], truth[rows]) for rows in drawn], dtype=np.float64)
    _require_finite(replicates, "The statistic's resamples")
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def pixel_intervals(
    maps: Sequence[Floats],
    masks: Sequence[Bools],
    *,
    max_fpr: float = 0.3,
    n: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return the percentile bootstrap intervals of `pixel_auroc` and `aupro`, under the keys `auroc` and `aupro`.

    `maps`, `masks` as in `pixel_auroc`. Whole images are drawn, those with and those without a mask separately: pixels
    of one image are alike, so drawing pixels would give intervals that are far too narrow. Rates are counted at some
    1400 thresholds, dense where few normal pixels are above; that changes either figure by less than 0.0001. The same
    seed gives the same intervals. Raises UsageError when a class of pixels is missing.
    Source: Efron & Tibshirani 1993, chapter 13.
    """
    tail = _tail(level)
    counts, sizes = _counts_by_image(maps, masks)
    defective = sizes[:, 1] > 0
    rng = np.random.default_rng(seed)
    classes = [rows for rows in (np.flatnonzero(~defective), np.flatnonzero(defective)) if len(rows)]
    areas = []
    for _ in range(n):
        weights = np.zeros(len(sizes))
        for rows in classes:
            weights += np.bincount(rng.choice(rows, len(rows)), minlength=len(sizes))
        fpr, tpr, pro = (_curve(weights, counts[:, kind], sizes[:, kind]) for kind in range(3))
        areas.append((float(sklearn_metrics.auc(fpr, tpr)), area_up_to(fpr, pro, max_fpr)))
    low, high = np.quantile(np.array(areas), [tail, 1 - tail], axis=0)
    return {name: (float(low[index]), float(high[index])) for index, name in enumerate(("auroc", "aupro"))}


def binomial_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) interval of a proportion of `k` successes in `n` trials.

    0 <= k <= n, n >= 1, `level` in (0, 1); 0 <= low <= k/n <= high <= 1. Its coverage is at least `level`.
    Raises UsageError for anything else. Source: Clopper & Pearson, Biometrika 26 (1934).

    >>> low, high = binomial_interval(0, 10)
    >>> low, round(high, 4)
    (0.0, 0.3085)
    """
    if n < 1 or not 0 <= k <= n:
        raise UsageError(f"{k} successes in {n} trials make no proportion.", "Give 0 <= k <= n with n >= 1.")
    tail = _tail(level)
    low = stats.beta.ppf(tail, k, n - k + 1) if k > 0 else 0.0
    high = stats.beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0
    return float(low), float(high)


def _counts_by_image(maps: Sequence[Floats], masks: Sequence[Bools]) -> tuple[Float64s, Float64s]:
    """Return what each image has at or above each threshold, float64 [images, 3, thresholds], and in all, [images, 3].

    The three are normal pixels, anomalous pixels, and regions, each of which counts with its share of pixels.
    Thresholds fall from just above the highest normal value to the lowest.
    """
    normal = np.concatenate([pixels[~mask] for pixels, mask in _maps_at_mask_size(maps, masks)])
    _require_both(len(normal), sum(int(np.count_nonzero(mask)) for mask in masks), "pixel")
    sample = normal[:: max(1, len(normal) // 1_000_000)]
    shares = np.concatenate([[0.0], np.geomspace(1 / len(sample), 0.3, 500), np.linspace(0.3, 1.0, 200)])
    reached = np.quantile(sample, 1 - np.minimum(shares, 1.0), method="nearest")
    # Just above a value, too: equal normal pixels must not take anomalous ones above them along.
    rising = np.unique(np.concatenate([reached, np.nextafter(reached, np.float32(np.inf))]))
    counts = np.zeros((len(maps), 3, len(rising)))
    sizes = np.zeros((len(maps), 3))
    for index, (pixels, mask) in enumerate(_maps_at_mask_size(maps, masks)):
        parts = [(pixels[~mask], None), (pixels[mask], None), (pixels[mask], _region_weights([mask]))]
        for kind, (values, weights) in enumerate(parts):
            between = np.bincount(np.searchsorted(rising, values, side="right"), weights, len(rising) + 1)
            counts[index, kind] = between[:0:-1].cumsum()
            sizes[index, kind] = between.sum()
    return counts, sizes


def _curve(weights: Float64s, counts: Float64s, sizes: Float64s) -> Float64s:
    """Return the rates of weighted images at falling thresholds, from 0 to 1."""
    return np.concatenate([[0.0], weights @ counts / (weights @ sizes), [1.0]])


def _mann_whitney(sorted_normal: Floats, anomalous: Floats) -> float:
    """Return the share of (normal, anomalous) pairs in the right order, ties counting one half."""
    below = np.searchsorted(sorted_normal, anomalous, side="left")
    at_or_below = np.searchsorted(sorted_normal, anomalous, side="right")
    twice_won = int(below.sum(dtype=np.int64)) + int(at_or_below.sum(dtype=np.int64))
    return twice_won / (2 * len(sorted_normal) * len(anomalous))


def _overlap_at_distinct_values(pixels: Float32s, weights: Float64s) -> tuple[Float32s, Float64s]:
    """Return the distinct values in falling order and the share of the weight at or above each."""
    falling = np.argsort(pixels)[::-1]
    values = pixels[falling]
    last_of_equals = np.append(values[1:] != values[:-1], True)
    share = np.cumsum(weights[falling])[last_of_equals]
    return values[last_of_equals], share / share[-1]


def _region_weights(masks: Sequence[Bools]) -> Float64s:
    """Return 1 / (size of its region) for each anomalous pixel, image after image in row-major order."""
    weights = []
    for mask in masks:
        regions, _ = ndimage.label(mask, structure=EIGHT_CONNECTED)
        region_of_pixel = regions[regions > 0]
        weights.append(1.0 / np.bincount(region_of_pixel)[region_of_pixel])
    return np.concatenate(weights)


def _value_at(x: Float64s, y: Float64s, limit: float) -> float:
    """Return y at x = limit by linear interpolation; where the curve is vertical there, its upper end."""
    after = int(np.searchsorted(x, limit, side="right"))
    if after == len(x):
        return float(y[-1])
    share = (limit - x[after - 1]) / (x[after] - x[after - 1])
    return float(y[after - 1] + share * (y[after] - y[after - 1]))


def _sorted_normal_and_anomalous_pixels(maps: Sequence[Floats], masks: Sequence[Bools]) -> tuple[Float32s, Float32s]:
    """Return the normal pixels of all images, sorted, and the anomalous ones, image after image in row-major order."""
    normal_parts, anomalous_parts = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for pixels, mask in _maps_at_mask_size(maps, masks):
        normal_parts.append(pixels[~mask])
        anomalous_parts.append(pixels[mask])
    normal, anomalous = np.concatenate(normal_parts), np.concatenate(anomalous_parts)
    _require_both(len(normal), len(anomalous), "pixel")
    normal.sort()
    return normal, anomalous


def _maps_at_mask_size(maps: Sequence[Floats], masks: Sequence[Bools]) -> Iterator[tuple[Float32s, Bools]]:
    """Yield each map as float32 in the size of its mask, and the mask, both checked."""
    if len(maps) != len(masks):
        raise UsageError(f"There are {len(maps)} maps but {len(masks)} masks.", "Give a good image an all-False mask.")
    for index, (map_, mask) in enumerate(zip(maps, masks, strict=True)):
        if np.ndim(map_) != 2 or np.ndim(mask) != 2 or not np.size(map_) or not np.size(mask):
            shapes = f"map {index} has shape {np.shape(map_)} and its mask {np.shape(mask)}"
            raise UsageError(f"Expected [h, w] and [H, W], but {shapes}.", "Give each map and mask as one 2-D array.")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused here
            pixels = np.asarray(map_, dtype=np.float32)
        _require_finite(pixels, f"Map {index} (as float32)")
        yield _resized(pixels, np.shape(mask)), _bools(mask, f"Mask {index}")


def _resized(pixels: Float32s, shape: tuple[int, ...]) -> Float32s:
    """Return a float32 map resized to (height, width) with Pillow's bilinear filter (half-pixel centres)."""
    if pixels.shape == shape:
        return pixels
    height, width = shape
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _two_classes(scores: Floats, labels: Bools) -> tuple[Float64s, Bools]:
    """Return checked scores and labels with both classes present."""
    values, truth = _checked(scores, labels)
    _require_both(int(np.count_nonzero(~truth)), int(np.count_nonzero(truth)), "image")
    return values, truth


def _checked(scores: Floats, labels: Bools) -> tuple[Float64s, Bools]:
    """Return scores as finite float64 [n] and labels as bool [n]."""
    if np.shape(scores) != np.shape(labels):
        shapes = f"scores have shape {np.shape(scores)} and labels {np.shape(labels)}"
        raise UsageError(f"The shapes differ: {shapes}.", "Give one score and one label per image.")
    return _finite_vector(scores), _bools(labels, "The label array")


def _finite_vector(scores: Floats) -> Float64s:
    """Return scores as float64 [n] with n >= 1, all finite."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise UsageError(f"Scores have shape {values.shape}.", "Give a one-dimensional array with at least one score.")
    _require_finite(values, "The score array")
    return values


def _bools(values: Bools, name: str) -> Bools:
    """Return an array as bool; numbers are accepted when all are 0 or 1, so that a 0/255 mask is not misread."""
    array = np.asarray(values)
    if array.dtype == np.bool_:
        return array
    if not np.isin(array, (0, 1)).all():
        raise UsageError(f"{name} holds values other than 0 and 1.", "Compare it first, for example mask > 0.")
    return array.astype(np.bool_)


def _require_finite(values: Floats, name: str) -> None:
    """Raise UsageError with the number of values that are NaN or infinite."""
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise UsageError(
            f"{name}: {bad} of {values.size} values are NaN or infinite.", "Check the model and its inputs."
        )


def _require_both(normal: int, anomalous: int, unit: str) -> None:
    """Raise UsageError naming the class that has no members."""
    if not normal:
        raise _missing_class("normal", unit)
    if not anomalous:
        raise _missing_class("anomalous", unit)


def _missing_class(missing: str, unit: str) -> UsageError:
    """Return the error for data without one of the two classes."""
    return UsageError(f"There is no {missing} {unit} in the data.", f"Add images with at least one {missing} {unit}.")


def _tail(level: float) -> float:
    """Return the probability left out on each side of a two-sided interval."""
    if not 0 < level < 1:
        raise UsageError(f"level is {level}, outside (0, 1).", "The usual value is 0.95.")
    return (1 - level) / 2
