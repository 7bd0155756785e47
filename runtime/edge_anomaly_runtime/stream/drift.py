"""Whether a camera's scores still look like those that its alarm limits were set from.

A limit promises a false-alarm rate for pictures like the calibration's. When the light, the lens or the material
changes, the scores move and the promise is void, mostly without any other sign.

The rule, which the tests check by simulation:

- Shift: the share of scores below the calibration's median, which should be 1/2. Spread: the share outside of its 5 %
  and 95 % quantiles. Shape, for what keeps both, such as one of two kinds of parts: the share below any quantile. These
  are shares, so they hold for scores of any distribution, and a defect counts as one frame however high it scores: a
  share `_DEFECTS` of bad parts is allowed for.
- Frames are no independent draws: a part is seen in many. The error of a share is therefore that of the mean of a
  correlated series, with its autocorrelations summed as long as sums of neighbouring pairs stay positive and do not
  rise (initial monotone sequence, Geyer 1992, Statistical Science 7(4)), after adding back what the subtraction of
  the window's own mean takes from each of them. A jump inside the window counts as correlation: a
  change is believed when most of the window has seen it.
- The calibration's quantiles are a sample's as well: the share of all future scores between two order statistics of n
  follows a Beta distribution (Wilks 1941), of which `_expected_outside` and `_limit` take mean and deviation.
- Window and calibration enter with limits of their own, added and not squared: a window's error is drawn anew all day
  long, the calibration's only once.
- What is significant must matter as well: half a sigma, 1.4 times the spread, or a KS distance of 1/4. A window that is
  narrower than the calibration shows a part of what is normal (a line that stands still), so its median may lie
  anywhere in the rest, and its shape is not judged.
- A window with too few independent frames grows, up to `_GROWTH` times; if that is too few still, nothing is said.
- An episode begins when four looks in a row, a tenth of the window apart, agree; it ends when four are below 0.7 of the
  limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_anomaly_runtime.bundle import Thresholds
from edge_anomaly_runtime.errors import UsageError

State = Literal["learning", "ok", "drifting"]
Scores = npt.NDArray[np.float64]

PERCENTS = (1, 5, 25, 50, 75, 95, 99)
MIN_WINDOW = 50

_GROWTH = 16
_MIN_SCORES, _MIN_INDEPENDENT, _ENOUGH_INDEPENDENT = 20, 20.0, 150.0
# In standard errors of the window and of the calibration.
_WINDOW_Z, _CALIBRATION_Z = 3.0, 2.0
_DEFECTS = 0.05
_SHIFT_SIGMA, _SPREAD, _KS = 0.5, 1.4, 0.25
# What ends an episode, in parts of the limits that begin it, so that the state does not flap.
_END = 0.7
_LOOKS_PER_WINDOW = 10
# An episode begins and ends when so many looks in a row agree.
_AGREE = 4
# Interquartile range of a normal distribution, in standard deviations.
_IQR_SIGMA = 1.349


@dataclass(frozen=True)
class Reference:
    """The held-out normal scores of one graph at one precision on one engine.

    n: how many there were. quantiles: at `PERCENTS`, as `numpy.percentile` gives them. sigma: their robust standard
    deviation, from the interquartile range.
    """

    n: int
    quantiles: tuple[float, ...]
    sigma: float

    @property
    def median(self) -> float:
        return self.quantiles[PERCENTS.index(50)]

    @property
    def iqr(self) -> float:
        return self.sigma * _IQR_SIGMA


@dataclass(frozen=True)
class Figures:
    """How scores differ from a reference.

    shift_sigma: distance of the medians, in the reference's sigma. spread: ratio of the interquartile ranges.
    ks: Kolmogorov-Smirnov distance, 0 to 1, at the stored quantiles, the only places where the reference's
    distribution is known.
    """

    shift_sigma: float
    spread: float
    ks: float


@dataclass(frozen=True)
class DriftReport:
    """What is known about the latest scores of one camera.

    shift_sigma, spread, ks: see `Figures`; None before the first 20 scores. n: scores that they are from.
    n_independent: how many independent ones those are worth. advice: what to do, or what is waited for; '' when all is
    well.
    """

    state: State
    shift_sigma: float | None
    spread: float | None
    ks: float | None
    n: int
    n_independent: float
    advice: str


@dataclass(frozen=True)
class _Look:
    """One window against the reference; `shift`, `spread` and `shape` in parts of their limits: from 1 on, drift."""

    figures: Figures
    n: int
    n_independent: float
    shift: float
    spread: float
    shape: float

    @property
    def worst(self) -> float:
        return max(self.shift, self.spread, self.shape)

    @property
    def is_known(self) -> bool:
        return self.n_independent >= _MIN_INDEPENDENT


class DriftMonitor:
    """Compares the latest scores of one camera with the calibration; for use from one thread.

    window: how many scores to look at; it should hold some 30 parts or more. Where they are too much alike it grows, up
    to 16 times.

    Raises:
        UsageError: the window is too short.
    """

    def __init__(self, reference: Reference, *, window: int = 1000) -> None:
        if window < MIN_WINDOW:
            raise UsageError(f"A drift window of {window} scores is too short.", f"Give {MIN_WINDOW} or more.")
        self._reference = reference
        self._window = window
        self._scores = np.zeros(window * _GROWTH)
        self._count = 0
        self._next_look = window
        self._agreeing = 0
        self._is_drifting = False
        self._advice = ""

    @property
    def is_drifting(self) -> bool:
        """Whether an episode is on."""
        return self._is_drifting

    def update(self, score: float) -> DriftReport | None:
        """Take the score of the next frame; return a report when an episode of drift begins or has ended.

        Raises:
            ValueError: the score is not finite; such a frame is INVALID and says nothing about drift.
        """
        if not math.isfinite(score):
            raise ValueError(f"the score is {score}")
        self._scores[self._count % self._scores.size] = score
        self._count += 1
        if self._count < self._next_look:
            return None
        look = self._look()
        self._next_look = self._count + look.n // _LOOKS_PER_WINDOW
        return self._report(look) if self._judge(look) else None

    def report(self) -> DriftReport:
        """Return the figures of now and the state of the last look; takes about a millisecond."""
        if self._count < _MIN_SCORES:
            return DriftReport("learning", None, None, None, self._count, 0.0, self._learning_advice())
        return self._report(self._look())

    def _report(self, look: _Look) -> DriftReport:
        state: State = "ok"
        advice = ""
        if self._is_drifting:
            state, advice = "drifting", self._advice
        elif self._count < self._window:
            state, advice = "learning", self._learning_advice()
        elif not look.is_known:
            state, advice = "learning", _alike_advice(look)
        seen = look.figures
        return DriftReport(state, seen.shift_sigma, seen.spread, seen.ks, look.n, look.n_independent, advice)

    def _judge(self, look: _Look) -> bool:
        """Begin or end an episode; return whether that was done."""
        if not look.is_known:
            return False
        if look.worst >= 1:
            self._advice = advice_for(look.figures, is_shifted=look.shift >= 1, is_wider=look.spread >= 1)
        contradicts = look.worst < _END if self._is_drifting else look.worst >= 1
        self._agreeing = self._agreeing + 1 if contradicts else 0
        if self._agreeing < _AGREE:
            return False
        self._agreeing = 0
        self._is_drifting = not self._is_drifting
        return True

    def _learning_advice(self) -> str:
        return f"{self._count} scores so far; a window holds {self._window}."

    def _look(self) -> _Look:
        """Look at the shortest window that shows drift or holds enough independent scores, else at the longest."""
        held = min(self._count, self._scores.size)
        factor = 1
        while True:
            look = look_at(self._latest(min(held, factor * self._window)), self._reference, block=factor)
            shows_drift = look.is_known and look.worst >= 1
            if shows_drift or look.n_independent >= _ENOUGH_INDEPENDENT or factor * self._window >= held:
                return look
            factor *= 2

    def _latest(self, n: int) -> Scores:
        start, end = (self._count - n) % self._scores.size, (self._count - 1) % self._scores.size + 1
        if start < end:
            return self._scores[start:end]
        return np.concatenate([self._scores[start:], self._scores[:end]])


def reference_of(thresholds: Thresholds) -> Reference:
    """Return the distribution of the normal scores that limits were set from.

    Raises:
        UsageError: the bundle does not keep it, or all scores were the same.
    """
    kept = thresholds.scores
    names = [f"q{percent}" for percent in PERCENTS]
    if absent := [name for name in ("n", "std", *names) if name not in kept]:
        raise UsageError(
            f"The bundle does not say how its normal scores were distributed ({', '.join(absent)} missing).",
            "Export it again with this version of edge-anomaly.",
        )
    quantiles = tuple(kept[name] for name in names)
    # Where half of the scores are the same the quartiles are, too.
    iqr = quantiles[PERCENTS.index(75)] - quantiles[PERCENTS.index(25)]
    sigma = iqr / _IQR_SIGMA if iqr > 0 else kept["std"]
    if not sigma > 0:
        raise UsageError(
            f"The {int(kept['n'])} normal scores of the bundle are all the same: drift has no measure.",
            "Export it again with more normal images.",
        )
    return Reference(int(kept["n"]), quantiles, sigma)


def figures_of(scores: Scores, reference: Reference) -> Figures:
    """Compare scores, in any order, with a reference.

    >>> reference = Reference(99, (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0), 50 / 1.349)
    >>> figures = figures_of(np.arange(0.0, 201.0), reference)
    >>> round(figures.shift_sigma, 3), figures.spread, round(figures.ks, 2)
    (1.349, 2.0, 0.49)
    """
    return _figures(np.sort(scores), reference)


def look_at(scores: Scores, reference: Reference, *, block: int = 1) -> _Look:
    """Judge scores in the order of their frames; correlations are taken between means of `block` frames."""
    ordered = np.sort(scores)
    figures = _figures(ordered, reference)
    # The window's own quantiles: a series that lies all on one side of the reference's has no correlation to measure.
    n_median = independent(scores > _quantile(ordered, 50), block)
    n_outside = independent((scores < _quantile(ordered, 5)) | (scores > _quantile(ordered, 95)), block)

    moved = {
        percent: _moved(ordered, value, percent / 100) / _below_limit(percent / 100, n_median, reference.n)
        for percent, value in zip(PERCENTS, reference.quantiles, strict=True)
    }
    hidden = _hidden(figures.spread)
    shift = min(moved[50], abs(figures.shift_sigma) / max(_SHIFT_SIGMA, hidden))
    shape = 0.0 if hidden else min(max(moved.values()), figures.ks / _KS)

    expected = _expected_outside(reference.n)
    limit = _limit(expected, n_outside, reference.n) + _DEFECTS * (1 - expected)
    spread = min((_outside(ordered, reference) - expected) / limit, figures.spread / _SPREAD)
    return _Look(figures, scores.size, n_median, shift, spread, shape)


def independent(events: npt.NDArray[np.bool_], block: int = 1) -> float:
    """Return how many independent events have a mean as precise as these, which come in the order of time.

    At least 1, and 1 where nothing ever changes. See the module's docstring for the source.

    >>> independent(np.tile([True, False, False, True, True, False], 50)) > 290
    True
    >>> 9 < independent(np.repeat(np.tile([True, False, False, True, True, False], 2), 50)) < 20
    True
    """
    usable = events.size // block * block
    means: Scores = events[events.size - usable :].reshape(-1, block).mean(axis=1)
    correlation = _autocorrelation(means)
    if correlation is None:
        return 1.0
    time = _correlation_time(correlation)
    lags = np.arange(correlation.size)
    for _ in range(2):  # the correction depends on what it corrects; it settles at once
        bias = time / means.size
        corrected = (correlation / (1 - lags / means.size) + bias) / (1 + bias)
        corrected[0] = 1.0
        time = min(_correlation_time(corrected), means.size / 2)
    error = float(means.var()) * time / means.size
    variance = float(events.var())
    return min(float(events.size), max(1.0, variance / error))


def advice_for(figures: Figures, *, is_shifted: bool, is_wider: bool) -> str:
    """Say in plain words what has moved, what it means and what to check."""
    parts = []
    if is_shifted and figures.shift_sigma > 0:
        parts.append(
            f"Scores are higher than at calibration ({figures.shift_sigma:+.1f} sigma): good parts come closer to the "
            "limits, expect more false alarms."
        )
    elif is_shifted:
        parts.append(
            f"Scores are lower than at calibration ({figures.shift_sigma:+.1f} sigma): the limits are too far away for "
            "small defects, expect misses. A picture that shows less detail, blurred or dim, can have this effect."
        )
    if is_wider:
        parts.append(
            f"Scores spread {figures.spread:.1f} times as wide as at calibration: expect false alarms and misses. "
            "Light that changes, a loose camera or mixed lots can have this effect."
        )
    if not (is_shifted or is_wider):
        parts.append(
            f"About {figures.ks:.0%} of the scores lie where they did not at calibration: a part of the pictures has "
            "changed, such as one of several kinds of parts; expect false alarms or misses there."
        )
    return " ".join([*parts, _WHAT_TO_DO])


_WHAT_TO_DO = (
    "Check light, exposure, lens (dirt, focus) and camera position, and whether a new lot or material has come. If all "
    "of that is as it should be and the parts are good, set the limits again from new normal images; a limit that is "
    "only raised hides the change."
)


def _alike_advice(look: _Look) -> str:
    return (
        f"{look.n} scores so far are worth about {look.n_independent:.0f} independent ones and {_MIN_INDEPENDENT:.0f} "
        "are needed: more parts have to pass."
    )


def _figures(ordered: Scores, reference: Reference) -> Figures:
    iqr = _quantile(ordered, 75) - _quantile(ordered, 25)
    return Figures(
        shift_sigma=(_quantile(ordered, 50) - reference.median) / reference.sigma,
        spread=iqr / reference.iqr,
        ks=max(
            _moved(ordered, value, percent / 100) for percent, value in zip(PERCENTS, reference.quantiles, strict=True)
        ),
    )


def _quantile(ordered: Scores, percent: float) -> float:
    """Return what `numpy.percentile` does, which takes longer than everything else here."""
    place = (ordered.size - 1) * percent / 100
    below = int(place)
    lower, upper = float(ordered[below]), float(ordered[min(below + 1, ordered.size - 1)])
    return lower + (upper - lower) * (place - below)


def _moved(ordered: Scores, value: float, share: float) -> float:
    """Return how far the share of scores below `value` is from `share`; ties count for either side."""
    below, not_above = np.searchsorted(ordered, value, "left"), np.searchsorted(ordered, value, "right")
    return max(0.0, float(below) / ordered.size - share, share - float(not_above) / ordered.size)


def _outside(ordered: Scores, reference: Reference) -> float:
    """Return the share of scores outside of the reference's 5 % and 95 % quantiles."""
    low, high = reference.quantiles[PERCENTS.index(5)], reference.quantiles[PERCENTS.index(95)]
    inside = np.searchsorted(ordered, high, "right") - np.searchsorted(ordered, low, "left")
    return 1 - float(inside) / ordered.size


def _below_limit(share: float, n_window: float, n_calibration: int) -> float:
    # Defects are high scores: where a share p was below a quantile, p (1 - defects) is.
    return _limit(share, n_window, n_calibration) + _DEFECTS * share


def _limit(share: float, n_window: float, n_calibration: int) -> float:
    deviation = math.sqrt(share * (1 - share))
    return _WINDOW_Z * deviation / math.sqrt(n_window) + _CALIBRATION_Z * deviation / math.sqrt(n_calibration + 2)


def _expected_outside(n: int) -> float:
    """Return the mean share of future scores outside of the 5 % and 95 % quantiles, 0.9 (n - 1) ranks apart, of n."""
    return 1 - 0.9 * (n - 1) / (n + 1)


def _hidden(spread: float) -> float:
    """Return how far, in sigma, the median of a window may lie that shows only a part of the calibration's spread.

    The variances add up: what is not seen inside of the window is between windows. Two standard deviations of it; a
    spread of 0.87 and more may be by chance.
    """
    return 2 * math.sqrt(max(0.0, 0.75 - spread**2))


def _autocorrelation(series: Scores) -> Scores | None:
    """Return the correlation at lags 0 to half of the length; None for a constant series."""
    centred = series - series.mean()
    size = 1 << (2 * series.size - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    covariance = np.fft.irfft(spectrum * np.conj(spectrum), size)[: max(2, series.size // 2)]
    return covariance / covariance[0] if covariance[0] > 1e-9 else None


def _correlation_time(correlation: Scores) -> float:
    """Return 1 + 2 * sum of the correlations: how many values are worth one independent one; at least 1."""
    pairs = correlation[: correlation.size // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    positive = np.minimum.accumulate(pairs[: ends[0]] if ends.size else pairs)
    return max(1.0, 2 * float(positive.sum()) - 1)
