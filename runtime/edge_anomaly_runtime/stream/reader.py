"""One thread per source: keeps it connected, judges every picture, hands out the newest or every one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from time import monotonic, monotonic_ns
from typing import Literal, TypeVar

from edge_anomaly_runtime.errors import EdgeAnomalyError

from .arrivals import Arrivals
from .backoff import Backoff
from .frame import Frame
from .health import Health, HealthLimits, Trust
from .outbox import Outbox
from .source import (
    EndOfFile,
    FrameSource,
    Picture,
    SourceLost,
    SourceRefused,
    SourceSilent,
    SourceUnsupported,
    UnusablePicture,
)
from .uri import redact

State = Literal["connecting", "up", "damaged", "stalled", "lost", "unauthorised", "ended"]
Answer = TypeVar("Answer")

# One call to a source asks for so long at most, so that a close is noticed.
_READ_S = 0.5
# Threads left behind in a driver that never answers; with so many of them no other is started.
_MAX_ABANDONED = 4


@dataclass(frozen=True)
class ReaderOptions:
    """Time limits in seconds, all on the monotonic clock.

    stalled_s: without a picture for so long a camera is `stalled`, with
    damaged ones only `damaged`. late_s: a picture that was waited for longer is
    stale. max_age_s: so is one that lay in the mailbox for longer. reconnect_s: a camera that sent nothing for so long
    is connected anew. hung_s: a call that has not come back by then is left behind with its thread. backoff_s: first
    and longest wait before another attempt; back to the first after healthy_s. silent_s: the longest one after an
    attempt that took all its time: it has waited already. refused_s: wait after wrong credentials
    or a stream that does not exist. probe_s: how often to look whether an unreachable camera answers again.
    queue: pictures of a file read ahead. mailbox: pictures of a camera that may wait, one unless every picture counts
    and may be `max_age_s` late. keep_distrusted: deliver a camera's damaged pictures, marked, instead of
    dropping them; those of a file always are.
    """

    stalled_s: float = 3.0
    late_s: float = 0.5
    max_age_s: float = 0.5
    reconnect_s: float = 5.0
    hung_s: float = 15.0
    backoff_s: tuple[float, float] = (0.5, 30.0)
    healthy_s: float = 30.0
    silent_s: float = 1.0
    refused_s: float = 60.0
    probe_s: float = 2.0
    queue: int = 4
    mailbox: int = 1
    keep_distrusted: bool = False


@dataclass(frozen=True)
class Status:
    """What is known about a source at one moment.

    state, since_ns: where it is and since when (monotonic clock). cause: why, for people, without credentials.
    connects, reconnects: successful connections, and those after the first. captured = delivered + waiting + the sum of
    drops. drops: pictures not handed out, by reason: mailbox (a newer one came), stale, distrusted, duplicate,
    unreadable, closed. size: (width, height) of the last picture; resizes: how often it changed. last_ns: when the last
    picture came (monotonic clock). still_since_s: since when the picture is frozen (monotonic seconds), None if not.
    stalls: how often pictures came again after a stall, on the same connection.
    """

    camera: str
    state: State
    since_ns: int
    cause: str = ""
    connects: int = 0
    reconnects: int = 0
    captured: int = 0
    delivered: int = 0
    waiting: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    resizes: int = 0
    last_ns: int | None = None
    still_since_s: float | None = None
    stalls: int = 0

    def seconds_in_state(self) -> float:
        """How long the state has lasted, in seconds."""
        return (monotonic_ns() - self.since_ns) / 1e9


class Reader:
    """Reads one source in a thread of its own; every method may be called from any thread.

    A live source gives its newest picture from a mailbox of one; a file gives every picture and waits while its queue
    is full. A picture is handed out once, none is made up, and no `seq` is used twice.

    make_source: makes a new, unopened connection. probe: a cheap look whether an unreachable camera answers again,
    which ends the wait before the next attempt. on_frame: called from the reader's thread after a frame was put out and
    at the end. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        camera: str,
        make_source: Callable[[], FrameSource],
        *,
        live: bool,
        options: ReaderOptions | None = None,
        health: HealthLimits | None = None,
        probe: Callable[[], bool] | None = None,
        on_frame: Callable[[], None] | None = None,
    ) -> None:
        self.camera = camera
        self.live = live
        self.error: EdgeAnomalyError | None = None
        self._make_source = make_source
        self._options = options or ReaderOptions()
        self._probe = probe
        self._on_frame = on_frame
        self._box = Outbox(
            live=live,
            max_age_s=self._options.max_age_s,
            queue=self._options.queue,
            mailbox=self._options.mailbox,
        )
        # Pictures of a file are not taken at the pace of the clock.
        limits = health or HealthLimits()
        self._health = Health(limits if live else replace(limits, frozen_s=0.0, blur=0.0))
        self._backoff = Backoff(*self._options.backoff_s)
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._state: State = "connecting"
        self._cause = ""
        self._since_ns = monotonic_ns()
        self._last_ns: int | None = None
        self._trusted_ns = 0
        self._connects = self._resizes = self._stalls = 0
        self._size: tuple[int, int] | None = None
        self._wait_s = 0.0
        self._answered = True  # the last time that the probe looked
        self._busy_since: float | None = None
        self._abandoned: list[threading.Thread] = []
        self._thread = self._new_thread()

    def __enter__(self) -> Reader:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Reader:
        """Start reading; returns at once, the connection is made in the thread."""
        self._thread.start()
        return self

    def take(self, timeout: float = 0.0) -> Frame | None:
        """Return the next frame, waiting up to `timeout` seconds; None if there is none, or none any more.

        Of a live source it is the newest, at most `max_age_s` old.
        """
        self._leave_hung_thread()
        return self._box.take(timeout)

    @property
    def ended(self) -> bool:
        """Whether no frame will come any more; `error` says why, where it was not the end of a file."""
        return self._box.is_exhausted

    def status(self) -> Status:
        """Return the present state and counts; a stall shows here even while a call hangs."""
        self._leave_hung_thread()
        counts = self._box.counts()
        with self._lock:
            state, since_ns, cause = self._observed_state()
            return Status(
                self.camera,
                state,
                since_ns,
                cause,
                self._connects,
                max(0, self._connects - 1),
                counts.captured,
                counts.delivered,
                counts.waiting,
                counts.drops,
                self._size,
                self._resizes,
                self._last_ns,
                self._health.still_since_s,
                self._stalls,
            )

    def drops(self) -> dict[str, int]:
        """Return the frames dropped so far by cause, which is less work than the whole `status`."""
        return dict(self._box.counts().drops)

    def close(self, timeout: float = 1.5) -> None:
        """Stop within `timeout` seconds; a thread that hangs in a driver is left behind and ends when it can."""
        self._stop.set()
        self._box.close(discard=True)
        thread = self._thread
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout)
        with self._lock:
            if self._state != "ended":
                self._enter("ended", "closed")

    def _observed_state(self) -> tuple[State, int, str]:
        """Return state, since when and cause, with what only the clock can tell; the lock is held."""
        limit_s = self._options.stalled_s
        quiet_since = max(self._since_ns, self._last_ns or 0)
        stalled_at = quiet_since + int(limit_s * 1e9)
        if self.live and monotonic_ns() > stalled_at:
            if self._state == "up":
                return "stalled", stalled_at, f"no picture for {limit_s:g} s"
            if self._state == "connecting":
                return "lost", stalled_at, f"no picture within {limit_s:g} s of the start"
        damaged_at = max(self._since_ns, self._trusted_ns) + int(limit_s * 1e9)
        if self.live and self._state == "up" and monotonic_ns() > damaged_at:
            return "damaged", damaged_at, f"no undamaged picture for {limit_s:g} s"
        return self._state, self._since_ns, self._cause

    def _enter(self, state: State, cause: str) -> None:
        """Change the state; the lock is held."""
        if state != self._state:
            self._state, self._since_ns = state, monotonic_ns()
        self._cause = cause

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name=f"reader-{self.camera}", daemon=True)

    def _leave_hung_thread(self) -> None:
        """Go on in a new thread when a call to the source has been away for too long: it may never come back."""
        with self._lock:
            busy_since = self._busy_since
            if not self.live or busy_since is None or monotonic() - busy_since < self._options.hung_s:
                return
            self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
            self._enter("lost", f"the source's driver has not answered for {self._options.hung_s:g} s")
            if len(self._abandoned) >= _MAX_ABANDONED or self._stop.is_set():
                return
            self._abandoned.append(self._thread)
            self._busy_since = None
            self._wait_s = self._backoff.next_s()
            self._thread = self._new_thread()
            self._thread.start()

    # From here on: in the reader's thread.

    def _is_current(self) -> bool:
        """Whether this thread is the one that reads: one that hung and came back must not touch anything."""
        return self._thread is threading.current_thread() and not self._stop.is_set() and self._state != "ended"

    def _run(self) -> None:
        while self._is_current():
            self._wait_for_attempt()
            if self._is_current():
                self._attempt()

    def _attempt(self) -> None:
        """Connect and read until the connection ends, in whatever way."""
        source: FrameSource | None = None
        try:
            source = self._make_source()
            self._read_connection(source)
        except EndOfFile:
            self._finish("the end of the file", None)
        except EdgeAnomalyError as error:
            self._after_failure(error)
        except Exception as error:
            # A bug in a driver's binding must not silence a camera for good.
            self._after_failure(EdgeAnomalyError(f"{self.camera}: {type(error).__name__}: {redact(str(error))}"))
        finally:
            if source is not None:
                source.close()

    def _read_connection(self, source: FrameSource) -> None:
        self._call(source.open)
        with self._lock:
            if not self._is_current():
                return
            self._connects += 1
        self._health.restart()
        trust, arrivals = Trust(), Arrivals(late_s=self._options.late_s)
        connected = arrived = monotonic()
        last_pts: float | None = None
        while self._is_current():
            try:
                picture = self._call(lambda: source.read(_READ_S))
            except UnusablePicture as error:
                self._count_unreadable(error)
                continue
            waited = monotonic() - arrived
            if picture is not None:
                is_stale = self.live and arrivals.is_stale(waited, picture.pts)
                is_repeated = self.live and picture.pts is not None and picture.pts == last_pts
                last_pts = picture.pts
                self._judge(picture, trust, is_stale=is_stale, is_repeated=is_repeated)
            if self.live and waited >= self._options.reconnect_s:
                # Even if a picture came at last: FFmpeg answers a stall with the last one it held, then blocks again.
                raise SourceLost(f"{self.camera} sent no picture for {waited:.0f} s.", "Check the camera.")
            if picture is not None:
                arrived = monotonic()  # after judging it: waiting for room in a queue is not the source's fault
                if arrived - connected > self._options.healthy_s:
                    self._backoff.reset()

    def _call(self, call: Callable[[], Answer]) -> Answer:
        """Make a call that may hang, and leave a trace of it for other threads."""
        self._busy_since = monotonic()
        try:
            return call()
        finally:
            if self._thread is threading.current_thread():
                self._busy_since = None

    def _judge(self, picture: Picture, trust: Trust, *, is_stale: bool, is_repeated: bool) -> None:
        decoding = timedelta(milliseconds=picture.decode_ms)  # it had arrived before
        captured_ns = monotonic_ns() - int(decoding.total_seconds() * 1e9)
        captured_utc = datetime.now(timezone.utc) - decoding
        distrust = trust.check(picture)
        invalid = "" if distrust else self._health.check(picture, captured_ns / 1e9)
        is_dropped = bool(distrust) and self.live and not self._options.keep_distrusted
        with self._lock:
            if not self._is_current():
                return
            seq = self._box.next_seq()
            self._note_size(picture)
            if not is_stale:
                if self._observed_state()[0] == "stalled":
                    self._stalls += 1
                    self._since_ns = captured_ns  # up again from here on
                self._last_ns = captured_ns
                if not distrust:
                    self._trusted_ns = captured_ns
                self._enter("up", f"damaged: {distrust}" if distrust else invalid)
        if is_stale or is_repeated or is_dropped:
            self._box.drop("stale" if is_stale else "duplicate" if is_repeated else "distrusted")
            return
        self._box.put(
            Frame(
                self.camera,
                seq,
                picture.pixels,
                captured_ns,
                captured_utc,
                pts=picture.pts,
                decode_ms=picture.decode_ms,
                is_keyframe=picture.is_keyframe,
                distrust=distrust,
                invalid=invalid,
                path=picture.path,
            )
        )
        self._announce()

    def _note_size(self, picture: Picture) -> None:
        size = (picture.pixels.shape[1], picture.pixels.shape[0])
        if self.live and self._size not in (None, size):
            self._resizes += 1
        self._size = size

    def _count_unreadable(self, error: UnusablePicture) -> None:
        self._box.next_seq()
        self._box.drop("unreadable")
        with self._lock:
            self._enter("up", redact(error.what))

    def _after_failure(self, error: EdgeAnomalyError) -> None:
        if not self.live:
            self._finish(redact(error.what), error)
            return
        with self._lock:
            if self._is_current():
                self._enter("unauthorised" if isinstance(error, SourceRefused) else "lost", redact(error.what))
                self._wait_s = self._wait_after(error)

    def _wait_after(self, error: EdgeAnomalyError) -> float:
        """Return the seconds until the next attempt; the lock is held."""
        if isinstance(error, (SourceRefused, SourceUnsupported)):
            return self._options.refused_s
        wait_s = self._backoff.next_s()
        return min(wait_s, self._options.silent_s) if isinstance(error, SourceSilent) else wait_s

    def _finish(self, cause: str, error: EdgeAnomalyError | None) -> None:
        with self._lock:
            if not self._is_current():
                return
            self.error = error
            self._enter("ended", cause)
        self._box.close(discard=False)
        self._announce()

    def _announce(self) -> None:
        if self._on_frame is not None:
            self._on_frame()

    def _wait_for_attempt(self) -> None:
        """Wait as long as the last failure asks for, or until an unreachable camera answers again."""
        give_up = monotonic() + self._wait_s
        while self._is_current() and (left := give_up - monotonic()) > 0:
            if self._probe is not None and self._state == "lost":
                answered, self._answered = self._answered, self._call(self._probe)
                if self._answered and not answered:
                    return
            self._stop.wait(min(left, self._options.probe_s))
