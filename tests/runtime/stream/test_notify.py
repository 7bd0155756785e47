"""Messages to systemd: what is sent, and that a hung loop sends nothing."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from time import monotonic, sleep

import pytest

from edge_anomaly_runtime.stream.notify import Notifier


class Manager:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(0.2)

    def messages(self) -> list[str]:
        found = []
        try:
            while True:
                found.append(self._socket.recv(4096).decode())
        except TimeoutError:
            return found

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_messages(tmp_path: Path, kind: str) -> None:
    name = secrets.token_hex(8)
    address, told = (f"\0{name}", f"@{name}") if kind == "abstract" else (str(tmp_path / "s"), str(tmp_path / "s"))
    manager = Manager(address)
    notifier = Notifier({"NOTIFY_SOCKET": told, "WATCHDOG_USEC": "30000000"}, pid=7)
    notifier.ready("2 cameras\nREADY=0")
    notifier.progress()
    notifier.status("reconnecting")
    notifier.reloading()
    notifier.stopping()
    messages = manager.messages()
    manager.close()
    assert messages[:3] == ["READY=1\nSTATUS=2 cameras READY=0", "WATCHDOG=1", "STATUS=reconnecting"]
    assert messages[3].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert messages[4] == "STOPPING=1"


def test_pings_come_from_progress_at_most_four_times_an_interval(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "s"))
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "s"), "WATCHDOG_USEC": "400000"})
    end = monotonic() + 0.45
    while monotonic() < end:
        notifier.progress()
        sleep(0.002)
    assert 3 <= len(manager.messages()) <= 6
    sleep(0.4)
    assert manager.messages() == [], "a loop that stands still sends nothing"
    manager.close()


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "7"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "8"}, None),
    ],
)
def test_the_watchdog_interval(environment: dict[str, str], interval: float | None) -> None:
    assert Notifier(environment, pid=7).watchdog_s == interval


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket", "@nobody-listens", "/" + "x" * 200])
def test_without_a_manager_nothing_happens(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000"})
    notifier.ready()
    notifier.progress()
    notifier.stopping()


def test_a_manager_that_does_not_read_does_not_block(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "s"))
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "s")})
    start = monotonic()
    for _ in range(2000):
        notifier.status("x" * 100)
    assert monotonic() - start < 2
    manager.close()


def test_the_process_environment_is_the_default() -> None:
    assert Notifier().watchdog_s is None or "WATCHDOG_USEC" in os.environ
