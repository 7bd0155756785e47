"""What works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

from .cpu import cpu_name, int8_instructions, usable_cpus
from .cuda import available_memory, driver_fault, runtime_fault
from .errors import MissingRequirementError
from .jetson import l4t_release, power_mode
from .session import CPU_ENGINES, ENGINES
from .stream.source_gst import CSI_ELEMENTS, NVDEC_ELEMENTS, require_gstreamer
from .tensorrt_library import tensorrt_state

SCHEMA = "edge-anomaly.doctor/1"

# Import name to the extra that brings it.
_PACKAGES = {
    "numpy": "",
    "PIL": "",
    "pydantic": "",
    **{package: extra for package, extra in ENGINES.values()},
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "onnx": "export",
    "onnxscript": "export",
    "av": "video",
    "paho": "mqtt",
    "cryptography": "sign",
    "starlette": "web",
}
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "paho": "paho-mqtt"}
# What `stream` needs a package for, by its name in the report.
_STREAM_PACKAGES = {"cameras and video": "av", "sink mqtt": "paho", "page": "starlette"}


def examine() -> dict[str, Any]:
    """Return a JSON-ready description of CPU, packages, engines and TensorRT.

    Of the large packages only TensorRT is imported: nothing less tells whether its libraries are there. An engine is
    true where its package (TensorRT: and driver and CUDA runtime) can be used.
    """
    packages = {name: _version(name) for name in _PACKAGES}
    tensorrt = _tensorrt()
    return {
        "schema": SCHEMA,
        "edge_anomaly": _version("edge-anomaly"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "usable_cpus": usable_cpus(),
        "int8_instructions": int8_instructions(),
        "packages": packages,
        "engines": {
            "tensorrt": tensorrt["usable"],
            **{engine: packages[ENGINES[engine][0]] is not None for engine in CPU_ENGINES},
        },
        "tensorrt": tensorrt,
        "stream": _stream(packages),
        "advice": _advice(packages, tensorrt),
    }


def _tensorrt() -> dict[str, Any]:
    """Tell apart why TensorRT cannot be used: the driver, CUDA's library, and the package with its own."""
    driver = driver_fault()
    runtime = "not looked for without a driver" if driver else runtime_fault()
    state, detail, hint = tensorrt_state()
    memory = available_memory()
    return {
        "usable": driver is None and runtime is None and state == "ok",
        "driver": driver or "ok",
        "cuda_runtime": runtime or "ok",
        "package": state,
        "detail": detail,
        "hint": hint,
        "l4t": l4t_release(),
        "power_mode": power_mode(),
        "available_memory_mib": None if memory is None else memory >> 20,
    }


def _stream(packages: dict[str, str | None]) -> dict[str, str]:
    """Return what `stream` can use: 'ok', or why not and what to do."""
    report = {
        part: "ok" if packages[package] else f'not installed. Run: pip install "edge-anomaly[{_PACKAGES[package]}]"'
        for part, package in _STREAM_PACKAGES.items()
    }
    for part, elements in (("csi cameras", CSI_ELEMENTS), ("decoder nvdec", NVDEC_ELEMENTS)):
        try:
            require_gstreamer(part, elements)
            report[part] = "ok"
        except MissingRequirementError as error:
            report[part] = f"{error.what} {error.hint}"
    return report


def _advice(packages: dict[str, str | None], tensorrt: dict[str, Any]) -> list[str]:
    lines = []
    has_gpu = tensorrt["driver"] == "ok" or tensorrt["l4t"] is not None
    if tensorrt["package"] != "ok" and (has_gpu or tensorrt["package"] != "not installed"):
        lines.append(f"{tensorrt['detail']} {tensorrt['hint']}")
    if tensorrt["driver"] != "ok" and (tensorrt["package"] == "ok" or tensorrt["l4t"] is not None):
        lines.append(f"TensorRT cannot be used: {tensorrt['driver']}")
    elif tensorrt["driver"] == "ok" and tensorrt["cuda_runtime"] != "ok":
        lines.append(f"TensorRT cannot be used: {tensorrt['cuda_runtime']}")
    for engine in CPU_ENGINES:
        package, extra = ENGINES[engine]
        if packages[package] is None:
            lines.append(f'Engine {engine} is not installed. Run: pip install "edge-anomaly[{extra}]"')
    if packages["torch"] is None:
        lines.append('Training is not installed. Run: pip install "edge-anomaly[train]"')
    elif packages["onnx"] is None or packages["onnxscript"] is None:
        lines.append('Export is not installed. Run: pip install "edge-anomaly[export]"')
    if not int8_instructions():
        lines.append("This CPU has no INT8 dot-product instructions: FP32 models run about as fast as INT8 ones here.")
    return lines


def _version(name: str) -> str | None:
    if name != "edge-anomaly" and importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return None
