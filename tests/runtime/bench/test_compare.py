"""Telling a slow-down from noise: on simulated clocks, where the truth is known."""

from __future__ import annotations

import random

import pytest

from edge_anomaly_runtime.bench.compare import Comparison, compare, noise_bound


class Machine:
    """A machine whose calls take a given time, times noise that lasts for a while, as on a shared computer."""

    def __init__(self, seed: int, noise: float = 0.15) -> None:
        self.rng, self.noise = random.Random(seed), noise
        self.now, self.factor, self.left = 0.0, 1.0, 0

    def clock(self) -> float:
        return self.now

    def work(self, milliseconds: float) -> None:
        if not self.left:
            self.factor = 1 + abs(self.rng.gauss(0, self.noise))
            self.left = self.rng.randrange(20, 200)
        self.left -= 1
        self.now += milliseconds / 1e3 * self.factor * self.rng.uniform(0.98, 1.02)


def measured(seed: int, slower: float, noise: float = 0.15) -> Comparison:
    machine = Machine(seed, noise)
    return compare(lambda: machine.work(5.0), lambda: machine.work(5.0 * slower), clock=machine.clock)


@pytest.mark.parametrize("noise", [0.15, 0.3])
def test_equals_are_called_slower_at_most_once_in_fifty_and_a_planted_fifteen_per_cent_is_found(noise: float) -> None:
    assert sum(measured(seed, 1.0, noise).is_slower for seed in range(50)) <= 1
    assert sum(measured(seed, 1.15, noise).is_slower for seed in range(40)) >= 38


def test_on_a_quiet_machine_the_ratio_is_the_truth() -> None:
    result = measured(0, 1.15, noise=0.0)
    assert result.ratio == pytest.approx(1.15, rel=0.01)
    assert result.noise == pytest.approx(1.0, abs=0.01)
    assert result.p < 0.001
    assert result.is_slower
    assert not measured(0, 1.05, noise=0.0).is_slower  # slower, but within the limit


def test_what_looks_slower_or_noise_may_hide_is_measured_a_second_time() -> None:
    assert len(measured(0, 1.5, noise=0.0).first) == 90
    assert len(measured(0, 1.0, noise=0.0).first) == 45
    assert len(measured(0, 1.0, noise=0.9).first) == 90


def test_neither_side_always_comes_first() -> None:
    order: list[str] = []
    machine = Machine(0)

    def call(name: str) -> None:
        machine.work(20.0)
        order.append(name)

    compare(lambda: call("A"), lambda: call("B"), rounds=8, clock=machine.clock)
    timed = "".join(order[12:])  # two first calls, ten to find out how many make a block
    assert timed.count("A") == timed.count("B")
    block = len(timed) // 16
    assert [timed[start] for start in range(0, len(timed), block)] == list("ABBA" * 4)


def test_noise_is_what_halves_of_one_side_differ_by() -> None:
    rng = random.Random(1)
    noisy = [10 * (1 + abs(rng.gauss(0, 0.3))) for _ in range(15)]
    assert noise_bound([10.0] * 15) == 1.0
    assert 1.02 < noise_bound(noisy) < 1.6
