"""Counters, gauges and histograms, and the text in which Prometheus reads them.

Written here because it is a page of code: the common client library brings global registries, collectors of its own and
a server with no limits, and the device would need one package more.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence

Labels = tuple[str, ...]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class _Family(ABC):
    """One metric name with its label names."""

    kind = ""

    def __init__(self, name: str, help_text: str, labels: Labels = ()) -> None:
        self.name, self.help_text, self.labels = name, help_text, labels
        self._lock = threading.Lock()

    def render(self) -> str:
        """Return the family in the text format, one sample a line."""
        lines = [f"# HELP {self.name} {_escaped(self.help_text)}", f"# TYPE {self.name} {self.kind}"]
        return "\n".join([*lines, *self._samples()]) + "\n"

    @abstractmethod
    def _samples(self) -> list[str]: ...

    def _labelled(self, values: Labels, **more: str) -> str:
        pairs = [*zip(self.labels, values, strict=True), *more.items()]
        return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}" if pairs else ""


class Counter(_Family):
    """A total that only grows."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: Labels = ()) -> None:
        super().__init__(name, help_text, labels)
        self._values: dict[Labels, float] = {}

    def add(self, *labels: str, by: float = 1) -> None:
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + by

    def set_total(self, *labels: str, total: float) -> None:
        """Take over a total that somebody else counts."""
        with self._lock:
            self._values[labels] = max(total, self._values.get(labels, 0))

    def _samples(self) -> list[str]:
        with self._lock:
            return [f"{self.name}{self._labelled(key)} {_number(value)}" for key, value in self._values.items()]


class Gauge(_Family):
    """A value of the moment."""

    kind = "gauge"

    def __init__(self, name: str, help_text: str, labels: Labels = ()) -> None:
        super().__init__(name, help_text, labels)
        self._values: dict[Labels, float] = {}

    def set(self, *labels: str, value: float) -> None:
        with self._lock:
            self._values[labels] = value

    def clear(self) -> None:
        """Forget all label values, such as those of a model that was replaced."""
        with self._lock:
            self._values.clear()

    def _samples(self) -> list[str]:
        with self._lock:
            return [f"{self.name}{self._labelled(key)} {_number(value)}" for key, value in self._values.items()]


class Histogram(_Family):
    """Counts of values up to each of the ascending `bounds`; values that are not finite are left out."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, labels: Labels = (), *, bounds: Sequence[float] = _SECONDS) -> None:
        super().__init__(name, help_text, labels)
        self._bounds = tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, *labels: str, value: float) -> None:
        if not math.isfinite(value):
            return
        with self._lock:
            counts = self._counts.setdefault(labels, [0] * (len(self._bounds) + 1))
            counts[bisect_left(self._bounds, value)] += 1
            self._sums[labels] = self._sums.get(labels, 0.0) + value

    def _samples(self) -> list[str]:
        lines = []
        with self._lock:
            for key, counts in self._counts.items():
                total = 0
                for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
                    total += count
                    lines.append(f"{self.name}_bucket{self._labelled(key, le=_number(bound))} {total}")
                lines.append(f"{self.name}_sum{self._labelled(key)} {_number(self._sums[key])}")
                lines.append(f"{self.name}_count{self._labelled(key)} {total}")
        return lines


class StreamMetrics:
    """All metrics of a stream; safe to use from every thread.

    score_bounds: of the histogram of scores, in the model's raw units; `score_bounds_around` makes some from a
    threshold. before_render: called before each page, to fetch totals that readers and sinks count for themselves.
    """

    def __init__(self, score_bounds: Sequence[float], *, before_render: Callable[[], None] | None = None) -> None:
        camera = ("camera",)
        self.frames_captured = Counter("frames_captured_total", "Frames that the source delivered.", camera)
        self.frames_scored = Counter("frames_scored_total", "Frames that got a verdict.", camera)
        self.frames_dropped = Counter("frames_dropped_total", "Frames that nobody scored.", ("camera", "reason"))
        self.source_up = Gauge("source_up", "1 while the source delivers frames.", camera)
        self.reconnects = Counter("reconnects_total", "Connections after the first.", camera)
        self.last_frame = Gauge("last_frame_timestamp_seconds", "Wall-clock time of the last frame.", camera)
        self.frame_age = Histogram("frame_age_seconds", "Age of a frame when it was scored.")
        self.stage = Histogram("stage_seconds", "Time per stage and frame.", ("stage",))
        self.score = Histogram("score", "Anomaly scores, raw units.", bounds=score_bounds)
        self.verdict = Counter("verdict_total", "Verdicts.", ("verdict",))
        self.sink_dropped = Counter("sink_dropped_total", "Results that a sink did not deliver.", ("sink",))
        self.drift_shift_sigma = Gauge(
            "drift_shift_sigma", "Shift of the scores against the calibration, in its standard deviations.", camera
        )
        self.model_info = Gauge("model_info", "1 for the model in use.", ("sha", "backend", "precision"))
        self._before_render = before_render

    def render(self) -> str:
        """Return the page for Prometheus (text format 0.0.4)."""
        if self._before_render is not None:
            self._before_render()
        return "".join(family.render() for family in vars(self).values() if isinstance(family, _Family))


def score_bounds_around(threshold: float) -> tuple[float, ...]:
    """Return histogram bounds that show how far scores stay below an alarm limit and go above it.

    >>> score_bounds_around(10.0)
    (2.5, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.5, 15.0, 20.0, 40.0)
    """
    if not math.isfinite(threshold) or threshold <= 0:
        return tuple(float(value) for value in (-100, -10, -1, 0, 1, 10, 100))
    shares = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
    return tuple(round(threshold * share, 12) for share in shares)


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(float(value)) if value != int(value) else str(int(value))


def _escaped(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
