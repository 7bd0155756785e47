"""Recorded scores against the calibration: what is read, what is left out, what is reported."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_anomaly_runtime.bundle import MANIFEST, Bundle, read_bundle
from edge_anomaly_runtime.errors import ArtefactError, UsageError
from edge_anomaly_runtime.stream.drift_report import (
    CameraDrift,
    calibrations,
    drift_json,
    drift_table,
    oldest_first,
    recorded_drift,
)
from edge_anomaly_runtime.stream.sink_jsonl import JsonlSink

from .recorded import KEY, NORMAL_IMAGES, bundle_with_scores, normal_scores, stream_records, write_lines, write_manifest
from .scored_items import scored

Records = list[dict[str, Any]]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return read_bundle(bundle_with_scores(tiny_bundle, tmp_path / "part.eab"))


def _drift(bundle: Bundle, *paths: Path, **options: Any) -> tuple[tuple[CameraDrift, ...], dict[str, int]]:
    return recorded_drift(paths, bundle, **options)


def _one(bundle: Bundle, *paths: Path, **options: Any) -> CameraDrift:
    cameras, _ = recorded_drift(paths, bundle, **options)
    assert len(cameras) == 1
    return cameras[0]


# What is reported


def test_every_window_has_its_figures_times_and_state(bundle: Bundle, tmp_path: Path) -> None:
    scores = normal_scores(2000) + normal_scores(2000, shift=1.5, seed=2) + normal_scores(500, shift=1.5, seed=3)
    path = write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, scores))
    one = _one(bundle, path)
    assert (one.camera, one.key, one.scores, one.calibration_images) == ("c0", KEY, 4500, NORMAL_IMAGES)
    assert [(window.first, window.last) for window in one.windows] == [
        (1, 1000), (1001, 2000), (2001, 3000), (3001, 4000), (4001, 4500),
    ]  # fmt: skip
    states = [window.state for window in one.windows]
    assert (states[:2], states[3:]) == (["ok", "ok"], ["drifting", "drifting"])
    shifts = [window.figures.shift_sigma for window in one.windows]
    assert shifts[:2] == pytest.approx([0, 0], abs=0.4)
    assert shifts[2:] == pytest.approx([1.5, 1.5, 1.5], abs=0.4)
    assert (one.windows[0].start, one.windows[0].end) == ("2026-11-21 10:15:02", "2026-11-21 10:15:41")
    assert one.latest.state == "drifting"
    assert one.has_drifted


def test_scores_as_at_calibration_are_ok(bundle: Bundle, tmp_path: Path) -> None:
    one = _one(bundle, write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, normal_scores(3000))))
    assert (one.latest.state, one.has_drifted) == ("ok", False)
    assert {window.state for window in one.windows} == {"ok"}


def test_cameras_are_judged_each_for_itself(bundle: Bundle, tmp_path: Path) -> None:
    good = stream_records(bundle.path, normal_scores(2500), camera="c0")
    bad = stream_records(bundle.path, normal_scores(2500, shift=-2), camera="c1")
    both = [record for pair in zip(good, bad, strict=True) for record in pair]
    path = write_lines(tmp_path / "out.jsonl", both)
    cameras, left_out = _drift(bundle, path)
    assert [(one.camera, one.scores, one.latest.state) for one in cameras] == [
        ("c0", 2500, "ok"),
        ("c1", 2500, "drifting"),
    ]
    assert left_out == {}
    cameras, left_out = _drift(bundle, path, camera="c0")
    assert [one.camera for one in cameras] == ["c0"]
    assert left_out == {"of other cameras": 2500}
    with pytest.raises(UsageError, match="Unknown camera 'c2'") as caught:
        _drift(bundle, path, camera="c2")
    assert "c0, c1" in caught.value.hint


def test_a_short_recording_gets_shorter_windows(bundle: Bundle, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, normal_scores(240, shift=2)))
    one = _one(bundle, path)
    assert (one.window, [window.last for window in one.windows]) == (120, [120, 240])
    assert one.latest.state == "drifting"
    assert [window.last for window in _one(bundle, path, window=60).windows] == [60, 120, 180, 240]
    with pytest.raises(UsageError, match="A drift window of 20 scores is too short"):
        _drift(bundle, path, window=20)


def test_the_json_report_holds_the_same(bundle: Bundle, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, normal_scores(2500, shift=2)))
    cameras, left_out = _drift(bundle, path)
    report = json.loads(json.dumps(drift_json(bundle, cameras, left_out), allow_nan=False))
    assert (report["schema"], report["bundle"], report["ok"]) == ("edge-anomaly.drift/1", "tiny", False)
    [camera] = report["cameras"]
    assert (camera["camera"], camera["key"], camera["has_drifted"]) == ("c0", KEY, True)
    assert camera["latest"]["state"] == "drifting"
    assert camera["latest"]["shift_sigma"] == pytest.approx(2, abs=0.4)
    assert sorted(camera["windows"][0]) == ["end", "first", "ks", "last", "shift_sigma", "spread", "start", "state"]


def test_the_table_has_a_line_per_window_and_the_advice(bundle: Bundle, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, normal_scores(2000, shift=2)))
    head, names, *windows, end = drift_table(_one(bundle, path)).splitlines()
    assert head == f"c0: 2000 scores, compared with {NORMAL_IMAGES} normal images of {KEY}"
    assert names.split() == ["scores", "from", "(UTC)", "to", "(UTC)", "shift", "spread", "ks", "state"]
    assert len(windows) == 2
    first, day, start, _, end_time, shift, _, _, state = windows[1].split()
    assert (first, day, start, end_time, state) == ("1001-2000", "2026-11-21", "10:15:42", "10:16:21", "drifting")
    assert float(shift) == pytest.approx(2, abs=0.4)
    assert end.startswith("c0: drifting. Scores are higher than at calibration")


def test_the_table_tells_of_a_drift_that_is_over(bundle: Bundle, tmp_path: Path) -> None:
    scores = normal_scores(2000, shift=2) + normal_scores(4000)
    path = write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, scores))
    one = _one(bundle, path)
    assert (one.latest.state, one.has_drifted) == ("ok", True)
    assert [window.state for window in one.windows] == ["ok", *["drifting"] * 3, "ok", "ok"]
    assert drift_table(one).splitlines()[-1].startswith("c0: drifted for a time, ok at the end.")


def test_a_name_from_a_file_cannot_write_to_the_terminal(bundle: Bundle, tmp_path: Path) -> None:
    records = stream_records(bundle.path, normal_scores(100), camera="\x1b[2Jc0\n\ud800")
    table = drift_table(_one(bundle, write_lines(tmp_path / "out.jsonl", records)))
    assert table.startswith("\\u001b[2Jc0\\n\\ud800: 100 scores")


# What is read


def test_files_that_the_sink_has_rotated_are_one_recording(bundle: Bundle, tmp_path: Path) -> None:
    """Written by the sink itself, read in whatever order the shell gives them."""
    sink = JsonlSink(tmp_path / "out.jsonl", max_bytes=100_000)
    sink.open()
    records = stream_records(bundle.path, normal_scores(1000) + normal_scores(1000, shift=3))
    for number, record in enumerate(records):
        item = scored(number)
        item.record.clear()
        item.record.update(record)
        sink.write(item)
    sink.close()
    files = sorted(tmp_path.glob("out*.jsonl"))
    assert len(files) > 3
    for order in (files, files[::-1]):
        one = _one(bundle, *order)
        assert one.scores == 2000
        assert [window.figures.shift_sigma for window in one.windows] == pytest.approx([0, 3], abs=0.4)


def test_full_files_come_before_the_one_in_use_and_recordings_stay_in_order() -> None:
    given = [Path(name) for name in ("b.jsonl", "a.000011.jsonl", "a.000002.jsonl", "a.jsonl", "b.000001.jsonl")]
    assert [str(path) for path in oldest_first([*given, Path("b.jsonl")])] == [
        "b.000001.jsonl",
        "b.jsonl",
        "a.000002.jsonl",
        "a.000011.jsonl",
        "a.jsonl",
    ]


def test_a_line_that_was_cut_off_is_counted(bundle: Bundle, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, normal_scores(120)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    cameras, left_out = _drift(bundle, path)
    assert (cameras[0].scores, left_out) == (119, {"cut off at the end of a file": 1})
    path.write_bytes(whole.rstrip(b"\n"))
    assert _drift(bundle, path)[1] == {}, "a last line without its newline may be whole"


@pytest.mark.parametrize(
    "damage", [b'{"schema": "edge-anomaly.str\n', b"\0\0\0\0\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"]
)
def test_damaged_lines_are_counted(bundle: Bundle, tmp_path: Path, damage: bytes) -> None:
    path = write_lines(tmp_path / "out.jsonl", stream_records(bundle.path, normal_scores(120)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:60], damage, b"\n", *lines[60:]]))
    cameras, left_out = _drift(bundle, path)
    assert (cameras[0].scores, left_out) == (120, {"not JSON": 1})


def test_frames_without_a_score_are_counted(bundle: Bundle, tmp_path: Path) -> None:
    scores: list[float | None] = [*normal_scores(120), None, math.nan, math.inf]
    records = stream_records(bundle.path, scores)
    event = {**records[0], "score": None, "threshold": None, "warn": None, "seq": None, "event": "lost"}
    strange = [{**records[0], "score": value} for value in ("12", True, 10**400, [1])]
    cameras, left_out = _drift(bundle, write_lines(tmp_path / "out.jsonl", [*records, event, *strange]))
    assert (cameras[0].scores, left_out) == (120, {"without a score": 8})


def test_records_of_another_model_are_counted(bundle: Bundle, tmp_path: Path) -> None:
    records = stream_records(bundle.path, normal_scores(125))
    others = [None, 7, "tiny", "other@" + records[0]["model"].partition("@")[2], "tiny@sha256:0123456789abcdef"]
    for record, model in zip(records, others, strict=False):
        record["model"] = model
    cameras, left_out = _drift(bundle, write_lines(tmp_path / "out.jsonl", records))
    assert (cameras[0].scores, left_out) == (120, {"of another model": 5})


def test_nothing_to_compare_says_why(bundle: Bundle, tmp_path: Path) -> None:
    records = stream_records(bundle.path, normal_scores(3))
    for record in records:
        record["model"] = "other@sha256:0123"
    with pytest.raises(UsageError, match=r"No record can be compared with .*: 3 of another model"):
        _drift(bundle, write_lines(tmp_path / "out.jsonl", records))
    with pytest.raises(UsageError, match=r"No record can be compared with .*: there is none"):
        _drift(bundle, write_lines(tmp_path / "empty.jsonl", []))


@pytest.mark.parametrize("schema", ["edge-anomaly.stream/2", "edge-anomaly.classify/1", None, 1])
def test_another_schema_is_refused_with_its_line(bundle: Bundle, tmp_path: Path, schema: object) -> None:
    records = stream_records(bundle.path, normal_scores(3))
    records[1]["schema"] = schema
    path = write_lines(tmp_path / "out.jsonl", records)
    with pytest.raises(ArtefactError) as caught:
        _drift(bundle, path)
    assert caught.value.what.startswith(f"{path}, line 2 has schema {schema!r}; drift reads")


def test_json_that_is_no_record_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ArtefactError, match="line 1 has schema None"):
        _drift(bundle, tmp_path / "out.jsonl")


def test_files_that_cannot_be_read_are_named(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read .*absent\.jsonl: No such file"):
        _drift(bundle, tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match=r"Cannot read .*: Is a directory"):
        _drift(bundle, tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(UsageError, match=r"picture\.png holds no JSON lines"):
        _drift(bundle, tmp_path / "picture.png")


def test_what_score_prints_is_read_too(bundle: Bundle, tmp_path: Path) -> None:
    """Such records name neither model nor camera nor time; their limits say what they are from."""
    limits = bundle.manifest.thresholds["onnxruntime/fp32"]
    good = [
        {
            "schema": "edge-anomaly.score/1",
            "path": f"photos/{number}.png",
            "score": score * limits.scores["q50"] / 10,
            "verdict": "OK",
            "threshold": limits.fail.value,
            "warn": limits.warn.value,
            "ms": {},
        }
        for number, score in enumerate(normal_scores(120))
    ]
    strangers = [{**good[0], "threshold": 1.0}] * 3
    cameras, left_out = _drift(bundle, write_lines(tmp_path / "scores.jsonl", [*good, *strangers]))
    assert [(one.camera, one.key, one.scores) for one in cameras] == [("images", "onnxruntime/fp32", 120)]
    assert cameras[0].windows[0].start is None
    assert "-  " in drift_table(cameras[0])
    assert left_out == {"of another engine or precision": 3}


# Engine and precision


def test_the_limits_in_a_record_tell_its_engine_and_precision(bundle: Bundle, tmp_path: Path) -> None:
    ten = [score * 13 for score in normal_scores(100)]
    path = write_lines(
        tmp_path / "out.jsonl",
        [*stream_records(bundle.path, normal_scores(100)), *stream_records(bundle.path, ten, key="onnxruntime/int8")],
    )
    cameras, left_out = _drift(bundle, path)
    assert [(one.key, one.scores) for one in cameras] == [(KEY, 100), ("onnxruntime/int8", 100)]
    assert [one.latest.state for one in cameras] == ["ok", "ok"]
    cameras, left_out = _drift(bundle, path, engine="onnxruntime")
    assert [(one.key, one.scores) for one in cameras] == [("onnxruntime/int8", 100)]
    assert left_out == {"of another engine or precision": 100}


def test_who_names_engine_and_precision_is_believed(bundle: Bundle, tmp_path: Path) -> None:
    """A TensorRT engine's limits are set on its device, and may not be known here."""
    records = stream_records(bundle.path, normal_scores(100))
    for record in records:
        record["threshold"] = 123.0
    path = write_lines(tmp_path / "out.jsonl", records)
    with pytest.raises(UsageError, match="100 of another engine or precision"):
        _drift(bundle, path)
    assert _one(bundle, path, engine="openvino", precision="int8").scores == 100


def test_unknown_engines_and_precisions_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="Unknown engine 'openvno'"):
        calibrations(bundle, engine="openvno")
    with pytest.raises(UsageError, match="Unknown precision 'int4'"):
        calibrations(bundle, precision="int4")
    with pytest.raises(
        UsageError, match="has no thresholds for --engine tensorrt --precision auto; it has openvino/fp"
    ):
        calibrations(bundle, engine="tensorrt")


def test_the_limits_of_an_engine_that_was_built_here_are_known(
    trt_bundle: Path, tmp_path: Path, make_gpu: Callable[..., Any]
) -> None:
    from edge_anomaly_runtime.tensorrt_build import build_engine

    make_gpu()
    own = build_engine(trt_bundle, precision="int8").record.thresholds
    assert own is not None
    bundle = read_bundle(trt_bundle)
    key = "tensorrt/int8"
    assert [one.thresholds for one in calibrations(bundle) if one.key == key] == [own, bundle.manifest.thresholds[key]]
    scores = [own.scores["q50"] + (number % 40 - 20) for number in range(120)]
    records = stream_records(trt_bundle, scores, key=key)
    for record in records:
        record |= {"threshold": own.fail.value, "warn": own.warn.value}
    one = _one(bundle, write_lines(tmp_path / "out.jsonl", records))
    assert (one.key, one.scores, one.calibration_images) == (key, 120, own.scores["n"])


def test_a_classifier_has_nothing_to_compare_with(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "classifier.eab"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"]["kind"] = "classifier"
    write_manifest(folder, manifest)
    with pytest.raises(UsageError, match="is a classifier: it has no normal scores"):
        calibrations(read_bundle(folder))


def test_a_bundle_that_keeps_no_distribution_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    records = stream_records(tiny_bundle, normal_scores(100), key="openvino/fp32")
    with pytest.raises(UsageError, match="does not say how its normal scores were distributed"):
        _drift(read_bundle(tiny_bundle), write_lines(tmp_path / "out.jsonl", records))
