"""The seam between scoring and engines: one protocol, and the choice of engine and precision."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .cpu import int8_instructions, usable_cpus
from .errors import MissingRequirementError, UsageError, did_you_mean, missing_extra

# Engine name to (import name, extra), in the order in which `auto` prefers them.
ENGINES = {"openvino": ("openvino", "openvino"), "onnxruntime": ("onnxruntime", "onnxruntime")}
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


def open_session(
    bundle: Bundle, *, engine: str = "auto", precision: str = "auto", threads: int | None = None
) -> tuple[Session, str, str, tuple[str, ...]]:
    """Load the bundle's graph and return the session, engine, precision, and why they were chosen.

    Raises:
        UsageError: unknown engine or precision, or the bundle lacks the graph that was asked for.
        MissingRequirementError: the engine's package is not installed.
        ArtefactError: the graph's file does not match its hash, or the engine refuses it.
    """
    if engine not in ("auto", *ENGINES):
        raise did_you_mean("engine", engine, ["auto", *ENGINES])
    if precision not in ("auto", *PRECISIONS):
        raise did_you_mean("precision", precision, ["auto", *PRECISIONS])
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} is not possible.", "Give 1 or more.")
    chosen_engine, engine_reasons = _choose_engine(bundle, engine)
    chosen_precision, precision_reason = _choose_precision(bundle, precision)
    name = bundle.graph(chosen_engine, chosen_precision)
    model = bundle.read(name)
    weights = bundle.read(name.removesuffix(".xml") + ".bin") if name.endswith(".xml") else None
    session = open_engine(chosen_engine, model, weights=weights, threads=threads)
    return session, chosen_engine, chosen_precision, (*engine_reasons, precision_reason)


def open_engine(engine: str, model: bytes, *, weights: bytes | None = None, threads: int | None = None) -> Session:
    """Load ONNX, or OpenVINO IR with its `weights`, from bytes; `threads` defaults to what the machine grants."""
    threads = threads or usable_cpus()
    if engine == "openvino":
        from .engine_openvino import open_openvino

        return open_openvino(model, weights=weights, threads=threads)
    from .engine_onnxruntime import open_onnxruntime

    return open_onnxruntime(model, threads=threads)


def is_installed(engine: str) -> bool:
    """Tell whether the engine's package can be found, without importing it."""
    return importlib.util.find_spec(ENGINES[engine][0]) is not None


def _choose_engine(bundle: Bundle, engine: str) -> tuple[str, tuple[str, ...]]:
    if engine != "auto":
        if not is_installed(engine):
            raise missing_extra(f"--engine {engine}", *ENGINES[engine])
        return engine, ()
    reasons = []
    for candidate, (package, extra) in ENGINES.items():
        if not any(key.startswith(f"{candidate}/") for key in bundle.manifest.graphs):
            reasons.append(f"not {candidate}: the bundle was not exported for it")
        elif not is_installed(candidate):
            reasons.append(f'not {candidate}: package {package} is missing (pip install "edge-anomaly[{extra}]")')
        else:
            return candidate, (*reasons, f"engine {candidate}: first usable of {', '.join(ENGINES)}")
    raise MissingRequirementError(f"No engine can run this bundle: {'; '.join(reasons)}.", "Install one of them.")


def _choose_precision(bundle: Bundle, precision: str) -> tuple[str, str]:
    if precision != "auto":
        return precision, f"precision {precision}: asked for"
    if bundle.manifest.precision == "fp32":
        return "fp32", "precision fp32: the bundle's own"
    if not int8_instructions():
        return "fp32", "precision fp32: this CPU has no INT8 dot-product instructions (ask for int8 to use it anyway)"
    return "int8", "precision int8: the bundle's own"
