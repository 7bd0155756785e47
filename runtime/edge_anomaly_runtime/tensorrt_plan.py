"""From an ONNX graph to a TensorRT plan: parse, set the precision, build within the memory that there is.

Two ways of stating the precision. Up to TensorRT 10 the graph is FP32 with quantise and dequantise nodes, and flags
allow the builder FP16 and INT8 (`weak`). From 11 on these flags are gone and each tensor has the type that the graph
gives it (`strong`). Explicit quantisation works in all of them, so there is no calibrator here.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

from .atomic import replace_file
from .errors import ArtefactError
from .progress import is_interactive, say
from .tensorrt_library import forget_log, not_none, shared_logger, started, with_log

MIB = 1 << 20


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is built.

    strong: every type comes from the graph (TensorRT 11). precision: fp32, fp16 or int8. float_prefix: nodes that
    begin so compute in FP32. shape: of the input, [N, H, W, 3], for graphs whose batch axis is free. workspace_mib and
    optimization_level are where the attempts start.
    """

    strong: bool
    precision: str
    float_prefix: str
    shape: tuple[int, ...]
    workspace_mib: int
    optimization_level: int


@dataclass(frozen=True)
class Plan:
    """A serialised engine, and what it took."""

    data: bytes
    workspace_mib: int
    optimization_level: int | None
    seconds: float
    pinned: int


def build_plan(trt: Any, graph: bytes, options: PlanOptions, timing_cache: Path) -> Plan:
    """Build an engine for the GPU here, in seconds to many minutes.

    Raises:
        MissingRequirementError: TensorRT cannot use the driver.
        ArtefactError: the parser refuses the graph (all its errors are named), or no attempt gave an engine.
        KeyboardInterrupt: the user stopped the build.
    """
    forget_log()
    start = perf_counter()
    logger = shared_logger(trt)
    if init_plugins := getattr(trt, "init_libnvinfer_plugins", None):
        init_plugins(logger, "")
    builder = started(trt.Builder, trt, "TensorRT cannot start a builder.")
    network = not_none(builder.create_network(_network_flags(trt, options)), "TensorRT cannot make a network.", _DOCTOR)
    parser = trt.OnnxParser(network, logger)  # the network's weights lie in the parser: both live until the build ends
    _parse(trt, parser, graph)
    config = not_none(builder.create_builder_config(), "TensorRT cannot make a configuration.", _DOCTOR)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector names layers without types
    pinned = _set_precision(trt, config, network, options)
    _add_profile(builder, config, network, options.shape)
    _load_timing_cache(config, timing_cache)
    with _progress(trt, config) as stopped:
        data, workspace, level = _climb(trt, builder, network, config, options, stopped)
    _save_timing_cache(config, timing_cache)
    return Plan(data, workspace, level, round(perf_counter() - start, 1), pinned)


def attempts(workspace_mib: int, level: int, *, has_levels: bool) -> list[tuple[int, int | None]]:
    """List what to try in turn: (workspace in MiB, optimisation level).

    Half the workspace first, then a lower level, which tries fewer kernels.

    >>> attempts(1024, 3, has_levels=True)
    [(1024, 3), (512, 3), (512, 2), (512, 1)]
    >>> attempts(1024, 3, has_levels=False)
    [(1024, None), (512, None)]
    """
    half = max(1, workspace_mib // 2)
    if not has_levels:
        return [(workspace_mib, None), (half, None)]
    return [(workspace_mib, level), (half, level), *((half, lower) for lower in range(level - 1, 0, -1))]


def _network_flags(trt: Any, options: PlanOptions) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    # EXPLICIT_BATCH: needed by 8, ignored by 10, gone in 11.
    names = ("STRONGLY_TYPED",) if options.strong else ("EXPLICIT_BATCH",)
    return sum(1 << int(getattr(flags, name)) for name in names if hasattr(flags, name))


def _parse(trt: Any, parser: Any, graph: bytes) -> None:
    if parser.parse(graph):
        return
    errors = [_described(parser.get_error(index)) for index in range(parser.num_errors)]
    listed = "\n".join(f"- {error}" for error in errors)
    raise ArtefactError(
        f"TensorRT {trt.__version__} refuses the graph:\n{listed}" if errors else with_log("TensorRT refuses it."),
        "Export the bundle again for this TensorRT (an older one needs --opset 17).",
    )


def _described(error: Any) -> str:
    # Up to TensorRT 8 an error tells the node's number only; a file that is no ONNX has no nodes.
    if hasattr(error, "node_name"):
        if not error.node_operator():
            return str(error.desc())
        return f"{error.node_name()} ({error.node_operator()}): {error.desc()}"
    return f"node {error.node()}: {error.desc()}"


def _set_precision(trt: Any, config: Any, network: Any, options: PlanOptions) -> int:
    """Set the flags, hold the head in FP32, and return how many layers were held."""
    # TF32 keeps 10 bits of a product's factors: distances and whitening would lose what the thresholds rest on.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.strong or options.precision == "fp32":
        return 0
    config.set_flag(trt.BuilderFlag.FP16)
    if options.precision == "int8":
        config.set_flag(trt.BuilderFlag.INT8)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return sum(
        _hold_in_float(trt, network.get_layer(index))
        for index in range(network.num_layers)
        if network.get_layer(index).name.startswith(options.float_prefix)
    )


def _hold_in_float(trt: Any, layer: Any) -> bool:
    """Let a layer compute and write in FP32, unless it works on shapes, indices or constants."""
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
        return False
    if not all(output.is_execution_tensor and output.dtype == trt.DataType.FLOAT for output in outputs):
        return False
    layer.precision = trt.DataType.FLOAT
    for index in range(layer.num_outputs):
        layer.set_output_type(index, trt.DataType.FLOAT)
    return True


def _add_profile(builder: Any, config: Any, network: Any, shape: tuple[int, ...]) -> None:
    """Give a free batch axis the bundle's own size; static graphs need no profile."""
    tensor = network.get_input(0)
    there = tuple(tensor.shape)
    if -1 not in there:
        return
    if -1 in there[1:] or there[1:] != shape[1:]:
        raise ArtefactError(
            f"The graph's input {tensor.name} has shape {list(there)}; only the first axis may be free, "
            f"and the rest must be {list(shape[1:])}.",
            "Export the bundle again.",
        )
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)


def _climb(
    trt: Any, builder: Any, network: Any, config: Any, options: PlanOptions, stopped: list[bool]
) -> tuple[bytes, int, int | None]:
    has_levels = hasattr(config, "builder_optimization_level")  # from 8.6 on
    ladder = attempts(options.workspace_mib, options.optimization_level, has_levels=has_levels)
    for number, (workspace, level) in enumerate(ladder, start=1):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace * MIB)
        if level is not None:
            config.builder_optimization_level = level
        plan = builder.build_serialized_network(network, config)
        if stopped:
            raise KeyboardInterrupt
        if plan is not None:
            return bytes(plan), workspace, level
        say(f"attempt {number} of {len(ladder)} failed (workspace {workspace} MiB, level {level})")
    raise ArtefactError(
        with_log(f"TensorRT {trt.__version__} built no engine in {len(ladder)} attempts."),
        "Close other programs to free memory, or give less with --workspace-mib; a graph that this TensorRT cannot "
        "build needs another export.",
    )


def _load_timing_cache(config: Any, path: Path) -> None:
    """Take over how fast kernels were in earlier builds; a missing or damaged file only costs time."""
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    digest, data = stored[:32], stored[32:]
    cache = config.create_timing_cache(data if hashlib.sha256(data).digest() == digest else b"")
    if cache is not None:
        config.set_timing_cache(cache, False)


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        data = bytes(cache.serialize())
        replace_file(path, hashlib.sha256(data).digest() + data)


@contextlib.contextmanager
def _progress(trt: Any, config: Any) -> Iterator[list[bool]]:
    """Show the builder's steps and let Ctrl-C stop it, where this TensorRT tells of them (from 10 on).

    Yields a list that is not empty once the user has asked to stop.
    """
    stopped: list[bool] = []
    if not hasattr(config, "progress_monitor") or threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(True)

    config.progress_monitor = _monitor(trt, stopped)
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
        if is_interactive():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _monitor(trt: Any, stopped: list[bool]) -> Any:
    shown = is_interactive()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called by TensorRT from its own threads; a phase may lie inside another one."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if shown:
                line = f"\r\x1b[K{phase_name} {step + 1}/{self.steps.get(phase_name, 0)}"
                print(line[:100], end="", file=sys.stderr, flush=True)
            return not stopped

    return Monitor()


_DOCTOR = "See `edge-anomaly doctor`; restart the process."
