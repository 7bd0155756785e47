"""What works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

from .cpu import cpu_name, int8_instructions, usable_cpus
from .session import ENGINES

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
}
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def examine() -> dict[str, Any]:
    """Return a JSON-ready description of CPU, packages and engines; nothing heavy is imported."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "schema": SCHEMA,
        "edge_anomaly": _version("edge-anomaly"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "usable_cpus": usable_cpus(),
        "int8_instructions": int8_instructions(),
        "packages": packages,
        "engines": {engine: packages[package] is not None for engine, (package, _) in ENGINES.items()},
        "advice": _advice(packages),
    }


def _advice(packages: dict[str, str | None]) -> list[str]:
    lines = []
    for engine, (package, extra) in ENGINES.items():
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
