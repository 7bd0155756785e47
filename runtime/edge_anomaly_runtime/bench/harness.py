"""One measurement of one bundle: this process, or the median of several fresh ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from edge_anomaly_runtime.bundle import Bundle, read_bundle
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import EdgeAnomalyError, UsageError, did_you_mean
from edge_anomaly_runtime.images import list_images, load_image
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.scoring import Scorer, scorer_of
from edge_anomaly_runtime.session import TimedSession, open_session

from .environment import environment, fingerprint, peak_rss_mb, reference_ms, warnings_of
from .scenarios import TOTAL, Frame, Measured, Stages, WarmUp, multi, offline, paced, single, warm_up
from .statistics import summary, upper_bound

SCHEMA = "edge-anomaly.bench/1"
Report = dict[str, Any]
Scenario = Literal["single", "paced", "multi", "offline"]

# The parent's monotonic clock when it started this process: `start to first score` begins there.
SPAWNED = "EDGE_ANOMALY_BENCH_SPAWNED"
_BOUNDED = (99.0, 99.9)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    runs: images of single, paced and offline, rounds of multi. rate: frames a second of paced. streams: cameras of
    multi. images: files or folders in place of the bundle's golden images. repeat: fresh processes; 1 is this one.
    warm_up: False starts the clock at once, to see what a cold start costs.
    """

    scenario: str = "single"
    runs: int = 700
    rate: float | None = None
    streams: int = 1
    images: tuple[str, ...] = ()
    repeat: int = 1
    warm_up: bool = True

    def __post_init__(self) -> None:
        if self.scenario not in get_args(Scenario):
            raise did_you_mean("scenario", self.scenario, list(get_args(Scenario)))
        for name in ("runs", "streams", "repeat"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} is not possible.", "Give 1 or more.")
        if (self.rate is not None) != (self.scenario == "paced"):
            raise UsageError(
                f"Scenario {self.scenario} with rate {self.rate} is not possible.",
                "Give --rate FPS with --scenario paced, and only there.",
            )
        if self.rate is not None and not 0 < self.rate <= 10_000:
            raise UsageError(f"--rate {self.rate:g} is not possible.", "Give frames a second, above 0.")
        if self.streams > 1 and self.scenario != "multi":
            raise UsageError(
                f"--streams {self.streams} with --scenario {self.scenario} is not possible.", "Add --scenario multi."
            )


def bench_bundle(
    path: Path | str,
    options: BenchOptions,
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Report:
    """Measure a bundle and return a JSON-ready report, samples included; see docs/benchmarking.md for its fields.

    Raises:
        UsageError: zero images, or one that the bundle cannot judge.
        ArtefactError, MissingRequirementError: as `read_bundle` and `open_session`.
    """
    if options.repeat > 1:
        return _merged(
            [
                _in_fresh_process(path, options, engine, precision, threads)
                for _ in track(range(options.repeat), "processes", options.repeat)
            ]
        )
    start = perf_counter()
    bundle = read_bundle(path)
    verified = perf_counter()
    # Offline, each worker has one thread and a graph of its own: what several small ones gain over one large one.
    workers = (threads or usable_cpus()) if options.scenario == "offline" else 1
    opened = [
        open_session(bundle, engine=engine, precision=precision, threads=1 if workers > 1 else threads)
        for _ in range(workers)
    ]
    loaded = perf_counter()
    scorers = [scorer_of(bundle, *one) for one in opened]
    try:
        report = run_bench(scorers, options)
    finally:
        for scorer in scorers:
            scorer.close()
    report["start_s"] |= {"verify": round(verified - start, 4), "load": round(loaded - verified, 4)}
    return report


def run_bench(scorers: Sequence[Scorer], options: BenchOptions | None = None) -> Report:
    """Measure loaded bundles, one for all scenarios but offline, and return the report as `bench_bundle` does."""
    options = options or BenchOptions()
    scorer = scorers[0]
    pictures = _pictures(scorer.bundle, options.images)
    frames = [_frame(one, pictures) for one in scorers]
    start = perf_counter()
    frames[0](0)
    first_ms = (perf_counter() - start) * 1e3
    spawned = float(os.environ.get(SPAWNED, "nan"))
    since_spawn = round(time.monotonic() - spawned, 4) if spawned == spawned else None
    around = environment(scorer)
    warmed = warm_up(frames[0]) if options.warm_up else WarmUp(0, 0.0, True)
    before = reference_ms()
    measured = _measured(frames, options)
    after = reference_ms()
    stages = {name: summary(measured.of(name)) for name in measured.stages[0]}
    for name, values in stages.items():
        values |= {f"p{percent:g}_upper": upper_bound(measured.of(name), percent) for percent in _BOUNDED}
    images = len(measured.stages) * options.streams
    key = f"{scorer.engine}-{scorer.precision}"
    report: Report = {
        "schema": SCHEMA,
        "name": f"{scorer.bundle.manifest.name}/{key}/{options.scenario}",
        "bundle": scorer.bundle.manifest.name,
        "manifest_sha256": hashlib.sha256(scorer.bundle.manifest_raw).hexdigest(),
        "engine": scorer.engine,
        "precision": scorer.precision,
        "scenario": {"kind": options.scenario, "rate": options.rate, "streams": options.streams},
        "runs": len(measured.stages),
        "processes": 1,
        "distinct_images": len(pictures),
        "latency_ms": stages,
        "cpu_ms_per_image": round(measured.cpu_seconds * 1e3 / images, 3),
        "images_per_second": round(images / measured.seconds, 3),
        "scheduled": measured.scheduled,
        "missed": measured.missed,
        "start_s": {"first_score": since_spawn, "first_inference": round(first_ms / 1e3, 4)},
        "peak_rss_mb": peak_rss_mb(),
        "warm_up": asdict(warmed),
        "reference_ms": {"before": round(before, 4), "after": round(after, 4)},
        "executed": scorer.session.executed_precisions() if isinstance(scorer.session, TimedSession) else None,
        "accuracy": _accuracy(scorer),
        "environment": around,
        "samples_ms": [round(value, 4) for value in measured.of(TOTAL)],
        "started_s": [round(value, 4) for value in measured.started_s],
    }
    report["warnings"] = warnings_of(report)
    report["fingerprint"] = fingerprint(report)
    return report


def _measured(frames: Sequence[Frame], options: BenchOptions) -> Measured:
    if options.scenario == "paced":
        assert options.rate is not None  # BenchOptions has seen to it
        return paced(frames[0], options.runs, options.rate)
    if options.scenario == "multi":
        return multi(frames[0], options.runs, options.streams)
    return offline(frames, options.runs) if options.scenario == "offline" else single(frames[0], options.runs)


def _pictures(bundle: Bundle, images: Sequence[str]) -> list[bytes]:
    """Return image files as they are: decoding is part of what is measured."""
    if not images:
        return [bundle.read(golden.file) for golden in bundle.manifest.golden]
    paths = list_images(images)
    if not paths:
        raise UsageError(f"There is no image in {', '.join(images)}.", "Give files or folders with images.")
    for path in paths:
        load_image(path)  # says what is wrong with a file, and which one
    return [path.read_bytes() for path in paths]


def _frame(scorer: Scorer, pictures: Sequence[bytes]) -> Frame:
    session = scorer.session

    def frame(index: int) -> Stages:
        start = perf_counter()
        with Image.open(io.BytesIO(pictures[index % len(pictures)])) as file:
            image = np.asarray(file.convert("RGB"))
        decoded = perf_counter()
        result = scorer.score_image(image)
        end = perf_counter()
        if result.verdict == "INVALID":
            raise UsageError(f"Image {index % len(pictures)} cannot be judged: {result.reason}.", "Leave it out.")
        ms = {"decode": (decoded - start) * 1e3, **result.ms}
        if isinstance(session, TimedSession):
            # The engine's own clock; the rest of `infer` are copies and Python.
            ms |= {"engine": session.engine_ms, "copy": max(0.0, ms["infer"] - session.engine_ms)}
        return {**ms, "post": max(0.0, (end - decoded) * 1e3 - ms["resize"] - ms["infer"])}

    return frame


def _accuracy(scorer: Scorer) -> dict[str, float]:
    """Return what the export measured of this graph: a fast graph that finds nothing is worth nothing."""
    for row in scorer.bundle.manifest.parity:
        if row.backend == f"{scorer.engine} {scorer.precision}" and row.auroc is not None:
            return {"auroc": row.auroc}
    return {}


def _in_fresh_process(
    path: Path | str, options: BenchOptions, engine: str, precision: str, threads: int | None
) -> Report:
    command = [sys.executable, "-m", "edge_anomaly_runtime", "bench", "run", str(path), "--json", "--samples"]
    command += ["--engine", engine, "--precision", precision, "--scenario", options.scenario]
    command += ["--runs", str(options.runs), "--streams", str(options.streams)]
    command += [] if options.warm_up else ["--no-warm-up"]
    command += [] if options.rate is None else ["--rate", str(options.rate)]
    command += [] if threads is None else ["--threads", str(threads)]
    for image in options.images:
        command += ["--images", image]
    environ = {**os.environ, SPAWNED: repr(time.monotonic())}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        say(done.stderr.rstrip())
        error = EdgeAnomalyError(f"The process that measures {path} ended with code {done.returncode}.", "See above.")
        error.exit_code = done.returncode
        raise error
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _merged(reports: Sequence[Report]) -> Report:
    """Return one report with the medians over processes; samples one after another, warnings of any of them."""
    first = reports[0]
    latency = {
        stage: {name: _middle([report["latency_ms"][stage][name] for report in reports]) for name in values}
        for stage, values in first["latency_ms"].items()
    }
    keys = ("cpu_ms_per_image", "images_per_second", "peak_rss_mb", "scheduled", "missed")
    return {
        **first,
        "processes": len(reports),
        "latency_ms": latency,
        **{key: _middle([report[key] for report in reports]) for key in keys},
        "start_s": {key: _middle([report["start_s"][key] for report in reports]) for key in first["start_s"]},
        "samples_ms": [value for report in reports for value in report["samples_ms"]],
        "started_s": [value for report in reports for value in report["started_s"]],
        "p50_of_each_process": [report["latency_ms"][TOTAL]["p50"] for report in reports],
        "warnings": list(dict.fromkeys(text for report in reports for text in report["warnings"])),
    }


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 4) if len(known) == len(values) else None
