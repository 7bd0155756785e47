"""A measurement for other programs and for people: table, Markdown, github-action-benchmark, JUnit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from .gates import Gate
from .harness import Report
from .scenarios import TOTAL
from .statistics import PERCENTS, samples_needed

_STATISTICS = ("min", *(f"p{percent:g}" for percent in PERCENTS))
_COLUMNS = (*_STATISTICS, "max")


def stage_rows(report: Report) -> list[list[str]]:
    """Return a heading and a row for every stage, in milliseconds; `n/a` where there are too few samples."""
    rows = [["ms", *_COLUMNS]]
    for stage, values in report["latency_ms"].items():
        rows.append([stage, *("n/a" if values[name] is None else f"{values[name]:.2f}" for name in _COLUMNS)])
    return rows


def headline(report: Report) -> str:
    """Return what was measured, on one line."""
    scenario, around = report["scenario"], report["environment"]
    kind = scenario["kind"]
    if scenario["rate"] is not None:
        kind += f" at {scenario['rate']:g} fps"
    if scenario["streams"] > 1:
        kind += f", {scenario['streams']} cameras"
    processes = "" if report["processes"] == 1 else f" in each of {report['processes']} processes (medians of them)"
    return (
        f"{report['bundle']} on {report['engine']} {report['precision']}, {around['threads']} threads, {kind}: "
        f"{report['runs']} runs{processes}, {report['distinct_images']} images"
    )


def fact_lines(report: Report) -> list[str]:
    """Return what belongs beside the latencies: throughput, CPU, memory, start, accuracy, missing percentiles."""
    lines = [
        f"{report['images_per_second']:.1f} images a second, {report['cpu_ms_per_image']:.2f} ms of CPU time an image"
        + ("" if report["peak_rss_mb"] is None else f", peak memory {report['peak_rss_mb']:.0f} MB")
    ]
    start = {name: value for name, value in report["start_s"].items() if value is not None}
    names = {
        "verify": "verifying the bundle",
        "load": "loading and compiling",
        "first_inference": "first image",
        "first_score": "process start to first score",
    }
    lines.append("; ".join(f"{text} {start[name]:.2f} s" for name, text in names.items() if name in start))
    if report["missed"] is not None:
        lines.append(f"{report['missed']:g} of {report['scheduled']:g} frames missed")
    if report["executed"]:
        counts = ", ".join(f"{count} in {name}" for name, count in sorted(report["executed"].items()))
        lines.append(f"convolutions and matrix products executed: {counts}")
    if report["accuracy"]:
        lines.append("; ".join(f"{name} {value:.4f} at export" for name, value in report["accuracy"].items()))
    count = report["latency_ms"][TOTAL]["n"]
    missing = [percent for percent in PERCENTS if report["latency_ms"][TOTAL][f"p{percent:g}"] is None]
    if missing:
        needs = ", ".join(f"p{percent:g} {samples_needed(percent)}" for percent in missing)
        lines.append(f"n/a: {count:g} samples are too few ({needs} are needed)")
    return lines


def markdown(report: Report, gates: Sequence[Gate] = ()) -> str:
    """Return a summary for a CI job's page."""
    heading, *rows = stage_rows(report)
    lines = [f"### {report['name']}", "", headline(report), ""]
    lines += [f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += ["", *(f"- {line}" for line in fact_lines(report))]
    if gates:
        lines += ["", "| gate | measured | limit | |", "|---|---|---|---|"]
        for gate in gates:
            shown = "missing" if gate.value is None else f"{gate.value:g}"
            sign = "at least" if gate.is_floor else "at most"
            verdict = "ok" if gate.ok else "**failed**"
            lines.append(f"| {gate.name} | {shown} | {sign} {gate.limit:g}{gate.note} | {verdict} |")
    for text in report["warnings"]:
        lines += ["", f"> Warning: {text}."]
    return "\n".join(lines).rstrip() + "\n"


def github_action_benchmark(report: Report) -> str:
    """Return JSON for github-action-benchmark's `customSmallerIsBetter`: the statistics that may be gated on."""
    total = report["latency_ms"][TOTAL]
    extra = f"n={total['n']:g} processes={report['processes']} manifest={report['manifest_sha256'][:12]}"
    rows = [
        {
            "name": f"{report['name']}/{name}",
            "unit": "ms",
            "value": total[name],
            "range": f"± {total['stdev']:.3f}",
            "extra": extra,
        }
        for name in _STATISTICS
        if total[name] is not None
    ]
    rows.append({"name": f"{report['name']}/cpu", "unit": "ms", "value": report["cpu_ms_per_image"], "extra": extra})
    return json.dumps(rows, indent=1) + "\n"


def junit(report: Report, gates: Sequence[Gate]) -> str:
    """Return JUnit XML: a test case for every gate, the environment as properties."""
    failures = sum(not gate.ok for gate in gates)
    suite = ElementTree.Element(
        "testsuite", name=report["name"], tests=str(len(gates)), failures=str(failures), errors="0", skipped="0"
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in {**report["environment"], "manifest_sha256": report["manifest_sha256"]}.items():
        ElementTree.SubElement(properties, "property", name=name, value=_as_text(value))
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", classname=report["name"].replace("/", "."), name=gate.name)
        if not gate.ok:
            ElementTree.SubElement(case, "failure", message=str(gate)).text = "\n".join(report["warnings"])
    ElementTree.SubElement(suite, "system-out").text = markdown(report, gates)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
