"""A report says what was measured on what: with an engine that obeys, and with the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_runtime.bench.harness import BenchOptions, Report, bench_bundle, golden_pictures, run_bench
from edge_anomaly_runtime.bundle import Bundle, read_bundle
from edge_anomaly_runtime.errors import EdgeAnomalyError, UsageError
from edge_anomaly_runtime.scoring import Scorer
from edge_anomaly_runtime.session import SessionInfo

STAGES = ["total", "decode", "resize", "infer", "post"]


class ObedientSession:
    """Answers at once, or as `answer` says, and keeps what it was asked."""

    info = SessionInfo("fake", "1.2", "CPU", "f32", 1)

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.reds: list[int] = []
        self._answer = answer

    def run(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        self._answer()
        self.reds.append(int(images[0, 0, 0, 0]))
        return {"score": np.zeros(1, np.float32), "anomaly_map": np.zeros((1, 4, 4), np.float32)}

    def close(self) -> None:
        pass


def scorer(bundle: Path, session: ObedientSession) -> Scorer:
    return Scorer(read_bundle(bundle), session, engine="openvino", precision="int8")


def bench(bundle: Path, **options: object) -> Report:
    settings = BenchOptions(**{"runs": 12, "warm_up": False, **options})  # type: ignore[arg-type]
    return bench_bundle(bundle, settings, engine="onnxruntime", precision="int8", threads=1)


def test_images_go_round_and_every_run_counts(tiny_bundle: Path) -> None:
    session = ObedientSession()
    report = run_bench([scorer(tiny_bundle, session)], BenchOptions(runs=5, warm_up=False))
    # The first inference is reported apart; the third golden image has the model's size already, as no camera's has.
    assert session.reds == [50, *[50, 150, 50, 150, 50]]
    assert (report["runs"], report["distinct_images"], len(report["samples_ms"])) == (5, 2, 5)


def test_stages_add_up_to_the_whole(tiny_bundle: Path) -> None:
    def wait() -> None:
        end = perf_counter() + 0.003
        while perf_counter() < end:
            pass

    report = run_bench([scorer(tiny_bundle, ObedientSession(wait))], BenchOptions(runs=30, warm_up=False))
    mean = {stage: values["mean"] for stage, values in report["latency_ms"].items()}
    assert list(mean) == STAGES
    assert mean["total"] == pytest.approx(sum(mean[stage] for stage in STAGES[1:]), rel=0.15)
    assert 3.0 <= report["latency_ms"]["infer"]["min"] < 20.0
    assert 1.0 < report["cpu_ms_per_image"] < 200.0
    assert 1.0 < report["images_per_second"] < 334.0


def test_the_report_has_these_fields_and_fits_into_json(tiny_bundle: Path) -> None:
    report = json.loads(json.dumps(bench(tiny_bundle), allow_nan=False))
    assert report["schema"] == "edge-anomaly.bench/1"
    assert report["name"] == "tiny/onnxruntime-int8/single"
    assert list(report["latency_ms"]) == STAGES
    for figures in report["latency_ms"].values():
        assert figures["n"] == 12
        assert 0 <= figures["min"] <= figures["p50"] <= figures["max"]
        assert figures["p90"] is figures["p99"] is figures["p99.9"] is figures["p99_upper"] is None
    assert report["start_s"]["verify"] > 0
    assert report["start_s"]["load"] > 0
    assert report["start_s"]["first_score"] is None  # this process was not started for the measurement
    assert report["peak_rss_mb"] > 20
    environment = report["environment"]
    assert (environment["threads"], environment["float_precision"]) == (1, "f32")
    assert environment["device"] == "CPUExecutionProvider"
    assert len(report["manifest_sha256"]) == 64


def test_openvino_tells_its_own_time_and_what_it_has_executed(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    report = bench_bundle(tiny_bundle, BenchOptions(runs=30, warm_up=False), engine="openvino", threads=1)
    latency = report["latency_ms"]
    assert set(latency) == {*STAGES, "engine", "copy"}
    assert 0 < latency["engine"]["p50"] < latency["infer"]["p50"]
    assert latency["copy"]["mean"] == pytest.approx(latency["infer"]["mean"] - latency["engine"]["mean"], abs=0.05)
    assert report["executed"] is not None


def test_own_images_in_place_of_golden_ones(tiny_bundle: Path, tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (60, 40), (90, 90 + index, 90)).save(tmp_path / f"{index}.png")
    assert bench(tiny_bundle, images=(str(tmp_path),))["distinct_images"] == 4


def test_images_that_cannot_be_used_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="none"):
        bench(tiny_bundle, images=(str(tmp_path / "none"),))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UsageError, match=r"torn\.png"):
        bench(tiny_bundle, images=(str(tmp_path / "torn.png"),))
    Image.new("RGB", (60, 40)).save(tmp_path / "black.png")
    with pytest.raises(UsageError, match=r"black\.png cannot be judged: the picture is black"):
        bench(tiny_bundle, images=(str(tmp_path / "black.png"),))


def test_a_rate_that_cannot_be_held_is_reported_as_missed_frames(tiny_bundle: Path) -> None:
    def wait() -> None:
        end = perf_counter() + 0.01
        while perf_counter() < end:
            pass

    options = BenchOptions("paced", runs=100, rate=400, warm_up=False)
    report = run_bench([scorer(tiny_bundle, ObedientSession(wait))], options)
    assert report["scheduled"] == 100
    assert report["missed"] + report["runs"] == 100
    assert report["missed"] >= 60
    assert any("frames were missed: the rate cannot be held" in text for text in report["warnings"])


def test_cameras_in_turns_and_workers_side_by_side(tiny_bundle: Path) -> None:
    report = bench(tiny_bundle, scenario="multi", streams=3)
    assert (report["runs"], report["scenario"]["streams"]) == (12, 3)
    assert report["images_per_second"] > 1e3 / report["latency_ms"]["total"]["max"]


@pytest.mark.parametrize("threads", [1, 3])
def test_offline_has_a_warm_worker_for_every_thread(tiny_bundle: Path, threads: int) -> None:
    options = BenchOptions("offline", runs=40)
    report = bench_bundle(tiny_bundle, options, engine="onnxruntime", precision="int8", threads=threads)
    assert (report["runs"], report["environment"]["threads"]) == (40, threads)


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_threads_are_refused(tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match=f"--threads {threads}"):
        bench_bundle(tiny_bundle, BenchOptions("offline"), threads=threads)


def test_pictures_of_the_model_s_size_are_used_only_where_there_are_no_others(bundle_folder: Path) -> None:
    bundle = read_bundle(bundle_folder)
    full = [bundle.path / image.file for image in bundle.manifest.golden if not image.preprocessed]
    assert 0 < len(full) < len(bundle.manifest.golden)
    assert golden_pictures(bundle) == full
    made = bundle.manifest.model_copy(
        update={"golden": tuple(image for image in bundle.manifest.golden if image.preprocessed)}
    )
    assert len(golden_pictures(Bundle(bundle.path, made))) == len(made.golden)


def test_accuracy_is_the_export_s_of_this_very_graph(bundle_folder: Path) -> None:
    report = bench_bundle(bundle_folder, BenchOptions(runs=3, warm_up=False), engine="onnxruntime", precision="int8")
    rows = {row.backend: row.auroc for row in read_bundle(bundle_folder).manifest.parity}
    assert report["accuracy"] == {"auroc": rows["onnxruntime int8"]}


def test_fresh_processes_give_the_median_of_their_figures(tiny_bundle: Path) -> None:
    report = bench(tiny_bundle, repeat=3)
    assert (report["processes"], report["runs"], len(report["samples_ms"])) == (3, 12, 36)
    assert report["latency_ms"]["total"]["p50"] == sorted(report["p50_of_each_process"])[1]
    assert report["latency_ms"]["total"]["p90"] is None
    assert 0.05 < report["start_s"]["first_score"] < 60
    assert report["start_s"]["first_score"] > report["start_s"]["verify"] + report["start_s"]["load"]


def test_a_process_that_fails_hands_its_code_on(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EdgeAnomalyError, match="ended with code 2") as raised:
        bench_bundle(tiny_bundle, BenchOptions(runs=12, repeat=2), engine="onnxruntime", precision="int4")
    assert raised.value.exit_code == 2
    assert "int4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scenario": "singel"}, "Did you mean"),
        ({"runs": 0}, "--runs 0"),
        ({"repeat": 0}, "--repeat 0"),
        ({"streams": 0}, "--streams 0"),
        ({"streams": 2}, "--scenario multi"),
        ({"scenario": "paced"}, "--rate FPS"),
        ({"rate": 5.0}, "--rate FPS"),
        ({"scenario": "paced", "rate": 0.0}, "--rate 0"),
        ({"scenario": "paced", "rate": float("nan")}, "--rate nan"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        BenchOptions(**options)  # type: ignore[arg-type]
