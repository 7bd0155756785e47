"""Limits: what is read, what fails, and that a figure which is missing is never a pass."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from edge_anomaly_runtime.bench.gates import (
    baseline_gates,
    budget_gates,
    check_names,
    figure_of,
    floor_gates,
    parse_limits,
    read_baseline,
)
from edge_anomaly_runtime.bench.harness import Report
from edge_anomaly_runtime.errors import ArtefactError, UsageError


def test_limits_are_read_with_and_without_a_unit() -> None:
    texts = ["p99=25ms", "infer.p50=3.5", "p99.9=40ms", "peak_rss_mb=200"]
    assert parse_limits(texts, "--budget") == {"p99": 25.0, "infer.p50": 3.5, "p99.9": 40.0, "peak_rss_mb": 200.0}


@pytest.mark.parametrize("text", ["p99", "p99=", "p99=fast", "p99=25s", "=25", "p99=-1", "P99=1", "p99=nan"])
def test_limits_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        parse_limits([text], "--budget")


def test_a_budget_is_kept_up_to_its_limit(report: Report) -> None:
    kept, broken, fast, slow = budget_gates(
        report, {"p50": 10.0, "infer.p50": 7.9, "images_per_second": 100.0} | {"cpu_ms_per_image": 15.9}
    )
    assert (kept.ok, broken.ok, fast.ok, slow.ok) == (True, False, True, False)
    assert str(broken) == "FAIL infer.p50: 8 (limit <= 7.9)"


def test_a_figure_that_cannot_be_shown_is_an_error_that_says_how_many_runs_it_needs(report: Report) -> None:
    with pytest.raises(UsageError, match=r"p99\.9 cannot be shown from 700 samples; it needs 6636") as raised:
        budget_gates(report, {"p99.9": 40.0})
    assert "--runs 6636" in raised.value.hint
    with pytest.raises(UsageError, match="no figure 'median'"):
        figure_of(report, "median")
    with pytest.raises(UsageError, match=r"no figure 'upload\.p50'"):
        figure_of(report, "upload.p50")


def test_accuracy_has_a_floor_and_a_missing_accuracy_fails(report: Report) -> None:
    high, low, missing = (
        floor_gates(report, {"auroc": 0.95}),
        floor_gates(report, {"auroc": 0.99}),
        floor_gates(report, {"f1": 0.5}),
    )
    assert (high[0].ok, low[0].ok, missing[0].ok) == (True, False, False)
    assert "missing" in str(missing[0])


def test_a_ratio_to_the_baseline_is_kept_or_not(report: Report) -> None:
    slower = copy.deepcopy(report)
    slower["latency_ms"]["total"]["p50"] = 11.4
    slower["latency_ms"]["total"]["min"] = 9.9
    p50, minimum = baseline_gates(slower, report, {"p50": 1.15, "min": 1.05})
    assert (p50.ok, minimum.ok) == (True, False)
    assert "9 of the baseline x 1.05" in str(minimum)


def test_of_throughput_and_accuracy_more_is_better(report: Report) -> None:
    worse = copy.deepcopy(report)
    worse["images_per_second"], worse["accuracy"]["auroc"] = 50.0, 0.5
    ratios = {"images_per_second": 1.1, "auroc": 1.0, "cpu_ms_per_image": 1.0}
    assert [gate.ok for gate in baseline_gates(worse, report, ratios)] == [False, False, True]
    assert [gate.ok for gate in baseline_gates(report, worse, ratios)] == [True, True, True]
    assert [gate.ok for gate in budget_gates(worse, {"auroc": 0.95, "images_per_second": 40})] == [False, True]


def test_frames_lost_to_a_stall_fail_their_limit_instead_of_hiding_it(report: Report) -> None:
    report["missed"], report["scheduled"] = 36, 700
    report["latency_ms"]["total"]["p99"] = None
    lost, late = budget_gates(report, {"missed": 0, "p99": 25.0})
    assert (lost.value, lost.ok) == (36, False)
    assert (late.value, late.ok) == (None, False)


@pytest.mark.parametrize(
    ("names", "runs", "text"),
    [
        (["p99"], 661, "p99 cannot be shown from 661 samples; it needs 662"),
        (["infer.p99.9"], 700, r"infer\.p99\.9 cannot be shown"),
        (["medain"], 700, "no figure 'medain'"),
    ],
)
def test_limits_are_checked_before_anything_is_measured(names: list[str], runs: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_names(names, runs)
    check_names(["min", "p50", "infer.p95", "missed", "auroc", "peak_rss_mb"], 130)


def test_a_baseline_without_the_figure_is_told(report: Report) -> None:
    other = copy.deepcopy(report)
    other["peak_rss_mb"], other["latency_ms"]["total"]["p99"] = None, None
    with pytest.raises(UsageError, match="The baseline has no peak_rss_mb"):
        baseline_gates(report, other, {"peak_rss_mb": 1.1})
    with pytest.raises(UsageError, match="In the baseline, p99 cannot be shown"):
        baseline_gates(report, other, {"p99": 1.1})


def test_a_stage_that_is_gone_fails(report: Report) -> None:
    less = copy.deepcopy(report)
    del less["latency_ms"]["infer"]
    gates = baseline_gates(less, report, {"p50": 1.15, "infer.p50": 1.2})
    assert [(gate.name, gate.ok) for gate in gates] == [("p50", True), ("infer.p50", False), ("infer.p50", False)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("environment", "cpu"), "another CPU"),
        (("environment", "threads"), 8),
        (("name",), "part/openvino-fp32/single"),
    ],
)
def test_a_baseline_of_something_else_is_refused_unless_forced(
    report: Report, path: tuple[str, ...], value: object
) -> None:
    other = copy.deepcopy(report)
    target = other
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ArtefactError, match=rf"{path[-1]}.*{re.escape(str(value))}") as raised:
        baseline_gates(report, other, {"p50": 1.15})
    assert raised.value.exit_code == 4
    assert [gate.ok for gate in baseline_gates(report, other, {"p50": 1.15}, force=True)] == [True]


def test_a_newer_engine_may_be_compared(report: Report) -> None:
    other = copy.deepcopy(report)
    other["environment"]["engine_version"] = "2030.1"
    assert baseline_gates(report, other, {"p50": 1.15})[0].ok


def test_baselines_are_read_or_refused(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(report))
    assert read_baseline(path)["name"] == report["name"]
    path.write_text(json.dumps({"schema": "edge-anomaly.score/1"}))
    with pytest.raises(ArtefactError, match=r"edge-anomaly\.score/1"):
        read_baseline(path)
    path.write_text(json.dumps({"schema": "edge-anomaly.bench/1"}))
    with pytest.raises(ArtefactError, match="not a measurement"):
        read_baseline(path)
    path.write_text('{"schema"')
    with pytest.raises(ArtefactError, match="no JSON object"):
        read_baseline(path)
    with pytest.raises(UsageError, match="nowhere"):
        read_baseline(tmp_path / "nowhere.json")
