"""Cameras and video files through PyAV: RTSP, HTTP (MJPEG), V4L2, recordings."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any, NoReturn

import numpy as np

from edge_anomaly_runtime.errors import SourceError, missing_extra

from .source import EndOfFile, Picture, SourceLost, SourceRefused, SourceSilent, SourceUnsupported
from .uri import Kind, SourceUri

try:
    import av
except ModuleNotFoundError:
    raise missing_extra("Reading cameras and video files", "av", "video") from None

# Cameras are untrusted: every codec, container and protocol more is a parser more that they can reach.
_CODECS: dict[Kind, tuple[str, ...]] = {
    "rtsp": ("h264", "hevc", "mjpeg"),
    "http": ("mjpeg", "h264", "hevc"),
    "video": ("h264", "hevc", "mjpeg"),
    "v4l2": ("mjpeg", "rawvideo", "h264"),
}
_CONTAINERS: dict[Kind, str] = {
    "rtsp": "rtsp",
    "http": "mpjpeg,mjpeg,mpegts",
    "video": "mov,mp4,matroska,webm,avi,mpegts,mjpeg,mpjpeg,jpeg_pipe,h264,hevc",
    "v4l2": "v4l2,video4linux2",
}
_PROTOCOLS: dict[Kind, str] = {
    "rtsp": "rtsp,rtsps,rtp,udp,tcp,tls",
    "http": "http,https,httpproxy,tcp,tls",
    "video": "file",
    "v4l2": "file",
}
_V4L2_OPTIONS = {"size": "video_size", "fps": "framerate", "format": "input_format"}
# 4K has 8.3 million; decoding H.264 of 49 million took 1.7 GB.
_MAX_PIXELS = 16_000_000

_REFUSED = {
    "HTTPUnauthorizedError": "the user name or password is wrong (401)",
    "HTTPForbiddenError": "access is forbidden (403)",
    "HTTPNotFoundError": "there is no such stream (404)",
    "PermissionError": "permission denied",
}
_UNSUPPORTED = frozenset(
    {
        "ArgumentError",
        "DecoderNotFoundError",
        "DemuxerNotFoundError",
        "ProtocolNotFoundError",
        "PatchWelcomeError",
    }
)


@dataclass(frozen=True)
class AvOptions:
    """How a source is opened.

    open_timeout, read_timeout: seconds that one call may block. transport: tcp or udp for RTSP. threads: decoder
    threads; one is enough for a live camera and leaves the other cores to the model. analyze_s, probe_bytes: how much
    of a stream may be read to find out what it is.
    """

    open_timeout: float = 5.0
    read_timeout: float = 5.0
    transport: str = "tcp"
    threads: int = 1
    analyze_s: float = 1.0
    probe_bytes: int = 500_000


@dataclass(frozen=True)
class Packet:
    """One compressed picture: its bytes, time in seconds, and whether it is a key frame or damaged."""

    data: bytes
    pts: float | None
    is_keyframe: bool
    is_corrupt: bool


class AvSource:
    """One connection through PyAV; see `source.FrameSource`.

    `read` may overrun its timeout by the source's own read timeout: FFmpeg cannot be asked for less in the middle.
    """

    def __init__(self, uri: SourceUri, options: AvOptions | None = None) -> None:
        self._uri = uri
        self._options = options or AvOptions()
        self._container: Any = None
        self._stream: Any = None
        self._packets: Iterator[Any] = iter(())
        self._decoded: deque[Picture] = deque()
        self._fault = ""

    def open(self) -> None:
        """Connect and look at what is sent.

        Raises:
            SourceLost, SourceRefused, SourceUnsupported: as `source.FrameSource`.
        """
        self.close()
        failure: SourceError | None = None
        start = monotonic()
        try:
            self._connect()
        except SourceError as error:
            failure = error
        except Exception as error:  # besides its own, PyAV raises what broken headers cause, such as OverflowError
            # A silent server ends as invalid data, too, when the time is up.
            failure = self._silent(opening=True) if self._is_late(start) else self._outcome(error, opening=True)
        if failure is None and self._uri.live and self._is_late(start) and not self._stream.codec_context.width:
            failure = self._silent(opening=True)  # it promised pictures and sent none; a slow one has sent some by now
        if failure is not None:  # raised out here: PyAV's exception holds the URL, and must not even be the context
            self.close()
            raise failure

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that the stream announces, in pixels."""
        return self._stream.codec_context.width, self._stream.codec_context.height

    @property
    def codec(self) -> str:
        """The codec's name: h264, hevc, mjpeg or rawvideo."""
        return str(self._stream.codec_context.name)

    @property
    def header(self) -> bytes:
        """The parameter sets that the stream announces outside its packets; may be empty."""
        return bytes(self._stream.codec_context.extradata or b"")

    def read(self, timeout: float) -> Picture | None:
        """Return the next picture, or None when none was finished within about `timeout` seconds.

        Raises:
            EndOfFile, SourceLost: as `source.FrameSource`.
        """
        give_up = monotonic() + timeout
        while not self._decoded:
            packet = self._next_packet()
            self._decode(packet)
            if monotonic() >= give_up and not self._decoded:
                return None
        return self._decoded.popleft()

    def read_packet(self) -> Packet:
        """Return the next packet without decoding it, for a decoder elsewhere.

        Raises:
            EndOfFile, SourceLost: as `read`.
        """
        while not (packet := self._next_packet()).size:
            if packet.dts is None and not self._uri.live:
                raise EndOfFile
        return Packet(bytes(packet), _seconds(packet), packet.is_keyframe, packet.is_corrupt)

    def close(self) -> None:
        """Close the connection and forget what was decoded."""
        container, self._container, self._stream = self._container, None, None
        self._packets, self._decoded, self._fault = iter(()), deque(), ""
        if container is not None:
            container.close()

    def _connect(self) -> None:
        uri, options = self._uri, self._options
        self._container = av.open(
            uri.location,
            mode="r",
            format="v4l2" if uri.kind == "v4l2" else None,
            options=container_options(uri, options),
            metadata_errors="replace",
            timeout=(options.open_timeout, options.read_timeout),
        )
        if not self._container.streams.video:
            raise SourceUnsupported(f"{uri.shown} sends no picture.", "Check the stream's path.")
        self._stream = self._container.streams.video[0]
        context = self._stream.codec_context
        if context.name not in _CODECS[uri.kind]:
            raise SourceUnsupported(
                f"{uri.shown} is coded as {context.name}, which is not read.",
                f"Set the camera to, or convert the file to, one of: {', '.join(_CODECS[uri.kind])}.",
            )
        if context.width * context.height > _MAX_PIXELS:
            raise SourceUnsupported(
                f"{uri.shown} sends {context.width}x{context.height} pixels, more than {_MAX_PIXELS // 10**6} million.",
                "Choose a smaller picture size.",
            )
        context.options = {"max_pixels": str(_MAX_PIXELS)}  # a later, larger picture is a decode error
        if uri.live:
            # Frame threads hold pictures back, one per thread.
            context.thread_type, context.thread_count = "SLICE", options.threads
        else:
            context.thread_type = "AUTO"
        self._packets = self._container.demux(self._stream)

    def _next_packet(self) -> Any:
        if self._container is None:
            raise SourceLost(f"{self._uri.shown} is not open.")
        failure: SourceError | None = None
        ended = False
        packet = None
        try:
            packet = next(self._packets)
        except (StopIteration, av.EOFError):
            ended = True
        except Exception as error:
            failure = self._outcome(error, opening=False)
        if failure is not None:
            raise failure
        if ended:
            self._raise_end()
        return packet

    def _raise_end(self) -> NoReturn:
        if not self._uri.live:
            raise EndOfFile
        # A cut and a reset connection look like the end of a file.
        raise SourceLost(f"{self._uri.shown} ended the stream.")

    def _decode(self, packet: Any) -> None:
        start = perf_counter()
        if packet.is_corrupt:
            self._fault = "corrupt packet"
        elif self.codec == "mjpeg" and packet.size and not _has_jpeg_end(bytes(packet)):
            self._fault = "truncated JPEG"  # half a JPEG decodes without an error, grey from there on
        frames = []
        try:
            frames = packet.decode()
        except av.EOFError:
            return
        except av.FFmpegError:
            self._fault = "decode error"
        for frame in frames:
            fault, self._fault = self._fault, ""
            if frame.is_corrupt:
                fault = fault or "corrupt frame"
            pixels: Any = np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
            # Two pictures of one packet share the time since `start`; the second one cost next to nothing.
            spent, start = (perf_counter() - start) * 1e3, perf_counter()
            self._decoded.append(Picture(pixels, self._time_of(frame), bool(frame.key_frame), fault, spent))

    def _time_of(self, frame: Any) -> float | None:
        # MJPEG over HTTP has no time of its own; FFmpeg makes one up from an assumed 25 frames per second.
        return None if self._uri.kind == "http" and self.codec == "mjpeg" else _seconds(frame)

    def _is_late(self, start: float) -> bool:
        return monotonic() - start > 0.98 * self._options.open_timeout

    def _silent(self, *, opening: bool) -> SourceSilent:
        limit_s = self._options.open_timeout if opening else self._options.read_timeout
        hint = "Check the camera, its address and the network; a slow one needs a longer --timeout."
        return SourceSilent(f"{self._uri.shown}: no answer within {limit_s:g} s.", hint)

    def _outcome(self, error: Exception, *, opening: bool) -> SourceError:
        """Turn PyAV's exception, whose text holds the URL with its password, into one of ours."""
        kind = type(error).__name__
        shown = self._uri.shown
        if kind in _REFUSED:
            hint = "Check the credentials and the stream's path."
            if self._uri.kind in ("v4l2", "video"):
                hint = "Check the file's rights; for a camera: sudo usermod -aG video $USER."
            return SourceRefused(f"{shown}: {_REFUSED[kind]}.", hint)
        if not self._uri.live or (opening and kind in _UNSUPPORTED):
            known = _CONTAINERS[self._uri.kind]
            return SourceUnsupported(
                f"{shown} is not a stream that is read, or it is damaged ({kind}).",
                f"Known kinds: {known} with {', '.join(_CODECS[self._uri.kind])}.",
            )
        if kind in ("ExitError", "TimeoutError"):
            return self._silent(opening=opening)
        reason = self._uri.redact(str(getattr(error, "strerror", None) or kind))
        return SourceLost(f"{shown}: {reason}.", "Check the camera, its address and the network.")


def container_options(uri: SourceUri, options: AvOptions) -> dict[str, str]:
    """Return FFmpeg's options for a source: allow-lists, and how long it may look before it decides."""
    chosen = {
        "protocol_whitelist": _PROTOCOLS[uri.kind],
        "format_whitelist": _CONTAINERS[uri.kind],
        "codec_whitelist": ",".join(_CODECS[uri.kind]),
    }
    if uri.live:
        chosen |= {"analyzeduration": str(math.ceil(options.analyze_s * 1e6)), "probesize": str(options.probe_bytes)}
    if uri.kind == "rtsp":
        chosen |= {"rtsp_transport": options.transport, "allowed_media_types": "video"}
    if uri.kind == "v4l2":
        chosen |= {_V4L2_OPTIONS[name]: value for name, value in uri.options.items() if name in _V4L2_OPTIONS}
    return chosen


def _seconds(timed: Any) -> float | None:
    """Return the time of a packet or frame in seconds; None where it has none."""
    return None if timed.pts is None or timed.time_base is None else float(timed.pts * timed.time_base)


def _has_jpeg_end(data: bytes) -> bool:
    # The coded data cannot hold this marker; behind it USB cameras leave padding, before the middle lies a thumbnail.
    return data.rfind(b"\xff\xd9", len(data) // 2) >= 0
