"""Which frames of a camera are scored, and what a row of single verdicts amounts to."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from edge_anomaly_runtime.errors import UsageError, did_you_mean
from edge_anomaly_runtime.scoring import Result, Verdict

from .frame import Frame

Kind = Literal["latest", "all", "every", "fps", "trigger"]

_LEVELS: tuple[Verdict, ...] = ("OK", "WARN", "NG")
_FORMS = "latest, all, every:N, fps:F or trigger"


@dataclass(frozen=True)
class FramePolicy:
    """latest: the newest frame; all: each one; every: each `value`-th; fps: at most `value` a second; trigger: one per
    trigger."""

    kind: Kind
    value: float = 0.0


def parse_policy(text: str) -> FramePolicy:
    """Read `--frames`.

    >>> parse_policy("fps:2.5")
    FramePolicy(kind='fps', value=2.5)

    Raises:
        UsageError: it is not a policy.
    """
    kind, colon, number = text.partition(":")
    if kind == "latest" and not colon:
        return FramePolicy("latest")
    if kind == "all" and not colon:
        return FramePolicy("all")
    if kind == "trigger" and not colon:
        return FramePolicy("trigger")
    if kind not in ("every", "fps"):
        raise did_you_mean("frame policy", text, ["latest", "all", "every:N", "fps:F", "trigger"])
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind == "every":
        if not (1 <= value <= 1e6 and value == int(value)):
            raise UsageError(
                f"--frames {text} is not possible.", f"Give every:N with a whole N from 1. Forms: {_FORMS}."
            )
        return FramePolicy("every", value)
    if not 0 < value <= 1000:
        raise UsageError(f"--frames {text} is not possible.", f"Give fps:F with F above 0. Forms: {_FORMS}.")
    return FramePolicy("fps", value)


class FrameGate:
    """Says of each frame of one camera, in order, whether it is scored; the others count as `skipped`."""

    def __init__(self, policy: FramePolicy) -> None:
        self._policy = policy
        self._seen = 0
        self._due_ns: float | None = None
        self._pending = 0
        self._pulled_ns = 0

    def trigger(self, now_ns: int) -> None:
        """Ask for the next frame captured from now on (monotonic clock)."""
        self._pending += 1
        self._pulled_ns = now_ns

    def is_due(self, frame: Frame) -> bool:
        """Tell whether to score this frame; call it once per frame."""
        policy = self._policy
        if policy.kind == "every":
            self._seen += 1
            return (self._seen - 1) % int(policy.value) == 0
        if policy.kind == "fps":
            if self._due_ns is not None and frame.captured_ns < self._due_ns:
                return False
            period_ns = 1e9 / policy.value
            due_ns = frame.captured_ns if self._due_ns is None else self._due_ns
            # The next one is due a period after this one was, unless frames came late: no burst makes up for that.
            self._due_ns = max(due_ns + period_ns, frame.captured_ns + period_ns / 2)
            return True
        if policy.kind == "trigger":
            # A frame from before the trigger may show the part before it.
            if not self._pending or frame.captured_ns < self._pulled_ns:
                return False
            self._pending = 0
            return True
        return True


def parse_confirm(text: str) -> tuple[int, int]:
    """Read `--confirm K/N`.

    >>> parse_confirm("2/3")
    (2, 3)

    Raises:
        UsageError: it is not K/N with 1 <= K <= N <= 1000.
    """
    k, slash, n = text.partition("/")
    if slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n) <= 1000:
        return int(k), int(n)
    raise UsageError(f"--confirm {text} is not possible.", "Give K/N with 1 <= K <= N, such as 2/3.")


class Debouncer:
    """Turns the single verdicts of one camera into one that does not flicker.

    confirm (k, n): WARN or NG when at least k of the last n frames were at least that bad; (1, 1) changes nothing.
    hysteresis: a verdict stays until the score has fallen below its limit by this share of the way from `fail` to
    `warn`; 0 changes nothing. INVALID is told at once and counts for nothing: it can neither raise nor end an alarm.
    """

    def __init__(self, confirm: tuple[int, int] = (1, 1), hysteresis: float = 0.0) -> None:
        if not 0 <= hysteresis <= 1:
            raise UsageError(f"--hysteresis {hysteresis:g} is not possible.", "Give a share from 0 to 1.")
        self._k, n = confirm
        self._hysteresis = hysteresis
        self._levels: deque[int] = deque(maxlen=n)
        self._level = 0

    def update(self, result: Result) -> Verdict:
        """Take the next frame's result; return the verdict that holds now."""
        if result.verdict == "INVALID":
            return "INVALID"
        self._levels.append(self._single_level(result))
        reached = sorted(self._levels, reverse=True)
        self._level = reached[self._k - 1] if len(reached) >= self._k else 0
        return _LEVELS[self._level]

    def _single_level(self, result: Result) -> int:
        if result.score is None or result.threshold is None or result.warn is None:  # a classifier has no limits
            return _LEVELS.index(result.verdict)
        slack = self._hysteresis * (result.threshold - result.warn)
        if result.score > result.threshold - (slack if self._level == 2 else 0.0):
            return 2
        return 1 if result.score > result.warn - (slack if self._level >= 1 else 0.0) else 0
