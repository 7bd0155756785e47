"""What an export is asked for, checked before any work."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_runtime.errors import UsageError, did_you_mean, missing_extra
from edge_anomaly_runtime.session import PRECISIONS
from edge_anomaly_runtime.thresholds import check_rates

from .graph import OPSET
from .matrix import LEAST_TENSORRT, TARGETS, TENSORRT_VERSIONS, version_parts


@dataclass(frozen=True)
class ExportOptions:
    """How to export: targets, precision, calibration images, limits of the guard.

    calibration: another run, or a folder of images, to calibrate INT8 on. trt_version: the oldest TensorRT that must
    take the files, None is 10.0. opset: None is the newest that all targets take.
    """

    targets: tuple[str, ...] = ("openvino",)
    precision: str = "int8"
    calibration_images: int = 128
    calibration: Path | None = None
    seed: int = 0
    alpha_warn: float = 0.05
    alpha_fail: float = 0.01
    limits: GuardLimits = field(default_factory=GuardLimits)
    allow_drop: bool = False
    force: bool = False
    trt_version: str | None = None
    opset: int | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError("No target was given.", f"Choose from: {', '.join(TARGETS)}.")
        for target in self.targets:
            if target not in TARGETS:
                raise did_you_mean("target", target, list(TARGETS))
        if self.precision not in PRECISIONS:
            raise did_you_mean("precision", self.precision, list(PRECISIONS))
        if self.calibration_images < 1:
            raise UsageError(f"{self.calibration_images} calibration images are not possible.", "Give 1 or more.")
        if self.trt_version is not None and not self.tensorrt:
            raise UsageError(f"--trt-version {self.trt_version} needs --target tensorrt.", "Add it, or leave it out.")
        if self.least_tensorrt not in TENSORRT_VERSIONS:
            raise did_you_mean("TensorRT version", self.least_tensorrt, list(TENSORRT_VERSIONS))
        if self.opset is not None and not 17 <= self.opset <= self.newest_opset:
            raise UsageError(
                f"Opset {self.opset} is not possible.",
                f"Choose 17 to {self.newest_opset}"
                + (f" for TensorRT {self.least_tensorrt}." if self.tensorrt else "."),
            )
        check_rates(self.alpha_warn, self.alpha_fail)

    @property
    def tensorrt(self) -> bool:
        """Whether the bundle is for TensorRT too."""
        return "tensorrt" in self.targets

    @property
    def least_tensorrt(self) -> str:
        """The oldest TensorRT that must take the files."""
        return self.trt_version or "10.0"

    @property
    def newest_opset(self) -> int:
        """The newest operator set that all targets take."""
        return min(OPSET, TENSORRT_VERSIONS[self.least_tensorrt]) if self.tensorrt else OPSET

    @property
    def used_opset(self) -> int:
        """The operator set of the exported graphs."""
        return self.opset or self.newest_opset


def check_requirements(options: ExportOptions) -> None:
    """Refuse a target whose package this machine lacks."""
    for name in options.targets:
        target = TARGETS[name]
        if target.package is not None and importlib.util.find_spec(target.package) is None:
            raise missing_extra(f"--target {name}", target.package, target.extra)


def check_least_tensorrt(kind: str, options: ExportOptions) -> None:
    """Refuse a TensorRT that lacks an operator of the model."""
    least = LEAST_TENSORRT.get(kind)
    if options.tensorrt and least is not None and version_parts(options.least_tensorrt) < version_parts(least):
        raise UsageError(
            f"{kind} has operators that TensorRT {options.least_tensorrt} does not know.",
            f"Give --trt-version {least} or newer.",
        )
