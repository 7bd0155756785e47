"""`bench` as CI sees it: exit codes, files, and what goes to standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import edge_anomaly_runtime.bench.compare
from edge_anomaly_runtime.bench.compare import Comparison

from .conftest import Run

QUICK = ["--runs", "12", "--no-warm-up", "--engine", "onnxruntime", "--threads", "1"]


def test_bench_prints_a_table_or_json(run: Run, tiny_bundle: Path) -> None:
    code, out, err = run("bench", tiny_bundle, *QUICK)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["ms", "total", "decode", "resize", "infer", "post"]
    assert "n/a: 12 samples are too few (p90 64, p95 130, p99 662, p99.9 6636 are needed)" in out
    assert "12 runs, 2 images" in err
    code, out, _ = run("bench", "run", tiny_bundle, *QUICK, "--json")
    report = json.loads(out)
    assert (code, report["schema"], report["runs"], report["gates"]) == (0, "edge-anomaly.bench/1", 12, [])
    assert "samples_ms" not in report
    code, out, _ = run("bench", "--json", "--samples", tiny_bundle, *QUICK)
    assert len(json.loads(out)["samples_ms"]) == 12


def test_a_missed_limit_ends_with_code_1_and_every_file_is_written(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("gab", "junit", "markdown", "html")}
    flags = [part for name, path in files.items() for part in (f"--{name}", path)]
    limits = ["--budget", "p50=1000ms", "--budget", "infer.min=0.0001"]
    code, out, err = run("bench", tiny_bundle, *QUICK, *limits, *flags, "--plots", tmp_path / "plots", "--json")
    assert code == 1
    assert "FAIL infer.min" in err
    assert "1 of 2 limits are not kept: infer.min" in err
    assert [gate["ok"] for gate in json.loads(out)["gates"]] == [True, False]
    assert json.loads(files["gab"].read_text())[0]["name"].endswith("/min")
    suite: Any = ElementTree.parse(files["junit"]).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert "**failed**" in files["markdown"].read_text()
    assert "<svg" in files["html"].read_text()
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "histogram.svg",
        "over-time.svg",
        "percentiles.svg",
    ]
    # A summary is added to, as $GITHUB_STEP_SUMMARY wants it.
    run("bench", tiny_bundle, *QUICK, "--markdown", files["markdown"])
    assert files["markdown"].read_text().count("### ") == 2


def test_a_baseline_gates_the_next_measurement(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    _, out, _ = run("bench", tiny_bundle, *QUICK, "--json")
    base = tmp_path / "base.json"
    base.write_text(out)
    code, _, err = run("bench", tiny_bundle, *QUICK, "--baseline", base, "--max-ratio", "p50=1000")
    assert (code, "ok   p50" in err) == (0, True)
    code, _, err = run("bench", tiny_bundle, *QUICK, "--baseline", base, "--max-ratio", "p50=0.001")
    assert (code, "FAIL p50" in err) == (1, True)
    report = json.loads(out)
    report["environment"]["cpu"] = "another CPU"
    base.write_text(json.dumps(report))
    code, _, err = run("bench", tiny_bundle, *QUICK, "--baseline", base)
    assert (code, "another CPU" in err, "--force" in err) == (4, True, True)
    assert run("bench", tiny_bundle, *QUICK, "--baseline", base, "--max-ratio", "p50=1000", "--force")[0] == 0


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--budget", "p99=25ms"], 2, "it needs 662"),
        (["--budget", "fast"], 2, "--budget fast"),
        (["--floor", "auroc=0.9"], 1, "auroc"),  # the tiny bundle's export has measured none
        (["--max-ratio", "p50=1.1"], 2, "--baseline"),
        (["--scenario", "paced"], 2, "--rate"),
        (["--scenario", "camera"], 2, "camera"),
        (["--precision", "fp16"], 2, "fp16"),
        (["--images", "/nowhere"], 2, "/nowhere"),
        (["--samples"], 2, "Add --json"),
        (["--budget", "medain=3"], 2, "medain"),
        (["--baseline", "/nowhere.json"], 2, "/nowhere.json"),
    ],
)
def test_bad_input_ends_with_its_code_and_says_why(
    run: Run, tiny_bundle: Path, options: list[str], code: int, text: str
) -> None:
    found, _, err = run("bench", tiny_bundle, *QUICK, *options)
    assert found == code
    assert text in err


def test_compare_measures_a_graph_against_itself(run: Run, tiny_bundle: Path) -> None:
    key = f"{tiny_bundle}@onnxruntime/int8"
    code, out, err = run("bench", "compare", key, key, "--rounds", "8", "--max-ratio", "3", "--threads", "1", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert report["schema"] == "edge-anomaly.bench-compare/1"
    assert not report["is_slower"]
    assert 0.3 < report["ratio"] < 3
    code, _, err = run("bench", "compare", key, key, "--rounds", "3")
    assert (code, "--rounds 3" in err) == (2, True)
    code, _, err = run("bench", "compare", key, f"{tiny_bundle}@int8")
    assert (code, "BUNDLE@ENGINE/PRECISION" in err) == (2, True)


def test_compare_ends_with_code_1_for_a_slower_bundle(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*calls: Any, limit: float, **_: Any) -> Comparison:
        for call in calls:
            call()
        return Comparison((1.0,) * 45, (1.3,) * 45, 1.3, 1.02, 1e-9, limit)

    monkeypatch.setattr(edge_anomaly_runtime.bench.compare, "compare", slow)
    code, out, err = run("bench", "compare", tiny_bundle, tiny_bundle)
    assert code == 1
    assert "B / A 1.300 (limit 1.1, noise 1.020" in out
    assert "takes 1.30 times as long" in err


def test_sweep_prints_the_highest_rate_and_draws_it(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    flags = ["--rate", "20", "--rate", "12", "--seconds", "1", "--engine", "onnxruntime", "--threads", "1"]
    code, out, err = run("bench", "sweep", tiny_bundle, *flags, "--plot", tmp_path / "plots" / "pace.svg")
    assert code == 0
    assert "20 a second: 20 scored" in err
    assert out.endswith("a second without missing one\n")
    assert "<svg" in (tmp_path / "plots" / "pace.svg").read_text()
    code, out, _ = run("bench", "sweep", tiny_bundle, *flags, "--json")
    report = json.loads(out)
    assert (report["schema"], [row["rate"] for row in report["rates"]]) == ("edge-anomaly.bench-sweep/1", [12, 20])
    code, _, err = run("bench", "sweep", tiny_bundle, "--rate", "0")
    assert code == 2
    assert "--rate 0 is not possible" in err
