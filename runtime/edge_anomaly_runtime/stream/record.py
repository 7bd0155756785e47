"""The JSON record of a scored frame: one line of JSONL, one MQTT message, one webhook body."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from time import monotonic_ns
from typing import Any

import numpy as np

from edge_anomaly_runtime.scoring import Result

from .frame import Frame, Scored

SCHEMA = "edge-anomaly.stream/1"


def record_of(
    frame: Frame, result: Result, *, scored_ns: int, drops: Mapping[str, int], model: str, map_file: str | None = None
) -> dict[str, Any]:
    """Return the record of a frame, JSON types and finite numbers only; readers ignore keys that they do not know.

    scored_ns: monotonic clock, as `frame.captured_ns`. drops: running totals by cause. model: 'name@sha256:digits'.
    map_file: where a picture of this frame was kept. A frame that must not be trusted, and a score that is not finite,
    come out as INVALID whatever `result` says.
    """
    score = _finite(result.score)
    reason = frame.invalid or frame.distrust or result.reason
    if not reason and result.score is not None and score is None:
        reason = "the score is not finite"
    invalid = bool(reason) or result.verdict == "INVALID"
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "camera": frame.camera,
        "seq": frame.seq,
        "t_capture": _utc(frame),
        "age_ms": round((scored_ns - frame.captured_ns) / 1e6, 1),
        "score": None if invalid else score,
        "threshold": _finite(result.threshold),
        "warn": _finite(result.warn),
        "verdict": "INVALID" if invalid else result.verdict,
        "reason": (reason or "unknown") if invalid else None,
        "ms": {name: _finite(value) for name, value in {"decode": frame.decode_ms, **result.ms}.items()},
        "drops": {name: int(count) for name, count in drops.items()},
        "model": model,
        "map": map_file,
    }
    if result.label and not invalid:
        record |= {"label": result.label, "probability": _finite(result.probability)}
    return record


def event_of(camera: str, state: str, cause: str, *, model: str, drops: Mapping[str, int]) -> Scored:
    """Return what the sinks get when a camera stops delivering: INVALID with the cause, no frame, no number.

    Without it the last verdict would stand for as long as the camera is away. `event` is the camera's new state.
    """
    now = datetime.now(timezone.utc)
    pixels = np.zeros((0, 0, 3), dtype=np.uint8)
    frame = Frame(camera, -1, pixels, captured_ns=monotonic_ns(), captured_utc=now)
    reason = f"camera {state}" + (f": {cause}" if cause else "")
    result = Result("INVALID", None, None, None, reason=reason)
    record = record_of(frame, result, scored_ns=frame.captured_ns, drops=drops, model=model)
    return Scored(frame, result, {**record, "seq": None, "age_ms": None, "event": state}, changed=True)


def record_line(item: Scored) -> bytes:
    """Return the record as one line, newline included; ASCII, so that no reader can split it elsewhere.

    Raises:
        ValueError: the record holds a number that is not finite.
    """
    return json.dumps(item.record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _utc(frame: Frame) -> str:
    utc = frame.captured_utc.astimezone(timezone.utc).replace(tzinfo=None)
    return utc.isoformat(timespec="milliseconds") + "Z"
