"""The JSON record: its keys, finite numbers only, INVALID for whatever cannot be trusted."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from edge_anomaly_runtime.scoring import Result
from edge_anomaly_runtime.stream.frame import Frame, Scored
from edge_anomaly_runtime.stream.record import record_line, record_of

from .scored_items import frame_of, scored


def _record(frame: Frame, result: Result) -> dict[str, Any]:
    return record_of(frame, result, scored_ns=frame.captured_ns + 41_200_000, drops={"mailbox": 3}, model="p@sha256:ab")


def test_a_scored_frame_has_the_documented_keys() -> None:
    frame = frame_of(812, decode_ms=6.1)
    record = _record(frame, Result("NG", 0.83, 0.52, 0.4, {"resize": 2.0, "infer": 11.3}))
    assert record == {
        "schema": "edge-anomaly.stream/1",
        "camera": "c0",
        "seq": 812,
        "t_capture": "2026-11-21T10:15:02.114Z",
        "age_ms": 41.2,
        "score": 0.83,
        "threshold": 0.52,
        "warn": 0.4,
        "verdict": "NG",
        "reason": None,
        "ms": {"decode": 6.1, "resize": 2.0, "infer": 11.3},
        "drops": {"mailbox": 3},
        "model": "p@sha256:ab",
        "map": None,
    }


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_invalid_and_never_ok(score: float) -> None:
    record = _record(frame_of(), Result("OK", score, math.inf, None, {"infer": math.nan}))
    assert (record["verdict"], record["score"], record["reason"]) == ("INVALID", None, "the score is not finite")
    assert (record["threshold"], record["ms"]["infer"]) == (None, None)
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    "frame", [frame_of(distrust="frozen"), frame_of(invalid="frozen")], ids=["distrust", "invalid"]
)
def test_a_frame_that_must_not_be_trusted_is_invalid_whatever_its_score(frame: Frame) -> None:
    record = _record(frame, Result("OK", 0.1, 0.5, 0.4))
    assert (record["verdict"], record["score"], record["reason"]) == ("INVALID", None, "frozen")


def test_a_classifiers_label_is_in_the_record_of_a_judged_frame_only() -> None:
    result = Result("OK", 3.0, None, None, label="cat", probability=0.9)
    assert _record(frame_of(), result)["label"] == "cat"
    assert "label" not in _record(frame_of(invalid="black"), result)


def test_times_of_other_zones_become_utc() -> None:
    there = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    frame = frame_of()
    moved = Frame(frame.camera, 0, frame.pixels, frame.captured_ns, there)
    assert _record(moved, Result("OK", 0.1, 0.5, 0.4))["t_capture"] == "2025-12-31T23:30:00.000Z"


def test_a_line_is_one_line_whatever_the_camera_is_called() -> None:
    item = scored(camera='new\nline "ü" \u2028 \ud800')
    line = record_line(item)
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert json.loads(line)["camera"] == item.frame.camera


def test_a_record_with_nan_is_refused() -> None:
    item = scored()
    with pytest.raises(ValueError, match="not JSON compliant"):
        record_line(Scored(item.frame, item.result, {"score": math.nan}))
