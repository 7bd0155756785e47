"""What the exports are worth: every cell of the matrix, INT8 accuracy and latency per model, the memory of calibration.

    python benchmarks/export_matrix.py cells --json cells.json          # every model and backbone, random weights
    python benchmarks/export_matrix.py accuracy RUN... --json acc.json  # runs of benchmarks/detectors.py --keep
    python benchmarks/export_matrix.py latency                          # INT8 against FP32 on OpenVINO, alternating
    python benchmarks/export_matrix.py memory                           # peak memory of WideResNet50-2, 256 images
    python benchmarks/export_matrix.py agreement --model vit-knn        # do INT8 and FP32 rank images alike?

`cells` exports to all targets and says of each: parity of every graph with torch, our rules for TensorRT, NVIDIA's
parser and builder (extra trt-check), the share of INT8 among what OpenVINO executes. Detectors with random weights
find nothing: there, agreement of scores is all that means anything.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import OPEN, print_rows  # these two are beside this one
from latency import median_ms

from edge_anomaly.autoencoder import AutoencoderConfig
from edge_anomaly.classifier import ClassifierConfig
from edge_anomaly.data import UNSURE
from edge_anomaly.detectors import DETECTORS
from edge_anomaly.evaluate import evaluate_items, open_judge
from edge_anomaly.fastflow import FastflowConfig
from edge_anomaly.image_set import ImageSet
from edge_anomaly.padim import PadimConfig
from edge_anomaly.patchcore import PatchcoreConfig
from edge_anomaly.runs import load_run
from edge_anomaly.sample_data import draw_sample_data
from edge_anomaly.stpm import StpmConfig
from edge_anomaly.train import TrainOptions, train_detector
from edge_anomaly.train_classifier import ClassifierOptions, train_classifier
from edge_anomaly.vit_knn import VIT_BASE, VitKnnConfig
from edge_anomaly_calibration.guard import auroc, rank_correlation
from edge_anomaly_export import trt_check
from edge_anomaly_export.classifier import export_classifier
from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_export.trt_lint import lint
from edge_anomaly_runtime.bundle import Bundle, read_bundle
from edge_anomaly_runtime.engine_openvino import openvino_core
from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.images import list_images, load_image
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.scoring import open_scorer

LITE = "efficientnet_lite0"
RESNETS = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")
HEAVY_LAYERS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution")
KEYS = ("openvino/fp32", "openvino/int8", "onnxruntime/int8", "tensorrt/int8")
# As little as possible of everything: what a model has learnt does not matter here.
QUICK: dict[str, Any] = {
    **{f"padim {name}": PadimConfig(name) for name in (LITE, *RESNETS)},
    **{f"patchcore {name}": PatchcoreConfig(name) for name in (LITE, *RESNETS)},
    **{
        f"fastflow {name}": FastflowConfig(name, epochs=1, finetune_epochs=1, finetune="off")
        for name in (LITE, *RESNETS)
    },
    **{f"stpm {name}": StpmConfig(name, epochs=8, batch_size=8) for name in (LITE, *RESNETS)},
    "autoencoder": AutoencoderConfig(epochs=1),
    **{f"autoencoder {name}": AutoencoderConfig(encoder=name, epochs=1) for name in (LITE, *RESNETS[:3])},
    "vit-knn": VitKnnConfig(architecture=asdict(VIT_BASE)),
    # Many small steps, for BatchNorm's statistics: without them activations of deep networks leave FP16's range.
    **{
        f"classifier ResNet-{depth}": ClassifierConfig(depth, epochs=30, batch_size=4, learning_rate=0.001)
        for depth in (18, 34, 50, 101, 152)
    },
}


def quick_run(name: str, size: int, images: int, scratch: Path) -> Path:
    """Train a model for a few epochs on drawn parts and return its run folder."""
    data, run, config = scratch / "parts", scratch / name.replace(" ", "-"), QUICK[name]
    if not data.exists():
        draw_sample_data(data, train=images * 5 // 4, test_good=10, per_defect=2)
    if run.exists():
        return run
    if isinstance(config, ClassifierConfig):
        options = ClassifierOptions(force=True)
        train_classifier(str(data / "test"), run, config=config, options=options)
        return run
    weights = "default" if LITE in name or name == "autoencoder" else "random"
    options_ = TrainOptions(force=True)
    train_detector(str(data), run, config=config, preprocess=Preprocess(size, size), weights=weights, options=options_)
    return run


def export(run: Path, name: str, out: Path, precision: str = "int8", targets: tuple[str, ...] = ("openvino",)) -> None:
    # Not --allow-drop: a graph that is broken in FP16 shall fail.
    options = ExportOptions(targets, precision, calibration_images=32, limits=OPEN, force=True)
    (export_classifier if name.startswith("classifier") else export_run)(run, out, options)


def measure_cell(name: str, precision: str, size: int, scratch: Path) -> dict[str, Any]:
    """Export one model in one precision to all targets and say what came of it."""
    row: dict[str, Any] = {"model": name, "precision": precision, "size": size}
    start = time.perf_counter()
    try:
        run = quick_run(name, size, 40, scratch)
        export(run, name, scratch / "part.eab", precision, ("onnx", "openvino", "tensorrt"))
        bundle = read_bundle(scratch / "part.eab")
    except EdgeAnomalyError as error:
        return {**row, "ok": False, "reason": error.what, "seconds": time.perf_counter() - start}
    parity = {line.backend: line.score_difference for line in bundle.manifest.parity}
    graphs = {name for key, name in bundle.manifest.graphs.items() if key.startswith("tensorrt/")}
    graphs |= {name for name in bundle.manifest.files if name.startswith("tensorrt/") and name.endswith(".onnx")}
    checks = [tensorrt_check(bundle, name) for name in sorted(graphs)]
    float_rows = [line for line in bundle.manifest.parity if "fp32" in line.backend]
    return {
        **row,
        "ok": all(line.ok for line in float_rows) and all(check["ok"] for check in checks),
        "parity": parity,
        "tensorrt": checks,
        "int8_share": executed_int8(bundle) if precision == "int8" else None,
        "megabytes": sum(entry.size for entry in bundle.manifest.files.values()) / 1e6,
        "seconds": time.perf_counter() - start,
    }


def tensorrt_check(bundle: Bundle, file: str) -> dict[str, Any]:
    """Return what our rules and NVIDIA's parser and builder say about a file for TensorRT."""
    data = bundle.read(file)
    version = "11.0" if file.startswith("tensorrt/") else "10.0"
    errors = [f for f in lint(onnx.load_from_string(data), minimum_version=version) if f.severity == "E"]
    verdict = trt_check.check_with_nvidia(data, timeout_s=600) if trt_check.is_installed() else None
    return {
        "file": file,
        "lint_errors": len(errors),
        "nvidia": None if verdict is None else str(verdict),
        "ok": not errors and (verdict is None or verdict.ok),
    }


def executed_int8(bundle: Bundle) -> float:
    """Return the share of the backbone's convolutions and matrix products that OpenVINO runs in INT8."""
    core = openvino_core()
    model = core.read_model(bundle.read("openvino/model.xml"), bundle.read("openvino/model.bin"))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    heavy = integer = 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.value for key, value in node.get_rt_info().items()}
        if info.get("layerType") not in HEAVY_LAYERS:
            continue
        names = str(info.get("originalLayersNames", ""))
        if "head/" in names and "backbone/" not in names:
            continue
        heavy += 1
        integer += info.get("runtimePrecision") in ("u8", "i8")
    return integer / max(1, heavy)


def measure_accuracy(run_path: Path, scratch: Path) -> dict[str, Any]:
    """Export a trained run to all targets in INT8 and compare with FP32 on all its labelled images.

    Also, for heads that are fitted: what INT8 costs when the head keeps its FP32 statistics.
    """
    run = load_run(run_path)
    options = ExportOptions(("onnx", "openvino", "tensorrt"), "int8", allow_drop=False, force=True)
    out = scratch / "accuracy.eab"
    row: dict[str, Any] = {"run": run_path.name, "kind": run.kind}
    try:
        export_run(run_path, out, options)
    except EdgeAnomalyError as error:
        row["guard"] = error.what
        export_run(run_path, out, replace(options, allow_drop=True))
    bundle = read_bundle(out)
    row["float_tensors"] = {} if bundle.manifest.calibration is None else bundle.manifest.calibration.float_tensors
    items = [item for item in run.test if item.label != UNSURE]
    scores = {}
    for key in KEYS:
        engine, _, precision = key.partition("/")
        if engine == "tensorrt":
            line = next(line for line in bundle.manifest.parity if line.backend == "tensorrt int8 simulated")
            row[key] = {"auroc": line.auroc, "flips": line.flips / line.images, "distinct": line.distinct}
            continue
        with open_judge(out, engine=engine, precision=precision) as judge:
            figures, _, predictions = evaluate_items(judge, items)
        scores[key] = predictions.scores
        row[key] = {
            "auroc": figures["image"]["auroc"],
            "distinct": float(np.unique(predictions.scores).size / predictions.scores.size),
            "rank_correlation": rank_correlation(scores[KEYS[0]], predictions.scores),
        }
    row["statistics kept from FP32"] = without_refit(run_path, items, scratch)
    return row


def without_refit(run_path: Path, items: Any, scratch: Path) -> float | None:
    """Return the INT8 AUROC when the head is not fitted again."""
    run = load_run(run_path)
    detector = DETECTORS[run.kind]
    if detector.refit is None:
        return None
    DETECTORS[run.kind] = replace(detector, refit=None)
    try:
        export_run(run_path, scratch / "kept.eab", ExportOptions(("onnx",), "int8", limits=OPEN, force=True))
    finally:
        DETECTORS[run.kind] = detector
    with open_judge(scratch / "kept.eab", engine="openvino", precision="int8") as judge:
        _, kept, predictions = evaluate_items(judge, items)
    defective = np.array([item.label != "good" for item in kept])
    return auroc(predictions.scores, defective)


def measure_latency(name: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """Return the ratio of FP32 to INT8 p50 on OpenVINO, the whole graph, in alternating blocks of calls."""
    run = quick_run(name, 224, 40, scratch)
    export(run, name, scratch / "latency.eab")
    size = read_bundle(scratch / "latency.eab").manifest.input.preprocess
    inputs = np.random.default_rng(0).integers(0, 256, (8, size.height, size.width, 3), dtype=np.uint8)
    with (
        open_scorer(scratch / "latency.eab", engine="openvino", precision="fp32") as plain,
        open_scorer(scratch / "latency.eab", engine="openvino", precision="int8") as quantised,
    ):
        calls = max(10, min(200, round(1500 / median_ms(plain, inputs, 5, warm_up=10))))
        pairs = [
            (median_ms(plain, inputs, calls, warm_up=10), median_ms(quantised, inputs, calls, warm_up=10))
            for _ in range(rounds)
        ]
    ratios = [slow / fast for slow, fast in pairs]
    return {
        "model": name,
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "fp32_ms": float(np.median([pair[0] for pair in pairs])),
        "int8_ms": float(np.median([pair[1] for pair in pairs])),
    }


def measure_agreement(name: str, scratch: Path) -> dict[str, Any]:
    """Return Spearman's rank correlation of INT8 and FP32 scores over 140 drawn images, 60 of them with a defect."""
    run = quick_run(name, 224, 40, scratch)
    export(run, name, scratch / "agreement.eab")
    draw_sample_data(scratch / "judged", train=1, test_good=80, per_defect=15)
    paths = list_images([str(scratch / "judged" / "test")])
    scores = {}
    for key in ("openvino/fp32", "openvino/int8", "onnxruntime/int8"):
        engine, _, precision = key.partition("/")
        with open_scorer(scratch / "agreement.eab", engine=engine, precision=precision) as scorer:
            scores[key] = np.array(
                [scorer.score_image(np.asarray(load_image(path))).score for path in paths], dtype=np.float64
            )
    reference = scores["openvino/fp32"]
    return {
        "model": name,
        "images": len(paths),
        **{
            key: {
                "rank_correlation": rank_correlation(reference, value),
                "distinct": np.unique(value).size / value.size,
            }
            for key, value in scores.items()
        },
    }


def measure_memory(scratch: Path) -> dict[str, Any]:
    """Return the peak memory of exporting WideResNet50-2 PaDiM in INT8, calibrated on 256 images, in this process."""
    run = quick_run("padim wide_resnet50_2", 224, 256, scratch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    options = ExportOptions(("openvino",), "int8", calibration_images=256, limits=OPEN, allow_drop=True, force=True)
    export_run(run, scratch / "memory.eab", options)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"images": len(ImageSet(load_run(run).fit, load_run(run).preprocess)), "before_gb": before, "peak_gb": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cells", "accuracy", "latency", "memory", "agreement"])
    parser.add_argument("runs", nargs="*", type=Path, help="accuracy: run folders")
    parser.add_argument("--model", action="append", choices=list(QUICK))
    parser.add_argument("--precision", action="append", choices=["fp32", "fp16", "int8"])
    parser.add_argument("--size", type=int, default=64, help="cells: side of the input; heads grow with it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one object per line to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if arguments.what == "cells":
            rows = (
                measure_cell(name, precision, arguments.size, scratch)
                for name in arguments.model or QUICK
                for precision in arguments.precision or ("fp32", "fp16", "int8")
            )
        elif arguments.what == "accuracy":
            rows = (measure_accuracy(run, scratch) for run in arguments.runs)
        elif arguments.what == "latency":
            chosen = ("padim resnet18", "padim wide_resnet50_2", "vit-knn", "stpm resnet18", "classifier ResNet-18")
            rows = (measure_latency(name, arguments.rounds, scratch) for name in arguments.model or chosen)
        elif arguments.what == "agreement":
            rows = (measure_agreement(name, scratch) for name in arguments.model or ("vit-knn",))
        else:
            rows = (measure_memory(scratch) for _ in range(1))
        print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
