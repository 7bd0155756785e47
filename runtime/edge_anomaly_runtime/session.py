"""The seam between scoring and engines: one protocol, and the choice of engine and precision."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .cpu import int8_instructions, usable_cpus
from .errors import MissingRequirementError, UsageError, did_you_mean, missing_extra

# Engine name to (import name, extra), in the order in which `auto` prefers them.
ENGINES = {
    "tensorrt": ("tensorrt", "tensorrt"),
    "openvino": ("openvino", "openvino"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
}
# Engines that `auto` never takes.
SIDE_ENGINES = {"onnxruntime-tensorrt": ("onnxruntime", "onnxruntime")}
# Engines that read a graph as it is, on any machine: the workstation exports and checks with these.
CPU_ENGINES = ("openvino", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class SessionInfo:
    """What really runs: read back from the engine, not copied from the request.

    `float_precision` is the arithmetic of the nodes that are not quantised.
    """

    engine: str
    version: str
    device: str
    float_precision: str
    threads: int


class Session(Protocol):
    """A loaded graph. Not safe for use from several threads at once."""

    @property
    def info(self) -> SessionInfo: ...

    def run(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """Run uint8 [N, H, W, 3] and return every output by name; the arrays belong to the caller."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class TimedSession(Protocol):
    """A session whose engine says how long the last call took by its own clock, and what it has run in which type."""

    @property
    def engine_ms(self) -> float: ...

    def executed_precisions(self) -> dict[str, int]:
        """Count the convolutions and matrix products by the precision that they really run in."""
        ...


def open_session(
    bundle: Bundle, *, engine: str = "auto", precision: str = "auto", threads: int | None = None
) -> tuple[Session, str, str, tuple[str, ...]]:
    """Load the bundle's graph and return the session, engine, precision, and why they were chosen.

    `auto` takes TensorRT only where an engine of this bundle was built on this device already.

    Raises:
        UsageError: unknown engine or precision, or the bundle lacks the graph that was asked for.
        MissingRequirementError: the engine's package, driver or device is not there, or its engine file is not built.
        ArtefactError: the graph's file does not match its hash, the engine refuses it, or its engine file belongs to
            another device or version.
    """
    if engine not in ("auto", *ENGINES, *SIDE_ENGINES):
        raise did_you_mean("engine", engine, ["auto", *ENGINES, *SIDE_ENGINES])
    if precision not in ("auto", *PRECISIONS):
        raise did_you_mean("precision", precision, ["auto", *PRECISIONS])
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} is not possible.", "Give 1 or more.")
    chosen_engine, engine_reasons = _choose_engine(bundle, engine, precision)
    chosen_precision, precision_reason = _choose_precision(bundle, chosen_engine, precision)
    session = _open(bundle, chosen_engine, chosen_precision, threads)
    return session, chosen_engine, chosen_precision, (*engine_reasons, precision_reason)


def graph_key(engine: str, precision: str) -> str:
    """Return the name under which a bundle keeps graph, thresholds and golden scores of an engine and a precision."""
    return f"{'tensorrt' if engine in SIDE_ENGINES else engine}/{precision}"


def _open(bundle: Bundle, engine: str, precision: str, threads: int | None) -> Session:
    if engine == "tensorrt":
        from .engine_tensorrt import open_tensorrt

        return open_tensorrt(bundle, precision)
    if engine == "onnxruntime-tensorrt":
        from .engine_onnxruntime_tensorrt import open_onnxruntime_tensorrt
        from .tensorrt_recipe import build_files, read_recipe

        model = bundle.read(build_files(read_recipe(bundle), precision).weak)
        return open_onnxruntime_tensorrt(model, precision=precision, threads=threads or usable_cpus())
    name = bundle.graph(engine, precision)
    model = bundle.read(name)
    weights = bundle.read(name.removesuffix(".xml") + ".bin") if name.endswith(".xml") else None
    return open_engine(engine, model, weights=weights, threads=threads)


def open_engine(engine: str, model: bytes, *, weights: bytes | None = None, threads: int | None = None) -> Session:
    """Load ONNX, or OpenVINO IR with its `weights`, on a CPU engine; `threads` defaults to what the machine grants."""
    threads = threads or usable_cpus()
    if engine == "openvino":
        from .engine_openvino import open_openvino

        return open_openvino(model, weights=weights, threads=threads)
    from .engine_onnxruntime import open_onnxruntime

    return open_onnxruntime(model, threads=threads)


def is_installed(engine: str) -> bool:
    """Tell whether the engine's package can be found, without importing it."""
    package, _ = {**ENGINES, **SIDE_ENGINES}[engine]
    return importlib.util.find_spec(package) is not None


def _choose_engine(bundle: Bundle, engine: str, precision: str) -> tuple[str, tuple[str, ...]]:
    if engine != "auto":
        # For TensorRT its own module says more: apt's package may be there, but for another Python.
        if engine != "tensorrt" and not is_installed(engine):
            raise missing_extra(f"--engine {engine}", *{**ENGINES, **SIDE_ENGINES}[engine])
        return engine, ()
    reasons: list[str] = []
    for candidate in ENGINES:
        reason = _why_not(bundle, candidate, precision)
        if reason is None:
            return candidate, (*reasons, f"engine {candidate}: first usable of {', '.join(ENGINES)}")
        reasons.append(f"not {candidate}: {reason}")
    raise MissingRequirementError(f"No engine can run this bundle: {'; '.join(reasons)}.", "Install one of them.")


def _why_not(bundle: Bundle, engine: str, precision: str) -> str | None:
    """Say why `auto` passes over an engine; None where it is usable."""
    package, extra = ENGINES[engine]
    if not any(key.startswith(f"{engine}/") for key in bundle.manifest.graphs):
        return "the bundle was not exported for it"
    if engine == "tensorrt":
        from .engine_tensorrt import why_not

        return why_not(bundle, bundle.manifest.precision if precision == "auto" else precision)
    if not is_installed(engine):
        return f'package {package} is missing (pip install "edge-anomaly[{extra}]")'
    return None


def _choose_precision(bundle: Bundle, engine: str, precision: str) -> tuple[str, str]:
    own = bundle.manifest.precision
    wanted = own if precision == "auto" else precision
    if wanted == "int8" and engine in CPU_ENGINES and not int8_instructions():
        if precision == "auto":
            return "fp32", "precision fp32: this CPU has no INT8 dot-product instructions"
        # Two products of 8 bits do not fit into the 16 that older instructions add them up in: measured, not feared.
        raise MissingRequirementError(
            "--precision int8: this CPU has no INT8 dot-product instructions; INT8 kernels saturate here and give "
            "wrong scores.",
            "Use --precision fp32, which is about as fast on such a CPU.",
        )
    if precision != "auto":
        return precision, f"precision {precision}: asked for"
    return own, f"precision {own}: the bundle's own"
