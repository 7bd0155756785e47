"""What the live page keeps: bounded, quick in the scorer's thread, finite in its JSON."""

from __future__ import annotations

import io
import json
import math
import threading
from time import thread_time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_anomaly_runtime.stream import page
from edge_anomaly_runtime.stream.frame import Scored
from edge_anomaly_runtime.stream.page import CameraView, LiveView, page_status
from edge_anomaly_runtime.stream.sink import ItemLost, SinkThread
from edge_anomaly_runtime.stream.sink_images import plain_picture

from .live_items import camera_status, give, live, stream_status
from .scored_items import wait_until


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(page, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def only(view: LiveView, after: int = 0) -> CameraView:
    [camera] = view.cameras(after)
    return camera


def opened(jpeg: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(jpeg))
    assert picture.format == "JPEG"
    return picture


def test_every_frame_is_in_the_chart_though_few_are_drawn(clock: Clock) -> None:
    view = LiveView()
    due = [view.wants(live(seq, "WARN" if seq == 7 else "OK")) for seq in range(50)]
    assert due == [True] + 49 * [False]
    points = only(view).points
    assert [point.number for point in points] == list(range(1, 51))
    assert [point.verdict for point in points].index("WARN") == 7
    assert (points[7].score, points[8].score) == (0.6, 0.2)


def test_pictures_come_five_times_a_second_while_somebody_looks_and_seldom_otherwise(clock: Clock) -> None:
    view = LiveView()

    def drawn_in_10_s() -> int:
        count = 0
        for seq in range(400):
            clock.now += 0.025
            count += look(live(seq))
            if is_watched and seq % 40 == 0:
                view.watch()
        return count

    def look(item: Scored) -> bool:
        is_due = view.wants(item)
        if is_due:
            view.write(item)
        return is_due

    is_watched = False
    assert drawn_in_10_s() in (2, 3)
    is_watched = True
    view.watch()
    assert look(live())  # at once, for whoever has just come
    assert 40 <= drawn_in_10_s() <= 50
    clock.now += 10
    is_watched = False
    assert drawn_in_10_s() in (2, 3)


def test_pictures_do_not_queue_up(clock: Clock) -> None:
    """A picture that waits to be drawn is the only one of its camera, unless it never comes."""
    view = LiveView()
    view.watch()
    first = live(0)
    assert view.wants(first)
    clock.now += 1
    assert not view.wants(live(1))
    assert view.wants(live(1, camera="another"))
    view.write(first)
    assert view.wants(live(2))
    clock.now += 4
    assert view.wants(live(3))


def test_every_bad_part_is_drawn_out_of_turn(clock: Clock) -> None:
    view = LiveView()
    verdicts = ["OK", "OK", "NG", "WARN", "INVALID", "NG", "NG"]
    due = [view.wants(live(seq, verdict)) for seq, verdict in enumerate(verdicts)]  # type: ignore[arg-type]
    assert due == [True, False, True, False, False, True, True]


def test_drawing_takes_a_quarter_of_a_core_at_most(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cameras with nothing but bad parts, and a picture that takes 0.1 s to draw."""
    view, spent = LiveView(), [0.0]

    def half_of_it() -> float:
        spent[0] += 0.1  # called before and after each picture, so each costs 0.1
        return spent[0]

    monkeypatch.setattr(page, "thread_time", half_of_it)
    for seq in range(100):
        give(view, live(seq, camera="a"), live(seq, camera="b"))
    drawn = {"a": 0, "b": 0}
    for seq in range(4000):
        clock.now += 0.025
        view.watch()
        for camera in drawn:
            drawn[camera] += view.wants(live(seq, "NG", camera=camera))
    # 100 s of clock: 125 of each camera in the long run, its 12 at once, and its ordinary turns.
    assert 100 <= drawn["a"] <= 280
    assert abs(drawn["a"] - drawn["b"]) <= 2
    assert view.cameras()[0].picture_every_s == pytest.approx(0.8, rel=0.01)


def test_pictures_are_scaled_down_before_they_are_drawn() -> None:
    sizes = []

    def draw(item: Scored) -> Image.Image:
        sizes.append(item.frame.pixels.shape)
        return plain_picture(item)

    view = LiveView(draw)
    for size in ((1080, 1920), (4000, 1000), (48, 64)):
        give(view, live(size=size))
        shot = view.picture("c0")
        assert shot is not None
        assert opened(shot.jpeg).size == shot.size
    assert sizes == [(540, 960, 3), (1280, 320, 3), (48, 64, 3)]


def test_bad_parts_are_kept_newest_first_as_thumbnails() -> None:
    view = LiveView()
    for seq in range(20):
        give(view, live(seq, "NG", size=(1080, 1920)), live(seq, "OK"))
    shots = only(view).ng
    assert [shot.seq for shot in shots] == list(range(19, 7, -1))
    assert opened(shots[0].jpeg).size == shots[0].size == (640, 360)
    assert view.ng_picture(shots[0].id) is shots[0]
    assert view.ng_picture("x") is view.ng_picture("") is None
    give(view, live(20, "NG"))
    assert view.ng_picture(shots[-1].id) is None
    assert len({shot.id for shot in (*shots, *only(view).ng)}) == 13


def test_ids_of_two_runs_differ() -> None:
    ids = set()
    for _ in range(2):
        view = LiveView()
        give(view, live(0, "NG"))
        ids.add(only(view).ng[0].id)
    assert len(ids) == 2


def test_what_is_kept_is_bounded() -> None:
    view = LiveView(points=30, kept_ng=2)
    for seq in range(200):
        give(view, live(seq, "NG"))
    camera = only(view)
    assert [point.number for point in camera.points] == list(range(171, 201))
    assert camera.first == 171
    assert len(camera.ng) == 2
    for number in range(100):
        view.wants(live(camera=f"camera {number}"))
    assert len(view.cameras()) == 64
    assert not view.wants(live(camera="one more"))


def test_only_what_is_newer_is_handed_out() -> None:
    view = LiveView()
    for seq in range(10):
        view.wants(live(seq, camera=f"c{seq % 2}"))
    assert view.number == 10
    assert [[point.number for point in camera.points] for camera in view.cameras(7)] == [[9], [8, 10]]
    assert [camera.points for camera in view.cameras(10)] == [(), ()]
    assert [camera.points for camera in view.cameras(99)] == [(), ()]


def test_another_model_starts_a_new_chart() -> None:
    view = LiveView()
    for seq in range(5):
        view.wants(live(seq, score=30.0, model="old@sha256:1"))
    view.wants(live(5, model="new@sha256:2"))
    assert [(point.number, point.score) for point in only(view).points] == [(6, 0.2)]
    assert only(view).first == 6


def test_a_picture_that_cannot_be_drawn_does_not_hold_up_the_next() -> None:
    def draw(item: Scored) -> Image.Image:
        if item.frame.seq == 0:
            raise ValueError("canary")
        return plain_picture(item)

    view, told = LiveView(draw), list[str]()
    with pytest.raises(ItemLost, match="could not be drawn"):
        view.write(live(0))
    thread = SinkThread(view, warn=told.append)
    thread.put(live(0, "NG"))
    thread.put(live(1, "NG"))
    wait_until(lambda: view.picture("c0") is not None)
    thread.close()
    assert [shot.seq for shot in only(view).ng] == [1]
    assert thread.counts().lost == 1
    assert "canary" not in "".join(told)


def test_what_has_no_pixels_is_no_frame() -> None:
    view = LiveView()
    assert not view.wants(live(0, "INVALID", size=(0, 0)))
    assert view.cameras() == []
    with pytest.raises(ItemLost, match="no pixels"):
        view.write(live(size=(0, 0)))


def test_noting_a_score_takes_microseconds() -> None:
    view, items = LiveView(), [live(seq) for seq in range(2000)]
    start = thread_time()
    for item in items:
        view.wants(item)
    assert (thread_time() - start) / len(items) < 50e-6


def test_threads_do_not_get_in_each_others_way() -> None:
    view, errors, stop = LiveView(points=50), list[BaseException](), threading.Event()

    def attempt(action: Any) -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        for camera in view.cameras(view.number - 20):
            numbers = [point.number for point in camera.points]
            assert numbers == sorted(set(numbers))
        json.dumps(page_status(stream_status(), view), allow_nan=False)

    actions = [
        *(lambda camera=camera: view.wants(live(camera=camera)) for camera in ("a", "b")),
        *(lambda camera=camera: give(view, live(0, "NG", camera=camera)) for camera in ("a", "c")),
        *(read, read, view.watch),
    ]
    threads = [threading.Thread(target=attempt, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    wait_until(lambda: view.number > 1000, 60)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {camera.camera for camera in view.cameras()} == {"a", "b", "c"}


def test_the_status_has_both_what_the_stream_says_and_what_was_seen() -> None:
    view = LiveView()
    give(view, live(3, "NG"), live(4, "INVALID"))
    view.wants(live(0, camera="unknown to the stream"))
    status = page_status(stream_status(), view)
    assert (status["model"], status["uptime_s"], status["run"], status["number"]) == (
        *("part@sha256:ab12cd34ef56", 93784.0),
        *(view.run, 3),
    )
    camera, other = status["cameras"]
    assert (camera["camera"], camera["captured"], camera["drops"]["mailbox"]) == ("c0", 1042, 39)
    seen = camera["live"]
    assert (seen["verdict"], seen["reason"], seen["score"]) == ("INVALID", "the picture is black", None)
    assert (seen["warn"], seen["fail"], seen["seq"], seen["first"]) == (0.5, 0.8, 4, 1)
    assert [point[2:] for point in seen["points"]] == [[0.9, "NG"], [None, "INVALID"]]
    assert seen["picture"]["verdict"] == "INVALID"
    assert [shot["seq"] for shot in seen["ng"]] == [3]
    assert 0 <= seen["age_s"] <= seen["ng"][0]["age_s"] < 5
    assert 0 <= status["now_s"] - seen["points"][-1][1] < 5
    assert (other["camera"], other["live"]["verdict"]) == ("unknown to the stream", "OK")
    [empty] = page_status(stream_status(camera_status("silent")), LiveView())["cameras"]
    assert empty["live"] is None


def test_the_status_is_plain_json_whatever_comes_in() -> None:
    strange = camera_status(
        "ü\ud800",
        fps=math.nan,
        captured=np.int64(7),
        age_ms={"p50": np.float32(1.5), "p95": math.inf},
        drift=None,
        cause=("a", OSError("odd")),
    )
    text = json.dumps(page_status(stream_status(strange), LiveView()), allow_nan=False, ensure_ascii=False)
    [camera] = json.loads(text.encode())["cameras"]
    assert camera["camera"] == "ü?"
    assert camera["fps"] is camera["age_ms"]["p95"] is camera["drift"] is None
    assert (camera["captured"], camera["age_ms"]["p50"], camera["cause"]) == (7, 1.5, ["a", "odd"])
