"""Scenarios on a clock that stands still unless somebody moves it."""

from __future__ import annotations

import gc
import threading

import pytest

from edge_anomaly_runtime.bench.scenarios import Stages, multi, offline, paced, single, warm_up


class Clock:
    """Time in seconds that passes by `sleep` and by work."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Worker:
    """Takes so many milliseconds for each image, the last of the list for all further ones."""

    def __init__(self, clock: Clock, *takes_ms: float) -> None:
        self.clock, self.takes_ms, self.seen = clock, takes_ms, list[int]()

    def __call__(self, index: int) -> Stages:
        takes = self.takes_ms[min(len(self.seen), len(self.takes_ms) - 1)]
        self.seen.append(index)
        self.clock.now += takes / 1e3
        return {"infer": takes}


def test_single_takes_one_image_after_the_other() -> None:
    clock = Clock()
    worker = Worker(clock, 5, 7, 90, 6)
    measured = single(worker, 4, clock=clock)
    assert worker.seen == [0, 1, 2, 3]
    assert measured.of("total") == pytest.approx([5, 7, 90, 6])
    assert measured.of("infer") == [5, 7, 90, 6]
    assert measured.seconds == pytest.approx(0.108)
    assert measured.started_s == pytest.approx([0, 0.005, 0.012, 0.102])


def test_a_pace_that_can_be_held_misses_nothing() -> None:
    clock = Clock()
    worker = Worker(clock, 10)
    measured = paced(worker, 5, 25, clock=clock, sleep=clock.sleep)
    assert (worker.seen, measured.scheduled, measured.missed) == ([0, 1, 2, 3, 4], 5, 0)
    assert measured.of("total") == pytest.approx([10] * 5)
    assert measured.of("wait") == pytest.approx([0] * 5, abs=1e-6)
    assert measured.seconds == pytest.approx(4 / 25 + 0.01)


def test_a_stall_counts_for_every_frame_that_waited_and_the_newest_is_taken() -> None:
    clock = Clock()
    worker = Worker(clock, 10, 95, 10)  # the second image takes two and a half periods
    measured = paced(worker, 6, 25, clock=clock, sleep=clock.sleep)
    # Frame 1 is due at 40 ms and done at 135 ms; of 2 (80 ms) and 3 (120 ms) the newer is taken.
    assert worker.seen == [0, 1, 3, 4, 5]
    assert measured.missed == 1
    assert measured.of("total") == pytest.approx([10, 95, 25, 10, 10])
    assert measured.of("wait") == pytest.approx([0, 0, 15, 0, 0], abs=1e-6)


def test_a_rate_that_cannot_be_held_is_told_by_the_missed_frames() -> None:
    clock = Clock()
    measured = paced(Worker(clock, 100), 100, 25, clock=clock, sleep=clock.sleep)
    assert measured.scheduled == 100
    assert measured.missed == pytest.approx(60, abs=1)
    assert len(measured.stages) + (measured.missed or 0) == 100


def test_several_cameras_are_scored_in_turns_and_wait_for_the_last() -> None:
    clock = Clock()
    worker = Worker(clock, 10)
    measured = multi(worker, 3, 4, clock=clock)
    assert worker.seen == list(range(12))
    assert measured.of("total") == pytest.approx([40] * 3)
    assert measured.of("infer") == pytest.approx([40] * 3)


def test_offline_shares_the_images_among_the_workers_and_gives_each_once() -> None:
    seen: list[int] = []
    lock, met = threading.Lock(), threading.Barrier(2, timeout=20)

    def frame(index: int) -> Stages:
        if index < 2:
            met.wait()  # both workers are at work at the same time
        with lock:
            seen.append(index)
        return {"infer": 1.0}

    measured = offline([frame, frame], 50)
    assert sorted(seen) == list(range(50))
    assert len(measured.stages) == 50


def test_a_failing_worker_ends_offline_with_its_error() -> None:
    def frame(index: int) -> Stages:
        raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        offline([frame, frame], 50)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("takes", "calls", "seconds", "settled"),
    [
        ([125.0], 10, 1.25, True),  # a second has passed with the eighth call, ten are the least
        ([1.0], 1000, 1.0, True),
        ([500.0, 500.0, 100.0], 14, 2.2, True),  # until the first half no longer is the slower one
        ([100 * 0.97**step for step in range(500)], None, None, False),  # never settles: given up after ten seconds
    ],
)
def test_warm_up_goes_on_until_times_no_longer_fall(
    takes: list[float], calls: int | None, seconds: float | None, settled: bool
) -> None:
    clock = Clock()
    found = warm_up(Worker(clock, *takes), clock=clock, most_seconds=3.0)
    assert found.is_settled is settled
    if calls is None:
        assert 3.0 <= found.seconds < 3.2
    else:
        assert found.calls <= calls
        assert found.calls >= 10
        assert found.seconds >= 1.0 - 1e-6


def test_the_garbage_collector_rests_while_the_clock_runs_and_works_again_after_an_error() -> None:
    states: list[bool] = []

    def frame(index: int) -> Stages:
        states.append(gc.isenabled())
        if index == 2:
            raise RuntimeError("engine died")
        return {"infer": 1.0}

    with pytest.raises(RuntimeError, match="engine died"):
        single(frame, 5)
    assert states == [False] * 3
    assert gc.isenabled()
