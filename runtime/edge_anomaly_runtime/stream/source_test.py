"""A synthetic camera, seeded: for demonstrations, tests and fault drills without hardware."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from edge_anomaly_runtime.errors import UsageError, did_you_mean

from .source import EndOfFile, Picture, SourceLost

SCENES = ("moving", "static")


@dataclass(frozen=True)
class TestPattern:
    """What a test:// source shows; every `_at` is a frame number, -1 is never.

    size: width x height. fps: pictures per second in real time; 0 is as fast as they are taken. noise: sensor noise,
    sigma in grey levels. count: pictures until the end (0: endless). defect_every: every n-th picture has a scratch.
    frozen_at, black_at, white_at, blurred_at: from there on the picture is that. for_frames: length of such a fault.
    lost_at: the connection breaks there.
    """

    __test__ = False  # not a test, for pytest

    scene: str = "moving"
    size: str = "320x240"
    fps: float = 25.0
    seed: int = 0
    noise: float = 1.0
    count: int = 0
    defect_every: int = 0
    frozen_at: int = -1
    black_at: int = -1
    white_at: int = -1
    blurred_at: int = -1
    lost_at: int = -1
    for_frames: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.scene not in SCENES:
            raise did_you_mean("test scene", self.scene, list(SCENES))
        width, height = self.width_height
        if not (16 <= width <= 7680 and 16 <= height <= 4320 and 0 <= self.fps <= 1000 and self.noise >= 0):
            raise UsageError(
                f"test:// cannot make {self.size} at {self.fps} fps with noise {self.noise}.",
                "Use size=320x240, fps=25 and noise=1 or the like.",
            )

    @property
    def width_height(self) -> tuple[int, int]:
        """The picture's width and height in pixels."""
        width, _, height = self.size.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise UsageError(f"test:// has no size {self.size!r}.", "Write it as size=320x240.")
        return int(width), int(height)

    def shows(self, at: int, index: int) -> bool:
        """Tell whether the fault that begins at frame `at` is on at frame `index`."""
        return at >= 0 and at <= index < at + self.for_frames


def pattern_from_options(scene: str, options: dict[str, str]) -> TestPattern:
    """Return the pattern of a test:// URI.

    >>> pattern_from_options("moving", {"fps": "10", "frozen_at": "50"}).frozen_at
    50

    Raises:
        UsageError: an unknown scene or option, or a value that is no number.
    """
    defaults = asdict(TestPattern())
    del defaults["scene"]
    values: dict[str, str | int | float] = {}
    for name, text in options.items():
        if name not in defaults:
            raise did_you_mean("option of test://", name, sorted(defaults))
        try:
            values[name] = type(defaults[name])(text)
        except ValueError:
            raise UsageError(f"The test:// option {name}={text!r} is no number.", f"Write {name}=25.") from None
    return TestPattern(scene or "moving", **values)  # type: ignore[arg-type]


class TestSource:
    """A camera that draws: a bright box crosses a seeded texture, or the texture alone."""

    __test__ = False

    def __init__(self, pattern: TestPattern) -> None:
        self._pattern = pattern
        width, height = pattern.width_height
        # 4 px grains: single-pixel noise would vanish in any resize.
        coarse = np.random.default_rng(pattern.seed).integers(60, 120, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
        self._texture = np.ascontiguousarray(coarse.repeat(4, 0).repeat(4, 1)[:height, :width])
        self._index = 0
        self._start = 0.0

    def open(self) -> None:
        """Start the clock; a new connection goes on with the next picture."""
        self._start = time.monotonic() - (self._index / self._pattern.fps if self._pattern.fps else 0.0)

    def read(self, timeout: float) -> Picture | None:
        """Return the next picture when it is due, None if that is more than `timeout` seconds away.

        Raises:
            EndOfFile: `count` pictures have been shown.
            SourceLost: frame `lost_at` was reached.
        """
        pattern, index = self._pattern, self._index
        if pattern.count and index >= pattern.count:
            raise EndOfFile
        due = self._start + index / pattern.fps if pattern.fps else 0.0
        wait = due - time.monotonic()
        if wait > 0:
            time.sleep(min(wait, timeout))
            if wait > timeout:
                return None
        self._index += 1
        if index == pattern.lost_at:
            raise SourceLost("test:// lost its connection, as it was told to.")
        start = time.perf_counter()
        pixels = draw(pattern, index, self._texture)
        rate = pattern.fps or 25.0
        is_keyframe = index % max(1, round(rate)) == 0
        return Picture(pixels, index / rate, is_keyframe, decode_ms=(time.perf_counter() - start) * 1e3)

    def close(self) -> None:
        """Nothing to free."""


def draw(pattern: TestPattern, index: int, texture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return picture `index` of a pattern, uint8 [h, w, 3]; the same arguments give the same pixels."""
    if pattern.shows(pattern.black_at, index):
        return np.zeros_like(texture)
    if pattern.shows(pattern.white_at, index):
        return np.full_like(texture, 255)
    if pattern.shows(pattern.frozen_at, index):
        index = pattern.frozen_at
    pixels = texture.copy()
    height, width = pixels.shape[:2]
    if pattern.scene == "moving":
        side = max(4, height // 6)
        left = index * max(1, width // 64) % max(1, width - side)
        top = (height - side) // 2
        pixels[top : top + side, left : left + side] = (220, 40, 40)
    if pattern.defect_every and index % pattern.defect_every == pattern.defect_every - 1:
        pixels[height // 4 : height // 4 + max(2, height // 60), width // 4 : 3 * width // 4] = (10, 10, 10)
    if pattern.shows(pattern.blurred_at, index):
        pixels = np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(8)), dtype=np.uint8)
    if pattern.noise:
        rng = np.random.default_rng((pattern.seed, index))
        noise = rng.normal(0.0, pattern.noise, (height, width, 1)).astype(np.float32)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels
