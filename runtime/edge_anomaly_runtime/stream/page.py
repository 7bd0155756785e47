"""What the live page shows: per camera the newest picture, the last scores and the last bad parts."""

from __future__ import annotations

import io
import math
import secrets
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from time import monotonic, monotonic_ns, thread_time
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .frame import Frame, Scored
from .sink import Draw, ItemLost
from .sink_images import plain_picture

POINTS = 600
KEPT_NG = 12

_CAMERAS = 64
# Pictures of a live camera are at most 960 px wide; a line camera's may be as high as it likes, but not here.
_PICTURE, _THUMBNAIL = (960, 1280), (640, 860)
_QUALITY = 80
# Seconds between two pictures of a camera: while somebody looks, and else.
_WATCHED_S, _UNWATCHED_S = 0.2, 5.0
_WATCH_LASTS_S = 10.0
_DRAWN_WITHIN_S = 3.0
# Drawing may take this share of one core; scoring needs the rest.
_SHARE = 0.25


class Point(NamedTuple):
    """One frame in the chart. number: counts all points of the view. seconds: captured, monotonic clock."""

    number: int
    seconds: float
    score: float | None
    verdict: str


@dataclass(frozen=True)
class Shot:
    """A drawn picture as JPEG; `id` is unique across restarts of the program."""

    id: str
    jpeg: bytes = field(repr=False)
    size: tuple[int, int]
    captured_ns: int
    utc: str
    seq: int
    verdict: str
    score: float | None


@dataclass(frozen=True)
class CameraView:
    """A camera at one moment. points: those that were asked for; first: number of the oldest that is kept.

    last: the newest record, with `captured_ns` of its frame. ng: bad parts, newest first. picture_every_s: how often
    a picture is drawn at present.
    """

    camera: str
    first: int
    points: tuple[Point, ...]
    last: Mapping[str, Any]
    captured_ns: int
    picture: Shot | None
    ng: tuple[Shot, ...]
    picture_every_s: float


class _Camera:
    def __init__(self, points: int, kept_ng: int) -> None:
        self.points: deque[Point] = deque(maxlen=points)
        self.ng: deque[Shot] = deque(maxlen=kept_ng)
        self.last: Mapping[str, Any] = {}
        self.captured_ns = 0
        self.picture: Shot | None = None
        self.next_s = self.next_ng_s = self.asked_s = -math.inf
        self.asked_ns = 0

    def is_due(self, now: float, pause_s: float, captured_ns: int) -> bool:
        """Tell whether an ordinary picture is due, and if so note that it was asked for."""
        # Pictures in a queue are old when they come out; one that was dropped there is not waited for in vain.
        is_drawn = self.picture is not None and self.picture.captured_ns >= self.asked_ns
        if now < self.next_s or not (is_drawn or now > self.asked_s + _DRAWN_WITHIN_S):
            return False
        self.next_s, self.asked_s, self.asked_ns = now + pause_s, now, captured_ns
        return True

    def is_ng_due(self, now: float, pause_s: float) -> bool:
        """Tell whether a bad part is due: as many at once as are kept, in the long run one per `pause_s`."""
        if self.next_ng_s > now + self.ng.maxlen * pause_s:  # type: ignore[operator]
            return False
        self.next_ng_s = max(self.next_ng_s, now) + pause_s
        return True


class LiveView:
    """A sink that keeps a bounded amount for the page; every method may be called from any thread.

    draw: makes a picture of a frame that is scaled down already. points: scores kept per camera; every frame counts,
    drawn or not. kept_ng: bad parts kept per camera. Per camera up to five pictures a second are drawn while `watch`
    is called, one in five seconds otherwise, and every bad part; fewer where drawing would take more than a quarter of
    a core for long.
    """

    name = "page"
    needs_pixels = True

    def __init__(self, draw: Draw = plain_picture, *, points: int = POINTS, kept_ng: int = KEPT_NG) -> None:
        self.run = secrets.token_hex(4)
        self._draw = draw
        self._points, self._kept_ng = points, kept_ng
        self._lock = threading.Lock()
        self._cameras: dict[str, _Camera] = {}
        self._number = self._shots = 0
        self._watched_until = -math.inf
        self._draw_s = 0.0

    def wants(self, item: Scored) -> bool:
        """Note the score and tell whether a picture is due; a few microseconds."""
        record, frame = item.record, item.frame
        if not frame.pixels.size:
            return False  # a camera's change of state, which the page learns from the stream
        verdict = str(record.get("verdict"))
        now = monotonic()
        with self._lock:
            camera = self._cameras.get(frame.camera)
            if camera is None:
                if len(self._cameras) >= _CAMERAS:
                    return False
                camera = self._cameras[frame.camera] = _Camera(self._points, self._kept_ng)
            if camera.last.get("model") != record.get("model"):
                camera.points.clear()  # scores of two models have no common scale
            self._number += 1
            camera.points.append(Point(self._number, frame.captured_ns / 1e9, record.get("score"), verdict))
            camera.last, camera.captured_ns = record, frame.captured_ns
            if verdict == "NG" and camera.is_ng_due(now, self._pause_s()):
                return True
            return camera.is_due(now, self._picture_every_s(now), frame.captured_ns)

    def open(self) -> None: ...

    def write(self, item: Scored) -> None:
        """Draw one picture and keep it.

        Raises:
            ItemLost: it cannot be drawn.
        """
        if item.frame.pixels.size == 0:
            raise ItemLost("the frame has no pixels")
        start = thread_time()
        try:
            picture = self._draw(replace(item, frame=_scaled_down(item.frame))).convert("RGB")
            jpeg, thumbnail = _jpeg(picture), b""
            size = picture.size
            if item.record.get("verdict") == "NG":
                picture.thumbnail(_THUMBNAIL)
                thumbnail = _jpeg(picture)
        except Exception as error:
            # Anything else would make the queue offer the same frame again, for ever.
            raise ItemLost(f"the picture could not be drawn ({type(error).__name__})") from error
        with self._lock:
            self._draw_s += 0.2 * (thread_time() - start - self._draw_s)
            camera = self._cameras.get(item.frame.camera)
            if camera is None:
                return
            self._shots += 1
            camera.picture = self._shot(item, jpeg, size)
            if thumbnail:
                camera.ng.append(self._shot(item, thumbnail, picture.size))

    def close(self) -> None: ...

    def watch(self) -> None:
        """Tell that somebody is looking; holds for ten seconds. Brings the next picture forward if nobody was."""
        now = monotonic()
        with self._lock:
            if now >= self._watched_until:
                for camera in self._cameras.values():
                    camera.next_s = -math.inf
            self._watched_until = now + _WATCH_LASTS_S

    @property
    def number(self) -> int:
        """How many frames were noted so far."""
        return self._number

    def cameras(self, after: int = 0) -> list[CameraView]:
        """Return every camera, in the order of their first frames, with the points whose number is above `after`."""
        with self._lock:  # the scorer waits for it: only copies
            every_s = self._picture_every_s(monotonic())
            views = [
                CameraView(
                    name,
                    camera.points[0].number,
                    tuple(camera.points) if camera.points[-1].number > after else (),
                    camera.last,
                    camera.captured_ns,
                    camera.picture,
                    tuple(camera.ng)[::-1],
                    every_s,
                )
                for name, camera in self._cameras.items()
            ]
        return [replace(view, points=view.points[bisect_right(view.points, after, key=_number) :]) for view in views]

    def picture(self, camera: str) -> Shot | None:
        """Return a camera's newest picture."""
        with self._lock:
            kept = self._cameras.get(camera)
            return kept.picture if kept is not None else None

    def ng_picture(self, shot_id: str) -> Shot | None:
        """Return the picture of a bad part while it is kept."""
        with self._lock:
            shots = (shot for camera in self._cameras.values() for shot in camera.ng)
            return next((shot for shot in shots if shot.id == shot_id), None)

    def _pause_s(self) -> float:
        """How far apart a camera's pictures must be; times the number of cameras, so that none takes all the turns."""
        return self._draw_s / _SHARE * len(self._cameras)

    def _picture_every_s(self, now: float) -> float:
        return max(self._pause_s(), _WATCHED_S if now < self._watched_until else _UNWATCHED_S)

    def _shot(self, item: Scored, jpeg: bytes, size: tuple[int, int]) -> Shot:
        frame, record = item.frame, item.record
        return Shot(
            f"{self.run}-{self._shots}",
            jpeg,
            size,
            frame.captured_ns,
            str(record.get("t_capture", "")),
            frame.seq,
            str(record.get("verdict")),
            record.get("score"),
        )


def page_status(status: Mapping[str, Any], view: LiveView, after: int = 0) -> dict[str, Any]:
    """Return what the page asks for: the stream's own status, and for each of its cameras `live`, from the view.

    JSON types and finite numbers only. Ages are in seconds at the time `now_s` of the same clock as the points' times.
    after: leaves out the points up to this number.
    """
    number = view.number  # before the points: one that comes in between is sent twice, not lost
    now_ns = monotonic_ns()
    lives = {live.camera: _live(live, now_ns) for live in view.cameras(after)}
    cameras = [dict(camera) for camera in status.get("cameras", [])]
    named = {camera.get("camera") for camera in cameras}
    cameras += [{"camera": name} for name in lives if name not in named]
    for camera in cameras:
        camera["live"] = lives.get(str(camera.get("camera")))
    whole = {**status, "cameras": cameras, "run": view.run, "number": number, "now_s": now_ns / 1e9}
    return {name: _plain(value) for name, value in whole.items()}


def _live(live: CameraView, now_ns: int) -> dict[str, Any]:
    last = live.last
    return {
        **{key: last.get(key) for key in ("verdict", "reason", "score", "warn", "label", "probability", "seq")},
        "fail": last.get("threshold"),
        "age_s": (now_ns - live.captured_ns) / 1e9,
        "picture_every_s": live.picture_every_s,
        "first": live.first,
        "points": [(point.number, round(point.seconds, 3), point.score, point.verdict) for point in live.points],
        "picture": _shot_fields(live.picture, now_ns) if live.picture else None,
        "ng": [_shot_fields(shot, now_ns) for shot in live.ng],
    }


def _shot_fields(shot: Shot, now_ns: int) -> dict[str, Any]:
    fields = {key: getattr(shot, key) for key in ("id", "size", "utc", "seq", "verdict", "score")}
    return {**fields, "age_s": (now_ns - shot.captured_ns) / 1e9}


def _plain(value: Any) -> Any:
    """Return a value as JSON types; what is not finite becomes None, and text is valid Unicode."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(str(value))


def _number(point: Point) -> int:
    return point.number


def _scaled_down(frame: Frame) -> Frame:
    """Scale before drawing: a heat map on 1920 x 1080 takes five times as long as on 960 x 540."""
    height, width = frame.pixels.shape[:2]
    if width <= _PICTURE[0] and height <= _PICTURE[1]:
        return frame
    picture = Image.fromarray(frame.pixels)
    picture.thumbnail(_PICTURE)
    return replace(frame, pixels=np.asarray(picture))


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
