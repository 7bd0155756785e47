"""Is the harness to be trusted? Equals and planted slow-downs, OpenVINO's benchmark_app, and our own overhead.

    python benchmarks/harness.py aa part.eab                # 50 comparisons of equals, 50 with 15 % more work
    python benchmarks/harness.py benchmark-app part.eab     # our p50 against benchmark_app's, same graph, f32, in turns
    python benchmarks/harness.py overhead part.eab          # a call minus the engine's time; a frame minus stages

Every command prints one JSON object and ends with code 1 if a figure misses its limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from edge_anomaly_runtime.bench.compare import compare
from edge_anomaly_runtime.bench.harness import golden_pictures
from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.engine_openvino import OpenVinoSession
from edge_anomaly_runtime.images import load_image
from edge_anomaly_runtime.progress import track
from edge_anomaly_runtime.scoring import Scorer, open_scorer

_PLANTED = 1.15
_INFERENCES = 500


def pictures(scorer: Scorer) -> list[np.ndarray]:
    return [np.asarray(load_image(path)) for path in golden_pictures(scorer.bundle)]


def equals_and_slower(bundle: Path, trials: int) -> dict[str, Any]:
    """Compare a bundle with itself, and with itself plus 15 % of each call spent waiting for the clock."""
    with open_scorer(bundle, engine="openvino") as scorer:
        turn = itertools.cycle(pictures(scorer))

        def plain() -> None:
            scorer.score_image(next(turn))

        def slower() -> None:
            start = perf_counter()
            scorer.score_image(next(turn))
            end = start + _PLANTED * (perf_counter() - start)
            while perf_counter() < end:
                pass

        equals = [compare(plain, plain, seed=seed) for seed in track(range(trials), "equals", trials)]
        planted = [compare(plain, slower, seed=seed) for seed in track(range(trials), "slower", trials)]
    flagged, found = sum(one.is_slower for one in equals), sum(one.is_slower for one in planted)
    return {
        "trials": trials,
        "equals_flagged": flagged,
        "planted_found": found,
        "planted_missed": [{"ratio": one.ratio, "noise": one.noise} for one in planted if not one.is_slower],
        "ok": flagged <= 0.02 * trials and found >= 0.95 * trials,
    }


def against_benchmark_app(bundle: Path, rounds: int) -> dict[str, Any]:
    """Return the ratio of our engine time's p50 to benchmark_app's, in turns, both of the bundle's own IR."""
    ratios, ours, theirs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        opened = read_bundle(bundle)
        for name in ("openvino/model.xml", "openvino/model.bin"):
            (Path(folder) / Path(name).name).write_bytes(opened.read(name))
        with open_scorer(bundle, engine="openvino") as scorer:
            for _ in track(range(rounds), "rounds", rounds):
                ours.append(median(engine for _, engine in inferences(scorer, _INFERENCES)))
                theirs.append(benchmark_app_p50(Path(folder), scorer.session.info.threads))
                ratios.append(ours[-1] / theirs[-1])
    ratio = median(ratios)
    return {
        "engine_p50_ms": median(ours),
        "benchmark_app_p50_ms": median(theirs),
        "ratio": ratio,
        "ratios": ratios,
        "ok": 0.97 <= ratio <= 1.03,
    }


def inferences(scorer: Scorer, count: int) -> list[tuple[float, float]]:
    """Return our time and the engine's own of each inference in ms, back to back as benchmark_app makes them."""
    session = scorer.session
    assert isinstance(session, OpenVinoSession)
    inputs = np.random.default_rng(0).integers(0, 256, (8, *input_shape(scorer)), dtype=np.uint8)
    samples = []
    for index in range(count + 50):
        start = perf_counter()
        session.run(inputs[index % 8][np.newaxis])
        samples.append(((perf_counter() - start) * 1e3, session.engine_ms))
    return samples[50:]


def benchmark_app_p50(folder: Path, threads: int) -> float:
    command = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(folder / "model.xml"), "-d", "CPU"]
    command += [
        "-hint",
        "none",
        "-api",
        "sync",
        "-nthreads",
        str(threads),
        "-infer_precision",
        "f32",
        "-niter",
        str(_INFERENCES),
        "-json_stats",
    ]
    command += ["-report_type", "no_counters", "-report_folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((folder / "benchmark_report.json").read_text())
    return float(report["execution_results"]["latency (ms)"])


def overhead(bundle: Path, runs: int) -> dict[str, Any]:
    """Return what a call of ours adds to the engine's own time, and what a frame adds to decode, resize and infer."""
    with open_scorer(bundle, engine="openvino") as scorer:
        calls = [whole - engine for whole, engine in inferences(scorer, runs)]
        frames = [
            rest_of(lambda image=image: scorer.score_image(image))
            for image in pictures(scorer)
            for _ in range(runs // 8)
        ]
    python_ms, rest_ms = median(calls), median(frames)
    return {"call_ms": python_ms, "frame_ms": rest_ms, "ok": python_ms < 0.15 and rest_ms < 0.3}


def rest_of(score: Callable[[], Any]) -> float:
    start = perf_counter()
    result = score()
    return (perf_counter() - start) * 1e3 - sum(result.ms.values())


def input_shape(scorer: Scorer) -> tuple[int, int, int]:
    size = scorer.bundle.manifest.input.preprocess
    return size.height, size.width, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["aa", "benchmark-app", "overhead"])
    parser.add_argument("bundle", type=Path, help="exported with --target openvino")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=800)
    arguments = parser.parse_args()
    if arguments.what == "aa":
        row = equals_and_slower(arguments.bundle, arguments.trials)
    elif arguments.what == "benchmark-app":
        row = against_benchmark_app(arguments.bundle, arguments.rounds)
    else:
        row = overhead(arguments.bundle, arguments.runs)
    print(json.dumps(row))
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
