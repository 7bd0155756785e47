"""Accuracy of the detectors on real solar cells and on drawn parts: torch models, the same splits for all.

    python benchmarks/detectors.py --model padim --data elpv-mono --data elpv-poly --data sample --seeds 3

Per seed: train on the data set's normal images (a fifth of them held out for the thresholds), judge the labelled ones.
Every detector runs with its defaults on EfficientNet-Lite0, whose ImageNet weights come by pip, at 224 pixels;
`autoencoder` is variant A (from scratch), `autoencoder-b` has EfficientNet-Lite0 as its frozen encoder, `padim-100`
keeps 100 channels, `fastflow-off` leaves the backbone frozen. ELPV images: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_anomaly.autoencoder import AutoencoderConfig
from edge_anomaly.data import open_dataset
from edge_anomaly.evaluate import evaluate_items, open_judge
from edge_anomaly.fastflow import FastflowConfig
from edge_anomaly.padim import PadimConfig
from edge_anomaly.patchcore import PatchcoreConfig
from edge_anomaly.sample_data import draw_sample_data
from edge_anomaly.stpm import StpmConfig
from edge_anomaly.train import TrainOptions, train_detector
from edge_anomaly_runtime.preprocess import Preprocess

BACKBONE = "efficientnet_lite0"
CONFIGS: dict[str, Any] = {
    "padim": PadimConfig(backbone=BACKBONE),
    "padim-100": PadimConfig(backbone=BACKBONE, dims=100),
    "patchcore": PatchcoreConfig(backbone=BACKBONE),
    "stpm": StpmConfig(backbone=BACKBONE),
    "fastflow": FastflowConfig(backbone=BACKBONE),
    "fastflow-off": FastflowConfig(backbone=BACKBONE, finetune="off"),
    "autoencoder": AutoencoderConfig(),
    "autoencoder-b": AutoencoderConfig(encoder=BACKBONE),
}


def measure(model: str, data: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Train once and return the figures of the labelled images with the training time."""
    run = scratch / f"{model}-{Path(data).name}-{seed}"
    config = replace(CONFIGS[model], seed=seed)
    options = TrainOptions(force=True)
    trained = train_detector(data, run, config=config, preprocess=Preprocess(224, 224), options=options)
    with open_judge(run) as judge:
        figures, _, _ = evaluate_items(judge, open_dataset(data, seed=seed).test)
    return {"model": model, "data": Path(data).name, "seed": seed, "train_seconds": trained.seconds, **figures}


def line(rows: list[dict[str, Any]]) -> str:
    """Return one line of the table: means over the seeds, and the image AUROC of each."""
    image = [row["image"]["auroc"] for row in rows]
    low, high = (np.mean([row["image"]["auroc_interval"][end] for row in rows]) for end in (0, 1))
    pixel = [row["pixel"] for row in rows if "pixel" in row]
    located = (
        f"  pixel {np.mean([p['auroc'] for p in pixel]):.4f}  AUPRO {np.mean([p['aupro'] for p in pixel]):.4f}"
        if pixel
        else ""
    )
    alarms = np.mean([row["false_alarms"]["warn"]["rate"] for row in rows])
    seconds = np.mean([row["train_seconds"] for row in rows])
    return (
        f"{rows[0]['model']:14} {rows[0]['data']:10} image AUROC {np.mean(image):.4f} (95 % {low:.3f} to {high:.3f}; "
        f"{' '.join(f'{value:.4f}' for value in image)}){located}  false alarms at 5 %: {alarms:.1%}  {seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(CONFIGS))
    parser.add_argument("--data", action="append", help="elpv-mono, elpv-poly, sample or a folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, help="append one object per run to this file; what it holds is not run again"
    )
    parser.add_argument("--keep", type=Path, help="keep the run folders here, for benchmarks/export_matrix.py")
    arguments = parser.parse_args()
    done: dict[tuple[str, str, int], dict[str, Any]] = {}
    if arguments.json and arguments.json.exists():
        rows = [json.loads(text) for text in arguments.json.read_text().splitlines()]
        done = {(row["model"], row["data"], row["seed"]): row for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        scratch = arguments.keep or Path(folder)
        for data in arguments.data or ["elpv-mono", "elpv-poly", "sample"]:
            if data == "sample":
                draw_sample_data(scratch / "sample", force=True)
                data = str(scratch / "sample")
            for model in arguments.model or CONFIGS:
                rows = []
                for seed in range(arguments.seeds):
                    row = done.get((model, Path(data).name, seed)) or measure(model, data, seed, scratch)
                    rows.append(row)
                    if arguments.json and (model, row["data"], seed) not in done:
                        with arguments.json.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                print(line(rows), flush=True)


if __name__ == "__main__":
    main()
