"""`demo`: the whole path once, offline, ending in a page to look at."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_runtime.atomic import check_free, disk_errors, replace_file
from edge_anomaly_runtime.bench.harness import run_bench
from edge_anomaly_runtime.bundle import Manifest
from edge_anomaly_runtime.errors import GateError
from edge_anomaly_runtime.images import load_image
from edge_anomaly_runtime.overlay import draw_overlay
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.scoring import open_scorer, verdict_of
from edge_anomaly_runtime.selftest import run_selftest

from .data import GOOD, NAMED, UNSURE, Item, open_dataset
from .evaluate import evaluate_items, open_judge
from .padim import PadimConfig
from .prediction import Predictions
from .report import Example, demo_report
from .sample_data import draw_sample_data
from .train import train_detector

SCHEMA = "edge-anomaly.demo/1"
BACKBONE = "efficientnet_lite0"
_SIZE = 224
_EXAMPLES = 12
_BENCH_ROUNDS = 3


def run_demo(data: str, out: Path, *, seed: int = 0, force: bool = False) -> dict[str, Any]:
    """Draw or open a data set, train, export INT8, self-test, evaluate and bench; write `out/index.html`.

    Returns the figures that `out/results.json` holds.

    Raises:
        GateError: parity or the self-test failed.
        UsageError: `out` exists and `force` is not set, or the data cannot be used.
    """
    check_free(out, force=force)
    start = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    with disk_errors(out):
        try:
            summary = _run(data, out, seed)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
    say(f"{time.perf_counter() - start:.0f} s. Open {out / 'index.html'}")
    return summary


def _run(data: str, out: Path, seed: int) -> dict[str, Any]:
    source = data
    if data == "sample":
        say("drawing sample data")
        source = str(out / "data")
        draw_sample_data(Path(source), seed=seed)
    name = Path(source).resolve().name if data != "sample" and data not in NAMED else data
    run, bundle = out / "run", out / f"{name}.eab"
    config = PadimConfig(backbone=BACKBONE, seed=seed)
    train_detector(source, run, config=config, preprocess=Preprocess(_SIZE, _SIZE))
    manifest = export_run(run, bundle, ExportOptions(("openvino",), "int8", seed=seed))
    dataset = open_dataset(source, seed=seed)
    keys = ("openvino/fp32", "openvino/int8")
    figures: dict[str, dict[str, Any]] = {}
    predictions: dict[str, Predictions] = {}
    items: Sequence[Item] = ()
    for key in keys:
        engine, precision = key.split("/")
        _selftest(bundle, engine, precision)
        with open_judge(bundle, engine=engine, precision=precision) as judge:
            figures[key], items, predictions[key] = evaluate_items(judge, dataset.test)
    benches = _bench_in_turn(bundle, keys)
    examples = _examples(items, predictions["openvino/int8"], manifest)
    commands = _commands(source if data != "sample" else str(Path("data")), name)
    summary = {"schema": SCHEMA, "figures": figures, "bench": benches, "bundle": str(bundle)}
    page = demo_report(
        title=f"PaDiM on {'drawn parts' if data == 'sample' else dataset.name}",
        manifest=manifest,
        figures=figures,
        scores={key: value.scores for key, value in predictions.items()},
        labels=[item.label for item in items],
        examples=examples,
        bench=benches,
        commands=commands,
        note=dataset.note or "Pictures drawn by edge-anomaly.",
    )
    replace_file(out / "index.html", page.encode())
    replace_file(out / "results.json", json.dumps(summary, indent=1).encode())
    _write_examples(out / "overlays", examples)
    _say_figures(figures, benches)
    return summary


def _selftest(bundle: Path, engine: str, precision: str) -> None:
    with open_scorer(bundle, engine=engine, precision=precision) as scorer:
        checks = run_selftest(scorer)
    bad = [check.file for check in checks if not check.ok]
    if bad:
        raise GateError(f"The self-test failed on {engine} {precision}: {', '.join(bad)}.")
    say(f"self-test {engine} {precision}: {len(checks)} golden images reproduced")


def _bench_in_turn(bundle: Path, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Bench the graphs in turn, three times each, and return each one's median run: a shared machine changes speed."""
    reports: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
    for key in track([*keys] * _BENCH_ROUNDS, "latency", len(keys) * _BENCH_ROUNDS):
        engine, precision = key.split("/")
        with open_scorer(bundle, engine=engine, precision=precision) as scorer:
            reports[key].append(run_bench([scorer]))
    middle = _BENCH_ROUNDS // 2
    return {
        key: sorted(rows, key=lambda row: float(row["latency_ms"]["infer"]["p50"]))[middle]
        for key, rows in reports.items()
    }


def _examples(items: Sequence[Item], predictions: Predictions, manifest: Manifest) -> list[Example]:
    """Choose, per label, images from clear to doubtful, and two good ones: the median and the worst."""
    thresholds = manifest.thresholds["openvino/int8"]
    labels = sorted({item.label for item in items} - {UNSURE})
    share = max(2, _EXAMPLES // max(1, len(labels)))
    chosen: list[int] = []
    for label in labels:
        ranked = sorted((i for i, item in enumerate(items) if item.label == label), key=lambda i: predictions.scores[i])
        wanted = (0.5, 1.0) if label == GOOD else tuple(np.linspace(0.1, 0.9, share))
        chosen += sorted({ranked[round(position * (len(ranked) - 1))] for position in wanted})
    examples = []
    for index in chosen:
        item, score = items[index], float(predictions.scores[index])
        picture = load_image(item.path)
        spec, limit = manifest.input.preprocess, thresholds.pixel.value
        overlay = draw_overlay(picture, predictions.maps[index], spec, limit)
        mask = None if item.mask is None else Image.open(item.mask).convert("L")
        name = f"{item.label}/{item.path.name}"
        examples.append(Example(name, item.label, verdict_of(score, thresholds), score, picture, overlay, mask))
    return examples


def _write_examples(folder: Path, examples: Sequence[Example]) -> None:
    folder.mkdir()
    for example in examples:
        example.overlay.save(folder / f"{example.name.replace('/', '-').rsplit('.', 1)[0]}.png")


def _commands(source: str, name: str) -> list[str]:
    drawn = [f"edge-anomaly sample-data {source}"] if name == "sample" else []
    return [
        *drawn,
        f"edge-anomaly train padim --data {source} --backbone {BACKBONE} --out run",
        f"edge-anomaly export run --target openvino --precision int8 --out {name}.eab",
        f"edge-anomaly selftest {name}.eab",
        f"edge-anomaly evaluate {name}.eab --data {source}",
        f"edge-anomaly bench {name}.eab --engine openvino",
    ]


def _say_figures(figures: dict[str, dict[str, Any]], benches: dict[str, dict[str, Any]]) -> None:
    for key, row in figures.items():
        alarms = row["false_alarms"]["fail"]
        image = f"image AUROC {row['image']['auroc']:.4f}  " if "image" in row else ""
        pixel = (
            f"pixel AUROC {row['pixel']['auroc']:.4f}  AUPRO {row['pixel']['aupro']:.4f}  " if "pixel" in row else ""
        )
        say(
            f"{key:15} {image}{pixel}false alarms {alarms['alarms']}/{alarms['images']}  "
            f"p50 {benches[key]['latency_ms']['infer']['p50']:.2f} ms"
        )
