"""The seam between scoring and everything that wants the results, and the thread that keeps the two apart."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.progress import say

from .frame import Scored

When = Literal["all", "change", "ng"]

# Makes the picture of a scored frame, heat map and outline included.
Draw = Callable[[Scored], Image.Image]

# Records are some hundred bytes each, a 1080p picture is 6 MB.
_RECORDS, _PICTURES = 1024, 8

# How soon a `put` that waits for a required sink notices that it was released.
_RELEASED_S = 0.2

_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


class ItemLost(Exception):
    """This one item cannot be delivered, now or later; the sink itself works. Its text names no secret."""


class Sink(Protocol):
    """A place for results. Only `wants` is called by the scorer's thread, the rest by one thread of the sink's own.

    name: for messages and metrics; never holds a path of a URL, a query or a password. needs_pixels: without it the
    frames come with an empty picture, so that waiting records do not hold memory.
    """

    name: str
    needs_pixels: bool

    def wants(self, item: Scored) -> bool:
        """Tell at once whether this item belongs here."""
        ...

    def open(self) -> None:
        """Connect or open files; called again after every failure. Raises what `write` raises."""
        ...

    def write(self, item: Scored) -> None:
        """Deliver one item; it counts as delivered when this returns.

        Raises:
            ItemLost: this item can never be delivered.
            Exception: the sink is out of order; the item is kept, the sink closed and opened again later.
        """
        ...

    def close(self) -> None:
        """Flush and free everything; called after a failure as well."""
        ...


@dataclass(frozen=True)
class SinkCounts:
    """What became of the items that a sink wanted: accepted = written + dropped + lost + waiting.

    dropped: the queue was full, or the sink was out of order at the end. lost: refused by the sink for good.
    """

    accepted: int
    written: int
    dropped: int
    lost: int
    waiting: int


class SinkThread:
    """A sink with a bounded queue and a thread of its own: `put` does not wait for it, however slow or dead it is.

    A full queue drops its oldest record, one that is not NG if there is any. A sink that fails is opened again after
    1, 2, 4 ... seconds. What goes wrong is said once a minute. `required`: `put` waits for room instead of dropping.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        capacity: int | None = None,
        required: bool = False,
        warn: Callable[[str], None] = say,
        warn_every_s: float = 60.0,
        retry_s: tuple[float, float] = (1.0, 10.0),
    ) -> None:
        self.name = sink.name
        self._sink = sink
        self._capacity = capacity or (_PICTURES if sink.needs_pixels else _RECORDS)
        self._required = required
        self._warn, self._warn_every_s, self._warned_at = warn, warn_every_s, float("-inf")
        self._retry_s = retry_s
        self._queue: deque[Scored] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None  # set by close
        self._is_open = False
        self._failures = 0
        self._reported = False
        self._accepted = self._written = self._dropped = self._lost = self._in_hand = 0
        self._thread = threading.Thread(target=self._run, name=f"sink {self.name}", daemon=True)
        self._thread.start()

    def put(self, item: Scored) -> None:
        """Queue one item if the sink wants it; one without a picture is nothing for a sink of pictures."""
        if (self._sink.needs_pixels and not item.frame.pixels.size) or not self._sink.wants(item):
            return
        if not self._sink.needs_pixels:
            item = replace(item, frame=replace(item.frame, pixels=_NO_PIXELS))
        with self._changed:
            self._accepted += 1
            while self._required and len(self._queue) >= self._capacity and self._deadline is None:
                self._changed.wait(_RELEASED_S)
            if self._deadline is not None:
                self._dropped += 1
                return
            self._queue.append(item)
            self._drop_surplus()
            self._changed.notify_all()

    def release(self) -> None:
        """Let a waiting `put` go, and none wait any more: the stream ends. Takes no lock, so a signal may call it."""
        self._required = False

    def counts(self) -> SinkCounts:
        """Return the running totals."""
        with self._changed:
            waiting = len(self._queue) + self._in_hand
            return SinkCounts(self._accepted, self._written, self._dropped, self._lost, waiting)

    @property
    def is_failing(self) -> bool:
        """Tell whether the last attempt to open or write failed."""
        return self._failures > 0

    def close(self, timeout: float = 2.0) -> bool:
        """Deliver what is queued for at most `timeout` seconds, then close; tell whether nothing was left over.

        A sink that hangs is left behind in its daemon thread.
        """
        with self._changed:
            self._deadline = monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout + 0.5)
        counts = self.counts()
        if counts.waiting or counts.dropped or counts.lost:
            self._tell(f"{counts.written} delivered, {counts.dropped + counts.lost} lost, {counts.waiting} not in time")
        return not self._thread.is_alive() and not counts.waiting

    def _run(self) -> None:
        while self._wait_before_retry():
            if not self._open():
                continue
            item = self._next()
            if item is None:
                break
            self._deliver(item)
        with self._changed:
            self._dropped += len(self._queue)
            self._queue.clear()
        self._close_sink()

    def _wait_before_retry(self) -> bool:
        """Wait out the back-off of a failing sink; False when the stream ends meanwhile."""
        if not self._failures:
            return True
        shortest, longest = self._retry_s
        pause = min(longest, shortest * 2.0 ** min(self._failures - 1, 16))
        with self._changed:
            return not self._changed.wait_for(lambda: self._deadline is not None, timeout=pause)

    def _open(self) -> bool:
        if self._is_open:
            return True
        try:
            self._sink.open()
        except Exception as error:
            self._failed(error)
            return False
        self._is_open = True
        return True

    def _next(self) -> Scored | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue) or self._deadline is not None)
            if not self._queue or (self._deadline is not None and monotonic() > self._deadline):
                return None
            self._in_hand = 1
            item = self._queue.popleft()
            self._changed.notify_all()
            return item

    def _deliver(self, item: Scored) -> None:
        try:
            self._sink.write(item)
        except ItemLost as error:
            self._settle(lost=1)
            self._report(error)
        except Exception as error:
            with self._changed:
                self._in_hand = 0
                self._queue.appendleft(item)
                self._drop_surplus()
            self._failed(error)
        else:
            self._settle(written=1)
            if self._failures and self._reported:
                counts = self.counts()
                self._tell(f"works again ({counts.dropped + counts.lost} records lost so far)")
                self._reported = False
            self._failures = 0

    def _settle(self, *, written: int = 0, lost: int = 0) -> None:
        with self._changed:
            self._in_hand = 0
            self._written += written
            self._lost += lost

    def _drop_surplus(self) -> None:
        while len(self._queue) > self._capacity:
            verdicts = (item.record.get("verdict") for item in self._queue)
            victim = next((index for index, verdict in enumerate(verdicts) if verdict != "NG"), 0)
            del self._queue[victim]
            self._dropped += 1

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._report(error)
        self._close_sink()

    def _close_sink(self) -> None:
        self._is_open = False
        try:
            self._sink.close()
        except Exception as error:
            # On a full disk even closing fails, for a reason that is reported already where it matters.
            self._report(error)

    def _report(self, error: Exception) -> None:
        now = monotonic()
        if now - self._warned_at < self._warn_every_s:
            return
        self._warned_at, self._reported = now, True
        counts = self.counts()
        self._tell(f"{_reason(error)} ({counts.dropped + counts.lost} records lost so far)")

    def _tell(self, text: str) -> None:
        # Standard error may be gone or on the same full disk; that must not end the thread.
        with suppress(OSError, ValueError):
            self._warn(f"sink {self.name}: {text}")


def is_wanted(when: When, item: Scored) -> bool:
    """Tell whether an item is one of 'all', of those whose verdict changed ('change'), or of the bad parts ('ng')."""
    if when == "ng":
        return item.record.get("verdict") == "NG"
    return when == "all" or item.changed


def _reason(error: Exception) -> str:
    if isinstance(error, EdgeAnomalyError):
        return error.what
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
