"""Latency of a bundle on this machine: one image after the other, back to back."""

from __future__ import annotations

import gc
import io
import math
import platform
from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .cpu import cpu_name, int8_instructions
from .errors import UsageError
from .preprocess import preprocess
from .scoring import Scorer

SCHEMA = "edge-anomaly.bench/1"

# Fewest samples before a percentile may be printed: confidence 0.99 with one exceedance allowed (MLPerf's rule).
_SAMPLES_NEEDED = {50: 11, 90: 64, 99: 662}


def run_bench(scorer: Scorer, *, runs: int = 700, warmup: int = 20) -> dict[str, Any]:
    """Time resize and inference on the golden images, in milliseconds, after a warm-up of at least one second.

    Returns a JSON-ready object with `schema`, per stage min, p50, p90, p99, max and mean, CPU time per image and the
    environment. No sample is dropped; a percentile with too few samples is None.
    """
    if runs < 1 or warmup < 0:
        raise UsageError(f"--runs {runs} --warmup {warmup} is not possible.", "Give at least 1 run.")
    pictures = [_golden_picture(scorer, golden.file) for golden in scorer.bundle.manifest.golden]
    spec = scorer.bundle.manifest.input.preprocess
    inputs = [preprocess(picture, spec)[np.newaxis] for picture in pictures]
    _warm_up(lambda index: scorer.session.run(inputs[index % len(inputs)]), warmup)
    cpu_start = process_time()
    infer = _time_calls(lambda index: scorer.session.run(inputs[index % len(inputs)]), runs)
    cpu_ms = (process_time() - cpu_start) * 1e3 / runs
    total = _time_calls(lambda index: scorer.score_image(pictures[index % len(pictures)]), runs)
    return {
        "schema": SCHEMA,
        "bundle": scorer.bundle.manifest.name,
        "engine": scorer.engine,
        "precision": scorer.precision,
        "runs": runs,
        "latency_ms": {"infer": summary(infer), "resize_and_infer": summary(total)},
        "infer_cpu_ms": round(cpu_ms, 3),
        "environment": _environment(scorer),
    }


def summary(samples_ms: Sequence[float]) -> dict[str, float | None]:
    """Return min, nearest-rank percentiles, max and mean of latencies in milliseconds."""
    ordered = sorted(samples_ms)
    result: dict[str, float | None] = {"min": round(ordered[0], 4)}
    for percent, needed in _SAMPLES_NEEDED.items():
        rank = math.ceil(len(ordered) * percent / 100)
        result[f"p{percent}"] = round(ordered[rank - 1], 4) if len(ordered) >= needed else None
    return {**result, "max": round(ordered[-1], 4), "mean": round(sum(ordered) / len(ordered), 4)}


def _golden_picture(scorer: Scorer, name: str) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(scorer.bundle.read(name))) as picture:
        return np.asarray(picture.convert("RGB"))


def _warm_up(call: Callable[[int], object], warmup: int) -> None:
    start, done = perf_counter(), 0
    while done < warmup or (warmup and perf_counter() - start < 1.0):
        call(done)
        done += 1


def _time_calls(call: Callable[[int], object], runs: int) -> list[float]:
    samples = []
    gc.disable()
    try:
        for index in range(runs):
            start = perf_counter()
            call(index)
            samples.append((perf_counter() - start) * 1e3)
    finally:
        gc.enable()
    return samples


def _environment(scorer: Scorer) -> dict[str, Any]:
    info = scorer.session.info
    return {
        "cpu": cpu_name(),
        "int8_instructions": int8_instructions(),
        "threads": info.threads,
        "engine_version": info.version,
        "device": info.device,
        "float_precision": info.float_precision,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
