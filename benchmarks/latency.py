"""INT8 against FP32 (f32 pinned) on OpenVINO, the whole graph, alternating in one run.

    python benchmarks/latency.py --backbone efficientnet_lite0 --backbone resnet18 --rounds 7

Latency does not depend on what the weights are, so backbones whose weights cannot be reached run with random ones.
The ratio of the two p50s of one round is what counts: both see the same state of the machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from edge_anomaly.padim import PadimConfig
from edge_anomaly.sample_data import draw_sample_data
from edge_anomaly.train import train_detector
from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.scoring import Scorer, open_scorer


def make_bundle(backbone: str, scratch: Path) -> Path:
    data, run, bundle = scratch / "data", scratch / backbone, scratch / f"{backbone}.eab"
    if not data.exists():
        draw_sample_data(data, train=60, test_good=10, per_defect=2)
    weights = "default" if backbone == "efficientnet_lite0" else "random"
    config = PadimConfig(backbone=backbone)
    train_detector(str(data), run, config=config, preprocess=Preprocess(224, 224), weights=weights)
    export_run(run, bundle, ExportOptions(("openvino",), "int8", calibration_images=32, allow_drop=True))
    return bundle


def median_ms(scorer: Scorer, inputs: np.ndarray, calls: int, *, warm_up: int = 30) -> float:
    """Return the p50 of a block of calls, after a short warm-up: engines are never timed interleaved call by call."""
    for index in range(warm_up):
        scorer.session.run(inputs[index % len(inputs)][np.newaxis])
    samples = []
    for index in range(calls):
        start = perf_counter()
        scorer.session.run(inputs[index % len(inputs)][np.newaxis])
        samples.append((perf_counter() - start) * 1e3)
    return float(np.median(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--engine", default="openvino")
    arguments = parser.parse_args()
    inputs = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as scratch:
        for backbone in arguments.backbone or ["efficientnet_lite0", "resnet18"]:
            bundle = make_bundle(backbone, Path(scratch))
            scorers = {p: open_scorer(bundle, engine=arguments.engine, precision=p) for p in ("fp32", "int8")}
            rounds = [
                {p: median_ms(scorer, inputs, arguments.calls) for p, scorer in scorers.items()}
                for _ in range(arguments.rounds)
            ]
            ratios = [row["fp32"] / row["int8"] for row in rounds]
            print(
                f"{backbone:20} {arguments.engine}  p50 fp32 {np.median([r['fp32'] for r in rounds]):.2f} ms  "
                f"int8 {np.median([r['int8'] for r in rounds]):.2f} ms  ratio median {np.median(ratios):.2f} "
                f"(min {min(ratios):.2f}, max {max(ratios):.2f}, {arguments.rounds} rounds of {arguments.calls} calls)",
                flush=True,
            )


if __name__ == "__main__":
    main()
