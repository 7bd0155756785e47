"""What is wrong with a decoded picture: damage that no decoder reports, and pictures that show nothing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from .source import Picture

FROZEN, BLACK, WHITE, BLURRED, WRONG_SIZE = "frozen", "black", "white", "out of focus", "wrong size"

Grid = npt.NDArray[np.float32]

# Mean difference of neighbours in grey levels that no encoder makes out of a frozen picture (0.64 was seen).
_CHANGE = 1.0


class Trust:
    """Says of each picture of one connection whether to believe it.

    After a gap in the stream's time, a corrupt flag or a decode error every picture is distrusted up to the next key
    frame without a fault: lost packets damage all that is predicted from them, and the decoder mostly says nothing.
    A stream is distrusted until its first key frame for the same reason.

    gap: a step of more than this many usual ones is a gap.
    """

    def __init__(self, *, gap: float = 1.5) -> None:
        self._gap = gap
        self._steps: deque[float] = deque(maxlen=15)
        self._last_pts: float | None = None
        self._reason = "no key frame yet"

    def check(self, picture: Picture) -> str:
        """Return why the picture may be damaged, '' if it may be believed."""
        time_fault = self._time_fault(picture.pts)
        if picture.corrupt:
            self._reason = picture.corrupt
        elif time_fault and not picture.is_keyframe:
            self._reason = time_fault
        elif picture.is_keyframe:
            self._reason = ""
        return self._reason

    def _time_fault(self, pts: float | None) -> str:
        last, self._last_pts = self._last_pts, pts if pts is not None else self._last_pts
        if last is None:
            return ""
        if pts is None:
            return "no time stamp"
        step = pts - last
        usual = median(self._steps) if self._steps else 0.0
        if step <= 0:
            return "time went back"
        self._steps.append(step)
        if usual and step > self._gap * usual:
            return "gap in the stream"
        return ""


@dataclass(frozen=True)
class HealthLimits:
    """When a picture is not worth scoring.

    black, white: mean grey levels outside of these show nothing. frozen_s: no change for so long (0: never judged).
    still: mean absolute difference of neighbouring pictures, key_still: of neighbouring key frames, in grey levels,
    below which nothing has changed. blur: share of the usual sharpness below which a picture is out of focus (0: never
    judged), when it lasts blur_s seconds. size: (width, height) that is expected, None for any.
    """

    black: float = 5.0
    white: float = 250.0
    frozen_s: float = 4.0
    still: float = 0.01
    key_still: float = 0.1
    blur: float = 0.15
    blur_s: float = 1.0
    size: tuple[int, int] | None = None


class Health:
    """Watches the pictures of one camera, one call per picture and in order; every time is from the monotonic clock."""

    def __init__(self, limits: HealthLimits | None = None) -> None:
        self._limits = limits or HealthLimits()
        self._shape: tuple[int, ...] = ()
        self._stillness = Stillness(self._limits)
        self._sharpness = Sharpness(self._limits)

    def check(self, picture: Picture, now_s: float) -> str:
        """Return why the picture must not be scored (one of this module's constants), '' if it may be."""
        height, width = picture.pixels.shape[:2]
        if picture.pixels.shape != self._shape:  # another size is another picture, not a change in this one
            self._shape = picture.pixels.shape
            self.restart()
        if self._limits.size is not None and self._limits.size != (width, height):
            return WRONG_SIZE
        grid = luma_grid(picture.pixels)
        frozen = self._stillness.update(grid, now_s, is_keyframe=picture.is_keyframe)
        mean = float(grid.mean())
        if mean < self._limits.black:
            return BLACK
        if mean > self._limits.white:
            return WHITE
        if frozen:
            return FROZEN
        return BLURRED if self._sharpness.update(picture.pixels, now_s) else ""

    @property
    def still_since_s(self) -> float | None:
        """Since when nothing has changed, on the monotonic clock; None if something does."""
        return self._stillness.still_since_s

    def restart(self) -> None:
        """Forget the pictures seen, as after a lost connection; what is sharp for this camera stays known."""
        self._stillness = Stillness(self._limits)
        self._sharpness.restart()


class Stillness:
    """Finds a frozen picture behind an encoder.

    Neither equality nor the difference of neighbours does: a frozen picture is encoded anew each time, and of a resting
    scene the encoder skips the noise. Key frames are coded whole, so a live camera's noise shows between them.
    Rule: over `frozen_s` the median difference of neighbours is below `still`, and the smallest difference of the last
    three pairs of key frames below `key_still`. A scene without any noise cannot be told from a frozen one.
    """

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        self._last: Grid | None = None
        self._last_key: Grid | None = None
        self._neighbours: deque[tuple[float, float]] = deque()
        self._key_pairs: deque[float] = deque(maxlen=3)
        self._start_s: float | None = None
        self.still_since_s: float | None = None

    def update(self, grid: Grid, now_s: float, *, is_keyframe: bool) -> bool:
        """Take the next picture's grid; return whether the picture is frozen."""
        if self._start_s is None:
            self._start_s = now_s
        if self._last is not None:
            difference = _difference(grid, self._last)
            if difference > _CHANGE:  # valid at once, not when half of the window has seen it
                self._neighbours.clear()
                self._key_pairs.clear()
                self._start_s = now_s
            self._neighbours.append((now_s, difference))
        self._last = grid
        if is_keyframe:
            if self._last_key is not None:
                self._key_pairs.append(_difference(grid, self._last_key))
            self._last_key = grid
        while self._neighbours and self._neighbours[0][0] < now_s - self._limits.frozen_s:
            self._neighbours.popleft()
        frozen = self._is_frozen(now_s)
        if not frozen:
            self.still_since_s = None
        elif self.still_since_s is None:
            self.still_since_s = now_s - self._limits.frozen_s
        return frozen

    def _is_frozen(self, now_s: float) -> bool:
        known_s = 0.0 if self._start_s is None else now_s - self._start_s
        if not self._limits.frozen_s or known_s < self._limits.frozen_s:
            return False
        if not self._key_pairs or len(self._neighbours) < 3:
            return False
        if min(self._key_pairs) >= self._limits.key_still:
            return False
        return median(difference for _, difference in self._neighbours) < self._limits.still


class Sharpness:
    """Finds a picture out of focus: its horizontal gradient falls far below what this camera usually shows.

    The reference is the least sharp tenth of the camera's own good pictures, one a second over ten minutes, so that an
    empty belt between two parts is part of what is usual. Judged once ten seconds are known and there is texture.
    """

    _SAMPLE_S, _SAMPLES, _ARMED, _TEXTURE = 1.0, 600, 10, 1.0

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        self._samples: deque[float] = deque(maxlen=self._SAMPLES)
        self._sampled_s = float("-inf")
        self._usual = 0.0
        self._low_since_s: float | None = None

    def update(self, pixels: npt.NDArray[np.uint8], now_s: float) -> bool:
        """Take the next picture; return whether it is out of focus, and has been for `blur_s`."""
        if not self._limits.blur:
            return False
        value = gradient(pixels)
        if len(self._samples) >= self._ARMED:
            if self._usual >= self._TEXTURE and value < self._limits.blur * self._usual:
                self._low_since_s = now_s if self._low_since_s is None else self._low_since_s
                return now_s - self._low_since_s >= self._limits.blur_s
        self._low_since_s = None
        if now_s - self._sampled_s >= self._SAMPLE_S:
            self._sampled_s = now_s
            self._samples.append(value)
            self._usual = float(np.percentile(self._samples, 10))
        return False

    def restart(self) -> None:
        """Forget how long the picture has been blurred."""
        self._low_since_s = None


def luma_grid(pixels: npt.NDArray[np.uint8], step: int = 8) -> Grid:
    """Return every `step`-th pixel's brightness, float32 [h/step, w/step], 0 to 255."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return np.asarray(pixels[::step, ::step].astype(np.float32) @ weights, np.float32)


def gradient(pixels: npt.NDArray[np.uint8], step: int = 8) -> float:
    """Return the mean absolute difference of horizontal neighbours in every `step`-th row's green, in grey levels."""
    rows = pixels[::step, :, 1].astype(np.int16)
    if rows.shape[1] < 2:
        return 0.0
    differences = rows[:, 1:] - rows[:, :-1]
    return float(np.abs(differences, out=differences).sum(dtype=np.int64) / differences.size)


def _difference(first: Grid, second: Grid) -> float:
    return float(np.abs(first - second).mean())
