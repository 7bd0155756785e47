"""Pictures of bad parts, or of every n-th frame, within a byte budget."""

from __future__ import annotations

import io
import re
from collections import deque
from contextlib import suppress
from datetime import timezone
from pathlib import Path
from typing import Literal

from PIL import Image

from edge_anomaly_runtime.atomic import replace_file
from edge_anomaly_runtime.errors import OutputError
from edge_anomaly_runtime.overlay import draw_overlay
from edge_anomaly_runtime.preprocess import Preprocess

from .frame import Scored
from .sink import Draw, ItemLost, When, is_wanted

Kind = Literal["overlay", "picture", "both"]

# Number, time, camera, verdict. Nothing else in the folder is counted or removed.
_OURS = re.compile(r"([0-9]{8,})-[0-9]{8}T[0-9]{9}Z-[\w.-]*-(?:OK|WARN|NG|INVALID)\.(?:jpg|png)", re.ASCII)
_LEFTOVER = re.compile(r"\.tmp-" + _OURS.pattern + r"-[0-9]+-[0-9a-f]{8}", re.ASCII)

_QUALITY = 90


class ImagesSink:
    """Writes `folder`/NUMBER-TIME-CAMERA-VERDICT.jpg with heat map and outline (`draw`); the plain picture as PNG.

    when: 'ng', 'change' or 'all'. every: besides those, each n-th frame of the stream; 0 for none. kind: what to keep.
    budget_bytes: where the next file would exceed it, the oldest go first; on a full disk as well.
    """

    needs_pixels = True

    def __init__(
        self,
        folder: Path,
        *,
        draw: Draw | None = None,
        budget_bytes: int = 500_000_000,
        when: When = "ng",
        every: int = 0,
        kind: Kind = "overlay",
    ) -> None:
        self.name = f"images:{folder.name}"
        self._folder = folder
        self._draw = draw or plain_picture
        self._budget = budget_bytes
        self._when, self._every, self._kind = when, every, kind
        self._seen = 0
        self._kept: deque[tuple[Path, int]] = deque()
        self._total = 0
        self._number = 0

    def wants(self, item: Scored) -> bool:
        self._seen += 1
        is_sample = self._every > 0 and self._seen % self._every == 0
        return is_sample or is_wanted(self._when, item)

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found = []
        for entry in self._folder.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                entry.unlink(missing_ok=True)
            elif match := _OURS.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    found.append((int(match[1]), entry, entry.lstat().st_size))
        found.sort()
        self._kept = deque((path, size) for _, path, size in found)
        self._total = sum(size for _, size in self._kept)
        self._number = found[-1][0] if found else 0
        self._make_room(0)

    def write(self, item: Scored) -> None:
        if item.frame.pixels.size == 0:
            raise ItemLost("the frame has no pixels")
        self._number += 1
        if self._kind != "picture":
            self._store(item, self._draw(item), ".jpg")
        if self._kind != "overlay":
            self._store(item, Image.fromarray(item.frame.pixels), ".png")

    def close(self) -> None: ...

    def _store(self, item: Scored, picture: Image.Image, suffix: str) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG" if suffix == ".jpg" else "PNG", quality=_QUALITY)
        data = buffer.getvalue()
        if len(data) > self._budget:
            raise ItemLost(f"one picture of {len(data)} bytes is more than the budget of {self._budget}")
        self._make_room(len(data))
        path = self._folder / f"{self._number:08}-{_stem(item)}{suffix}"
        try:
            replace_file(path, data)
        except OutputError:
            # Other programs share the disk: give back twice of what is needed, then try once more.
            if not self._kept:
                raise
            self._remove_oldest(2 * len(data))
            replace_file(path, data)
        self._kept.append((path, len(data)))
        self._total += len(data)

    def _make_room(self, size: int) -> None:
        self._remove_oldest(self._total + size - self._budget)

    def _remove_oldest(self, size: int) -> None:
        while size > 0 and self._kept:
            path, its_size = self._kept.popleft()
            path.unlink(missing_ok=True)
            self._total -= its_size
            size -= its_size


def plain_picture(item: Scored) -> Image.Image:
    """Return the camera's picture without anything on it."""
    return Image.fromarray(item.frame.pixels)


def draw_scored(item: Scored, spec: Preprocess, pixel_threshold: float) -> Image.Image:
    """Return the camera's picture with heat map and outline; plain where nothing was scored."""
    picture = plain_picture(item)
    if item.result.anomaly_map is None:
        return picture
    return draw_overlay(picture, item.result.anomaly_map, spec, pixel_threshold)


def file_part(camera: str) -> str:
    """Return a camera's name as a part of a file name: no separators, no leading dot, at most 64 characters."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", camera)[:64] or "_"


def _stem(item: Scored) -> str:
    utc = item.frame.captured_utc.astimezone(timezone.utc)
    time = f"{utc:%Y%m%dT%H%M%S}{utc.microsecond // 1000:03}Z"
    return f"{time}-{file_part(item.frame.camera)}-{item.record['verdict']}"
