"""Does the INT8 graph judge like the float graph? Compared on real images, with each graph's own thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_anomaly_runtime.bundle import Thresholds

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GuardLimits:
    """What the INT8 graph may cost: loss of image AUROC, share of changed alarms, and how far scores may collapse.

    For a classifier: loss of accuracy, and share of changed classes.
    """

    auroc_drop: float = 0.005
    flips: float = 0.02
    distinct: float = 0.9
    accuracy_drop: float = 0.003

    def __str__(self) -> str:
        return f"ΔAUROC<={self.auroc_drop:g}, flips<={self.flips:.0%}"

    def for_classes(self) -> str:
        """Say the limits of a classifier."""
        return f"Δaccuracy<={self.accuracy_drop:.1%}, changes<={self.flips:.0%}"


@dataclass(frozen=True)
class GuardReport:
    """INT8 against float: `auroc_drop` None without defects, `flips` is counted at each graph's own fail limit."""

    auroc_drop: float | None
    flips: int
    images: int
    rank_correlation: float
    distinct: float
    failures: tuple[str, ...]


def compare(
    reference: Scores,
    scores: Scores,
    *,
    reference_thresholds: Thresholds,
    thresholds: Thresholds,
    defective: npt.NDArray[np.bool_] | None,
    limits: GuardLimits,
) -> GuardReport:
    """Compare the scores of the same images, float64 [n], from the float graph and from the INT8 graph.

    `defective`: bool [n], or None where there are only normal images.
    """
    flips = int(((reference > reference_thresholds.fail.value) != (scores > thresholds.fail.value)).sum())
    drop = None
    if defective is not None and 0 < defective.sum() < defective.size:
        drop = auroc(reference, defective) - auroc(scores, defective)
    distinct = np.unique(scores).size / scores.size
    failures = []
    if not np.isfinite(scores).all():
        failures.append(f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are not finite")
    if drop is not None and drop > limits.auroc_drop:
        failures.append(f"image AUROC falls by {drop:.4f} (limit {limits.auroc_drop:g})")
    # Of fewer than 50 images, one is more than 2 %: a single one proves nothing.
    if flips > max(1.0, limits.flips * scores.size):
        failures.append(f"{flips} of {scores.size} verdicts flip (limit {limits.flips:.1%})")
    if distinct < limits.distinct:
        failures.append(f"only {distinct:.0%} of the scores are distinct: the graph saturates")
    return GuardReport(drop, flips, scores.size, rank_correlation(reference, scores), distinct, tuple(failures))


def auroc(scores: Scores, defective: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve, ties counted half (Mann-Whitney)."""
    ranks = tied_ranks(scores)
    bad, good = int(defective.sum()), int((~defective).sum())
    return float((ranks[defective].sum() - bad * (bad + 1) / 2) / (bad * good))


def rank_correlation(first: Scores, second: Scores) -> float:
    """Return Spearman's rank correlation, ties averaged; 1.0 for a single image."""
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float(np.array_equal(tied_ranks(first), tied_ranks(second)))
    return float(np.corrcoef(tied_ranks(first), tied_ranks(second))[0, 1])


def tied_ranks(values: Scores) -> Scores:
    """Return ranks from 1 on, equal values sharing the mean of theirs.

    >>> tied_ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
