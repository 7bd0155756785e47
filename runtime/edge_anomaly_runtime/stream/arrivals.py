"""Which pictures come too late to be the present: judged by when they arrive, never by an announced frame rate."""

from __future__ import annotations

from collections import deque
from statistics import median

# A picture that took less was lying ready; only used while the usual time between two is not known.
_AT_ONCE_S = 0.005


class Arrivals:
    """Watches how long each picture of one connection had to be waited for.

    late_s: a wait longer than this, and than `periods` usual ones, makes a picture late. FFmpeg answers a stalled read
    with the last picture it still held, as if nothing were wrong; and what follows a pause all at once is what piled
    up during it. Such pictures are stale until one had to be waited for again.
    """

    def __init__(self, *, late_s: float, periods: float = 4.0) -> None:
        self._late_s = late_s
        self._periods = periods
        self._waits: deque[float] = deque(maxlen=25)
        self._steps: deque[float] = deque(maxlen=25)
        self._last_pts: float | None = None
        self._catching_up = True  # what piled up while the connection was made

    @property
    def period_s(self) -> float:
        """The usual time between two pictures in seconds; 0 as long as it is not known."""
        if len(self._waits) >= 5:
            return median(self._waits)
        return median(self._steps) if self._steps else 0.0

    def is_stale(self, waited_s: float, pts: float | None) -> bool:
        """Tell whether a picture that took `waited_s` seconds to arrive is older than it looks."""
        period = self.period_s
        if pts is not None and self._last_pts is not None and 0 < pts - self._last_pts < 10:
            self._steps.append(pts - self._last_pts)
        self._last_pts = pts
        if self._catching_up and waited_s < (period / 2 or _AT_ONCE_S):
            return True
        self._waits.append(waited_s)  # the late ones as well: a slow camera's are usual
        self._catching_up = waited_s > max(self._late_s, self._periods * period)
        return self._catching_up
