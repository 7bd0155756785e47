"""The reader's rules, with scripted sources: what is handed out and counted, which state is told, what a hang does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.stream.frame import Frame
from edge_anomaly_runtime.stream.health import HealthLimits
from edge_anomaly_runtime.stream.reader import Reader, ReaderOptions
from edge_anomaly_runtime.stream.source import (
    EndOfFile,
    FrameSource,
    Picture,
    SourceLost,
    SourceRefused,
    SourceSilent,
    UnusablePicture,
)

from .test_uri import CANARY

QUICK = ReaderOptions(
    stalled_s=0.3,
    late_s=0.25,
    max_age_s=5.0,
    reconnect_s=0.8,
    hung_s=0.6,
    backoff_s=(0.05, 0.2),
    healthy_s=0.2,
    refused_s=0.5,
    probe_s=0.05,
)
PIXELS = np.full((16, 16, 3), 100, np.uint8)

Step = Picture | Exception | float | threading.Event | None


def picture(number: int) -> Picture:
    pixels = PIXELS.copy()
    pixels[:, : number % 16] = 150
    return Picture(pixels, number * 0.006, True)


class Scripted:
    """A source that plays a list: a picture is returned, an exception raised, a number slept, an event waited for."""

    def __init__(self, steps: list[Step], opening: Step = None, at_end: Step = None) -> None:
        self.steps = iter(steps)
        self.opening = opening
        self.at_end: Step = at_end or SourceLost("the script is over")
        self.is_closed = False

    def open(self) -> None:
        self._play(self.opening)

    def read(self, timeout: float) -> Picture | None:
        time.sleep(0.006)  # longer than a picture that lay ready
        return self._play(next(self.steps, self.at_end))

    def close(self) -> None:
        self.is_closed = True

    def _play(self, step: Step) -> Picture | None:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, float):
            time.sleep(step)
            return self._play(next(self.steps, self.at_end))
        if isinstance(step, threading.Event):
            step.wait(20)
            return None
        return step


def connections(*sources: Scripted) -> Callable[[], FrameSource]:
    """Return a maker that hands out these, then ones that cannot be opened."""
    rest = iter(sources)
    return lambda: next(rest, Scripted([], SourceLost("the camera is gone")))


def reader_of(*sources: Scripted, live: bool = True, options: ReaderOptions = QUICK) -> Reader:
    return Reader("c0", connections(*sources), live=live, options=options)


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.005)


def is_balanced(reader: Reader) -> bool:
    status = reader.status()
    return status.captured == status.delivered + status.waiting + sum(status.drops.values())


def take_all(reader: Reader) -> Iterator[Frame]:
    while not reader.ended:
        frame = reader.take(0.2)
        if frame is not None:
            yield frame


# Files


def test_a_file_gives_every_picture_once_and_ends() -> None:
    with reader_of(Scripted([picture(n) for n in range(50)], at_end=EndOfFile()), live=False) as reader:
        frames = list(take_all(reader))

        assert [frame.seq for frame in frames] == list(range(50))
        assert frames[7].pixels[0, 6].tolist() == [150, 150, 150]
        status = reader.status()
        assert (status.state, status.drops, status.delivered) == ("ended", {}, 50)
        assert reader.error is None and reader.take(0.0) is None


def test_a_file_is_read_no_faster_than_it_is_taken() -> None:
    with reader_of(Scripted([picture(n) for n in range(50)], at_end=EndOfFile()), live=False) as reader:
        wait_for(lambda: reader.status().waiting == QUICK.queue)
        time.sleep(0.1)
        assert reader.status().captured <= QUICK.queue + 1
        assert len(list(take_all(reader))) == 50


def test_unreadable_images_are_counted_and_passed_over() -> None:
    steps: list[Step] = [picture(0), UnusablePicture("Cannot use image b.png"), picture(2)]
    with reader_of(Scripted(steps, at_end=EndOfFile()), live=False) as reader:
        assert [frame.seq for frame in take_all(reader)] == [0, 2]
        assert reader.status().drops == {"unreadable": 1}
        assert is_balanced(reader)


def test_a_file_that_cannot_be_read_ends_with_its_error_and_is_not_tried_again() -> None:
    with reader_of(Scripted([], SourceLost("the disk is gone")), live=False) as reader:
        assert list(take_all(reader)) == []
        assert isinstance(reader.error, EdgeAnomalyError)
        assert reader.status().cause == "the disk is gone"


def test_a_damaged_picture_of_a_file_is_marked_and_not_left_out() -> None:
    steps: list[Step] = [picture(0), replace(picture(1), corrupt="decode error"), picture(2)]
    with reader_of(Scripted(steps, at_end=EndOfFile()), live=False) as reader:
        assert [frame.distrust for frame in take_all(reader)] == ["", "decode error", ""]


# Live


def test_the_newest_picture_is_taken_and_older_ones_are_counted() -> None:
    gate = threading.Event()
    with reader_of(Scripted([*(picture(n) for n in range(20)), gate])) as reader:
        wait_for(lambda: reader.status().captured == 20)
        frame = reader.take(1.0)

        assert frame is not None and frame.seq == 19
        assert reader.take(0.0) is None
        assert reader.status().drops["mailbox"] == 19
        assert is_balanced(reader)
        gate.set()


def test_a_frame_that_grew_old_in_the_mailbox_is_stale() -> None:
    gate = threading.Event()
    with reader_of(Scripted([picture(0), gate]), options=replace(QUICK, max_age_s=0.1)) as reader:
        wait_for(lambda: reader.status().waiting == 1)
        time.sleep(0.15)

        assert reader.take(0.0) is None
        assert reader.status().drops == {"stale": 1}
        gate.set()


def test_a_picture_that_answers_a_stall_is_not_handed_out() -> None:
    """FFmpeg gives the last picture it held when a read times out, as if it were new."""
    gate = threading.Event()
    steps: list[Step] = [*(picture(n) for n in range(10)), 0.4, picture(10), picture(11), gate]
    seen = []
    with reader_of(Scripted(steps), options=replace(QUICK, mailbox=len(steps))) as reader:
        while reader.status().captured < 12:
            seen.append(reader.take(0.01))
        while (frame := reader.take(0.05)) is not None:
            seen.append(frame)
        gate.set()
        assert reader.status().drops["stale"] == 1
    assert [frame.seq for frame in seen if frame is not None] == [*range(10), 11]


def test_a_repeated_picture_is_dropped() -> None:
    gate = threading.Event()
    with reader_of(Scripted([picture(0), picture(1), picture(1), gate])) as reader:
        wait_for(lambda: reader.status().captured == 3)
        assert reader.status().drops["duplicate"] == 1
        gate.set()


def test_a_camera_that_sends_only_damaged_pictures_is_not_up() -> None:
    """Nothing of it is scored, so the last verdict would stand for ever."""
    bad = [replace(picture(n), corrupt="corrupt packet") for n in range(1, 150)]
    gate = threading.Event()
    with reader_of(Scripted([picture(0), *bad, picture(150), gate])) as reader:
        wait_for(lambda: reader.status().state == "damaged")
        assert reader.status().cause == "no undamaged picture for 0.3 s"
        assert reader.status().captured > 10, "pictures come"
        wait_for(lambda: reader.status().state == "up")
        gate.set()


@pytest.mark.parametrize("keep", [False, True])
def test_damaged_pictures_of_a_camera_are_dropped_or_marked(keep: bool) -> None:
    gate = threading.Event()
    later = [replace(picture(n), is_keyframe=False) for n in (2, 3)]
    steps: list[Step] = [picture(0), replace(picture(1), corrupt="corrupt packet"), *later, picture(4), gate]
    found = []
    with reader_of(Scripted(steps), options=replace(QUICK, keep_distrusted=keep)) as reader:
        while reader.status().captured < 5 or reader.status().waiting:
            if frame := reader.take(0.001):
                found.append((frame.seq, frame.distrust))
        gate.set()
        drops = reader.status().drops.get("distrusted", 0)
    damaged = [(1, "corrupt packet"), (2, "corrupt packet"), (3, "corrupt packet")]
    assert found == ([(0, ""), *damaged, (4, "")] if keep else [(0, ""), (4, "")])
    assert drops == (0 if keep else 3)


def test_seq_goes_on_over_connections_and_health_marks_frames() -> None:
    black = Picture(np.zeros((16, 16, 3), np.uint8), 0.0)
    gate = threading.Event()
    with reader_of(Scripted([picture(0), picture(1)]), Scripted([black, gate])) as reader:
        wait_for(lambda: reader.status().captured == 3)
        frame = reader.take(0.0)
        assert frame is not None and (frame.seq, frame.invalid) == (2, "black")
        assert reader.status().reconnects == 1
        gate.set()


def test_a_change_of_size_is_counted_and_an_unexpected_size_is_invalid() -> None:
    gate = threading.Event()
    large = Picture(np.full((32, 32, 3), 100, np.uint8), 0.006)
    limits = HealthLimits(size=(16, 16))
    reader = Reader("c0", connections(Scripted([picture(0), large, gate])), live=True, options=QUICK, health=limits)
    with reader:
        wait_for(lambda: reader.status().captured == 2)
        frame = reader.take(0.0)
        assert frame is not None and frame.invalid == "wrong size"
        assert reader.status().size == (32, 32) and reader.status().resizes == 1
        gate.set()


def test_whoever_waits_is_told_of_every_frame() -> None:
    told = threading.Semaphore(0)
    steps: list[Step] = [picture(0), picture(1)]
    maker = connections(Scripted(steps, at_end=EndOfFile()))
    with Reader("c0", maker, live=False, on_frame=told.release):
        assert all(told.acquire(timeout=5) for _ in range(3))  # two frames and the end


# States


def test_states_of_a_camera_that_comes_goes_and_comes_back() -> None:
    gate = threading.Event()
    first = Scripted([picture(n) for n in range(3)], at_end=SourceLost("ended the stream"))
    with reader_of(Scripted([], SourceLost("no route")), first, Scripted([picture(0), gate])) as reader:
        wait_for(lambda: reader.status().state == "lost" and reader.status().cause == "no route")
        wait_for(lambda: reader.status().state == "up")
        wait_for(lambda: reader.status().cause == "ended the stream")
        wait_for(lambda: reader.status().state == "up" and reader.status().reconnects == 1)
        gate.set()
    assert reader.status().state == "ended" and reader.status().cause == "closed"
    assert first.is_closed


def test_a_stall_is_told_while_the_read_still_blocks() -> None:
    gate = threading.Event()
    with reader_of(Scripted([picture(0), gate]), options=replace(QUICK, hung_s=10)) as reader:
        wait_for(lambda: reader.status().state == "up")
        start = time.monotonic()
        wait_for(lambda: reader.status().state == "stalled")
        assert 0.1 < time.monotonic() - start < 1.0
        assert reader.status().seconds_in_state() < 1.0
        gate.set()


def test_a_stalled_camera_that_goes_on_is_up_again_without_a_new_connection() -> None:
    gate = threading.Event()
    steps: list[Step] = [picture(0), 0.5, picture(1), picture(2), gate]
    with reader_of(Scripted(steps)) as reader:
        wait_for(lambda: reader.status().state == "stalled")
        wait_for(lambda: reader.status().captured == 3)
        status = reader.status()
        assert (status.state, status.reconnects, status.stalls) == ("up", 0, 1)
        assert status.seconds_in_state() < 0.5
        gate.set()


def test_a_camera_that_stays_silent_is_connected_anew() -> None:
    silent: list[Step] = [picture(0), *[None] * 2000]
    gate = threading.Event()
    with reader_of(Scripted(silent), Scripted([picture(0), gate])) as reader:
        wait_for(lambda: reader.status().reconnects == 1 and reader.status().state == "up")
        gate.set()


def test_a_camera_that_never_answers_is_lost_and_not_connecting_for_ever() -> None:
    gate = threading.Event()
    with reader_of(Scripted([], gate), options=replace(QUICK, hung_s=10)) as reader:
        assert reader.status().state == "connecting"
        wait_for(lambda: reader.status().state == "lost")
        gate.set()


def test_refused_credentials_are_tried_again_slowly() -> None:
    attempts = []

    def maker() -> FrameSource:
        attempts.append(time.monotonic())
        return Scripted([], SourceRefused("the password is wrong (401)"))

    with Reader("c0", maker, live=True, options=QUICK) as reader:
        wait_for(lambda: len(attempts) == 2)
        assert reader.status().state == "unauthorised"
        assert attempts[1] - attempts[0] >= QUICK.refused_s


def test_the_wait_grows_with_each_failure_and_is_short_again_after_a_healthy_time() -> None:
    attempts = []

    def maker() -> FrameSource:
        attempts.append(time.monotonic())
        if len(attempts) == 5:
            return Scripted([picture(n) for n in range(60)])
        return Scripted([], SourceLost("no route"))

    with Reader("c0", maker, live=True, options=replace(QUICK, backoff_s=(0.05, 10.0))):
        wait_for(lambda: len(attempts) == 6)
    gaps = np.diff(attempts)
    assert gaps[3] > 0.25  # 0.4 s less jitter
    assert gaps[4] < 0.06 * 60 * 0.5  # the pictures took about 0.4 s; the wait after them was the first one again


def test_a_camera_that_answers_again_is_not_kept_waiting() -> None:
    answers = threading.Event()
    gate = threading.Event()
    rest = iter([Scripted([], SourceLost("no route")), Scripted([picture(0), gate])])
    options = replace(QUICK, backoff_s=(30.0, 30.0))
    with Reader("c0", lambda: next(rest), live=True, options=options, probe=answers.is_set) as reader:
        wait_for(lambda: reader.status().state == "lost")
        time.sleep(0.15)
        answers.set()
        wait_for(lambda: reader.status().state == "up", 2.0)
        gate.set()


def test_a_camera_that_came_back_during_an_attempt_is_not_kept_waiting() -> None:
    answers, hung = threading.Event(), threading.Event()
    attempts = []

    def maker() -> FrameSource:
        attempts.append(time.monotonic())
        return Scripted([], hung) if len(attempts) == 2 else Scripted([], SourceLost("no route"))

    options = replace(QUICK, backoff_s=(0.5, 30.0), hung_s=60.0)
    with Reader("c0", maker, live=True, options=options, probe=answers.is_set):
        wait_for(lambda: len(attempts) == 2)
        answers.set()
        hung.set()
        failed = time.monotonic()
        wait_for(lambda: len(attempts) == 3)
    assert attempts[2] - failed < 0.5  # and not the second wait, at least 0.75 s


def test_an_attempt_that_took_all_its_time_is_not_followed_by_a_long_wait() -> None:
    attempts = []

    def maker() -> FrameSource:
        attempts.append(0)
        return Scripted([], SourceSilent("no answer within 0 s"))

    with Reader("c0", maker, live=True, options=replace(QUICK, backoff_s=(30.0, 30.0), silent_s=0.05)):
        wait_for(lambda: len(attempts) == 5, 2.0)


def test_a_camera_that_answers_all_the_time_but_fails_keeps_its_wait() -> None:
    attempts = []

    def maker() -> FrameSource:
        attempts.append(0)
        return Scripted([], SourceLost("nonsense"))

    with Reader("c0", maker, live=True, options=replace(QUICK, backoff_s=(30.0, 30.0)), probe=lambda: True):
        time.sleep(0.4)
    assert len(attempts) == 1


def test_an_unknown_exception_of_a_driver_is_a_loss_without_its_password() -> None:
    error = RuntimeError(f"cannot open rtsp://admin:{CANARY}@cam/live")
    with reader_of(Scripted([error])) as reader:
        wait_for(lambda: reader.status().state == "lost")
        assert "RuntimeError" in reader.status().cause and CANARY not in reader.status().cause


# Hangs


def test_closing_takes_less_than_two_seconds_even_if_the_source_hangs() -> None:
    gate = threading.Event()
    reader = reader_of(Scripted([picture(0), gate]), options=replace(QUICK, hung_s=60)).start()
    wait_for(lambda: reader.status().captured == 1)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 2.0
    assert reader.ended and reader.status().state == "ended"
    assert is_balanced(reader)
    gate.set()


def test_a_hung_call_is_left_behind_and_the_camera_read_anew() -> None:
    gate = threading.Event()
    hung = Scripted([picture(0), gate, picture(1), picture(2)])
    second = threading.Event()
    with reader_of(hung, Scripted([picture(0), second])) as reader:
        wait_for(lambda: reader.status().reconnects == 1 and reader.status().state == "up")
        before = reader.status().captured
        gate.set()  # the old thread comes back, and must neither deliver nor change anything
        wait_for(lambda: hung.is_closed)
        assert reader.status().captured == before
        second.set()


def test_one_camera_that_hangs_does_not_slow_another() -> None:
    gate = threading.Event()
    with reader_of(Scripted([], gate)), reader_of(Scripted([picture(n) for n in range(40)])) as good:
        start = time.monotonic()
        wait_for(lambda: good.status().captured == 40)
        assert time.monotonic() - start < 2.0
        gate.set()


def test_a_source_that_hangs_for_ever_does_not_gather_threads() -> None:
    gate = threading.Event()
    options = replace(QUICK, hung_s=0.05, backoff_s=(0.01, 0.01))
    before = threading.active_count()
    with Reader("c0", lambda: Scripted([], gate), live=True, options=options) as reader:
        give_up = time.monotonic() + 1.0
        while time.monotonic() < give_up:
            reader.take(0.01)
        assert reader.status().state == "lost"
        assert threading.active_count() - before <= 6
        gate.set()
