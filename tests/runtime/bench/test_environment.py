"""What makes figures doubtful is said in words; what may differ between two measurements and what not."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_anomaly_runtime.bench.environment import (
    differences,
    peak_rss_mb,
    reference_ms,
    temperatures,
    warnings_of,
)
from edge_anomaly_runtime.bench.harness import Report


def test_a_quiet_measurement_has_no_warnings(report: Report) -> None:
    assert warnings_of(report) == []


@pytest.mark.parametrize(
    ("where", "value", "text"),
    [
        (("environment", "load"), 1.9, "a load of 1.9"),
        (("environment", "governor"), "powersave", "'powersave'"),
        (("environment", "float_precision"), "bf16", "ran in bf16, not in f32"),
        (("environment", "int8_instructions"), [], "INT8 does not pay here"),
        (("environment", "threads"), 4, "4 threads share 2 CPUs"),
        (("reference_ms", "after"), 1.2, r"changed by \+20%"),
        (("warm_up", "is_settled"), False, "still getting faster"),
        (("full_size_images",), False, "give --images"),
    ],
)
def test_each_doubt_is_said(report: Report, where: tuple[str, ...], value: Any, text: str) -> None:
    target = report if len(where) == 1 else report[where[0]]
    target[where[-1]] = value
    (found,) = warnings_of(report)
    assert re.search(text, found)


def test_half_precision_that_was_asked_for_is_no_surprise(report: Report) -> None:
    report["environment"]["float_precision"], report["precision"] = "f16", "fp16"
    assert warnings_of(report) == []


def test_missed_frames_are_a_warning(report: Report) -> None:
    report["scheduled"], report["missed"] = 100, 60
    assert warnings_of(report) == ["60 of 100 frames were missed: the rate cannot be held"]


def test_what_must_agree_is_the_machine_not_the_moment(report: Report) -> None:
    later = copy.deepcopy(report)
    later["environment"] |= {"load": 5.0, "governor": "powersave", "engine_version": "9"}
    assert differences(later, report) == []
    later["environment"]["cpu"] = "another"
    assert differences(report, later) == ["cpu: A <CPU> & more and another"]


def test_temperatures_by_zone(tmp_path: Path) -> None:
    for index, (kind, value) in enumerate([("cpu-thermal", "45500"), ("gpu-thermal", "torn")]):
        zone = tmp_path / "class" / "thermal" / f"thermal_zone{index}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(kind + "\n")
        (zone / "temp").write_text(value + "\n")
    assert temperatures(tmp_path) == {"cpu-thermal": 45.5}
    assert temperatures(tmp_path / "nowhere") == {}


def test_memory_and_reference_work_are_measured() -> None:
    assert (peak_rss_mb() or 0) > 20
    assert 0.01 < reference_ms() < 100


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the parent's memory counts")
def test_memory_of_the_parent_is_not_counted() -> None:
    mine = np.ones(40_000_000)  # 320 MB, touched
    command = "from edge_anomaly_runtime.bench.environment import peak_rss_mb; print(peak_rss_mb())"
    child = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert (peak_rss_mb() or 0) > mine.nbytes / 1e6 > float(child.stdout)
