"""Overlay video through PyAV: one file after the other for each camera, playable after a crash as well."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from edge_anomaly_runtime.errors import UsageError, missing_extra

from .frame import Scored
from .sink import Draw
from .sink_images import file_part, plain_picture

_CODECS = ("libx264", "mpeg4")
# A plain mp4 cannot be played before its index stands at its end; one in fragments can. Nothing may wait in memory.
_CRASH_PROOF = {
    ".mkv": {"flush_packets": "1", "cluster_time_limit": "1000"},
    ".mp4": {"flush_packets": "1", "movflags": "frag_keyframe+empty_moov"},
}
_TIME_BASE = Fraction(1, 1000)
# A key frame at least this often: what a crash costs, and what a player has to go through when it seeks.
_KEYFRAME_FRAMES = 50


class _Recording:
    """One open file."""

    def __init__(self, container: Any, stream: Any, path: Path, shape: tuple[int, ...], started_ns: int) -> None:
        self.container, self.stream, self.path, self.shape = container, stream, path, shape
        self.started_ns = started_ns
        self.last_pts = -1


class VideoSink:
    """Writes `stem-CAMERA.000001.mkv` and so on; frames keep their times, so gaps are visible as standing pictures.

    Software encoding: expect a good part of a core per camera. max_bytes: size at which the next file begins; it also
    does when the picture's size changes. keep: how many files stay per camera. bit_rate: bits per second.

    Raises:
        MissingRequirementError: PyAV is not installed.
        UsageError: the name's suffix is neither .mkv nor .mp4.
    """

    needs_pixels = True

    def __init__(
        self,
        path: Path,
        *,
        draw: Draw | None = None,
        max_bytes: int = 200_000_000,
        keep: int = 10,
        bit_rate: int = 2_000_000,
    ) -> None:
        try:
            import av
        except ImportError:
            raise missing_extra("--sink video", "av", "video") from None
        if path.suffix not in _CRASH_PROOF:
            raise UsageError(f"Cannot write video to {path.name!r}.", f"End the name with {' or '.join(_CRASH_PROOF)}.")
        self._av = av
        self.name = f"video:{path.name}"
        self._path = path
        self._draw = draw or plain_picture
        self._max_bytes, self._keep, self._bit_rate = max_bytes, keep, bit_rate
        self._codec = next(name for name in _CODECS if name in av.codecs_available)
        self._recordings: dict[str, _Recording] = {}

    def wants(self, item: Scored) -> bool:
        return True

    def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, item: Scored) -> None:
        picture = np.asarray(self._draw(item))
        # 4:2:0 video has even sides.
        picture = np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])
        camera = file_part(item.frame.camera)
        recording = self._recordings.get(camera)
        if recording is not None and (
            recording.shape != picture.shape or recording.path.stat().st_size > self._max_bytes
        ):
            self._finish(camera)
            recording = None
        if recording is None:
            recording = self._begin(camera, picture.shape, item.frame.captured_ns)
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = max(recording.last_pts + 1, (item.frame.captured_ns - recording.started_ns) // 1_000_000)
        frame.time_base = _TIME_BASE
        recording.last_pts = frame.pts
        recording.container.mux(recording.stream.encode(frame))

    def close(self) -> None:
        for camera in list(self._recordings):
            self._finish(camera)

    def _begin(self, camera: str, shape: tuple[int, ...], started_ns: int) -> _Recording:
        path = self._next_path(camera)
        container: Any = self._av.open(str(path), "w", options=_CRASH_PROOF[path.suffix])
        stream = container.add_stream(self._codec, rate=25, bit_rate=self._bit_rate, gop_size=_KEYFRAME_FRAMES)
        stream.width, stream.height, stream.pix_fmt = shape[1], shape[0], "yuv420p"
        stream.codec_context.time_base = _TIME_BASE
        if self._codec == "libx264":
            stream.options = {"preset": "veryfast", "tune": "zerolatency"}
        recording = _Recording(container, stream, path, shape, started_ns)
        self._recordings[camera] = recording
        return recording

    def _finish(self, camera: str) -> None:
        recording = self._recordings.pop(camera)
        try:
            recording.container.mux(recording.stream.encode(None))
        finally:
            recording.container.close()

    def _next_path(self, camera: str) -> Path:
        """Return the next number's name and remove the oldest files of this camera."""
        name = re.compile(re.escape(f"{self._path.stem}-{camera}.") + r"([0-9]{6,})" + re.escape(self._path.suffix))
        found = ((name.fullmatch(entry.name), entry) for entry in self._path.parent.iterdir())
        files = sorted((int(match[1]), entry) for match, entry in found if match)
        for _, old in files[: max(0, len(files) + 1 - self._keep)]:
            old.unlink(missing_ok=True)
        number = files[-1][0] + 1 if files else 1
        return self._path.with_name(f"{self._path.stem}-{camera}.{number:06}{self._path.suffix}")
