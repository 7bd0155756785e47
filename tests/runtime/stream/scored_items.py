"""Scored frames for the tests of sinks, and a wait with an end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from time import monotonic, sleep
from typing import Any

import numpy as np

from edge_anomaly_runtime.scoring import Result, Verdict
from edge_anomaly_runtime.stream.frame import Frame, Scored
from edge_anomaly_runtime.stream.record import record_of

UTC = datetime(2026, 11, 21, 10, 15, 2, 114_000, tzinfo=timezone.utc)


def frame_of(seq: int = 0, *, camera: str = "c0", size: tuple[int, int] = (48, 64), **more: Any) -> Frame:
    """Return a grey frame of `size` (height, width)."""
    pixels = np.full((*size, 3), 90 + seq % 50, dtype=np.uint8)
    return Frame(camera, seq, pixels, captured_ns=1_000_000_000 + seq * 40_000_000, captured_utc=UTC, **more)


def scored(
    seq: int = 0,
    verdict: Verdict = "OK",
    *,
    camera: str = "c0",
    changed: bool = False,
    size: tuple[int, int] = (48, 64),
) -> Scored:
    """Return a frame with a verdict, a 4 x 4 map and its record."""
    frame = frame_of(seq, camera=camera, size=size)
    anomaly_map = np.linspace(0, 2, 16, dtype=np.float32).reshape(4, 4)
    score = {"OK": 0.2, "WARN": 0.6, "NG": 0.9}.get(verdict)
    reason = "" if score is not None else "the picture is black"
    result = Result(verdict, score, 0.8, 0.5, {"resize": 1.0, "infer": 2.0}, anomaly_map, reason=reason)
    record = record_of(frame, result, scored_ns=frame.captured_ns + 5_000_000, drops={"stale": 0}, model="m@sha256:1")
    return Scored(frame, result, record, changed)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition; fail the test when it does not come true."""
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, f"waited {seconds} s in vain"
        sleep(0.01)
