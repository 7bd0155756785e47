"""`stream`: the newest frame of every camera through one scorer to all sinks, until told to stop."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import monotonic, monotonic_ns, perf_counter
from typing import TYPE_CHECKING, Any

from PIL import Image

from edge_anomaly_runtime.errors import EdgeAnomalyError, SourceError
from edge_anomaly_runtime.overlay import draw_overlay
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.scoring import Result

from .camera import Camera
from .frame import Frame, Scored
from .metrics import StreamMetrics, score_bounds_around
from .metrics_server import MetricsServer, parse_address, token_from_environment, url_of
from .model import EngineChoice, Model, ModelSlot, check_golden, default_choice
from .notify import Notifier
from .record import event_of, record_of
from .settings import CameraSettings, SinkSettings, StreamSettings
from .sink import SinkThread
from .sink_spec import sink_from_spec
from .uri import parse_source, unique_names

if TYPE_CHECKING:
    from .page_server import PageServer

# Without a frame the loop comes round this often.
_TURN_S = 0.25
_HOUSEKEEPING_S = 0.5
_DRIFT_S = 5.0
# An engine that fails on so many frames in a row will not recover.
_MAX_FAILURES = 10
_DRAIN_S = 2.0
# Frames of replaced models may still wait in sinks.
_KEPT_MODELS = 4

Reload = Callable[[], StreamSettings]


class Stream:
    """A running stream. `run` belongs to one thread; `stop`, `request_reload`, `trigger` and `status` to any.

    Raises:
        ArtefactError, GateError, MissingRequirementError, UsageError: the model, a source or a sink cannot be used.
    """

    def __init__(self, settings: StreamSettings, *, reload: Reload | None = None) -> None:
        self._settings = settings
        self._reload_settings = reload
        self._wake = threading.Event()
        self._ended = threading.Event()
        # Plain flags: signal handlers set them, and an event's lock may be held by the very thread they interrupt.
        self._is_stopping = self._wants_reload = False
        self._lock = threading.Lock()  # guards what `status` reads: cameras, sinks
        self._started = datetime.now(timezone.utc)
        self._started_s = self._beat = monotonic()
        self._is_excused = False  # from coming round: it waits for a required sink, or loads a model
        self._failures = self._scored = 0
        self._frames_of_model: Counter[str] = Counter()
        self._models: dict[str, Model] = {}
        self._slots: dict[Path | None, ModelSlot] = {}
        self._cameras: dict[str, Camera] = {}
        self._sinks: dict[SinkSettings, SinkThread] = {}
        self._page: SinkThread | None = None
        self._servers: list[MetricsServer | PageServer] = []
        self._notifier = Notifier()
        self._next_housekeeping = self._next_drift = 0.0
        self._next_selftest = monotonic() + settings.selftest_hours * 3600
        self.failure: EdgeAnomalyError | None = None
        try:
            self._open(settings)
        except BaseException:
            self._close(in_order=True)
            raise

    # For every thread; the first two for signal handlers as well

    def stop(self) -> None:
        """End in order: no new frames, sinks flushed."""
        self._is_stopping = True
        for sink in list(self._sinks.values()):
            sink.release()

    def request_reload(self) -> None:
        """Read configuration and model again."""
        self._wants_reload = True

    def trigger(self) -> None:
        """Score the next frame of every camera that waits for a trigger."""
        with self._lock:
            for camera in self._cameras.values():
                if camera.waits_for_trigger:
                    camera.gate.trigger(monotonic_ns())

    @property
    def cameras(self) -> list[Camera]:
        """The cameras of now."""
        with self._lock:
            return list(self._cameras.values())

    @property
    def is_live(self) -> bool:
        """Whether the scoring loop comes round."""
        return self._is_excused or monotonic() - self._beat < self._settings.hang

    @property
    def is_ready(self) -> bool:
        """Whether every camera delivers."""
        return self.is_live and all(camera.reader.status().state in ("up", "ended") for camera in self.cameras)

    def status(self) -> dict[str, Any]:
        """Return the state of the whole stream as JSON types."""
        with self._lock:
            cameras, sinks = list(self._cameras.values()), list(self._sinks.values())
        counts = [(sink, sink.counts()) for sink in sinks]
        return {
            "model": ", ".join(dict.fromkeys(camera.slot.model.name for camera in cameras)),
            "started_utc": self._started.isoformat(timespec="seconds"),
            "uptime_s": round(monotonic() - self._started_s, 1),
            "cameras": [camera.status() for camera in cameras],
            "sinks": [
                {"sink": sink.name, "written": n.written, "dropped": n.dropped + n.lost, "failing": sink.is_failing}
                for sink, n in counts
            ],
        }

    # The scoring thread

    def run(self) -> dict[str, Any]:
        """Score until stopped, until the last file has ended or `stop_after` frames; return the final status.

        Raises:
            SourceError: a file could not be read, or with `fail_fast` a camera was lost.
            EdgeAnomalyError: the engine failed on frame after frame.
        """
        self._progress()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        for camera in self._cameras.values():
            camera.reader.start()
        names = ", ".join(self._cameras)
        self._notifier.ready(f"scoring {names}")
        say(f"scoring {names} with {self._model_line()}")
        in_order = False
        try:
            while not self._is_stopping and self.failure is None:
                self._wake.clear()
                scored = self._turn()
                self._housekeep()
                if not scored:
                    if all(camera.reader.ended for camera in self._cameras.values()):
                        self.failure = self._first_error()
                        break
                    self._wake.wait(_TURN_S)
            in_order = self.failure is None
        finally:
            self._ended.set()
            self._notifier.stopping()
            _all_at_once([camera.reader.close for camera in self._cameras.values()], _DRAIN_S)
            self._close(in_order=in_order)
        if self.failure is not None:
            raise self.failure
        return self.status()

    def _turn(self) -> bool:
        """Take at most one frame of every camera, so that a fast one cannot starve the others."""
        took = False
        for camera in self._cameras.values():
            self._progress()
            frame = camera.reader.take(0.0)
            if frame is None:
                continue
            took = True
            if not camera.gate.is_due(frame):
                camera.skipped += 1
                continue
            self._score(camera, camera.cut(frame))
            if self._is_stopping or self.failure is not None:
                break
        return took

    def _score(self, camera: Camera, frame: Frame) -> None:
        model = camera.slot.model
        result = self._judged(model, frame)
        start = perf_counter()
        verdict = camera.debouncer.update(result)
        scored_ns = monotonic_ns()
        record = record_of(
            frame, replace(result, verdict=verdict), scored_ns=scored_ns, drops=camera.drops(), model=model.name
        )
        if record["verdict"] not in (result.verdict, "INVALID"):
            record["single_verdict"] = result.verdict
        record["ms"]["post"] = round((perf_counter() - start) * 1e3, 3)
        item = Scored(frame, result, record, changed=camera.note(record))
        self._observe(record)
        self._send(item)
        self._scored += 1
        self._frames_of_model[model.name] += 1
        if self._frames_of_model[model.name] == self._settings.probation:
            camera.slot.commit()
        if self._scored == self._settings.stop_after:
            self._is_stopping = True

    def _judged(self, model: Model, frame: Frame) -> Result:
        if frame.invalid or frame.distrust:
            return model.scorer.invalid(frame.invalid or frame.distrust)
        try:
            result = model.scorer.score_image(frame.pixels)
        except Exception as error:
            # One bad frame must not end weeks of scoring; an engine that is broken must.
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                self.failure = EdgeAnomalyError(
                    f"The engine failed on {self._failures} frames in a row: {error}",
                    "Restart; see edge-anomaly doctor.",
                )
            return model.scorer.invalid(f"the engine failed: {type(error).__name__}")
        self._failures = 0
        return result

    def _send(self, item: Scored) -> None:
        for settings, sink in self._sinks.items():
            self._is_excused = settings.required
            sink.put(item)
        self._is_excused = False
        if self._page is not None:
            self._page.put(item)

    def _observe(self, record: dict[str, Any]) -> None:
        metrics = self._metrics
        metrics.frame_age.observe(value=record["age_ms"] / 1e3)
        for stage, ms in record["ms"].items():
            metrics.stage.observe(stage, value=(ms or 0.0) / 1e3)
        if record["score"] is not None:
            metrics.score.observe(value=record["score"])
        metrics.verdict.add(record["verdict"])

    def _progress(self) -> None:
        self._beat = monotonic()
        self._notifier.progress()

    def _housekeep(self) -> None:
        for slot in self._slots.values():
            slot.look()
            if (replaced := slot.take_next()) is not None:
                self._exchanged(slot, replaced)
        if self._wants_reload:
            self._wants_reload = False
            self._apply_reload()
        now = monotonic()
        if now < self._next_housekeeping:
            return
        self._next_housekeeping = now + _HOUSEKEEPING_S
        for camera in self._cameras.values():
            self._report_state(camera)
            if now >= self._next_drift and (news := camera.look_at_drift()):
                say(f"{camera.name}: {news}")
        if now >= self._next_drift:
            self._next_drift = now + _DRIFT_S
        if now >= self._next_selftest:
            self._next_selftest = now + self._settings.selftest_hours * 3600
            self._test_again()

    def _report_state(self, camera: Camera) -> None:
        if (fault := camera.fault()) is not None:
            state, cause = fault
            say(f"{camera.name}: {state}" + (f", {cause}" if cause else ""))
            self._send(event_of(camera.name, state, cause, model=camera.slot.model.name, drops=camera.drops()))
            if self._settings.fail_fast:
                self.failure = SourceError(
                    f"{camera.name} is {state}: {cause}.", "Check the camera; --fail-fast ends here."
                )
        if change := camera.resized():
            say(f"{camera.name}: {change}")
            self._send(event_of(camera.name, "resized", change, model=camera.slot.model.name, drops=camera.drops()))
        if self._settings.fail_fast and self.failure is None:
            self.failure = camera.reader.error

    def _first_error(self) -> EdgeAnomalyError | None:
        return next((camera.reader.error for camera in self._cameras.values() if camera.reader.error is not None), None)

    def _test_again(self) -> None:
        for slot in self._slots.values():
            try:
                check_golden(slot.model.scorer)
            except EdgeAnomalyError as error:
                self.failure = error
                return
        say("the golden images give their stored scores")

    def _exchanged(self, slot: ModelSlot, replaced: Model) -> None:
        replaced.scorer.close()
        self._remember(slot.model)
        for camera in self._cameras.values():
            if camera.slot is slot:
                camera.new_model()
        say(f"{slot.model.name} is in use in place of {replaced.name}")

    def _remember(self, model: Model) -> None:
        self._models[model.name] = model
        while len(self._models) > max(_KEPT_MODELS, 2 * len(self._slots)):
            del self._models[next(iter(self._models))]
        self._metrics.model_info.clear()
        for slot in self._slots.values():
            used = slot.model
            self._metrics.model_info.set(used.sha256, used.scorer.engine, used.scorer.precision, value=1)

    # Opening, reloading, closing

    def _open(self, settings: StreamSettings) -> None:
        wanted, choice = _planned(settings)
        # Sinks first: a wrong one is told at once, before a model is loaded.
        sinks = {sink: sink_from_spec(sink.to, draw=self._draw) for sink in settings.sinks}
        self._open_slots(settings, choice)
        first = next(iter(self._slots.values())).model.scorer
        limit = 0.0 if first.classes else first.thresholds.fail.value
        self._metrics = StreamMetrics(score_bounds_around(limit), before_render=self._fill_metrics)
        for slot in self._slots.values():
            self._remember(slot.model)
        for name, camera in wanted.items():
            self._cameras[name] = self._new_camera(name, camera, settings)
        self._sinks = {spec: SinkThread(sink, required=spec.required) for spec, sink in sinks.items()}
        self._open_servers(settings)

    def _open_slots(self, settings: StreamSettings, choice: EngineChoice) -> None:
        wanted = {camera.bundle for camera in settings.cameras}
        for bundle in sorted(wanted, key=str):
            if bundle not in self._slots:
                folder = settings.bundle if bundle is None else bundle
                store = settings.store if bundle is None else None
                self._slots[bundle] = ModelSlot(choice, bundle=folder, store=store)

    def _close_unused_slots(self, settings: StreamSettings) -> None:
        for bundle in set(self._slots) - {camera.bundle for camera in settings.cameras}:
            self._slots.pop(bundle).close(in_order=True)

    def _new_camera(self, name: str, camera: CameraSettings, settings: StreamSettings) -> Camera:
        return Camera(name, camera, settings, self._slots[camera.bundle], on_frame=self._wake.set)

    def _open_servers(self, settings: StreamSettings) -> None:
        if settings.metrics is not None:
            host, port = parse_address(settings.metrics)
            server = MetricsServer(
                self._metrics.render,
                is_live=lambda: self.is_live,
                is_ready=lambda: self.is_ready,
                host=host,
                port=port,
                token=token_from_environment(),
            )
            self._servers.append(server)
            say(f"metrics on {url_of(server.host, server.port, '/metrics')}")
        if settings.page is not None:
            from . import page_server
            from .page import LiveView

            host, port = parse_address(settings.page, "--page")
            view = LiveView(draw=self._draw)
            token = page_server.token_from_environment()
            page = page_server.PageServer(view, host=host, port=port, token=token, status=self.status)
            self._page = SinkThread(view)
            self._servers.append(page)
            say(f"live page on {url_of(page.host, page.port)}")

    def _apply_reload(self) -> None:
        """Take over what has changed in the configuration; whatever is wrong with it, the stream goes on as it is."""
        self._notifier.reloading()
        self._is_excused = True
        try:
            if self._reload_settings is not None:
                self._take_over(self._reload_settings())
            for slot in self._slots.values():
                slot.request_reload()
        except EdgeAnomalyError as error:
            say(f"the new configuration is refused, the old one stays: {error.what} {error.hint}")
            self._close_unused_slots(self._settings)
        finally:
            self._progress()
            self._is_excused = False
            self._notifier.ready(f"scoring {', '.join(self._cameras)}")

    def _take_over(self, settings: StreamSettings) -> None:
        old = self._settings
        fixed = ("bundle", "store", "engine", "precision", "threads", "metrics", "page", "hang")
        for name in fixed:
            if getattr(settings, name) != getattr(old, name):
                say(f"{name} has changed, which needs a restart")
        settings = settings.model_copy(update={name: getattr(old, name) for name in fixed})
        if settings == old:
            return
        wanted, choice = _planned(settings)
        sinks = {sink: sink_from_spec(sink.to, draw=self._draw) for sink in settings.sinks if sink not in self._sinks}
        same_rules = settings.model_copy(update={"cameras": old.cameras, "sinks": old.sinks}) == old
        cameras: dict[str, Camera] = {}
        self._open_slots(settings, choice)
        for name, chosen in wanted.items():
            running = self._cameras.get(name)
            if running is None or running.settings != chosen or not same_rules:
                running = self._new_camera(name, chosen, settings)
            cameras[name] = running
        # From here on nothing can fail.
        gone = [camera for name, camera in self._cameras.items() if cameras.get(name) is not camera]
        with self._lock:
            before, self._cameras = self._cameras, cameras
            old_sinks, self._sinks = (
                self._sinks,
                {
                    spec: self._sinks[spec] if spec in self._sinks else SinkThread(sinks[spec], required=spec.required)
                    for spec in settings.sinks
                },
            )
        self._settings = settings
        for camera in gone:
            camera.reader.close()
        for name, camera in cameras.items():
            if before.get(name) is not camera:
                camera.reader.start()
        for spec, sink in old_sinks.items():
            if spec not in self._sinks:
                sink.close(_DRAIN_S)
        self._close_unused_slots(settings)
        for slot in self._slots.values():
            self._remember(slot.model)
        say(f"configuration taken over: {', '.join(cameras)}")

    def _close(self, *, in_order: bool) -> None:
        """Flush the sinks, all at once, and free everything."""
        sinks = [*self._sinks.values(), *([self._page] if self._page is not None else [])]
        _all_at_once([partial(sink.close, _DRAIN_S) for sink in sinks], _DRAIN_S + 1.0)
        for server in self._servers:
            server.close()
        for slot in self._slots.values():
            slot.close(in_order=in_order)

    # For sinks, metrics and the watchdog

    def _draw(self, item: Scored) -> Image.Image:
        """Return a frame with its heat map, in the colours of the model that scored it."""
        picture = Image.fromarray(item.frame.pixels)
        model = self._models.get(str(item.record["model"]))
        if item.result.anomaly_map is None or model is None or model.scorer.classes:
            return picture
        spec = model.scorer.bundle.manifest.input.preprocess
        return draw_overlay(picture, item.result.anomaly_map, spec, model.scorer.thresholds.pixel.value)

    def _fill_metrics(self) -> None:
        metrics = self._metrics
        with self._lock:
            cameras, sinks = list(self._cameras.values()), list(self._sinks.values())
        for camera in cameras:
            status, name = camera.reader.status(), camera.name
            metrics.frames_captured.set_total(name, total=status.captured)
            metrics.frames_scored.set_total(name, total=camera.scored)
            for reason, count in camera.drops().items():
                metrics.frames_dropped.set_total(name, reason, total=count)
            metrics.source_up.set(name, value=float(status.state == "up"))
            metrics.reconnects.set_total(name, total=status.reconnects)
            if status.last_ns is not None:
                age_s = (monotonic_ns() - status.last_ns) / 1e9
                metrics.last_frame.set(name, value=datetime.now(timezone.utc).timestamp() - age_s)
            report = camera.drift_report
            if report is not None and report.shift_sigma is not None:
                metrics.drift_shift_sigma.set(name, value=report.shift_sigma)
        for sink in sinks:
            counts = sink.counts()
            metrics.sink_dropped.set_total(sink.name, total=counts.dropped + counts.lost)

    def _watch(self) -> None:
        """End the process when the scoring loop hangs in an engine: nothing inside of it can help then."""
        while not self._ended.wait(min(1.0, self._settings.hang / 4)):
            if not self.is_live:
                say(f"no progress for {self._settings.hang:g} s: the scorer hangs; ending with code 70")
                sys.stderr.flush()
                os._exit(70)

    def _model_line(self) -> str:
        model = next(iter(self._slots.values())).model
        info = model.scorer.session.info
        return f"{model.name} on {info.engine} {info.version}, {model.scorer.precision}, {info.threads} threads"


def _planned(settings: StreamSettings) -> tuple[dict[str, CameraSettings], EngineChoice]:
    """Return the cameras by their names, and the engine's settings for so many live ones."""
    sources = [parse_source(camera.source, camera=camera.name) for camera in settings.cameras]
    live = sum(source.live for source in sources)
    choice = default_choice(settings.engine, settings.precision, settings.threads, cameras=live)
    return dict(zip(unique_names(sources), settings.cameras, strict=True)), choice


def _all_at_once(calls: list[Callable[[], object]], seconds: float) -> None:
    """Make calls in threads and wait for all of them, together at most so long: several may hang."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    give_up = monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, give_up - monotonic()))


def summary_lines(status: dict[str, Any]) -> list[str]:
    """Return the final status for people: a line per camera and per sink."""
    lines = []
    for camera in status["cameras"]:
        verdicts = ", ".join(f"{count} {name}" for name, count in sorted(camera["verdicts"].items())) or "none"
        drops = ", ".join(f"{count} {name}" for name, count in sorted(camera["drops"].items()) if count) or "none"
        counted = f"{camera['captured']} captured, {camera['scored']} scored ({verdicts}); dropped: {drops}"
        lines.append(f"{camera['camera']}: {counted}")
    for sink in status["sinks"]:
        lines.append(f"sink {sink['sink']}: {sink['written']} written, {sink['dropped']} lost")
    return lines
