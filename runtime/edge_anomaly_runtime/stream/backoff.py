"""How long to wait before the next attempt."""

from __future__ import annotations

import random


class Backoff:
    """Doubling waits with jitter: first_s, 2 first_s, 4 first_s ... at most cap_s; each is 75 to 100 % of that.

    The jitter keeps cameras that failed together, for instance with their switch, from coming back in step.
    """

    def __init__(self, first_s: float, cap_s: float, *, seed: int | None = None) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._wait_s = first_s
        self._random = random.Random(seed)

    def next_s(self) -> float:
        """Return the next wait in seconds."""
        wait, self._wait_s = self._wait_s, min(self._cap_s, self._wait_s * 2)
        return wait * self._random.uniform(0.75, 1.0)

    def reset(self) -> None:
        """Begin with the first wait again."""
        self._wait_s = self._first_s
