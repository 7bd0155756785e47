"""One measurement of one bundle: this process, or the median of several fresh ones."""

from __future__ import annotations

import contextlib
import hashlib
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
import numpy.typing as npt
from PIL import Image

from edge_anomaly_runtime.bundle import Bundle, read_bundle
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import EdgeAnomalyError, UsageError, did_you_mean
from edge_anomaly_runtime.images import list_images, load_image
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.scoring import Result, Scorer, scorer_of
from edge_anomaly_runtime.session import CPU_ENGINES, TimedSession, open_session

from .environment import BUSY, environment, load_average, peak_rss_mb, reference_ms, warnings_of
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
    """Measure a bundle and return a JSON-ready report, samples included.

    latency_ms: by stage, n, min, percentiles (None with too few samples), upper bounds of the last two, max, mean and
    stdev. start_s: seconds to verify, to load and compile, of the first inference, and from the start of a fresh
    process to its first score.

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
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} is not possible.", "Give 1 or more.")
    load = load_average()
    start = perf_counter()
    bundle = read_bundle(path)
    verified = perf_counter()
    with contextlib.ExitStack() as stack:
        scorers: list[Scorer] = []
        # Offline, each worker has one thread and a graph of its own: what several small ones gain over one large one.
        wanted = threads or usable_cpus()
        while not scorers or (options.scenario == "offline" and _is_cpu(scorers[0]) and len(scorers) < wanted):
            one = 1 if options.scenario == "offline" else threads
            session = open_session(bundle, engine=engine, precision=precision, threads=one)
            scorers.append(stack.enter_context(scorer_of(bundle, *session)))
        loaded = perf_counter()
        report = run_bench(scorers, options, load=load)
    report["start_s"] |= {"verify": round(verified - start, 4), "load": round(loaded - verified, 4)}
    return report


def _is_cpu(scorer: Scorer) -> bool:
    return scorer.engine in CPU_ENGINES


def run_bench(scorers: Sequence[Scorer], options: BenchOptions | None = None, *, load: float | None = None) -> Report:
    """Measure a loaded bundle, offline several times the same, and return the report as `bench_bundle` does.

    load: of the machine before anything was loaded; None reads it now.
    """
    options = options or BenchOptions()
    scorer = scorers[0]
    paths = list_images(options.images) if options.images else golden_pictures(scorer.bundle)
    frames = [_frame(one, paths, as_camera=options.scenario in ("paced", "multi")) for one in scorers]
    start = perf_counter()
    frames[0](0)
    first_ms = (perf_counter() - start) * 1e3
    spawned = float(os.environ.get(SPAWNED, "nan"))
    since_spawn = round(time.monotonic() - spawned, 4) if spawned == spawned else None
    around = environment(scorer)
    around["threads"] *= len(scorers)
    around["load"] = around["load"] if load is None else load
    warmed = [warm_up(frame) for frame in frames] if options.warm_up else [WarmUp(0, 0.0, True)]
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
        "distinct_images": len(paths),
        "full_size_images": bool(options.images) or _are_full_size(scorer.bundle),
        "latency_ms": stages,
        "cpu_ms_per_image": round(measured.cpu_seconds * 1e3 / images, 3),
        "images_per_second": round(images / measured.seconds, 3),
        "scheduled": measured.scheduled,
        "missed": measured.missed,
        "start_s": {"first_score": since_spawn, "first_inference": round(first_ms / 1e3, 4)},
        "peak_rss_mb": peak_rss_mb(),
        "warm_up": asdict(warmed[0]),
        "reference_ms": {"before": round(before, 4), "after": round(after, 4)},
        "executed": scorer.session.executed_precisions() if isinstance(scorer.session, TimedSession) else None,
        "accuracy": _accuracy(scorer),
        "environment": around,
        "samples_ms": [round(value, 4) for value in measured.of(TOTAL)],
        "started_s": [round(value, 4) for value in measured.started_s],
    }
    report["warnings"] = warnings_of(report)
    return report


def _measured(frames: Sequence[Frame], options: BenchOptions) -> Measured:
    if options.scenario == "paced":
        assert options.rate is not None  # BenchOptions has seen to it
        return paced(frames[0], options.runs, options.rate)
    if options.scenario == "multi":
        return multi(frames[0], options.runs, options.streams)
    return offline(frames, options.runs) if options.scenario == "offline" else single(frames[0], options.runs)


def golden_pictures(bundle: Bundle) -> list[Path]:
    """Return the golden images as a camera gave them; where none was kept at full size, those of the model's size."""
    golden = bundle.manifest.golden
    chosen = [image for image in golden if not image.preprocessed] or list(golden)
    return [bundle.path / image.file for image in chosen]


def _are_full_size(bundle: Bundle) -> bool:
    return any(not image.preprocessed for image in bundle.manifest.golden)


def _frame(scorer: Scorer, paths: Sequence[Path], *, as_camera: bool) -> Frame:
    """Return what one image takes; as a camera's it is decoded whole, as a file it may be decoded smaller."""
    session, spec = scorer.session, None if as_camera else scorer.bundle.manifest.input.preprocess

    def frame(index: int) -> Stages:
        path = paths[index % len(paths)]
        start = perf_counter()
        image = load_image(path, spec)
        decoded = perf_counter()
        result = judged(scorer, image, path)
        end = perf_counter()
        ms = {"decode": (decoded - start) * 1e3, **result.ms}
        if isinstance(session, TimedSession):
            # The engine's own clock; the rest of `infer` are copies and Python.
            ms |= {"engine": session.engine_ms, "copy": max(0.0, ms["infer"] - session.engine_ms)}
        return {**ms, "post": max(0.0, (end - decoded) * 1e3 - ms["resize"] - ms["infer"])}

    return frame


def judged(scorer: Scorer, image: Image.Image | npt.NDArray[np.uint8], path: Path) -> Result:
    """Score a picture; one that is not judged never reaches the engine, and would make it look fast.

    Raises:
        UsageError: its verdict is INVALID.
    """
    result = scorer.score_image(image)
    if result.verdict == "INVALID":
        raise UsageError(f"Image {path} cannot be judged: {result.reason}.", "Measure with other images.")
    return result


def _accuracy(scorer: Scorer) -> dict[str, float]:
    """Return what the export measured of this graph: a fast graph that finds nothing is worth nothing."""
    for row in scorer.bundle.manifest.parity:
        # A TensorRT graph was simulated at export.
        if row.backend.removesuffix(" simulated") == scorer.key.replace("/", " "):
            found = {"auroc": row.auroc, "accuracy": row.accuracy}
            return {name: value for name, value in found.items() if value is not None}
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
        hint = "See above." if done.returncode > 0 else "It was killed; perhaps there was too little memory."
        error = EdgeAnomalyError(f"The process that measures {path} ended with code {done.returncode}.", hint)
        error.exit_code = done.returncode if done.returncode > 0 else EdgeAnomalyError.exit_code
        raise error
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _merged(reports: Sequence[Report]) -> Report:
    """Return one report with the medians over processes; samples one after another, warnings of any of them."""
    first = reports[0]
    latency = {
        stage: {
            **{name: _middle([report["latency_ms"][stage][name] for report in reports]) for name in values},
            "n": min(report["latency_ms"][stage]["n"] for report in reports),
        }
        for stage, values in first["latency_ms"].items()
    }
    keys = ("cpu_ms_per_image", "images_per_second", "peak_rss_mb", "scheduled", "missed")
    return {
        **first,
        "runs": min(report["runs"] for report in reports),
        "processes": len(reports),
        "latency_ms": latency,
        **{key: _middle([report[key] for report in reports]) for key in keys},
        "start_s": {key: _middle([report["start_s"][key] for report in reports]) for key in first["start_s"]},
        "samples_ms": [value for report in reports for value in report["samples_ms"]],
        "started_s": [value for report in reports for value in report["started_s"]],
        "p50_of_each_process": [report["latency_ms"][TOTAL]["p50"] for report in reports],
        # Every process but the first sees the load that those before it made.
        "warnings": list(
            dict.fromkeys([*first["warnings"], *(t for r in reports for t in r["warnings"] if not t.startswith(BUSY))])
        ),
    }


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 4) if len(known) == len(values) else None
