"""A headless Chromium driven through its debugging pipe: no driver and no package besides the browser itself."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from select import select
from time import monotonic, sleep
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Return the browser's program, None if there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One browser with one page; a context manager."""

    def __init__(self, program: str, folder: Path) -> None:
        to_browser, our_end = _high_pipe()
        from_browser, browser_end = _high_pipe()
        flags = [
            *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-sandbox"),
            *("--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb"),
        ]
        quiet = os.open(os.devnull, os.O_WRONLY)
        # The browser reads its commands from descriptor 3 and answers on 4.
        self._pid = os.posix_spawn(
            program,
            [program, *flags, "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, quiet, 2),  # first: it may be 3 or 4 itself
                (os.POSIX_SPAWN_DUP2, to_browser, 3),
                (os.POSIX_SPAWN_DUP2, browser_end, 4),
            ],
            setpgroup=0,
        )
        for handle in (to_browser, browser_end, quiet):
            os.close(handle)
        self._out, self._in = our_end, from_browser
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self._session = ""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._out)
        os.close(self._in)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        answer = self._answer(method, **parameters)
        assert "error" not in answer, answer["error"]
        return dict(answer["result"])

    def _answer(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its answer; events that come meanwhile are kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = monotonic() + 30
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                return answer
            self.events.append(answer)

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select([self._in], [], [], max(0.0, end - monotonic()))[0], "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser is gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        assert line.startswith(b"{"), f"the browser says {line[:1000]!r}"
        return dict(json.loads(line))

    def window(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """Set the size of the page in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, url: str) -> None:
        """Load a page."""
        self.command("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20.0) -> None:
        """Wait until a JavaScript expression is true; while the page is loading it may fail."""
        end = monotonic() + seconds
        while True:
            answer = self._answer("Runtime.evaluate", expression=f"Boolean({script})", returnByValue=True)
            if answer.get("result", {}).get("result", {}).get("value") is True:
                return
            assert monotonic() < end, f"not true within {seconds} s: {script}\n{answer}"
            sleep(0.05)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page."""
        data = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Return the errors that the page has logged: exceptions, refused scripts, failed requests."""
        self.value("0")
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        return found


def _high_pipe() -> tuple[int, int]:
    """Return a pipe whose ends are not 3 or 4."""
    ends = []
    for handle in os.pipe():
        ends.append(fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 20))
        os.close(handle)
    return ends[0], ends[1]
