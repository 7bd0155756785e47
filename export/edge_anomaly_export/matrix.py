"""What can be exported to what: one table for checking options, for the help, the docs and the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_anomaly.detectors import DETECTORS
from edge_anomaly_runtime.bundle import CLASSIFIER
from edge_anomaly_runtime.session import PRECISIONS


@dataclass(frozen=True)
class Target:
    """One value of --target.

    package, extra: what this machine needs for it, and how pip brings it; None where the export's own packages do.
    note: what is written.
    """

    package: str | None
    extra: str
    note: str


TARGETS: dict[str, Target] = {
    "onnx": Target(None, "export", "one ONNX file per precision, read by both CPU engines"),
    "openvino": Target("openvino", "openvino", "OpenVINO IR at the bundle's precision, beside the ONNX files"),
    "tensorrt": Target(None, "export", "ONNX files and a recipe; the engine is built on the device"),
}

MODELS: tuple[str, ...] = (CLASSIFIER, *DETECTORS)

# TensorRT 8.5 has no LayerNormalization; from 10 on everything here parses.
LEAST_TENSORRT = {"vit-knn": "8.6"}
TENSORRT_VERSIONS = {"8.5": 17, "8.6": 17, "10.0": 18, "10.3": 18, "11.0": 18}


@dataclass(frozen=True)
class Cell:
    """One export that must work."""

    model: str
    target: str
    precision: str


def cells() -> Iterator[Cell]:
    """Yield the whole matrix: every model goes to every target in every precision."""
    for model in MODELS:
        for target in TARGETS:
            for precision in PRECISIONS:
                yield Cell(model, target, precision)


def version_parts(version: str) -> tuple[int, ...]:
    """Return a version for comparing.

    >>> version_parts("10.3") > version_parts("8.6")
    True
    """
    return tuple(int(part) for part in version.split("."))
