"""Accuracy on real solar cells: FP32 against INT8, verdict flips, and whether the thresholds keep their promise.

    python benchmarks/elpv.py --cells mono --cells poly --seeds 3 --alarm-seeds 10

Per seed: train on 60 % of the cells with p = 0 (a fifth of them held out for the thresholds), export to OpenVINO INT8,
judge the remaining p = 0 cells against the p = 1 cells with the runtime. ELPV images: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edge_anomaly.data import GOOD, UNSURE, open_dataset
from edge_anomaly.evaluate import evaluate_items, open_judge
from edge_anomaly.padim import PadimConfig
from edge_anomaly.train import train_detector
from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_runtime.preprocess import Preprocess

KEYS = ("openvino/fp32", "openvino/int8", "onnxruntime/int8")


def measure_seed(cells: str, seed: int, dims: int | None, scratch: Path) -> dict[str, Any]:
    """Train, export and judge once; flips are counted on the test images at each graph's own fail threshold."""
    run, bundle = scratch / "run", scratch / "part.eab"
    config = PadimConfig(backbone="efficientnet_lite0", dims=dims, seed=seed)
    train_detector(f"elpv-{cells}", run, config=config, preprocess=Preprocess(224, 224))
    export_run(run, bundle, ExportOptions(("openvino",), "int8", seed=seed, allow_drop=True))
    items = [item for item in open_dataset(f"elpv-{cells}", seed=seed).test if item.label != UNSURE]
    row: dict[str, Any] = {"seed": seed}
    alarms = {}
    for key in KEYS:
        engine, precision = key.split("/")
        with open_judge(bundle, engine=engine, precision=precision) as judge:
            figures, _, predictions = evaluate_items(judge, items)
        row[key] = figures["image"]["auroc"]
        row[f"{key} warn"] = figures["false_alarms"]["warn"]
        alarms[key] = {
            "fail": predictions.scores > judge.thresholds.fail.value,
            "warn": predictions.scores > judge.thresholds.warn.value,
        }
    for key in KEYS[1:]:
        for level in ("fail", "warn"):
            row[f"{key} {level} flips"] = float((alarms[key][level] != alarms[KEYS[0]][level]).mean())
    return row


def false_alarm_rates(cells: str, seeds: int, scratch: Path) -> list[dict[str, Any]]:
    """Train on `seeds` splits and measure the warn rate (alpha = 5 %) on normal cells that were never seen."""
    rows = []
    for seed in range(seeds):
        run = scratch / f"run{seed}"
        config = PadimConfig(backbone="efficientnet_lite0", seed=seed)
        train_detector(f"elpv-{cells}", run, config=config, preprocess=Preprocess(224, 224))
        good = [item for item in open_dataset(f"elpv-{cells}", seed=seed).test if item.label == GOOD]
        with open_judge(run) as judge:
            figures, _, _ = evaluate_items(judge, good)
        rows.append(figures["false_alarms"]["warn"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", action="append", choices=["mono", "poly"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alarm-seeds", type=int, default=10)
    parser.add_argument("--dims", type=int, default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for cells in arguments.cells or ["mono", "poly"]:
        rows = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as scratch:
                rows.append(measure_seed(cells, seed, arguments.dims, Path(scratch)))
        with tempfile.TemporaryDirectory() as scratch:
            alarms = false_alarm_rates(cells, arguments.alarm_seeds, Path(scratch))
        results[cells] = {"seeds": rows, "alarms": alarms}
        print_table(cells, rows, alarms)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def print_table(cells: str, rows: list[dict[str, Any]], alarms: list[dict[str, Any]]) -> None:
    print(f"\nELPV {cells}: image AUROC of {len(rows)} seeds")
    for key in KEYS:
        values = [row[key] for row in rows]
        print(f"  {key:18} mean {np.mean(values):.4f}   {' '.join(f'{value:.4f}' for value in values)}")
    for key in KEYS[1:]:
        for level in ("fail", "warn"):
            values = [row[f"{key} {level} flips"] for row in rows]
            print(f"  flips {key:18} {level} mean {np.mean(values):.2%}   {' '.join(f'{v:.2%}' for v in values)}")
    if alarms:
        rates = [row["rate"] for row in alarms]
        print(
            f"  false alarms at 5 %, {len(alarms)} seeds: mean {np.mean(rates):.2%} "
            f"(stated 95 % bound {alarms[0]['bound']:.2%}); {' '.join(f'{rate:.1%}' for rate in rates)}"
        )


if __name__ == "__main__":
    main()
