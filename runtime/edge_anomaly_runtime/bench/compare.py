"""Is B slower than A? Measured in turns, with a bound for what two runs of the same thing differ by."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from .statistics import mann_whitney, percentile

# One in 500 comparisons of equals would be this extreme by chance; the ratio has to be large as well.
SIGNIFICANT = 0.002
LIMIT = 1.10
# Many short blocks tell more than few long ones: disturbances last longer than a block.
ROUNDS = 45
_QUARTILE = 25
# Of the ratios that equals showed, what is below this share is noise.
_NOISE_SHARE = 0.95
_RESAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """A against B in turns.

    first, second: p50 of every block in milliseconds, in the order of the rounds. ratio: B / A of the blocks' lower
    quartiles, because what disturbs a measurement only ever adds time. noise: what the same ratio of two halves of A
    alone stays below, 95 times in 100. p: one-sided, of B being no slower. is_slower: the ratio is above both `limit`
    and `noise`, and p is below 0.002.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    ratio: float
    noise: float
    p: float
    limit: float

    @property
    def is_slower(self) -> bool:
        """Whether B is slower than A by more than the limit and by more than noise."""
        return self.ratio > max(self.limit, self.noise) and self.p < SIGNIFICANT


def compare(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    rounds: int = ROUNDS,
    block_seconds: float = 0.05,
    limit: float = LIMIT,
    seed: int = 0,
    clock: Callable[[], float] = perf_counter,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Comparison:
    """Time both in blocks, A B B A A B B A ..., so that neither always comes first.

    A block is as many calls as take about `block_seconds`, the same number for both. What looks slower, and what noise
    above the limit may hide, is measured once more with as many rounds, and judged on all of them.
    """
    calls = _calls_of(first, second, block_seconds, clock)
    pairs = [_round(first, second, calls, number, clock) for number in progress(range(rounds))]
    result = _judged(pairs, limit, seed)
    if max(result.ratio, result.noise) > limit:
        pairs += [_round(first, second, calls, number, clock) for number in progress(range(rounds, 2 * rounds))]
        result = _judged(pairs, limit, seed)
    return result


def _round(
    first: Callable[[], object], second: Callable[[], object], calls: int, number: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the time of a block of each; in rounds of odd number the second one comes first."""
    if number % 2:
        other = _block(second, calls, clock)
        return _block(first, calls, clock), other
    return _block(first, calls, clock), _block(second, calls, clock)


def _block(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Return the median time of a call, after a tenth as many that do not count: caches are the other one's."""
    for _ in range(max(1, calls // 10)):
        call()
    samples = []
    for _ in range(calls):
        start = clock()
        call()
        samples.append((clock() - start) * 1e3)
    return median(samples)


def _calls_of(
    first: Callable[[], object], second: Callable[[], object], seconds: float, clock: Callable[[], float]
) -> int:
    for call in (first, second):
        call()
    start = clock()
    for call in itertools.islice(itertools.cycle((first, second)), 10):
        call()
    return max(11, min(1000, round(10 * seconds / max(1e-9, clock() - start))))


def _judged(pairs: Sequence[tuple[float, float]], limit: float, seed: int) -> Comparison:
    first, second = (tuple(side) for side in zip(*pairs, strict=True))
    return Comparison(
        first, second, _ratio(first, second), noise_bound(first, seed), mann_whitney(first, second), limit
    )


def noise_bound(blocks: Sequence[float], seed: int = 0) -> float:
    """Return what the ratio of two equal things stays below, 95 times in 100.

    The blocks of one side are dealt to two halves at random, again and again: whatever these differ by is noise.
    """
    rng, half = random.Random(seed), len(blocks) // 2
    ratios = []
    for _ in range(_RESAMPLES):
        dealt = rng.sample(list(blocks), 2 * half)
        ratios.append(_ratio(dealt[:half], dealt[half:]))
    return sorted(ratios)[int(_NOISE_SHARE * len(ratios))]


def _ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return percentile(sorted(second), _QUARTILE) / percentile(sorted(first), _QUARTILE)
