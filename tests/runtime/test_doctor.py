"""What works here, and what to type for the rest."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest

from edge_anomaly_runtime import cuda, doctor
from edge_anomaly_runtime.doctor import examine
from edge_anomaly_runtime.tensorrt_library import tensorrt_state

from .conftest import MakeGpu
from .fake_cuda import FakeDriver

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
    assert report["engines"] == {"tensorrt": False, "openvino": True, "onnxruntime": True}
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


def test_each_part_of_stream_is_usable_or_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine()["stream"]
    assert report["cameras and video"] == "ok"
    assert "nvarguscamerasrc" in report["csi cameras"] or "gst-launch" in report["csi cameras"]
    assert "apt-get" in report["decoder nvdec"]
    monkeypatch.setitem(sys.modules, "av", None)
    assert examine()["stream"]["cameras and video"] == 'not installed. Run: pip install "edge-anomaly[video]"'


@pytest.mark.parametrize(("found", "expected"), [([], 1), (["avx512_vnni"], 0)])
def test_a_cpu_without_int8_instructions_is_told(
    monkeypatch: pytest.MonkeyPatch, found: list[str], expected: int
) -> None:
    monkeypatch.setattr("edge_anomaly_runtime.doctor.int8_instructions", lambda: found)
    report = examine()
    assert report["int8_instructions"] == found
    assert sum("no INT8 dot-product instructions" in line for line in report["advice"]) == expected


# TensorRT


def _bindings(folder: Path, *names: str) -> tuple[str, ...]:
    for name in names:
        (folder / name).mkdir(parents=True)
    return (str(folder / "python3.*/dist-packages/tensorrt"),)


HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_tensorrt_that_is_not_installed() -> None:
    state, detail, hint = tensorrt_state(())
    assert (state, detail) == ("not installed", "The package tensorrt is not installed.")
    assert "python3-libnvinfer" in hint


def test_tensorrt_for_another_python(tmp_path: Path) -> None:
    folders = _bindings(tmp_path, "python3.6/dist-packages/tensorrt")
    state, detail, hint = tensorrt_state(folders)
    assert state == "other python"
    assert "installed for Python 3.6" in detail
    assert f"this is Python {HERE}" in detail
    assert "python3.6 -m venv --system-site-packages" in hint


def test_tensorrt_for_this_python_outside_the_environment(tmp_path: Path) -> None:
    folders = _bindings(tmp_path, "python3.6/dist-packages/tensorrt", f"python{HERE}/dist-packages/tensorrt")
    state, _, hint = tensorrt_state(folders)
    assert state == "outside the environment"
    assert hint.endswith("python3 -m venv --system-site-packages ENV")


def test_tensorrt_for_a_python_that_only_the_library_names(tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/tensorrt.cpython-36m-aarch64-linux-gnu.so").touch()
    state, _, _ = tensorrt_state((str(tmp_path / "tensorrt"),))
    assert state == "other python"


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
            "library missing",
            "libnvinfer.so.10",
        ),
        ("raise OSError('libnvonnxparser.so.8')", "library missing", "libnvonnxparser.so.8"),
        ("import no_such_module_here", "library missing", "no_such_module_here"),
        ("__version__ = '8.2.1.9'", "too old", "TensorRT 8.2.1.9 is too old: 8.5"),
        ("__version__ = '10.3.0'", "ok", "TensorRT 10.3.0"),
        ("", "library missing", "is not TensorRT"),
    ],
)
def test_tensorrt_that_is_there_but_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, state: str, words: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    found, detail, hint = tensorrt_state(())
    sys.modules.pop("tensorrt", None)
    assert found == state
    assert words in detail
    assert bool(hint) == (state != "ok")


def test_a_machine_without_a_gpu_is_told_in_the_report_and_not_in_the_advice() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    report = examine()
    assert "no NVIDIA driver" in report["tensorrt"]["driver"]
    assert report["tensorrt"]["usable"] is False
    assert not any("ensor" in line for line in report["advice"])


def test_a_jetson_gets_advice_release_and_power_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "l4t_release", lambda: "36.4.0")
    monkeypatch.setattr(doctor, "power_mode", lambda: "MAXN")
    report = examine()
    assert (report["tensorrt"]["l4t"], report["tensorrt"]["power_mode"]) == ("36.4.0", "MAXN")
    assert any("The package tensorrt is not installed" in line for line in report["advice"])
    assert any(line.startswith("TensorRT cannot be used: ") for line in report["advice"])


def test_with_gpu_and_package_tensorrt_is_usable(make_gpu: MakeGpu) -> None:
    make_gpu("10.3.0")
    report = examine()
    assert report["engines"]["tensorrt"] is True
    assert (report["tensorrt"]["driver"], report["tensorrt"]["package"]) == ("ok", "ok")
    assert report["tensorrt"]["cuda_runtime"] == "ok"


def test_a_driver_without_cudas_library_is_told(make_gpu: MakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpu("10.3.0")
    monkeypatch.setattr(cuda, "_load", {"libcuda.so.1": FakeDriver()}.get)
    report = examine()
    assert report["engines"]["tensorrt"] is False
    assert "no CUDA runtime library" in report["tensorrt"]["cuda_runtime"]
    assert f"TensorRT cannot be used: {report['tensorrt']['cuda_runtime']}" in report["advice"]
