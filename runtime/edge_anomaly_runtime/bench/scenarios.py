"""How images arrive: back to back, at a camera's pace, from several cameras at once, or all of them at once.

A scenario gets a function that processes image number i and returns milliseconds per stage, and knows nothing of
bundles; clocks can be exchanged.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

Stages = dict[str, float]
Frame = Callable[[int], Stages]
Clock = Callable[[], float]

TOTAL = "total"

_LEAST_CALLS, _LEAST_SECONDS, _MOST_SECONDS, _SETTLED = 10, 1.0, 10.0, 1.02


@dataclass(frozen=True)
class WarmUp:
    """What ran before the clock started. is_settled: the second half was as fast as the first, within 2 %."""

    calls: int
    seconds: float
    is_settled: bool


@dataclass(frozen=True)
class Measured:
    """Milliseconds per stage of every image that was processed, in order, and how long all of it took.

    scheduled, missed: of a paced scenario, how many frames the camera made, and how many of them were never processed
    because a newer one was there.
    """

    stages: list[Stages]
    seconds: float
    cpu_seconds: float
    scheduled: int | None = None
    missed: int | None = None
    started_s: list[float] = field(default_factory=list)

    def of(self, stage: str) -> list[float]:
        """Return one stage's milliseconds."""
        return [row[stage] for row in self.stages]


def warm_up(frame: Frame, *, clock: Clock = time.perf_counter, most_seconds: float = _MOST_SECONDS) -> WarmUp:
    """Call until ten calls and a second have passed and the time of a call no longer falls; at most ten seconds."""
    samples: list[float] = []
    start = clock()
    while True:
        begin = clock()
        frame(len(samples))
        end = clock()
        samples.append(end - begin)
        half = len(samples) // 2
        is_settled = half > 0 and median(samples[:half]) <= _SETTLED * median(samples[half:])
        is_long = len(samples) >= _LEAST_CALLS and end - start >= _LEAST_SECONDS
        if (is_long and is_settled) or end - start >= most_seconds:
            return WarmUp(len(samples), end - start, is_settled)


def single(frame: Frame, count: int, *, clock: Clock = time.perf_counter) -> Measured:
    """Process `count` images, each one as soon as the one before it is done."""
    return multi(frame, count, 1, clock=clock)


def paced(
    frame: Frame,
    count: int,
    rate: float,
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Measured:
    """Process the frames of a camera that makes `count` of them, `rate` a second, always the newest.

    A frame's total runs from the moment at which it was due, not from when somebody had time for it: a stall counts for
    the frame that waited (else: coordinated omission). A frame that a newer one has replaced is missed, without a time.
    """
    stages, started = [], []
    missed, index = 0, 0
    with _quiet():
        start, cpu = clock(), time.process_time()
        while index < count:
            due = start + index / rate
            if (wait := due - clock()) > 0:
                sleep(wait)
            newest = min(count - 1, max(index, int((clock() - start) * rate)))
            missed += newest - index
            due, index = start + newest / rate, newest + 1
            begin = clock()
            row = frame(newest)
            stages.append({TOTAL: (clock() - due) * 1e3, "wait": (begin - due) * 1e3, **row})
            started.append(due - start)
        return Measured(stages, clock() - start, time.process_time() - cpu, count, missed, started)


def multi(frame: Frame, count: int, streams: int, *, clock: Clock = time.perf_counter) -> Measured:
    """Process `count` rounds of one image from each of several cameras, one after the other, as `stream` does.

    The total is a round's: how old the last camera's picture is when its verdict is there.
    """
    stages, started = [], []
    with _quiet():
        start, cpu = clock(), time.process_time()
        for index in range(count):
            begin = clock()
            rows = [frame(index * streams + stream) for stream in range(streams)]
            sums = {name: sum(row[name] for row in rows) for name in rows[0]}
            stages.append({TOTAL: (clock() - begin) * 1e3, **sums})
            started.append(begin - start)
        return Measured(stages, clock() - start, time.process_time() - cpu, started_s=started)


def offline(frames: Sequence[Frame], count: int, *, clock: Clock = time.perf_counter) -> Measured:
    """Process `count` images with several workers at once: only the throughput means something.

    Raises:
        Exception: whatever a worker raised.
    """
    numbers = iter(range(count))
    lock = threading.Lock()
    stages: list[Stages] = []
    failures: list[BaseException] = []

    def work(frame: Frame) -> None:
        try:
            while not failures:
                with lock:
                    index = next(numbers, None)
                if index is None:
                    return
                begin = clock()
                row = frame(index)
                stages.append({TOTAL: (clock() - begin) * 1e3, **row})
        except BaseException as error:
            failures.append(error)

    with _quiet():
        start, cpu = clock(), time.process_time()
        threads = [threading.Thread(target=work, args=(frame,), daemon=True) for frame in frames]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        measured = Measured(stages, clock() - start, time.process_time() - cpu)
    if failures:
        raise failures[0]
    return measured


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the garbage collector from running while the clock does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
