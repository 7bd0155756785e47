"""What only GStreamer can do: CSI cameras and the hardware decoder of a Jetson, through a gst-launch-1.0 child."""

from __future__ import annotations

import shutil
import subprocess
from collections import deque
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import numpy as np

from edge_anomaly_runtime.errors import MissingRequirementError, UsageError, did_you_mean

from .health import Trust
from .raw_pipe import I420Layout, RawPipe, rgb_from_i420
from .source import Picture, SourceLost, SourceUnsupported
from .uri import SourceUri

if TYPE_CHECKING:
    from .source_av import AvSource, Packet

CSI_ELEMENTS = ("nvarguscamerasrc", "nvvidconv", "fdsink")
NVDEC_ELEMENTS = ("h264parse", "nvv4l2decoder", "nvvidconv", "fdsink")
_PARSERS = {"h264": "h264parse", "hevc": "h265parse"}
_NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
_INSTALL = "sudo apt-get install gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-bad"


@dataclass(frozen=True)
class CsiOptions:
    """width, height, fps: the sensor mode; flip: nvvidconv's flip-method, 0 to 7 (2 turns the picture upside down)."""

    width: int = 1280
    height: int = 720
    fps: int = 30
    flip: int = 0


def csi_options(options: dict[str, str]) -> CsiOptions:
    """Return the options of a csi:// URI, such as size=1920x1080&fps=30&flip=2.

    Raises:
        UsageError: an unknown option, or a value that is no number.
    """
    for name in options:
        if name not in ("size", "fps", "flip"):
            raise did_you_mean("option of csi://", name, ["size", "fps", "flip"])
    width, _, height = options.get("size", "1280x720").partition("x")
    try:
        chosen = CsiOptions(int(width), int(height), int(options.get("fps", "30")), int(options.get("flip", "0")))
    except ValueError:
        raise UsageError(f"csi:// cannot use {options}.", "Write it as csi://0?size=1280x720&fps=30.") from None
    if not (16 <= chosen.width <= 8192 and 16 <= chosen.height <= 8192 and 1 <= chosen.fps <= 240):
        raise UsageError(f"csi:// has no mode {chosen}.", "List the sensor's modes with: v4l2-ctl --list-formats-ext.")
    return chosen


def require_gstreamer(option: str, elements: tuple[str, ...]) -> None:
    """Raise MissingRequirementError unless the system's GStreamer has all of `elements`."""
    if shutil.which("gst-launch-1.0") is None or shutil.which("gst-inspect-1.0") is None:
        raise MissingRequirementError(f"{option} needs gst-launch-1.0, which is not installed.", f"Run: {_INSTALL}")
    missing = [name for name in elements if not _has_element(name)]
    if missing:
        raise MissingRequirementError(
            f"{option} needs the GStreamer element {missing[0]}, which is not there.",
            "On a Jetson: sudo apt-get install nvidia-l4t-gstreamer; elsewhere use --decoder cpu and a USB or RTSP "
            "camera.",
        )
    if "nvv4l2decoder" in elements and shutil.which("lsmod") is None:
        raise MissingRequirementError(
            f"{option} needs lsmod: without it nvv4l2decoder mistakes the board and never delivers a picture.",
            "Run: sudo apt-get install kmod",
        )


def _has_element(name: str) -> bool:
    try:
        done = subprocess.run(["gst-inspect-1.0", "--exists", name], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class CsiSource:
    """A camera on the CSI connector; see `source.FrameSource`.

    Its pictures are raw: each one counts as a key frame, and none has a time of its own.
    """

    def __init__(self, uri: SourceUri, *, start_timeout: float = 10.0) -> None:
        self._sensor = int(uri.location)
        self._options = csi_options(uri.options)
        self._layout = I420Layout(self._options.width, self._options.height)
        self._start_timeout = start_timeout
        self._pipe: RawPipe | None = None
        self._first: bytes | None = None

    def open(self) -> None:
        """Start the pipeline and wait for its first picture.

        Raises:
            SourceLost: it ended or sent nothing within `start_timeout` seconds.
        """
        self.close()
        self._pipe = RawPipe(csi_command(self._sensor, self._options), self._layout.size)
        self._first = self._pipe.picture(self._start_timeout)
        if self._first is None:
            self.close()
            raise SourceLost(
                f"csi://{self._sensor} sent no picture within {self._start_timeout:g} s.",
                "Check the cable, and: sudo systemctl restart nvargus-daemon.",
            )

    def read(self, timeout: float) -> Picture | None:
        """Return the next picture, or None when none came within `timeout` seconds.

        Raises:
            SourceLost: the pipeline has ended.
        """
        if self._pipe is None:
            raise SourceLost(f"csi://{self._sensor} is not open.")
        data, self._first = self._first or self._pipe.picture(timeout), None
        if data is None:
            return None
        start = perf_counter()
        pixels = rgb_from_i420(data, self._layout)
        return Picture(pixels, decode_ms=(perf_counter() - start) * 1e3)

    def close(self) -> None:
        """Kill the pipeline."""
        pipe, self._pipe, self._first = self._pipe, None, None
        if pipe is not None:
            pipe.close()


class NvdecSource:
    """An RTSP camera received through PyAV and decoded by the hardware; see `source.FrameSource`.

    Only the decoding is the child's: the password stays out of its arguments, which every user of the machine may read,
    and the stream's times, key frames and gaps are known from the packets. What the decoder does not tell is damage
    inside a picture. A camera that changes its size is scaled to the first one until it is connected anew.
    """

    def __init__(self, received: AvSource, *, feed_timeout: float = 5.0, decode_wait: float = 0.02) -> None:
        self._received = received
        self._feed_timeout = feed_timeout
        self._decode_wait = decode_wait
        self._layout = I420Layout(0, 0)
        self._pipe: RawPipe | None = None
        self._sent: deque[Packet] = deque()
        self._matching = Matching()

    def open(self) -> None:
        """Connect, and start the decoder.

        Raises:
            SourceLost, SourceRefused, SourceUnsupported: as `source.FrameSource`.
        """
        self.close()
        self._received.open()
        if self._received.codec not in _PARSERS:
            raise SourceUnsupported(
                f"--decoder nvdec does not decode {self._received.codec}.", "Leave it out for this camera."
            )
        self._layout = I420Layout(*self._received.size)
        self._pipe = RawPipe(nvdec_command(self._received.codec, self._layout), self._layout.size, feeds=True)
        self._pipe.feed(self._received.header, self._feed_timeout)

    def read(self, timeout: float) -> Picture | None:
        """Return the next picture, or None when none came within about `timeout` seconds.

        Raises:
            EndOfFile, SourceLost: as `source.FrameSource`.
        """
        if self._pipe is None:
            raise SourceLost("The hardware decoder is not open.")
        give_up = monotonic() + timeout
        while True:
            # A moment's wait, or the picture would only be found after the next packet, one period later.
            if self._sent and (data := self._pipe.picture(self._decode_wait)):
                return self._picture(data)
            if monotonic() >= give_up:
                return None
            packet = self._received.read_packet()
            self._sent.append(packet)
            self._matching.fed(packet)
            self._pipe.feed(packet.data, self._feed_timeout)

    def _picture(self, data: bytes) -> Picture:
        start = perf_counter()
        pixels = rgb_from_i420(data, self._layout)
        packet = self._sent.popleft()
        fault = self._matching.decoded()
        return Picture(pixels, packet.pts, packet.is_keyframe, fault, (perf_counter() - start) * 1e3)

    def close(self) -> None:
        """Kill the decoder and close the connection."""
        pipe, self._pipe = self._pipe, None
        self._sent.clear()
        self._matching = Matching()
        if pipe is not None:
            pipe.close()
        self._received.close()


class Matching:
    """Says which decoded pictures may be damaged, when pictures and packets can only be matched by counting.

    A decoder that leaves pictures out makes the n-th picture a later packet's, never an earlier one's. So a fault marks
    every picture from the moment its packet is fed, and up to the number of the next clean key frame's packet.
    """

    def __init__(self) -> None:
        self._trust = Trust()
        self._fed = self._decoded = 0
        self._fault = ""
        self._healed_at: int | None = None

    def fed(self, packet: Packet) -> None:
        """Take note of a packet that goes to the decoder."""
        corrupt = "corrupt packet" if packet.is_corrupt else ""
        fault = self._trust.check(Picture(_NO_PIXELS, packet.pts, packet.is_keyframe, corrupt))
        if fault:
            self._fault, self._healed_at = fault, None
        elif self._fault and self._healed_at is None:
            self._healed_at = self._fed
        self._fed += 1

    def decoded(self) -> str:
        """Return why the next picture may be damaged, '' if it may be believed."""
        if self._healed_at is not None and self._decoded >= self._healed_at:
            self._fault, self._healed_at = "", None
        self._decoded += 1
        return self._fault


def csi_command(sensor: int, options: CsiOptions) -> list[str]:
    """Return the command line that writes a CSI camera's pictures as I420 to `{fd}`, dropping what is not taken."""
    mode = f"width={options.width},height={options.height}"
    return [
        *("gst-launch-1.0", "-q", "nvarguscamerasrc", f"sensor-id={sensor}", "!"),
        *(f"video/x-raw(memory:NVMM),{mode},framerate={options.fps}/1", "!"),
        *("nvvidconv", f"flip-method={options.flip}", "!", f"video/x-raw,format=I420,{mode}", "!"),
        *("queue", "max-size-buffers=1", "leaky=downstream", "!", "fdsink", "fd={fd}", "sync=false"),
    ]


def nvdec_command(codec: str, layout: I420Layout) -> list[str]:
    """Return the command line that decodes a byte stream from its standard input to I420 pictures on `{fd}`."""
    return [
        *("gst-launch-1.0", "-q", "fdsrc", "fd=0", "do-timestamp=true", "!", _PARSERS[codec], "!"),
        *("nvv4l2decoder", "enable-max-performance=1", "disable-dpb=1", "!", "nvvidconv", "!"),
        *(f"video/x-raw,format=I420,width={layout.width},height={layout.height}", "!"),
        *("fdsink", "fd={fd}", "sync=false"),
    ]
