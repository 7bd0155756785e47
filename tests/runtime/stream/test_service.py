"""The whole stream: real bundles, a real engine, sources that end, stall and come back."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_anomaly_runtime import store
from edge_anomaly_runtime.errors import EdgeAnomalyError, SourceError, UsageError
from edge_anomaly_runtime.scoring import Scorer
from edge_anomaly_runtime.store import Gate
from edge_anomaly_runtime.stream.camera import check_policy, health_limits
from edge_anomaly_runtime.stream.model import EngineChoice, load_model
from edge_anomaly_runtime.stream.service import Stream, summary_lines
from edge_anomaly_runtime.stream.settings import StreamSettings, settings_from

from .scored_items import wait_until

MakeBundle = Callable[..., Path]

GATE = Gate(engine="onnxruntime", precision="fp32", threads=1)


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial in a child is tested with the models; here it would cost a second per test."""
    monkeypatch.setattr("edge_anomaly_runtime.stream.model.selftest_in_child", lambda *_, **__: {})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures: red 50, 60, 150, 220, a damaged one, 40."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, red in enumerate((50, 60, 150, 220)):
        Image.new("RGB", (32, 32), (red, 60, 60)).save(folder / f"{number}.png")
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    Image.new("RGB", (32, 32), (40, 60, 60)).save(folder / "5.png")
    return folder


def settings(bundle: Path | None, *sources: str, out: Path | None = None, **more: Any) -> StreamSettings:
    flags: dict[str, Any] = {
        "bundle": bundle,
        "engine": "onnxruntime",
        "precision": "fp32",
        "threads": 1,
        "cameras": [{"source": source} for source in sources],
        "sinks": [{"to": f"jsonl:{out}"}] if out is not None else [],
        **more,
    }
    return settings_from(None, flags)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@contextmanager
def running(stream: Stream) -> Iterator[dict[str, Any]]:
    """Run a stream in a thread; at the end stop it and put what `run` returned or raised into the dict."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["status"] = stream.run()
        except EdgeAnomalyError as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcome
    finally:
        stream.stop()
        thread.join(15)
    assert not thread.is_alive()


# Files


def test_every_picture_of_a_folder_is_scored_once_and_the_stream_ends(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    status = Stream(settings(tiny_bundle, str(photos), out=tmp_path / "out.jsonl")).run()
    rows = records(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in rows] == ["OK", "OK", "WARN", "NG", "OK"]
    assert [row["seq"] for row in rows] == [0, 1, 2, 3, 5]
    assert [row["score"] for row in rows] == pytest.approx([50, 60, 150, 220, 40], abs=0.01)
    (camera,) = status["cameras"]
    assert (camera["captured"], camera["scored"], camera["drops"]) == (6, 5, {"unreadable": 1})
    assert camera["verdicts"] == {"OK": 3, "WARN": 1, "NG": 1}
    assert status["sinks"][0]["written"] == 5
    assert "6 captured, 5 scored (1 NG, 3 OK, 1 WARN); dropped: 1 unreadable" in summary_lines(status)[0]


def test_each_stage_has_its_time(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    Stream(settings(tiny_bundle, str(photos), out=tmp_path / "out.jsonl")).run()
    for row in records(tmp_path / "out.jsonl"):
        assert set(row["ms"]) == {"decode", "resize", "infer", "post"}
        assert all(value >= 0 for value in row["ms"].values())


def test_every_second_frame_is_scored_and_the_others_are_counted(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "4.png").unlink()
    status = Stream(settings(tiny_bundle, str(photos), out=tmp_path / "out.jsonl", frames="every:2")).run()
    assert [row["seq"] for row in records(tmp_path / "out.jsonl")] == [0, 2, 4]
    assert status["cameras"][0]["drops"] == {"skipped": 2}


def test_only_the_region_of_interest_is_scored(tiny_bundle: Path, tmp_path: Path) -> None:
    """Left half red 220, right half red 40."""
    pixels = np.full((40, 60, 3), 60, dtype=np.uint8)
    pixels[:, :30, 0], pixels[:, 30:, 0] = 220, 40
    Image.fromarray(pixels).save(tmp_path / "half.png")
    scores = []
    for roi in ([0, 0, 0.5, 1], [0.5, 0, 1, 1]):
        out = tmp_path / f"{roi[0]}.jsonl"
        cameras = [{"source": str(tmp_path / "half.png"), "roi": roi}]
        Stream(settings(tiny_bundle, out=out, cameras=cameras)).run()
        scores.append(records(out)[0]["score"])
    assert scores == pytest.approx([220, 40], abs=0.01)


def test_verdicts_are_debounced_and_the_single_one_is_kept(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "4.png").unlink()
    Stream(settings(tiny_bundle, str(photos), out=tmp_path / "out.jsonl", confirm="2/3")).run()
    rows = records(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in rows] == ["OK", "OK", "OK", "WARN", "WARN"]
    assert [row.get("single_verdict") for row in rows] == [None, None, "WARN", "NG", "OK"]


def test_the_stream_ends_after_so_many_frames(tiny_bundle: Path, tmp_path: Path) -> None:
    status = Stream(settings(tiny_bundle, "test://moving?fps=0", stop_after=7, out=tmp_path / "out.jsonl")).run()
    assert status["cameras"][0]["scored"] == 7
    assert len(records(tmp_path / "out.jsonl")) == 7


# Cameras


def test_several_cameras_share_one_scorer_and_none_starves(tiny_bundle: Path, tmp_path: Path) -> None:
    sources = ("test://moving?fps=200&seed=1", "test://moving?fps=20&seed=2", "test://static?fps=20&seed=3")
    stream = Stream(settings(tiny_bundle, *sources, out=tmp_path / "out.jsonl"))
    with running(stream) as outcome:
        wait_until(lambda: all(camera.scored >= 20 for camera in stream.cameras), 30)
    cameras = outcome["status"]["cameras"]
    assert len({camera["camera"] for camera in cameras}) == 3
    for camera in cameras:
        assert camera["captured"] == camera["scored"] + sum(camera["drops"].values())
    by_camera = {camera["camera"]: camera["scored"] for camera in cameras}
    rows = [row for row in records(tmp_path / "out.jsonl") if "event" not in row]
    assert {name: sum(row["camera"] == name for row in rows) for name in by_camera} == by_camera


def test_a_slow_scorer_takes_the_newest_frame_and_counts_what_it_left(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_image = Scorer.score_image

    def slow(self: Scorer, image: Any) -> Any:
        time.sleep(0.1)
        return score_image(self, image)

    monkeypatch.setattr(Scorer, "score_image", slow)
    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", out=tmp_path / "out.jsonl"))
    with running(stream) as outcome:
        wait_until(lambda: stream.cameras[0].scored >= 20, 30)
    (camera,) = outcome["status"]["cameras"]
    assert camera["captured"] == camera["scored"] + sum(camera["drops"].values())
    assert camera["drops"]["mailbox"] > 2 * camera["scored"]
    ages = [row["age_ms"] for row in records(tmp_path / "out.jsonl")]
    assert np.percentile(ages, 95) < 400
    seqs = [row["seq"] for row in records(tmp_path / "out.jsonl")]
    assert seqs == sorted(set(seqs)), "each frame once, in order"


def test_a_camera_that_stalls_is_told_as_invalid_and_comes_back(tiny_bundle: Path, tmp_path: Path) -> None:
    source = "test://moving?fps=20&lost_at=20&for_frames=20"
    stream = Stream(settings(tiny_bundle, source, out=tmp_path / "out.jsonl", timeout=0.5))
    with running(stream):
        wait_until(
            lambda: "stalled" in _events(tmp_path / "out.jsonl") or "lost" in _events(tmp_path / "out.jsonl"), 20
        )
        wait_until(lambda: stream.cameras[0].reader.status().state == "up", 20)
        seen = stream.cameras[0].scored
        wait_until(lambda: stream.cameras[0].scored > seen, 20)
    rows = records(tmp_path / "out.jsonl")
    event = next(row for row in rows if "event" in row)
    assert (event["verdict"], event["score"], event["seq"]) == ("INVALID", None, None)
    assert event["reason"].startswith("camera ")
    seqs = [row["seq"] for row in rows if row["seq"] is not None]
    assert seqs == sorted(set(seqs))


def test_another_size_is_told(tiny_bundle: Path, tmp_path: Path) -> None:
    pixels = {"small": np.zeros((40, 40, 3), np.uint8), "large": np.zeros((80, 60, 3), np.uint8)}
    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", out=tmp_path / "out.jsonl"))
    source = stream.cameras[0].reader._make_source()
    read = source.read
    shown = ["small"]

    def resized(timeout: float) -> Any:
        picture = read(timeout)
        return picture and replace(picture, pixels=pixels[shown[0]] + 90)

    source.read = resized  # type: ignore[method-assign]
    with running(stream):
        wait_until(lambda: stream.status()["cameras"][0]["size"] == [40, 40] and stream.cameras[0].scored > 5)
        wait_until(lambda: stream.cameras[0]._size == (40, 40))
        shown[0] = "large"
        wait_until(lambda: "resized" in _events(tmp_path / "out.jsonl"))
    event = next(row for row in records(tmp_path / "out.jsonl") if "event" in row)
    assert "pictures are 60x80 now, 40x40 before" in event["reason"]


def _events(out: Path) -> list[str]:
    return [row["event"] for row in records(out) if "event" in row] if out.exists() else []


def test_with_fail_fast_a_lost_camera_ends_the_stream(tiny_bundle: Path) -> None:
    stream = Stream(settings(tiny_bundle, "rtsp://127.0.0.1:9/none", fail_fast=True, timeout=0.5))
    with pytest.raises(SourceError, match="127"):
        stream.run()


def test_a_file_that_cannot_be_read_ends_with_its_error_after_the_others(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    video = tmp_path / "cut.mp4"
    video.write_bytes(b"no video at all")
    out = tmp_path / "out.jsonl"
    with pytest.raises(SourceError):
        Stream(settings(tiny_bundle, str(video), str(photos), out=out)).run()
    assert len(records(out)) == 5


def test_frames_that_show_nothing_are_invalid_and_never_scored(tiny_bundle: Path, tmp_path: Path) -> None:
    source = "test://moving?fps=0&black_at=3"
    Stream(settings(tiny_bundle, source, out=tmp_path / "out.jsonl", stop_after=6)).run()
    rows = records(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in rows[3:]] == ["INVALID"] * 3
    assert all(row["score"] is None and row["reason"] == "black" for row in rows[3:])


def test_a_trigger_scores_one_frame(tiny_bundle: Path, tmp_path: Path) -> None:
    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", out=tmp_path / "out.jsonl", frames="trigger"))
    with running(stream) as outcome:
        (camera,) = stream.cameras
        wait_until(lambda: camera.skipped > 5)
        assert camera.scored == 0
        for number in (1, 2):
            stream.trigger()
            wait_until(lambda wanted=number: camera.scored == wanted)  # type: ignore[misc]
    (final,) = outcome["status"]["cameras"]
    assert final["scored"] == 2
    assert final["captured"] == 2 + sum(final["drops"].values())


@pytest.mark.parametrize(
    ("kind", "live", "max_lag", "refused"),
    [("all", True, None, True), ("every", True, None, True), ("all", True, 1.0, False), ("trigger", False, None, True),
     ("latest", True, None, False), ("all", False, None, False)],
)  # fmt: skip
def test_policies_that_do_not_fit_the_source(kind: str, live: bool, max_lag: float | None, refused: bool) -> None:
    if refused:
        with pytest.raises(UsageError):
            check_policy(kind, live, max_lag, "source")
    else:
        check_policy(kind, live, max_lag, "source")


def test_every_frame_of_a_camera_within_a_lag_loses_none_that_could_be_scored(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer that hesitates once for 0.4 s: `latest` would lose 20 frames, a lag of 2 s loses none."""
    score_image, calls = Scorer.score_image, []

    def hesitating(self: Scorer, image: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            time.sleep(0.4)
        return score_image(self, image)

    out = tmp_path / "out.jsonl"
    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", out=out, frames="all", max_lag=2.0, stop_after=40))
    monkeypatch.setattr(Scorer, "score_image", hesitating)
    status = stream.run()
    # What came at once after connecting may have piled up there before: stale by rule.
    assert status["cameras"][0]["drops"].keys() <= {"closed", "stale"}
    seqs = [row["seq"] for row in records(out)]
    assert seqs == list(range(seqs[0], seqs[0] + 40))
    assert seqs[0] < 5


# Model, engine, watchdog


def test_the_limits_of_dark_and_bright_come_from_the_normal_images(make_bundle: MakeBundle) -> None:
    folder = make_bundle(1)
    model = load_model(folder, EngineChoice("onnxruntime", "fp32", 1), trial=False)
    limits = health_limits(model.scorer)
    assert (limits.black, limits.white) == (5.0, 250.0)
    dark = model.scorer.bundle.manifest.input.model_copy(update={"brightness": (3.0, 253.0)})
    object.__setattr__(model.scorer.bundle, "manifest", model.scorer.bundle.manifest.model_copy(update={"input": dark}))
    limits = health_limits(model.scorer)
    assert (limits.black, limits.white) == (1.5, 254.0)
    model.scorer.close()


def test_a_new_version_is_used_from_one_frame_to_the_next(make_bundle: MakeBundle, tmp_path: Path) -> None:
    root, out = tmp_path / "store", tmp_path / "out.jsonl"
    first = store.install_bundle(root, make_bundle(1), gate=GATE)
    second = store.install_bundle(root, make_bundle(2), gate=GATE)
    store.activate_bundle(root, first.id, gate=GATE)
    stream = Stream(settings(None, "test://moving?fps=50", out=out, store=root, probation=5))
    with running(stream) as outcome:
        wait_until(lambda: stream.cameras[0].scored >= 10)
        assert store.read_state(root).probation is None, "the first version has proved itself"
        store.activate_bundle(root, second.id, gate=GATE)
        wait_until(lambda: second.manifest_sha256[:16] in stream.status()["model"], 30)
        seen = stream.cameras[0].scored
        wait_until(lambda: stream.cameras[0].scored >= seen + 10)
    models = [row["model"] for row in records(out)]
    assert [name.rpartition(":")[2] for name in dict.fromkeys(models)] == [
        first.manifest_sha256[:16],
        second.manifest_sha256[:16],
    ]
    (camera,) = outcome["status"]["cameras"]
    assert camera["captured"] == camera["scored"] + sum(camera["drops"].values())


def test_an_engine_that_fails_on_one_frame_is_invalid_and_on_every_frame_the_end(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_image, calls = Scorer.score_image, []

    def failing(self: Scorer, image: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 or len(calls) > 6:
            raise RuntimeError("the device is gone")
        return score_image(self, image)

    out = tmp_path / "out.jsonl"
    stream = Stream(settings(tiny_bundle, "test://moving?fps=0", out=out))
    monkeypatch.setattr(Scorer, "score_image", failing)
    with pytest.raises(EdgeAnomalyError, match="10 frames in a row") as caught:
        stream.run()
    assert caught.value.exit_code == 70
    verdicts = [row["verdict"] for row in records(out)]
    assert verdicts[2] == "INVALID" and "INVALID" not in verdicts[:2] + verdicts[3:6]
    assert verdicts[6:] == ["INVALID"] * 10


def test_a_scorer_that_hangs_ends_the_process_with_70(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, release = threading.Event(), threading.Event()
    codes: list[int] = []

    def exit_(code: int) -> None:
        codes.append(code)
        ended.set()
        release.set()

    def hanging(self: Scorer, image: Any) -> Any:
        release.wait(30)
        return self.invalid("late")

    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", hang=1.0))
    monkeypatch.setattr(os, "_exit", exit_)
    monkeypatch.setattr(Scorer, "score_image", hanging)
    with running(stream):
        assert ended.wait(10)
    assert codes[0] == 70


def test_golden_images_are_scored_again_from_time_to_time(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that flipped in the memory of the engine: the scores are off, and the stream ends."""
    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", selftest_hours=1e-4))
    score_pixels = Scorer.score_pixels

    def off(self: Scorer, pixels: Any) -> Any:
        result = score_pixels(self, pixels)
        return result.__class__(**{**result.__dict__, "score": (result.score or 0) * 1.5})

    monkeypatch.setattr(Scorer, "score_pixels", off)
    monkeypatch.setattr(Scorer, "score_image", lambda self, image: off(self, np.asarray(image)[:16, :16]))
    with pytest.raises(EdgeAnomalyError, match="golden"):
        stream.run()


# Operation


def test_wrong_sources_and_sinks_are_refused_before_the_model_is_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sink"):
        Stream(settings(tmp_path / "none.eab", "test://moving", sinks=[{"to": "carrier-pigeon:1"}]))
    with pytest.raises(UsageError, match=r"none\.mp4"):
        Stream(settings(tiny_bundle, str(tmp_path / "none.mp4")))


def test_metrics_say_what_happens(tiny_bundle: Path, tmp_path: Path) -> None:
    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", metrics="127.0.0.1:0"))
    address = f"http://127.0.0.1:{stream._servers[0].port}"
    with running(stream):
        wait_until(lambda: stream.cameras[0].scored > 5)
        text = urllib.request.urlopen(f"{address}/metrics", timeout=5).read().decode()
        assert urllib.request.urlopen(f"{address}/readyz", timeout=5).status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['frames_scored_total{camera="test-moving"}']) > 5
    assert float(values['source_up{camera="test-moving"}']) == 1
    assert any(name.startswith("model_info{") and "onnxruntime" in name for name in values)


def test_a_reload_adds_and_removes_cameras_and_sinks_and_keeps_the_others_running(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    before = settings(tiny_bundle, "test://moving?fps=50", "test://static?fps=50", out=one)
    after = settings(tiny_bundle, "test://moving?fps=50", "test://static?fps=50&size=64x64", out=two)
    stream = Stream(before, reload=lambda: after)
    with running(stream):
        wait_until(lambda: all(camera.scored > 3 for camera in stream.cameras))
        kept = stream.cameras[0]
        stream.request_reload()
        wait_until(lambda: len(stream.cameras) == 2 and stream.cameras[1].settings.source.endswith("size=64x64"))
        assert stream.cameras[0] is kept
        wait_until(lambda: stream.cameras[1].scored > 3)
    assert {row["camera"] for row in records(one)} >= {"test-moving", "test-static"}
    assert {row["camera"] for row in records(two)} == {"test-moving", "test-static"}


def test_a_configuration_that_is_wrong_changes_nothing(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> StreamSettings:
        raise UsageError("line1.toml:3: unknown key motor.")

    stream = Stream(settings(tiny_bundle, "test://moving?fps=50"), reload=broken)
    with running(stream):
        stream.request_reload()
        wait_until(lambda: not stream._wants_reload)
        seen = stream.cameras[0].scored
        wait_until(lambda: stream.cameras[0].scored > seen + 5)
    assert "line1.toml:3" in capsys.readouterr().err


def test_a_dead_sink_does_not_slow_scoring(tiny_bundle: Path, tmp_path: Path) -> None:
    sinks = [{"to": "https://127.0.0.1:9/hook#on=all&timeout=1"}, {"to": f"jsonl:{tmp_path / 'out.jsonl'}"}]
    stream = Stream(settings(tiny_bundle, "test://moving?fps=0", sinks=sinks, stop_after=300))
    start = time.monotonic()
    stream.run()
    assert time.monotonic() - start < 15
    assert len(records(tmp_path / "out.jsonl")) == 300


def test_a_required_sink_that_hangs_holds_scoring_back_but_not_the_end(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_anomaly_runtime.stream.sink._RECORDS", 4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hook = f"http://127.0.0.1:{silent.getsockname()[1]}/hook#on=all&timeout=30"
        stream = Stream(settings(tiny_bundle, "test://moving?fps=0", sinks=[{"to": hook, "required": True}], hang=1.0))
        with running(stream) as outcome:
            wait_until(lambda: stream.cameras[0].scored >= 6)
            time.sleep(1.5)  # longer than `hang`: waiting for a sink is no hang
            assert stream.cameras[0].scored == 6, "four wait, one is in hand, one waits for room"
    assert "error" not in outcome
    assert outcome["status"]["cameras"][0]["scored"] == 6


def test_the_live_page_shows_what_the_stream_does(tiny_bundle: Path) -> None:
    pytest.importorskip("uvicorn")
    stream = Stream(settings(tiny_bundle, "test://moving?fps=50", page="127.0.0.1:0"))
    address = f"http://127.0.0.1:{stream._servers[0].port}"
    with running(stream):
        wait_until(lambda: stream.cameras[0].scored > 5)
        with urllib.request.urlopen(f"{address}/api/status", timeout=5) as answer:
            status = json.load(answer)
        with urllib.request.urlopen(f"{address}/camera/test-moving.jpg", timeout=5) as answer:
            picture = Image.open(io.BytesIO(answer.read()))
    (camera,) = status["cameras"]
    assert (camera["camera"], camera["state"]) == ("test-moving", "up")
    assert camera["scored"] > 5
    assert picture.size == (320, 240)
