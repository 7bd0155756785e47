"""A reader on a real RTSP camera that stalls, breaks, garbles, changes size, freezes, goes dark, or is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from edge_anomaly_runtime.stream.frame import Frame
from edge_anomaly_runtime.stream.health import HealthLimits
from edge_anomaly_runtime.stream.probe import answers
from edge_anomaly_runtime.stream.reader import Reader, ReaderOptions, Status
from edge_anomaly_runtime.stream.source_av import AvOptions, AvSource
from edge_anomaly_runtime.stream.uri import parse_source

from .camera import Camera, Script, clean_pictures

QUICK = ReaderOptions(
    stalled_s=0.6, reconnect_s=1.0, backoff_s=(0.1, 0.4), healthy_s=2.0, refused_s=1.0, probe_s=0.1, max_age_s=2.0
)
CONNECTION = AvOptions(open_timeout=2.0, read_timeout=1.0, analyze_s=0.2, probe_bytes=50_000)


@contextmanager
def reading(
    camera: Camera, options: ReaderOptions = QUICK, health: HealthLimits | None = None, login: str = ""
) -> Iterator[Reader]:
    uri = parse_source(camera.url.replace("rtsp://", f"rtsp://{login}"))
    reader = Reader(
        "c0",
        lambda: AvSource(uri, CONNECTION),
        live=True,
        options=options,
        health=health,
        probe=lambda: answers(uri),
    )
    with reader:
        yield reader


def collect(reader: Reader, until: Callable[[Status], bool], seconds: float = 10.0) -> tuple[list[Frame], list[str]]:
    """Take frames until the status is as wanted; return them and the states on the way."""
    frames: list[Frame] = []
    states: list[str] = []
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        frame = reader.take(0.02)
        if frame is not None:
            frames.append(frame)
        status = reader.status()
        if not states or states[-1] != status.state:
            states.append(status.state)
        if until(status):
            return frames, states
    raise AssertionError(f"it did not happen: {states} {reader.status()}")


def assert_no_invention(frames: list[Frame], script: Script, count: int) -> None:
    """Every frame has a number of its own and is one of the camera's own pictures, to the bit."""
    numbers = [frame.seq for frame in frames]
    assert numbers == sorted(set(numbers))
    clean = clean_pictures(replace(script, fault="none"), count)
    assert all(frame.pixels.tobytes() in clean for frame in frames)


@pytest.mark.parametrize(("fault", "state"), [("stall", "stalled"), ("cut", "lost"), ("reset", "lost")])
def test_a_broken_connection_is_told_and_mended(fault: Any, state: str) -> None:
    script = Script(fault=fault, at=15, faulty_plays=1, noise=1.0)
    with Camera(script) as camera, reading(camera) as reader:
        start = time.monotonic()
        frames, states = collect(reader, lambda status: status.reconnects == 1 and status.state == "up")

        assert time.monotonic() - start < 6
        assert state in states
        more, _ = collect(reader, lambda status: status.captured > 30)
        status = reader.status()
        assert status.captured == status.delivered + status.waiting + sum(status.drops.values())
    assert_no_invention(frames + more, script, 80)


def test_a_camera_that_is_absent_at_the_start_is_found_when_it_comes() -> None:
    with Camera(Script()) as camera:
        camera.unplug()
        with reading(camera, replace(QUICK, backoff_s=(30.0, 30.0))) as reader:
            collect(reader, lambda status: status.state == "lost", 3.0)
            time.sleep(0.3)
            camera.plug()
            start = time.monotonic()
            collect(reader, lambda status: status.state == "up", 5.0)
            assert time.monotonic() - start < 3  # not the 30 s of the back-off


def test_a_wrong_password_is_told_without_hammering() -> None:
    with Camera(Script(login="admin:right")) as camera, reading(camera, login="admin:wr0ng-one@") as reader:
        collect(reader, lambda status: status.state == "unauthorised", 3.0)
        asked = camera.connections
        time.sleep(0.6)
        assert camera.connections == asked
        assert "401" in reader.status().cause and "wr0ng-one" not in str(reader.status())


def test_a_change_of_size_is_an_event_and_no_loss() -> None:
    with Camera(Script(fault="resize", at=10)) as camera, reading(camera) as reader:
        frames, states = collect(reader, lambda status: status.resizes == 1 and status.captured > 20)
        assert states[-1] == "up" and reader.status().reconnects == 0
        assert {frame.pixels.shape for frame in frames} == {(120, 160, 3), (240, 320, 3)}


def test_no_wrong_picture_is_handed_out_under_packet_loss() -> None:
    script = Script(fault="loss", share=0.1, at=5, noise=2.0, fps=50)
    with Camera(script) as camera, reading(camera) as reader:
        frames, _ = collect(reader, lambda status: status.captured >= 150)
        assert reader.status().drops["distrusted"] > 20
    assert_no_invention(frames, script, 400)


def test_garbled_packets_do_not_end_the_reading() -> None:
    with Camera(Script(fault="garble", share=0.3, at=5)) as camera, reading(camera) as reader:
        collect(reader, lambda status: status.captured >= 60)
        assert reader.status().state == "up"


def test_black_and_frozen_pictures_are_marked() -> None:
    with Camera(Script(fault="black", at=10)) as camera, reading(camera) as reader:
        frames, _ = collect(reader, lambda status: status.captured >= 25)
    assert {frame.invalid for frame in frames} == {"", "black"}

    limits = HealthLimits(frozen_s=1.5)
    with Camera(Script(fault="frozen", at=25, noise=1.0)) as camera, reading(camera, health=limits) as reader:
        frames, _ = collect(reader, lambda status: status.cause == "frozen")
        assert reader.status().still_since_s is not None
    assert not any(frame.invalid for frame in frames[:20])


def test_a_slow_scorer_gets_young_frames_and_every_drop_is_counted() -> None:
    with Camera(Script()) as camera, reading(camera, replace(QUICK, max_age_s=0.5)) as reader:
        collect(reader, lambda status: status.state == "up")
        ages = []
        for _ in range(12):
            frame = reader.take(1.0)
            assert frame is not None
            time.sleep(0.2)  # the scoring, at 5 fps
            ages.append((time.monotonic_ns() - frame.captured_ns) / 1e9)
        status = reader.status()
    assert max(ages) < 0.5
    assert status.drops["mailbox"] > 20
    assert status.captured == status.delivered + status.waiting + sum(status.drops.values())


def test_closing_a_camera_in_the_middle_of_a_stall_is_quick() -> None:
    with Camera(Script(fault="stall", at=5)) as camera, reading(camera, replace(QUICK, reconnect_s=10.0)) as reader:
        collect(reader, lambda status: status.captured >= 4)
        time.sleep(0.3)
        start = time.monotonic()
        reader.close()
        assert time.monotonic() - start < 2
