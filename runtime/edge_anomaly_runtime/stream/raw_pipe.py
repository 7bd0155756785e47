"""A child process that writes raw pictures into a pipe, and can be fed with a stream to decode."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from time import monotonic

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_anomaly_runtime.errors import SourceError

from .source import SourceLost
from .uri import redact


@dataclass(frozen=True)
class I420Layout:
    """How GStreamer lays out an I420 picture: rows padded to 4 bytes, odd heights rounded up, planes Y, U, V."""

    width: int
    height: int

    @property
    def luma_stride(self) -> int:
        """Bytes per row of the Y plane."""
        return -(-self.width // 4) * 4

    @property
    def chroma_stride(self) -> int:
        """Bytes per row of the U and V planes."""
        return -(-((self.width + 1) // 2) // 4) * 4

    @property
    def rows(self) -> int:
        """Rows of the Y plane; U and V have half of them."""
        return (self.height + 1) // 2 * 2

    @property
    def size(self) -> int:
        """Bytes of one picture."""
        return self.luma_stride * self.rows + self.chroma_stride * self.rows


# From limited range to the full range that Pillow's YCbCr has.
_LUMA_TO_FULL = [min(255, max(0, round((level - 16) * 255 / 219))) for level in range(256)]
_CHROMA_TO_FULL = [min(255, max(0, round((level - 128) * 255 / 224 + 128))) for level in range(256)]


def rgb_from_i420(data: bytes | bytearray, layout: I420Layout) -> npt.NDArray[np.uint8]:
    """Return uint8 [h, w, 3] RGB of one picture in limited range, BT.601; every 2 x 2 share their colour."""
    whole = (layout.width, layout.height)
    half_width, half_rows = (layout.width + 1) // 2, layout.rows // 2
    luma_size, chroma_size = layout.luma_stride * layout.rows, layout.chroma_stride * half_rows
    luma = Image.frombuffer("L", (layout.luma_stride, layout.rows), data[:luma_size], "raw", "L", 0, 1)
    planes = [luma.crop((0, 0, *whole)).point(_LUMA_TO_FULL)]
    for start in (luma_size, luma_size + chroma_size):
        raw = data[start : start + chroma_size]
        half = Image.frombuffer("L", (layout.chroma_stride, half_rows), raw, "raw", "L", 0, 1)
        full = half.crop((0, 0, half_width, half_rows)).point(_CHROMA_TO_FULL)
        # A box that ends where the picture does: an odd width needs half of the last colour value.
        box = (0.0, 0.0, layout.width / 2, layout.height / 2)
        planes.append(full.resize(whole, Image.Resampling.NEAREST, box=box))
    return np.array(Image.merge("YCbCr", planes).convert("RGB"), dtype=np.uint8)


class RawPipe:
    """A child whose pictures arrive one by one; killing it is the way out of any hang in a driver.

    command: `{fd}` in it becomes the number of the pipe to write to; nothing is run through a shell. A pipe holds
    64 KiB, less than one picture, so that the child cannot pile up old ones.
    """

    def __init__(self, command: list[str], picture_bytes: int, *, feeds: bool = False) -> None:
        self._picture_bytes = picture_bytes
        self._partial = bytearray()
        self._pictures: deque[bytes] = deque()
        self._errors = tempfile.TemporaryFile()
        self._output, child_end = os.pipe()
        os.set_blocking(self._output, False)
        try:
            self._child = subprocess.Popen(
                [part.replace("{fd}", str(child_end)) for part in command],
                stdin=subprocess.PIPE if feeds else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(child_end,),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            os.close(self._output)
            self._errors.close()
            raise SourceLost(f"Cannot start {command[0]}: {error.strerror}.") from None
        finally:
            os.close(child_end)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        if self._child.stdin is not None:
            os.set_blocking(self._child.stdin.fileno(), False)

    def picture(self, timeout: float) -> bytes | None:
        """Return the next whole picture, or None when none was complete within `timeout` seconds.

        Raises:
            SourceLost: the child has ended.
        """
        give_up = monotonic() + timeout
        while not self._pictures:
            if not self._selector.select(max(0.0, give_up - monotonic())):
                return None
            self._receive()
        return self._pictures.popleft()

    def feed(self, data: bytes, timeout: float) -> None:
        """Hand `data` to the child, taking in what it writes meanwhile.

        Raises:
            SourceLost: it has ended, or did not take the data within `timeout` seconds.
        """
        assert self._child.stdin is not None
        entry, give_up, rest = self._child.stdin.fileno(), monotonic() + timeout, memoryview(data)
        self._selector.register(entry, selectors.EVENT_WRITE)
        try:
            while rest:
                ready = self._selector.select(max(0.0, give_up - monotonic()))
                if not ready:
                    raise SourceLost("The hardware decoder takes no more data.", "Check it with gst-launch-1.0.")
                for key, _ in ready:
                    if key.fd == entry:
                        rest = rest[os.write(entry, rest) :]
                    else:
                        self._receive()
        except BrokenPipeError:
            raise self._ended() from None
        finally:
            self._selector.unregister(entry)

    def close(self) -> None:
        """Kill the child with everything it started."""
        self._selector.close()
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._child.wait()
        os.close(self._output)
        self._errors.close()

    def _receive(self) -> None:
        try:
            piece = os.read(self._output, self._picture_bytes - len(self._partial))
        except BlockingIOError:
            return
        if not piece:
            raise self._ended()
        self._partial += piece
        if len(self._partial) == self._picture_bytes:
            self._pictures.append(bytes(self._partial))
            self._partial.clear()

    def _ended(self) -> SourceError:
        try:
            self._child.wait(0.5)  # its last words come before its end
        except subprocess.TimeoutExpired:
            pass
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        words = redact(lines[-1].strip()) if lines else "it said nothing"
        return SourceLost(f"GStreamer ended: {words}", "Check the camera with gst-launch-1.0.")
