"""The `tensorrt` package: loading it, its version, and the one logger that a process can have."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import re
import sys
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from .errors import ArtefactError, EdgeAnomalyError, MissingRequirementError

OLDEST = (8, 5)
STRONG_FROM = 11

State = Literal["ok", "not installed", "other python", "outside the environment", "library missing", "too old"]

_KEPT_LINES = 50
_SHOWN_LINES = 5
_SYSTEM_FOLDERS = (
    "/usr/lib/python3.*/dist-packages/tensorrt",
    "/usr/local/lib/python3.*/dist-packages/tensorrt",
    "/usr/lib/python3/dist-packages/tensorrt",
)

# TensorRT keeps the first logger of a process and ignores all later ones, hence one place for its lines.
_LINES: deque[tuple[str, str]] = deque(maxlen=_KEPT_LINES)


def load_tensorrt() -> Any:
    """Import TensorRT's Python module. Ask for the driver first (`cuda.open_cuda`).

    Raises:
        MissingRequirementError: it is not installed, belongs to another Python, lacks its native library, or is older
            than 8.5.
    """
    state, detail, hint, module = _attempt(_SYSTEM_FOLDERS)
    if state != "ok":
        raise MissingRequirementError(detail, hint)
    return module


def tensorrt_state(folders: tuple[str, ...] = _SYSTEM_FOLDERS) -> tuple[State, str, str]:
    """Return whether TensorRT can be imported, one sentence about it, and what to type if not."""
    return _attempt(folders)[:3]


def version_of(trt: Any) -> tuple[int, int]:
    """Return major and minor version."""
    return _version_numbers(str(trt.__version__))


def shared_logger(trt: Any) -> Any:
    """Return the process's logger; it keeps the last 50 lines for `log_tail`."""
    return _logger(trt)


def log_tail() -> str:
    """Return TensorRT's last words: its error lines, or its last lines where there are none."""
    errors = [text for severity, text in _LINES if severity in ("INTERNAL_ERROR", "ERROR")]
    return "\n".join((errors or [text for _, text in _LINES])[-_SHOWN_LINES:])


def forget_log() -> None:
    """Drop the kept lines, so that `log_tail` tells of what follows only."""
    _LINES.clear()


def with_log(what: str) -> str:
    """Return `what` with TensorRT's last lines below it."""
    tail = log_tail()
    return f"{what}\nTensorRT said:\n{tail}" if tail else f"{what} TensorRT said nothing about it."


def not_none(value: Any, what: str, hint: str, *, kind: type[EdgeAnomalyError] = ArtefactError) -> Any:
    """Return `value`; TensorRT reports failure by None and a log line, which become an exception here."""
    if value is None:
        raise kind(with_log(what), hint)
    return value


def started(make: Callable[[Any], Any], trt: Any, what: str) -> Any:
    """Call `trt.Builder` or `trt.Runtime`, which fail where driver and TensorRT do not fit together.

    Raises:
        MissingRequirementError: they gave nothing: None, or what pybind11 makes of it.
    """
    try:
        made = make(shared_logger(trt))
    except TypeError as error:  # "pybind11::init(): factory function returned nullptr"
        if "nullptr" not in str(error):
            raise
        made = None
    return not_none(made, what, _DRIVER, kind=MissingRequirementError)


def _attempt(folders: tuple[str, ...]) -> tuple[State, str, str, Any]:
    try:
        module = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            return "library missing", f"TensorRT cannot be imported: {error}.", _REINSTALL, None
        return (*_elsewhere(folders), None)
    except (ImportError, OSError) as error:  # the bindings are there, libnvinfer or its like are not
        return "library missing", f"TensorRT is installed, but a native library is missing: {error}", _REINSTALL, None
    version = getattr(module, "__version__", None)
    if version is None:  # an empty folder named tensorrt imports as a namespace package
        return "library missing", "The module tensorrt that Python finds is not TensorRT.", _REINSTALL, None
    if _version_numbers(version) < OLDEST:
        found = f"TensorRT {version} is too old: {OLDEST[0]}.{OLDEST[1]} is the oldest that works."
        return "too old", found, "Update JetPack or TensorRT.", None
    return "ok", f"TensorRT {version}", "", module


def _elsewhere(folders: tuple[str, ...]) -> tuple[State, str, str]:
    """Look for a TensorRT that apt has installed for the system's Python, which another one cannot see or load."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = [path for pattern in folders for path in sorted(glob.glob(pattern))]
    minors = [minor for path in found if (minor := _python_of(path))]
    if here in minors:
        return (
            "outside the environment",
            f"TensorRT is installed for the system's Python {here} ({found[0]}), but not visible in this environment.",
            "Make the environment again with: python3 -m venv --system-site-packages ENV",
        )
    if found:
        other = minors[0] if minors else "the system's version"
        return (
            "other python",
            f"TensorRT is installed for Python {other} ({found[0]}); this is Python {here}, which cannot load it.",
            f"Make the environment with: python{minors[0] if minors else '3'} -m venv --system-site-packages ENV",
        )
    return "not installed", "The package tensorrt is not installed.", _INSTALL


def _python_of(folder: str) -> str | None:
    """Tell which Python a folder of bindings is for, from its path or from the names of its libraries."""
    if found := re.search(r"/python(3\.\d+)/", folder):
        return found[1]
    names = " ".join(glob.glob(f"{folder}/*.so"))
    found = re.search(r"cpython-3(\d+)-", names)
    return f"3.{found[1]}" if found else None


def _version_numbers(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


@cache
def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what matters; VERBOSE alone would push everything else out."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                _LINES.append((severity.name, f"[{severity.name}] {message.strip()}"))

    return Logger()


_INSTALL = (
    "On a Jetson: sudo apt install python3-libnvinfer, and an environment made with --system-site-packages. "
    'Elsewhere: pip install "edge-anomaly[tensorrt]"'
)
_DRIVER = "Install the driver that this TensorRT needs, or the TensorRT of this JetPack; see `edge-anomaly doctor`."
_REINSTALL = "On a Jetson: sudo apt install --reinstall nvidia-tensorrt. Elsewhere: install tensorrt again."
