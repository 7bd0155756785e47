"""Between the thread that reads a source and the one that scores: the newest picture, or every one, all counted."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from time import monotonic, monotonic_ns

from .frame import Frame


@dataclass(frozen=True)
class Counts:
    """captured = delivered + waiting + the sum of drops, at every moment."""

    captured: int
    delivered: int
    waiting: int
    drops: dict[str, int]


class Outbox:
    """Hands frames from one thread to another, each one once.

    live: a mailbox of `mailbox` frames, normally one, whose oldest gives way to a newer one; else a queue of `queue`
    frames that makes the writer wait. max_age_s: a live frame that is older when it is taken is dropped as stale.
    """

    def __init__(self, *, live: bool, max_age_s: float, queue: int, mailbox: int = 1) -> None:
        self._live = live
        self._max_age_ns = max_age_s * 1e9
        self._room = mailbox if live else queue
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._captured = self._delivered = 0
        self._drops: dict[str, int] = {}

    def next_seq(self) -> int:
        """Count one captured picture and return its number, which is never given again."""
        with self._changed:
            self._captured += 1
            return self._captured - 1

    def drop(self, reason: str, number: int = 1) -> None:
        """Count captured pictures that are not handed out."""
        with self._changed:
            self._count_drop(reason, number)

    def put(self, frame: Frame) -> None:
        """Put a frame out; with a queue, wait until there is room or the box is closed."""
        with self._changed:
            while self._live and len(self._frames) >= self._room:
                self._frames.popleft()
                self._count_drop("mailbox", 1)
            while len(self._frames) >= self._room and not self._closed:
                self._changed.wait()
            if self._closed:
                self._count_drop("closed", 1)
                return
            self._frames.append(frame)
            self._changed.notify_all()

    def take(self, timeout: float) -> Frame | None:
        """Return the next frame, waiting up to `timeout` seconds; None if there is none, or none any more."""
        give_up = monotonic() + timeout
        with self._changed:
            while True:
                while self._frames:
                    frame = self._frames.popleft()
                    self._changed.notify_all()
                    if self._live and monotonic_ns() - frame.captured_ns > self._max_age_ns:
                        self._count_drop("stale", 1)
                        continue
                    self._delivered += 1
                    return frame
                left = give_up - monotonic()
                if left <= 0 or self._closed:
                    return None
                self._changed.wait(left)

    def close(self, *, discard: bool) -> None:
        """Let nothing in any more; with `discard` also nothing out."""
        with self._changed:
            self._closed = True
            if discard and self._frames:
                self._count_drop("closed", len(self._frames))
                self._frames.clear()
            self._changed.notify_all()

    @property
    def is_exhausted(self) -> bool:
        """Whether it is closed and the last frame was taken."""
        with self._changed:
            return self._closed and not self._frames

    def counts(self) -> Counts:
        """Return all counts of one moment."""
        with self._changed:
            return Counts(self._captured, self._delivered, len(self._frames), dict(self._drops))

    def _count_drop(self, reason: str, number: int) -> None:
        self._drops[reason] = self._drops.get(reason, 0) + number
