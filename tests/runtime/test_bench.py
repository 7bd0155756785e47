"""Percentiles by nearest rank, and a report that says what was measured on what."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest

from edge_anomaly_runtime.bench import run_bench, summary
from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.scoring import Scorer, open_scorer
from edge_anomaly_runtime.session import SessionInfo


def test_percentiles_are_the_nearest_rank() -> None:
    assert summary([float(value) for value in range(1000, 0, -1)]) == {
        "min": 1.0,
        "p50": 500.0,
        "p90": 900.0,
        "p99": 990.0,
        "max": 1000.0,
        "mean": 500.5,
    }
    # 13 samples: the 7th is the smallest with at least half of them at or below it.
    assert summary([3, 1, 2, 4, 5, 6, 70, 8, 9, 10, 11, 12, 13])["p50"] == 8


@pytest.mark.parametrize(("name", "needed"), [("p50", 11), ("p90", 64), ("p99", 662)])
def test_a_percentile_needs_enough_samples(name: str, needed: int) -> None:
    assert summary([1.0] * needed)[name] == 1.0
    assert summary([1.0] * (needed - 1))[name] is None


def test_one_sample_is_minimum_maximum_and_mean() -> None:
    assert summary([2.5]) == {"min": 2.5, "p50": None, "p90": None, "p99": None, "max": 2.5, "mean": 2.5}


def test_no_sample_is_dropped() -> None:
    figures = summary([1.0] * 99 + [1000.0])
    assert (figures["max"], figures["mean"], figures["p90"]) == (1000.0, 10.99, 1.0)


class CountingSession:
    """Answers at once, or as `answer` says, and keeps what it was asked."""

    info = SessionInfo("fake", "1.2", "none", "f32", 3)

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.reds: list[int] = []
        self._answer = answer

    def run(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        self._answer()
        self.reds.append(int(images[0, 0, 0, 0]))
        return {"score": np.zeros(1, np.float32), "anomaly_map": np.zeros((1, 4, 4), np.float32)}

    def close(self) -> None:
        pass


def _scorer(tiny_bundle: Path, session: CountingSession) -> Scorer:
    return Scorer(read_bundle(tiny_bundle), session, engine="openvino", precision="int8")


def test_calls_go_round_the_golden_images_and_are_counted(tiny_bundle: Path) -> None:
    session = CountingSession()
    report = run_bench(_scorer(tiny_bundle, session), runs=5, warmup=0)
    assert session.reds == [50, 150, 220, 50, 150] * 2  # inference alone, then with the resize
    assert report["runs"] == 5


def test_warm_up_takes_at_least_a_second(tiny_bundle: Path) -> None:
    session = CountingSession()
    start = perf_counter()
    run_bench(_scorer(tiny_bundle, session), runs=1, warmup=2)
    assert perf_counter() - start >= 1.0
    assert len(session.reds) > 4


def test_the_report_has_these_fields_and_fits_into_json(tiny_bundle: Path) -> None:
    with open_scorer(tiny_bundle, engine="onnxruntime", precision="int8", threads=1) as scorer:
        report = json.loads(json.dumps(run_bench(scorer, runs=12, warmup=0), allow_nan=False))
    assert report["schema"] == "edge-anomaly.bench/1"
    assert (report["bundle"], report["engine"], report["precision"]) == ("tiny", "onnxruntime", "int8")
    assert sorted(report["latency_ms"]) == ["infer", "resize_and_infer"]
    for figures in report["latency_ms"].values():
        assert list(figures) == ["min", "p50", "p90", "p99", "max", "mean"]
        assert 0 < figures["min"] <= figures["p50"] <= figures["max"]
        assert figures["p90"] is figures["p99"] is None
    assert report["infer_cpu_ms"] >= 0
    environment = report["environment"]
    assert environment["threads"] == 1
    assert environment["float_precision"] == "f32"
    assert environment["device"] == "CPUExecutionProvider"
    for name in ("cpu", "int8_instructions", "engine_version", "python", "system"):
        assert name in environment


def test_latency_is_in_milliseconds(tiny_bundle: Path) -> None:
    def wait() -> None:
        end = perf_counter() + 0.002
        while perf_counter() < end:
            pass

    report = run_bench(_scorer(tiny_bundle, CountingSession(wait)), runs=11, warmup=0)
    for figures in report["latency_ms"].values():
        assert 2.0 <= figures["min"] < 20.0
    assert 0.5 < report["infer_cpu_ms"] < 200.0


def test_the_garbage_collector_rests_while_the_clock_runs_and_works_again_after_an_error(tiny_bundle: Path) -> None:
    states: list[bool] = []
    run_bench(_scorer(tiny_bundle, CountingSession(lambda: states.append(gc.isenabled()))), runs=2, warmup=0)
    assert states == [False] * 4
    assert gc.isenabled()

    def fail() -> None:
        raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        run_bench(_scorer(tiny_bundle, CountingSession(fail)), runs=2, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(("runs", "warmup"), [(0, 0), (-1, 20), (5, -1)])
def test_impossible_counts_are_refused(tiny_bundle: Path, runs: int, warmup: int) -> None:
    session = CountingSession()
    with pytest.raises(UsageError, match=f"--runs {runs} --warmup {warmup}"):
        run_bench(_scorer(tiny_bundle, session), runs=runs, warmup=warmup)
    assert session.reds == []
