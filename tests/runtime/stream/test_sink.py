"""The thread between scoring and a sink: never waits, counts what it drops, brings a dead sink back."""

from __future__ import annotations

import threading
from time import monotonic

import pytest

from edge_anomaly_runtime.stream.frame import Scored
from edge_anomaly_runtime.stream.sink import ItemLost, SinkCounts, SinkThread, is_wanted

from .scored_items import scored, wait_until


class Memory:
    """A sink that keeps what it gets, and can be told to hang, to fail or to refuse."""

    needs_pixels = False

    def __init__(self) -> None:
        self.name = "memory"
        self.items: list[Scored] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.opened = self.closed = 0

    def wants(self, item: Scored) -> bool:
        return True

    def open(self) -> None:
        self.opened += 1

    def write(self, item: Scored) -> None:
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        self.items.append(item)

    def close(self) -> None:
        self.closed += 1

    @property
    def seqs(self) -> list[int]:
        return [item.frame.seq for item in self.items]


class Pictures(Memory):
    needs_pixels = True


def test_everything_arrives_in_order_and_close_flushes() -> None:
    sink = Memory()
    thread = SinkThread(sink)
    for seq in range(500):
        thread.put(scored(seq))
    assert thread.close(5.0)
    assert sink.seqs == list(range(500))
    assert thread.counts() == SinkCounts(accepted=500, written=500, dropped=0, lost=0, waiting=0)
    assert (sink.opened, sink.closed) == (1, 1)


def test_records_wait_without_their_pictures() -> None:
    sink, pictures = Memory(), Pictures()
    for one in (sink, pictures):
        thread = SinkThread(one)
        thread.put(scored())
        thread.close()
    assert sink.items[0].frame.pixels.nbytes == 0
    assert pictures.items[0].frame.pixels.shape == (48, 64, 3)


def test_a_hanging_sink_costs_put_no_time_and_drops_the_oldest_that_are_not_ng() -> None:
    sink = Memory()
    sink.gate.clear()
    told: list[str] = []
    thread = SinkThread(sink, capacity=4, warn=told.append)
    thread.put(scored(0))
    wait_until(lambda: thread.counts().waiting == 1 and not thread._queue)
    start = monotonic()
    for seq in range(1, 2001):
        thread.put(scored(seq, "NG" if seq in (7, 9) else "OK"))
    assert monotonic() - start < 2.0
    counts = thread.counts()
    assert (counts.accepted, counts.dropped, counts.waiting) == (2001, 1996, 5)
    sink.gate.set()
    assert thread.close(5.0)
    assert sink.seqs == [0, 7, 9, 1999, 2000]
    assert told == ["sink memory: 5 delivered, 1996 lost, 0 not in time"]


def test_only_ng_records_in_a_full_queue_drop_the_oldest() -> None:
    sink = Memory()
    sink.gate.clear()
    thread = SinkThread(sink, capacity=2, warn=lambda _: None)
    thread.put(scored(0))
    wait_until(lambda: not thread._queue)
    for seq in range(1, 5):
        thread.put(scored(seq, "NG"))
    sink.gate.set()
    thread.close(5.0)
    assert sink.seqs == [0, 3, 4]


def test_a_dead_sink_is_reported_once_a_minute_and_gets_its_records_when_it_is_back() -> None:
    sink = Memory()
    sink.error = ConnectionError("the broker has gone")
    told: list[str] = []
    thread = SinkThread(sink, warn=told.append, retry_s=(0.01, 0.02))
    for seq in range(3):
        thread.put(scored(seq))
    wait_until(lambda: sink.opened > 4)
    assert told == ["sink memory: the broker has gone (0 records lost so far)"]
    assert thread.is_failing
    sink.error = None
    wait_until(lambda: sink.seqs == [0, 1, 2])
    assert thread.close()
    assert told[1:] == ["sink memory: works again (0 records lost so far)"]
    assert sink.opened == sink.closed


def test_warnings_come_again_after_their_pause() -> None:
    sink = Memory()
    sink.error = OSError(28, "No space left on device")
    told: list[str] = []
    thread = SinkThread(sink, warn=told.append, retry_s=(0.005, 0.005), warn_every_s=0.05)
    thread.put(scored())
    wait_until(lambda: len(told) >= 3)
    thread.close(0.1)
    assert set(told[:3]) == {"sink memory: No space left on device (0 records lost so far)"}


def test_an_item_that_cannot_be_delivered_is_lost_and_the_next_one_is_not() -> None:
    sink = Memory()
    sink.error = ItemLost("answer 400")
    told: list[str] = []
    thread = SinkThread(sink, warn=told.append)
    thread.put(scored(0))
    wait_until(lambda: thread.counts().lost == 1)
    sink.error = None
    thread.put(scored(1))
    wait_until(lambda: sink.seqs == [1])
    thread.close()
    assert told[0] == "sink memory: answer 400 (1 records lost so far)"
    assert sink.opened == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), KeyError("x")], ids=repr)
def test_a_bug_in_a_sink_does_not_end_its_thread(error: Exception) -> None:
    sink = Memory()
    sink.error = error
    thread = SinkThread(sink, warn=lambda _: None, retry_s=(0.01, 0.01))
    thread.put(scored(0))
    wait_until(lambda: sink.opened > 1)
    sink.error = None
    wait_until(lambda: sink.seqs == [0])
    assert thread.close()


def test_close_does_not_wait_for_a_hanging_or_a_dead_sink() -> None:
    hanging, dead = Memory(), Memory()
    hanging.gate.clear()
    dead.error = ConnectionError("gone")
    for sink in (hanging, dead):
        thread = SinkThread(sink, warn=lambda _: None, retry_s=(30.0, 30.0))
        thread.put(scored())
        thread.put(scored())
        wait_until(lambda thread=thread: len(thread._queue) < 2 or thread.is_failing)  # type: ignore[misc]
        start = monotonic()
        assert thread.close(0.2) is (sink is dead)
        assert monotonic() - start < 2.0
        counts = thread.counts()
        assert counts.accepted == counts.written + counts.dropped + counts.lost + counts.waiting
    hanging.gate.set()


def test_put_after_close_is_counted_as_dropped() -> None:
    thread = SinkThread(Memory(), warn=lambda _: None)
    thread.close()
    thread.put(scored())
    assert thread.counts().dropped == 1


def test_a_required_sink_makes_put_wait_instead_of_dropping() -> None:
    sink = Memory()
    sink.gate.clear()
    thread = SinkThread(sink, capacity=2, required=True)

    def feed() -> None:
        for seq in range(10):
            thread.put(scored(seq))

    feeder = threading.Thread(target=feed)
    feeder.start()
    feeder.join(0.2)
    assert feeder.is_alive()
    sink.gate.set()
    feeder.join(5)
    assert thread.close()
    assert sink.seqs == list(range(10))


def test_a_closed_standard_error_does_not_end_the_thread() -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError

    sink = Memory()
    sink.error = ConnectionError("gone")
    thread = SinkThread(sink, warn=closed, retry_s=(0.01, 0.01))
    thread.put(scored(3))
    wait_until(lambda: sink.opened > 2)
    sink.error = None
    wait_until(lambda: sink.seqs == [3])
    thread.close()


def test_what_is_wanted() -> None:
    bad, changed, good = scored(0, "NG"), scored(0, "OK", changed=True), scored(0)
    assert [is_wanted("all", item) for item in (bad, changed, good)] == [True, True, True]
    assert [is_wanted("change", item) for item in (bad, changed, good)] == [False, True, False]
    assert [is_wanted("ng", item) for item in (bad, changed, good)] == [True, False, False]
