"""Alarm limits with a stated false-alarm rate, from normal images that the model was not fitted on."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .bundle import Threshold, Thresholds
from .errors import UsageError

Scores = npt.NDArray[np.float64]

# Peaks over threshold: the share of scores that counts as the tail, and how many of them a fit needs.
_TAIL_SHARE = 0.1
_MIN_EXCEEDANCES = 20
_SHAPE_LIMIT = 0.5
_CONFIDENCE = 0.95


def fit_thresholds(
    scores: npt.ArrayLike, map_maxima: npt.ArrayLike, *, alpha_warn: float, alpha_fail: float
) -> Thresholds:
    """Set the warn and fail limits from held-out normal scores, and the pixel limit from the maxima of their maps.

    The pixel limit has the warn rate: on average that share of good images shows an outline anywhere.

    Raises:
        UsageError: an alpha is not between 0 and 1, alpha_fail is above alpha_warn, or there is no score.
    """
    check_rates(alpha_warn, alpha_fail)
    finite = _checked(scores)
    warn, fail = fit_threshold(finite, alpha_warn), fit_threshold(finite, alpha_fail)
    quantiles = {f"q{percent}": float(np.percentile(finite, percent)) for percent in (1, 5, 25, 50, 75, 95, 99)}
    return Thresholds(
        warn=warn,
        fail=fail,
        pixel=fit_threshold(_checked(map_maxima), alpha_warn),
        scores={
            "n": float(finite.size),
            "mean": float(finite.mean()),
            "std": float(finite.std()),
            "min": float(finite.min()),
            "max": float(finite.max()),
            **quantiles,
        },
    )


def check_rates(alpha_warn: float, alpha_fail: float) -> None:
    """Raise UsageError for false-alarm rates that cannot be had, before the work that leads to them."""
    for alpha in (alpha_warn, alpha_fail):
        if not 0 < alpha < 1:
            raise UsageError(f"A false-alarm rate of {alpha:g} is not possible.", "Choose a rate between 0 and 1.")
    if alpha_fail > alpha_warn:
        raise UsageError(
            f"The fail rate {alpha_fail:g} is above the warn rate {alpha_warn:g}.",
            "Choose --alpha-fail not above --alpha-warn: NG is the rarer verdict.",
        )


def fit_threshold(scores: npt.ArrayLike, alpha: float) -> Threshold:
    """Return the limit that a share `alpha` of normal scores exceeds.

    From alpha = 1 / (n + 1) on: split conformal (Vovk et al. 2005), the k-th smallest score with
    k = ceil((n + 1)(1 - alpha)); the true rate of a new image then follows Beta(n + 1 - k, k), whose 95 % quantile is
    the stated bound. Below: a generalised Pareto tail (Pickands 1975), never under the largest score.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"A false-alarm rate of {alpha:g} is not possible.", "Choose a rate between 0 and 1.")
    ordered = np.sort(_checked(scores))
    n = ordered.size
    # 1e-12: (n + 1)(1 - alpha) may come out a rounding error above a whole number.
    order = math.ceil((n + 1) * (1 - alpha) - 1e-12)
    if order <= n:
        return Threshold(
            value=float(ordered[order - 1]),
            alpha=alpha,
            method="conformal",
            n=n,
            order=order,
            upper95=beta_quantile(_CONFIDENCE, n + 1 - order, order),
        )
    value = _pareto_limit(ordered, alpha)
    largest = float(ordered[-1])
    return Threshold(
        value=largest if value is None else max(value, largest),
        alpha=alpha,
        method="maximum" if value is None else "pareto",
        n=n,
        order=n,
        upper95=beta_quantile(_CONFIDENCE, 1, n),
    )


def beta_quantile(probability: float, a: int, b: int) -> float:
    """Return the quantile of Beta(a, b) with whole a, b >= 1, by bisection of its binomial tail sum.

    Beta(a, b) has the distribution function P(X <= x) = P(Binomial(a + b - 1, x) >= a). (scipy has this, but it would
    be the calibration package's only use of it.)
    """
    n = a + b - 1
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(a)])
    counts = np.arange(a)
    low, high = 0.0, 1.0
    for _ in range(100):
        x = (low + high) / 2
        below = float(np.exp(log_choose + counts * math.log(x) + (n - counts) * math.log1p(-x)).sum())
        if 1 - below < probability:
            low = x
        else:
            high = x
    return (low + high) / 2


def _pareto_limit(ordered: Scores, alpha: float) -> float | None:
    """Return the limit from a Pareto tail fitted by probability-weighted moments (Hosking and Wallis 1987), if any."""
    n = ordered.size
    count = max(_MIN_EXCEEDANCES, int(n * _TAIL_SHARE))
    if count >= n:
        return None
    start = ordered[n - count - 1]
    excess = ordered[n - count :] - start
    weights = (count - np.arange(1, count + 1) + 0.35) / count
    first, second = excess.mean(), (weights * excess).mean()
    if not first > 2 * second > 0:
        return None
    shape = 2 - first / (first - 2 * second)
    # A weak prior, as in Vehtari et al. 2024: fitted to some 20 values alone the limit is often far too low.
    shape = (count * shape + 10 * 0.5) / (count + 10)
    shape = float(np.clip(shape, -_SHAPE_LIMIT, _SHAPE_LIMIT))
    scale = float(first * (1 - shape))
    rarity = alpha * n / count
    step = -math.log(rarity) if abs(shape) < 1e-9 else (rarity**-shape - 1) / shape
    return float(start + scale * step)


def _checked(scores: npt.ArrayLike) -> Scores:
    values = np.asarray(scores, dtype=np.float64).ravel()
    if values.size == 0:
        raise UsageError("There is no held-out normal image to set a threshold from.", "Raise --holdout.")
    if not np.isfinite(values).all():
        raise UsageError(f"{int((~np.isfinite(values)).sum())} of {values.size} normal scores are not finite.")
    return values
