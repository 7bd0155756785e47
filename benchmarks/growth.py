"""How latency grows with the picture and with PatchCore's bank: INT8 graphs on OpenVINO, in turns.

    python benchmarks/growth.py --rounds 7 --json growth.json

EfficientNet-Lite0 on drawn parts. `per_step` is the time of one size over the time of the size before it; a side twice
as long has four times the pixels, and a step above that would be worse than linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import OPEN  # these two are beside this one
from latency import median_ms

from edge_anomaly.padim import PadimConfig
from edge_anomaly.patchcore import PatchcoreConfig
from edge_anomaly.sample_data import draw_sample_data
from edge_anomaly.train import TrainOptions, train_detector
from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.scoring import Scorer, open_scorer

BACKBONE = "efficientnet_lite0"
SIDES = (112, 224, 448, 896)
BANKS = (300, 3_000, 30_000)
IMAGES = 60  # 48 of them to learn from: enough patches for the largest bank at 224 pixels


def make_bundle(config: PadimConfig | PatchcoreConfig, side: int, data: Path, scratch: Path) -> Path:
    run, bundle = scratch / "run", scratch / f"{len(list(scratch.iterdir()))}.eab"
    train_detector(str(data), run, config=config, preprocess=Preprocess(side, side), options=TrainOptions(force=True))
    export_run(run, bundle, ExportOptions(("openvino",), "int8", calibration_images=16, limits=OPEN, force=True))
    return bundle


def curve(name: str, steps: Sequence[int], bundles: Sequence[Path], rounds: int, growth: float) -> dict[str, Any]:
    """Return the p50 of every bundle and the ratios of neighbours; `growth`: what a linear step would take."""
    scorers = [open_scorer(bundle, engine="openvino", precision="int8") for bundle in bundles]
    inputs = [pixels_for(scorer) for scorer in scorers]
    calls = [max(5, min(200, round(700 / median_ms(s, i, 5, warm_up=5)))) for s, i in zip(scorers, inputs, strict=True)]
    rows = [
        [
            median_ms(scorer, images, count, warm_up=max(2, count // 10))
            for scorer, images, count in zip(scorers, inputs, calls, strict=True)
        ]
        for _ in range(rounds)
    ]
    per_step = [median(row[index + 1] / row[index] for row in rows) for index in range(len(steps) - 1)]
    for scorer in scorers:
        scorer.close()
    return {
        "curve": name,
        "steps": list(steps),
        "p50_ms": [median(column) for column in zip(*rows, strict=True)],
        "per_step": per_step,
        "linear_step": growth,
        "ok": all(step <= growth for step in per_step),
    }


def pixels_for(scorer: Scorer) -> np.ndarray:
    size = scorer.bundle.manifest.input.preprocess
    return np.random.default_rng(0).integers(0, 256, (4, size.height, size.width, 3), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch, data = Path(folder) / "work", Path(folder) / "parts"
        scratch.mkdir()
        draw_sample_data(data, train=IMAGES, test_good=10, per_defect=2)
        configs = {"PaDiM": PadimConfig(BACKBONE), "PatchCore, bank of 3,000": PatchcoreConfig(BACKBONE, bank=3_000)}
        for name, config in configs.items():
            bundles = [make_bundle(config, side, data, scratch) for side in SIDES]
            rows.append(curve(f"{name}: side in pixels", SIDES, bundles, arguments.rounds, 4.0))
            print(json.dumps(rows[-1]), flush=True)
        bundles = [
            make_bundle(PatchcoreConfig(BACKBONE, bank=bank, max_bank=bank), 224, data, scratch) for bank in BANKS
        ]
        growth = median(b / a for a, b in itertools.pairwise(BANKS))
        rows.append(curve("PatchCore at 224 pixels: vectors in the bank", BANKS, bundles, arguments.rounds, growth))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
