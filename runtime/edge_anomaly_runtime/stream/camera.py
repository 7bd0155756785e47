"""One camera of a stream: its reader, its rules, and what has been counted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from time import monotonic_ns
from typing import Any

import numpy as np

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.preprocess import WHOLE_IMAGE
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.scoring import Scorer, exposure_limits

from .drift import DriftMonitor, DriftReport, reference_of
from .frame import Frame
from .health import HealthLimits
from .model import ModelSlot
from .policy import Debouncer, FrameGate, parse_confirm, parse_policy
from .reader import ReaderOptions
from .settings import CameraSettings, StreamSettings
from .sources import reader_for
from .uri import parse_source

# Ages of so many frames make the percentiles.
_AGES = 500
# A live camera of which every frame counts may keep so many waiting; a 1080p picture is 6 MB.
_MAX_WAITING = 64


class Camera:
    """Belongs to the scoring thread, but for `status` and `drops`.

    scored, skipped: frames with a verdict, and those that the frame policy left out. verdict: the newest one.
    """

    def __init__(
        self,
        name: str,
        settings: CameraSettings,
        stream: StreamSettings,
        slot: ModelSlot,
        *,
        on_frame: Callable[[], None],
    ) -> None:
        self.name, self.settings, self.slot = name, settings, slot
        uri = parse_source(settings.source, camera=name)
        self.live = uri.live
        policy = parse_policy(settings.frames or stream.frames or ("latest" if uri.live else "all"))
        check_policy(policy.kind, uri.live, stream.max_lag, uri.shown)
        self.waits_for_trigger = policy.kind == "trigger"
        self.gate = FrameGate(policy)
        confirm = parse_confirm(settings.confirm or stream.confirm)
        hysteresis = stream.hysteresis if settings.hysteresis is None else settings.hysteresis
        self._make_debouncer = partial(Debouncer, confirm, hysteresis)
        every_one = policy.kind in ("all", "every") and uri.live and stream.max_lag is not None
        options = ReaderOptions(
            reconnect_s=stream.timeout,
            hung_s=3 * stream.timeout,
            max_age_s=(stream.max_lag or stream.max_age) if every_one else stream.max_age,
            mailbox=_MAX_WAITING if every_one else 1,
        )
        self.reader = reader_for(
            uri,
            camera=name,
            decoder=settings.decoder or stream.decoder,
            timeout=stream.timeout,
            options=options,
            health=health_limits(slot.model.scorer),
            on_frame=on_frame,
        )
        self.scored = self.skipped = 0
        self.verdicts: Counter[str] = Counter()
        self.verdict: str | None = None
        self._reason = ""
        self._ages_ms: deque[float] = deque(maxlen=_AGES)
        self._scored_at_ns: deque[int] = deque(maxlen=_AGES)
        self._told_state = "connecting"
        self._size: tuple[int, int] | None = None
        self.new_model()

    def new_model(self) -> None:
        """Forget what was learnt from the scores of another model."""
        self.debouncer = self._make_debouncer()
        scorer = self.slot.model.scorer
        self.drift: DriftMonitor | None = None
        self.drift_report: DriftReport | None = None
        self._drift_news: DriftReport | None = None
        if scorer.classes:
            return
        try:
            self.drift = DriftMonitor(reference_of(scorer.thresholds))
        except UsageError as error:
            say(f"{self.name}: drift is not watched: {error.what}")

    def cut(self, frame: Frame) -> Frame:
        """Return the frame's part inside the region of interest."""
        if self.settings.roi == WHOLE_IMAGE:
            return frame
        height, width = frame.pixels.shape[:2]
        left, top, right, bottom = self.settings.roi
        rows = slice(int(top * height), max(int(top * height) + 1, round(bottom * height)))
        columns = slice(int(left * width), max(int(left * width) + 1, round(right * width)))
        return replace(frame, pixels=np.ascontiguousarray(frame.pixels[rows, columns]))

    def note(self, record: Mapping[str, Any]) -> bool:
        """Count a scored frame by its record; return whether its verdict, or why it is INVALID, is new."""
        verdict, reason = str(record["verdict"]), str(record["reason"] or "")
        self.scored += 1
        self.verdicts[verdict] += 1
        self._scored_at_ns.append(monotonic_ns())
        self._ages_ms.append(float(record["age_ms"]))
        if record["score"] is not None and self.drift is not None:
            self._drift_news = self.drift.update(float(record["score"])) or self._drift_news
        kind = "" if verdict != "INVALID" else reason
        changed = (verdict, kind) != (self.verdict, self._reason)
        self.verdict, self._reason = verdict, kind
        return changed

    def resized(self) -> str:
        """Return what to say when the camera's pictures have another size than before, '' otherwise."""
        size = self.reader.status().size
        before, self._size = self._size, size
        if not self.live or size is None or before in (None, size):
            return ""
        return f"pictures are {size[0]}x{size[1]} now, {before[0]}x{before[1]} before"

    def fault(self) -> tuple[str, str] | None:
        """Return state and cause when the camera has just stopped delivering, None otherwise."""
        status = self.reader.status()
        if status.state == self._told_state or not self.live:
            return None
        self._told_state = status.state
        if status.state not in ("damaged", "stalled", "lost", "unauthorised"):
            return None
        self.verdict, self._reason = "INVALID", status.state
        return status.state, status.cause

    def drops(self) -> dict[str, int]:
        """Return the running totals of frames that were not scored, by cause."""
        drops = self.reader.drops()
        return {**drops, "skipped": self.skipped} if self.skipped else drops

    def look_at_drift(self) -> str:
        """Bring `drift_report` up to date; return what to say when an episode has begun or ended, '' otherwise."""
        if self.drift is None:
            return ""
        self.drift_report = self.drift.report()
        news, self._drift_news = self._drift_news, None
        if news is None:
            return ""
        return f"the scores drift. {news.advice}" if news.state == "drifting" else "the scores are as calibrated again"

    def status(self) -> dict[str, Any]:
        """Return what the page shows, as JSON types."""
        status = self.reader.status()
        ages = sorted(self._ages_ms.copy())
        times = self._scored_at_ns.copy()
        recent = [at for at in times if monotonic_ns() - at < 10e9]
        span_s = (recent[-1] - recent[0]) / 1e9 if len(recent) > 1 else 0.0
        drift = self.drift_report
        return {
            "camera": self.name,
            "state": status.state,
            "cause": status.cause,
            "size": None if status.size is None else list(status.size),
            "captured": status.captured,
            "scored": self.scored,
            "drops": self.drops(),
            "fps": round((len(recent) - 1) / span_s, 2) if span_s else None,
            "age_ms": {name: _percentile(ages, share) for name, share in (("p50", 0.5), ("p95", 0.95))},
            "verdict": self.verdict,
            "verdicts": dict(self.verdicts),
            "drift": None if drift is None else drift_values(drift),
        }


def check_policy(kind: str, live: bool, max_lag: float | None, shown: str) -> None:
    """Refuse frame policies that do not fit the source.

    Raises:
        UsageError: every frame of a camera without a limit to its lag, or a trigger for files.
    """
    if live and kind in ("all", "every") and max_lag is None:
        raise UsageError(
            f"--frames {kind} on the camera {shown} falls behind for ever when scoring is slower.",
            "Add --max-lag SECONDS, after which frames are dropped and counted, or take --frames latest.",
        )
    if not live and kind == "trigger":
        raise UsageError(f"--frames trigger is for cameras, not for {shown}.", "Take --frames all.")


def health_limits(scorer: Scorer) -> HealthLimits:
    """Return when a picture is too dark or bright, given how dark and bright the model's normal images are."""
    black, white = exposure_limits(scorer.bundle.manifest.input.brightness)
    return HealthLimits(black=black, white=white)


def drift_values(report: DriftReport) -> dict[str, Any]:
    """Return a drift report as JSON types."""
    return {
        "state": report.state,
        "shift_sigma": report.shift_sigma,
        "spread": report.spread,
        "ks": report.ks,
        "n": report.n,
        "advice": report.advice,
    }


def _percentile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
