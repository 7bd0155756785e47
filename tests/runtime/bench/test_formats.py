"""What other programs read: JSON for github-action-benchmark, JUnit, Markdown, SVG and HTML that parse."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

from edge_anomaly_runtime.bench.formats import (
    fact_lines,
    github_action_benchmark,
    headline,
    junit,
    markdown,
    stage_rows,
)
from edge_anomaly_runtime.bench.gates import Gate
from edge_anomaly_runtime.bench.harness import Report
from edge_anomaly_runtime.bench.plots import page, plots

GATES = [Gate("p50", 10.0, 12.0), Gate("p99", 30.0, 25.0), Gate("auroc", None, 0.9, is_floor=True)]


def test_the_table_says_what_cannot_be_shown(report: Report) -> None:
    heading, total, _ = stage_rows(report)
    assert heading == ["ms", "min", "p50", "p90", "p95", "p99", "p99.9", "max"]
    assert total == ["total", "9.00", "10.00", "10.00", "12.00", "30.00", "n/a", "30.00"]
    facts = "\n".join(fact_lines(report))
    assert "n/a: 700 samples are too few (p99.9 6636 are needed)" in facts
    assert "4 in f32, 33 in u8" in facts
    assert "100.0 images a second, 16.00 ms of CPU time an image, peak memory 150 MB" in facts
    assert headline(report) == "part on openvino int8, 2 threads, single: 700 runs, 8 images"


def test_markdown_is_a_table_with_the_gates(report: Report) -> None:
    report["warnings"] = ["the machine was busy"]
    text = markdown(report, GATES)
    assert "| total | 9.00 | 10.00 | 10.00 | 12.00 | 30.00 | n/a | 30.00 |" in text
    assert "| p99 | 30 | at most 25 | **failed** |" in text
    assert "| auroc | missing | at least 0.9 | **failed** |" in text
    assert "> Warning: the machine was busy." in text


def test_github_action_benchmark_gets_what_is_known_and_smaller_is_better(report: Report) -> None:
    rows = {row["name"]: row for row in json.loads(github_action_benchmark(report))}
    assert list(rows) == [f"part/openvino-int8/single/{name}" for name in ("min", "p50", "p90", "p95", "p99", "cpu")]
    assert rows["part/openvino-int8/single/p50"]["value"] == 10.0
    assert all(row["unit"] == "ms" for row in rows.values())


def test_junit_has_a_case_for_every_gate_and_escapes_what_xml_does_not_take(report: Report) -> None:
    suite = ElementTree.fromstring(junit(report, GATES))
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert cases["p50"] is None
    assert cases["p99"] is not None
    assert cases["p99"].get("message") == "FAIL p99: 30 (limit <= 25)"
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert properties["cpu"] == "A <CPU> & more"
    assert properties["usable_cpus"] == "2"


def test_plots_parse_and_every_mark_is_inside_the_picture(report: Report) -> None:
    drawn = plots(report)
    assert list(drawn) == ["over-time", "histogram", "percentiles"]
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        for mark in root.iter():
            for name, most in (("cx", 720), ("cy", 260), ("x", 720), ("y", 260)):
                if (value := mark.get(name)) is not None:
                    assert 0 <= float(value) <= most
    namespace = "{http://www.w3.org/2000/svg}"
    assert len(list(ElementTree.fromstring(drawn["over-time"]).iter(f"{namespace}circle"))) == 700
    heights = [
        float(bar.get("height", 0)) for bar in ElementTree.fromstring(drawn["histogram"]).iter(f"{namespace}rect")
    ]
    assert max(heights[1:]) / min(heights[1:]) == 350 / 10 or math.isclose(
        max(heights[1:]) / min(heights[1:]), 35, rel_tol=0.05
    )


def test_a_pace_has_a_picture_of_its_own(report: Report) -> None:
    report["scenario"] = {"kind": "paced", "rate": 25.0, "streams": 1}
    report["started_s"] = [index / 25 for index in range(700)]
    assert "25 a second (40.0 ms each)" in plots(report)["pace"]


def test_equal_samples_and_a_single_one_can_be_drawn(report: Report) -> None:
    for samples in ([5.0], [5.0] * 40):
        report["samples_ms"] = samples
        assert all("nan" not in svg and "inf" not in svg for svg in plots(report).values())


def test_the_page_stands_alone_and_escapes(report: Report) -> None:
    report["warnings"] = ["<script>"]
    text = page(report, GATES)
    assert text.count("<svg") == 3
    assert "A &lt;CPU&gt; &amp; more" in text
    assert "<script>" not in text
    assert not re.search(r"(src|href)=", text)
