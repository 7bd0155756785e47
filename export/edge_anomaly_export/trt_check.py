"""Does NVIDIA's own parser read an ONNX graph, and does its builder make an engine of it? No GPU is needed.

The package is TensorRT for RTX: a parser of the TensorRT 11 kind, newer than what runs on a Jetson. It refuses what
no TensorRT takes; it does not show that an older one builds the graph, nor that INT8 kernels are chosen, nor any speed.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from edge_anomaly_runtime.errors import EdgeAnomalyError, MissingRequirementError, missing_extra

PACKAGE, EXTRA = "tensorrt_rtx", "trt-check"
TIMEOUT_S = 120.0

_STOPPED = "was stopped"

# Where there is no GPU, every first error is followed by a line on the missing driver.
_NO_DRIVER = "(cudaError 35:"


@dataclass(frozen=True)
class ParserError:
    """What the parser refuses, and the node where it does ('' where it names none)."""

    node: str
    operator: str
    description: str


@dataclass(frozen=True)
class CheckResult:
    """What parser and builder said about one graph.

    `plan_bytes`: size of the engine that was built, and thrown away. `seconds`: parsing and building. `crash`: how the
    process ended that parsed and built, '' if it came to its end.
    """

    version: str = ""
    parsed: bool = False
    errors: tuple[ParserError, ...] = ()
    built: bool = False
    plan_bytes: int = 0
    seconds: float = 0.0
    log_warnings: tuple[str, ...] = ()
    log_errors: tuple[str, ...] = ()
    crash: str = ""

    @property
    def timed_out(self) -> bool:
        """Tell whether the time limit ended the check: that says nothing about the graph."""
        return self.crash.startswith(_STOPPED)

    @property
    def ok(self) -> bool:
        """Tell whether the graph was parsed and built."""
        return self.parsed and self.built

    def __str__(self) -> str:
        """Return the verdict in a line, with the first reason where it is bad."""
        name = f"TensorRT for RTX {self.version}".rstrip()
        if self.crash:
            return f"{name} {self.crash}"
        if self.ok:
            return f"{name} builds the graph: {self.plan_bytes / 1e6:.1f} MB in {self.seconds:.1f} s"
        if not self.parsed and self.errors:
            first = self.errors[0]
            reason = first.description.splitlines()[-1]  # the first line only names the node
            return f"{name} cannot read node {first.node!r} ({first.operator}): {reason}"
        reason = self.log_errors[-1].splitlines()[-1] if self.log_errors else "it gives no reason"
        return f"{name} cannot {'build' if self.parsed else 'read'} the graph: {reason}"


def is_installed() -> bool:
    """Tell whether NVIDIA's package can be found, without importing it."""
    return importlib.util.find_spec(PACKAGE) is not None


def check_with_nvidia(model: bytes, *, timeout_s: float = TIMEOUT_S) -> CheckResult:
    """Parse and build a serialised ONNX graph (no external data) in a process of its own.

    The process keeps a crash in NVIDIA's library from ending this one; its logger, too, is one for all graphs.

    Raises:
        MissingRequirementError: the package is not installed, or its libraries cannot be loaded.
        EdgeAnomalyError: the process ended without a result, and without a crash.
    """
    if not is_installed():
        raise missing_extra("The check with NVIDIA's parser", PACKAGE, EXTRA)
    command = [sys.executable, "-m", __name__]
    try:
        process = subprocess.run(command, input=model, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return CheckResult(crash=f"{_STOPPED} after {timeout_s:g} s")
    output, error = (stream.decode(errors="replace").strip() for stream in (process.stdout, process.stderr))
    if process.returncode < 0:
        return CheckResult(crash=f"crashed ({_signal_name(-process.returncode)})")
    if process.returncode == MissingRequirementError.exit_code:
        raise MissingRequirementError(
            f"The package {PACKAGE} is installed but cannot be loaded: {error}.",
            f'Run: pip install --force-reinstall "edge-anomaly[{EXTRA}]"',
        )
    if process.returncode:
        last_line = error.rpartition("\n")[2]
        raise EdgeAnomalyError(f"The check with NVIDIA's parser ended with code {process.returncode}: {last_line}")
    return TypeAdapter(CheckResult).validate_json(output.splitlines()[-1])  # the library may print before


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _parse_and_build(trt: Any, model: bytes) -> CheckResult:
    """Do the work with the package `trt`, in the process made for it."""
    warnings: list[str] = []
    problems: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity == trt.ILogger.WARNING:
                warnings.append(text)
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and (text := _without_driver(text)):
                problems.append(text)

    start = time.perf_counter()
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # a name of its own: the parser crashes without its network
    parser = trt.OnnxParser(network, logger)
    parsed = bool(parser.parse(model))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    # Some limits show only here (TopK); a failure is None and a line in the log, not an exception.
    plan = builder.build_serialized_network(network, builder.create_builder_config()) if parsed else None
    return CheckResult(
        version=str(trt.__version__),
        parsed=parsed,
        errors=tuple(
            # The description of an operator that is not there is only "false"; the code says it.
            ParserError(
                error.node_name(), error.node_operator(), f"{error.code().name}: {_without_driver(error.desc())}"
            )
            for error in errors
        ),
        built=plan is not None,
        plan_bytes=0 if plan is None else int(plan.nbytes),
        seconds=time.perf_counter() - start,
        log_warnings=tuple(warnings),
        log_errors=tuple(problems),
    )


def _without_driver(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if _NO_DRIVER not in line)


def _main() -> None:
    """Read a graph from standard input and print the result as one line of JSON."""
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(MissingRequirementError.exit_code)
    result = _parse_and_build(tensorrt_rtx, sys.stdin.buffer.read())
    print(f"\n{json.dumps(asdict(result))}")


if __name__ == "__main__":
    _main()
