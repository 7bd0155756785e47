"""Scored frames of now and a stream's status, for the tests of the live page."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from time import monotonic_ns
from typing import Any

import numpy as np

from edge_anomaly_runtime.scoring import Result, Verdict
from edge_anomaly_runtime.stream.frame import Frame, Scored
from edge_anomaly_runtime.stream.page import LiveView
from edge_anomaly_runtime.stream.record import record_of
from edge_anomaly_runtime.stream.sink import SinkThread

SCORES: Mapping[str, float] = {"OK": 0.2, "WARN": 0.6, "NG": 0.9}


def live(
    seq: int = 0,
    verdict: Verdict = "OK",
    *,
    camera: str = "c0",
    size: tuple[int, int] = (48, 64),
    score: float | None = None,
    model: str = "part@sha256:ab12cd34ef56",
) -> Scored:
    """Return a frame that was captured just now; warn is 0.5, fail 0.8, `size` is (height, width)."""
    pixels = np.full((*size, 3), 90 + seq % 50, dtype=np.uint8)
    frame = Frame(camera, seq, pixels, monotonic_ns(), datetime.now(timezone.utc))
    value = SCORES.get(verdict) if score is None else score
    anomaly_map = None if value is None else np.full((4, 4), value, dtype=np.float32)
    reason = "" if value is not None else "the picture is black"
    result = Result(verdict, value, 0.8, 0.5, {"infer": 2.0}, anomaly_map, reason=reason)
    return Scored(frame, result, record_of(frame, result, scored_ns=monotonic_ns(), drops={}, model=model))


def give(view: LiveView, *items: Scored) -> None:
    """Hand frames to the view as its sink thread would, but drawn whether a picture is due or not."""
    for item in items:
        view.wants(item)
        view.write(item)


def camera_status(camera: str = "c0", **more: Any) -> dict[str, Any]:
    """Return the state of one camera."""
    drift = {"state": "ok", "shift_sigma": 0.31, "spread": 1.05, "ks": 0.07, "n": 900, "advice": ""}
    return {
        "camera": camera,
        "state": "up",
        "cause": "",
        "captured": 1042,
        "scored": 1000,
        "fps": 9.9,
        "drops": {"mailbox": 39, "stale": 3, "duplicate": 0},
        "age_ms": {"p50": 41.2, "p95": 88.4},
        "verdict": "OK",
        "drift": drift,
        **more,
    }


def stream_status(*cameras: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a stream with these cameras."""
    return {
        "model": "part@sha256:ab12cd34ef56",
        "started_utc": "2026-11-21T10:15:02Z",
        "uptime_s": 93_784.0,
        "cameras": list(cameras or [camera_status()]),
        "sinks": [{"sink": "mqtt://broker", "written": 990, "dropped": 10, "failing": True}],
    }


class Feed:
    """Cameras that deliver a frame of `verdict` every 40 ms until `pause` or `stop`, through a real sink thread."""

    def __init__(self, view: LiveView, *cameras: str) -> None:
        self.verdict: Verdict = "OK"
        self.is_paused = False
        self._sink, self._cameras, self._stopped = SinkThread(view), cameras or ("c0",), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._sink.close()

    def _run(self) -> None:
        seq = 0
        while not self._stopped.wait(0.04):
            if not self.is_paused:
                for camera in self._cameras:
                    self._sink.put(live(seq, self.verdict, camera=camera, size=(120, 160)))
                seq += 1
