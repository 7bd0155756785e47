"""A program of the user's that is started for a result: a reject gate, a lamp, a PLC."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from edge_anomaly_runtime.errors import UsageError

from .frame import Scored
from .record import record_line
from .sink import ItemLost, When, is_wanted

# The program does not see the rest of the environment: it holds the passwords of cameras and brokers.
_ENVIRONMENT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "XDG_RUNTIME_DIR")


class CommandSink:
    """Starts `arguments` (never a shell) with the JSON record on standard input and waits for its end.

    timeout_s: after that time the program and its children are killed. A program that fails or runs too long loses
    this item; it is not started twice for one.

    Raises:
        UsageError: the program is not there or may not be run.
    """

    needs_pixels = False

    def __init__(self, arguments: Sequence[str], *, timeout_s: float = 5.0, when: When = "ng") -> None:
        program = shutil.which(arguments[0]) if arguments else None
        if program is None:
            raise UsageError(
                f"There is no program {arguments[0] if arguments else ''!r} for the sink command.",
                'Give a program with its arguments as a JSON list: command:["/usr/local/bin/reject","--pin","7"]',
            )
        # Arguments may hold a secret; the program's name does not.
        self.name = f"command:{os.path.basename(program)}"
        self._arguments = [program, *arguments[1:]]
        self._timeout_s = timeout_s
        self._when = when

    def wants(self, item: Scored) -> bool:
        return is_wanted(self._when, item)

    def open(self) -> None: ...

    def write(self, item: Scored) -> None:
        child = subprocess.Popen(
            self._arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,
        )
        try:
            child.communicate(record_line(item), timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            _kill_group(child)
            raise ItemLost(f"the program did not end within {self._timeout_s:g} s and was killed") from None
        if child.returncode:
            raise ItemLost(f"the program ended with code {child.returncode}")

    def close(self) -> None: ...


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill a program with all that it has started, and wait for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
