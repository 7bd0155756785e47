"""What works here, and what to type for the rest."""

from __future__ import annotations

import json
import platform
import sys

import numpy as np
import PIL
import pytest

from edge_anomaly_runtime.doctor import examine

BASE = {"numpy", "PIL", "pydantic", "openvino", "onnxruntime", "torch", "torchvision", "timm", "onnx", "onnxscript"}


def test_the_report_has_these_fields_and_fits_into_json() -> None:
    report = json.loads(json.dumps(examine(), allow_nan=False))
    assert report["schema"] == "edge-anomaly.doctor/1"
    assert report["python"] == platform.python_version()
    assert report["edge_anomaly"]
    assert report["usable_cpus"] >= 1
    assert report["packages"].keys() >= BASE
    assert report["packages"]["numpy"] == np.__version__
    assert report["packages"]["PIL"] == PIL.__version__
    assert report["engines"] == {"openvino": True, "onnxruntime": True}
    assert all(isinstance(line, str) for line in report["advice"])


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("openvino", 'Engine openvino is not installed. Run: pip install "edge-anomaly[openvino]"'),
        ("onnxruntime", 'Engine onnxruntime is not installed. Run: pip install "edge-anomaly[onnxruntime]"'),
        ("torch", 'Training is not installed. Run: pip install "edge-anomaly[train]"'),
        ("onnxscript", 'Export is not installed. Run: pip install "edge-anomaly[export]"'),
    ],
)
def test_a_missing_package_gives_the_line_to_type(monkeypatch: pytest.MonkeyPatch, package: str, line: str) -> None:
    assert line not in examine()["advice"]
    monkeypatch.setitem(sys.modules, package, None)
    report = examine()
    assert report["packages"][package] is None
    assert line in report["advice"]
    if package in report["engines"]:
        assert report["engines"][package] is False


@pytest.mark.parametrize(("found", "expected"), [([], 1), (["avx512_vnni"], 0)])
def test_a_cpu_without_int8_instructions_is_told(
    monkeypatch: pytest.MonkeyPatch, found: list[str], expected: int
) -> None:
    monkeypatch.setattr("edge_anomaly_runtime.doctor.int8_instructions", lambda: found)
    report = examine()
    assert report["int8_instructions"] == found
    assert sum("no INT8 dot-product instructions" in line for line in report["advice"]) == expected
