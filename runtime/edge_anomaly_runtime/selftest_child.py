"""The first load of a bundle, in a process of its own: on a hostile graph an engine may crash, hang or eat memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any

from .errors import ArtefactError, EdgeAnomalyError, GateError, MissingRequirementError, UsageError

DEFAULT_SECONDS = 60.0
DEFAULT_MEMORY_MB = 2048

_POLL_S = 0.05
_HINT = "Do not use this bundle here. Export it again, or try another --engine."
_ERRORS: dict[int, type[EdgeAnomalyError]] = {
    1: GateError,
    2: UsageError,
    3: MissingRequirementError,
    4: ArtefactError,
}


def selftest_in_child(
    path: Path,
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    seconds: float = DEFAULT_SECONDS,
    memory_mb: int = DEFAULT_MEMORY_MB,
) -> dict[str, Any]:
    """Load a bundle and score its golden images in a child process; return the report of `selftest --json`.

    memory_mb: resident memory at which the child is killed, looked at 20 times a second. Address space is no measure:
    engines reserve far more than they use.

    Raises:
        GateError: a golden image does not give its stored result.
        ArtefactError: the engine crashed, took too long or too much memory, or refuses the bundle.
        UsageError, MissingRequirementError: as `open_scorer`.
    """
    options = ["--engine", engine, "--precision", precision]
    options += [] if threads is None else ["--threads", str(threads)]
    command = [sys.executable, "-m", "edge_anomaly_runtime", "selftest", str(path), "--json", *options]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True)
        try:
            _offer_to_the_oom_killer(child.pid)
            _wait(child, path, seconds, memory_mb)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.returncode != 0:
            raise _error(child.returncode, _tail(errors), path)
        out.seek(0)
        report: dict[str, Any] = json.load(out)
    return report


def _wait(child: subprocess.Popen[bytes], path: Path, seconds: float, memory_mb: int) -> None:
    end = monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL_S)
            return
        if monotonic() > end:
            raise ArtefactError(f"The self-test of {path} did not end within {seconds:g} s.", _HINT)
        used = _resident_mb(child.pid)
        if used > memory_mb:
            raise ArtefactError(f"The self-test of {path} took {used} MB, more than {memory_mb}.", _HINT)


def _resident_mb(pid: int) -> int:
    """Return the resident memory of a process, 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000


def _offer_to_the_oom_killer(pid: int) -> None:
    """Should the kernel run out of memory, let it take the trial and not the service."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _tail(file: Any) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4096))
    text: str = file.read().decode(errors="replace")
    return text


def _error(code: int, text: str, path: Path) -> EdgeAnomalyError:
    if code < 0:
        return ArtefactError(f"The engine died of {signal.Signals(-code).name} on {path}.", _HINT)
    _, _, told = text.rpartition("Error: ")
    what, _, hint = told.strip().partition("\n")
    kind = _ERRORS.get(code, ArtefactError)
    return kind(what or f"The self-test of {path} ended with code {code}.", hint or _HINT)
