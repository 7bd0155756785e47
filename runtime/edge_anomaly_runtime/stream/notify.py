"""Messages to systemd over NOTIFY_SOCKET; without one, nothing happens."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from time import monotonic, monotonic_ns


class Notifier:
    """Tells the service manager that the stream is ready, alive, stopping.

    `progress` belongs into the scoring loop and nowhere else: a ping from a timer would hide a hung scorer. It sends
    at most four pings per watchdog interval, so it may be called for every frame.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, *, pid: int | None = None) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._interval_s = _watchdog_s(environment, os.getpid() if pid is None else pid)
        self._pinged_at = float("-inf")

    @property
    def watchdog_s(self) -> float | None:
        """Seconds without a ping after which systemd restarts the service; None without a watchdog."""
        return self._interval_s

    def ready(self, status: str = "") -> None:
        """Say that frames are scored; the watchdog runs from here on."""
        self._send("READY=1", f"STATUS={_one_line(status)}")

    def progress(self) -> None:
        """Say that the scoring loop has come round once more."""
        now = monotonic()
        if self._interval_s is not None and now - self._pinged_at >= self._interval_s / 4:
            self._pinged_at = now
            self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(f"STATUS={_one_line(text)}")

    def reloading(self) -> None:
        """Say that the configuration is read again; `ready` ends that."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the stream drains and ends."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        # '@' stands for the zero byte of an abstract name.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
                link.setblocking(False)
                link.sendto("\n".join(lines).encode(), address)
        except OSError:
            pass  # a manager that does not listen must not stop the stream; its watchdog will act


def _watchdog_s(environment: Mapping[str, str], pid: int) -> float | None:
    microseconds, wanted = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(pid))
    if not microseconds.isdecimal() or int(microseconds) == 0 or wanted != str(pid):
        return None
    return int(microseconds) / 1e6


def _one_line(text: str) -> str:
    return " ".join(text.split())
