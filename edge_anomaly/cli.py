"""The full command line: the device's commands and the workstation's, whose bodies import late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edge_anomaly_runtime.cli import app, run
from edge_anomaly_runtime.errors import UsageError

from .cli_options import AlphaFail, AlphaWarn, ForceOption, JsonOption, SeedOption, StrictOption, require
from .cli_train import train_app

app.add_typer(train_app, name="train")


@app.command()
def export(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Default: the newest run in ./runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The bundle folder to write, NAME.eab.")] = Path("part.eab"),
    target: Annotated[list[str], typer.Option(help="onnx, openvino or tensorrt; repeatable.")] = ["openvino"],  # noqa: B006
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "int8",
    calibration_images: Annotated[int, typer.Option(help="Images to measure INT8 ranges on.")] = 128,
    calibration: Annotated[
        Path | None, typer.Option(help="A folder of normal images, or a detector's run, to measure INT8 ranges on.")
    ] = None,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    max_auroc_drop: Annotated[float, typer.Option(help="What INT8 may cost in image AUROC.")] = 0.005,
    max_flips: Annotated[float, typer.Option(help="Share of verdicts or classes that INT8 may change.")] = 0.02,
    max_accuracy_drop: Annotated[float, typer.Option(help="What INT8 may cost a classifier in accuracy.")] = 0.003,
    allow_drop: Annotated[bool, typer.Option("--allow-drop", help="Write the bundle although a gate failed.")] = False,
    trt_version: Annotated[
        str | None, typer.Option(help="Oldest TensorRT that must take the files, 8.5 to 11.0. Default: 10.0.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="17 or 18. Default: the newest that all targets take.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and end.")] = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantise a run, check it against the trained model and write a bundle.

    Example: edge-anomaly export runs/parts --target openvino --precision int8 --out part.eab
    Example: edge-anomaly export runs/parts --target tensorrt --target onnx --trt-version 10.3 --out part.eab
    """
    require("export", "torch", "onnx", "onnxscript", "onnxruntime")
    from edge_anomaly_calibration.guard import GuardLimits
    from edge_anomaly_export.classifier import classifier_plan, export_classifier
    from edge_anomaly_export.exporting import export_plan, export_run
    from edge_anomaly_export.options import ExportOptions
    from edge_anomaly_runtime.bundle import manifest_bytes

    from .runs import newest_run
    from .train_classifier import is_classifier_run

    options = ExportOptions(
        targets=tuple(target),
        precision=precision,
        calibration_images=calibration_images,
        calibration=calibration,
        seed=seed,
        alpha_warn=alpha_warn,
        alpha_fail=alpha_fail,
        limits=GuardLimits(max_auroc_drop, max_flips, accuracy_drop=max_accuracy_drop),
        allow_drop=allow_drop,
        force=force,
        trt_version=trt_version,
        opset=opset,
    )
    source = run_folder or newest_run()
    is_classifier = is_classifier_run(source)
    if dry_run:
        print("\n".join((classifier_plan if is_classifier else export_plan)(source, out, options)))
        return
    manifest = (export_classifier if is_classifier else export_run)(source, out, options)
    if as_json:
        print(manifest_bytes(manifest).decode(), end="")


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN|BUNDLE", help="A bundle NAME.eab, or a run folder.")],
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images: as for train. A classifier's default: the data it was trained on."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with all figures into this folder.")] = None,
    engine: Annotated[str, typer.Option(help="auto, tensorrt, openvino or onnxruntime (bundles only).")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or int8 (bundles only).")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Split of a named data set. Default: the training's.")] = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Judge labelled images: AUROC, AUPRO, and the false-alarm rate against the promised one.

    Example: edge-anomaly evaluate part.eab --data parts/ --engine openvino --json
    Example: edge-anomaly evaluate runs/parts --data parts/ --report report/
    """
    require("train", "torch", "sklearn", "scipy", "matplotlib")
    from .train_classifier import is_classifier_bundle, is_classifier_run

    if is_classifier_run(path):
        from .evaluation_report import evaluate_classifier

        figures = evaluate_classifier(path, data, report=report, strict=strict)
        _print_json(figures) if as_json else _print_classification(figures)
        return
    if is_classifier_bundle(path):
        from .evaluation_report import evaluate_classifier_bundle

        figures = evaluate_classifier_bundle(
            path, data, engine=engine, precision=precision, report=report, strict=strict
        )
        _print_json(figures) if as_json else _print_classification(figures)
        return
    from .data import open_dataset
    from .evaluate import evaluate_items, open_judge

    if data is None:
        raise UsageError("There is nothing to judge.", "Give labelled images with --data.")
    with open_judge(path, engine=engine, precision=precision) as judge:
        dataset = open_dataset(data, seed=judge.seed if seed is None else seed)
        figures, items, predictions = evaluate_items(judge, dataset.test, strict=strict)
    if report is not None:
        from .evaluation_report import report_detector

        report_detector(path, report, judge, items, predictions, figures)
    if as_json:
        _print_json(figures)
    else:
        _print_figures(figures)


@app.command()
def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN|BUNDLE...", help="Runs and bundles to set side by side.")],
    data: Annotated[
        str | None, typer.Option(help="Labelled images. Default: those that each run was trained beside.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plot into this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Set runs side by side: accuracy, size, latency on this CPU, training time.

    Example: edge-anomaly compare runs/padim runs/stpm part.eab --data parts/ --out models.png
    """
    require("train", "torch", "sklearn", "scipy", "matplotlib")
    from edge_anomaly_runtime.atomic import replace_file

    from .compare import compare_paths

    comparison = compare_paths(paths, data)
    if out is not None:
        replace_file(out, comparison.plot)
    if as_json:
        _print_json(comparison.record)
    else:
        print(comparison.table)


@app.command(name="sample-data")
def sample_data(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    seed: SeedOption = 0,
    train_images: Annotated[int, typer.Option("--train", help="Normal images to learn from.")] = 300,
    test_good: Annotated[int, typer.Option(help="Normal images to test with.")] = 100,
    per_defect: Annotated[int, typer.Option(help="Images of each of the four kinds of defect.")] = 25,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 256,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw a data set of machined parts with scratches, holes, stains and missing screws, with masks.

    Example: edge-anomaly sample-data parts/ --seed 1
    """
    from edge_anomaly_runtime.progress import say

    from .sample_data import draw_sample_data

    counts = draw_sample_data(
        out, seed=seed, train=train_images, test_good=test_good, per_defect=per_defect, size=size, force=force
    )
    if as_json:
        _print_json({"schema": "edge-anomaly.sample-data/1", "folder": str(out), "counts": counts})
    say(f"{out}: {sum(counts.values())} images, {', '.join(f'{count} {name}' for name, count in counts.items())}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for data, run, bundle and report.")] = Path("demo-out"),
    data: Annotated[str, typer.Option(help="sample, elpv-mono, elpv-poly, or a folder with train/good.")] = "sample",
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole path once, offline: data, training, INT8 export, self-test, scoring, report.

    Example: edge-anomaly demo --data elpv-mono --out demo-elpv
    """
    require("all", "torch", "sklearn", "onnx", "onnxscript", "onnxruntime", "openvino")
    from .demo import run_demo

    summary = run_demo(data, out, seed=seed, force=force)
    if as_json:
        _print_json(summary)


def main() -> NoReturn:
    """Entry point of the console script."""
    run(app)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _print_classification(figures: dict[str, Any]) -> None:
    low, high = figures["accuracy_interval"]
    print(f"images           {figures['images']}")
    print(f"accuracy         {figures['accuracy']:.2%}  (95 % {low:.2%} to {high:.2%})")
    if figures["top5"] is not None:
        print(f"top-5            {figures['top5']:.2%}")
    for name, row in figures["classes"].items():
        print(
            f"  {name:14} {row['images']:5} images   precision {row['precision']:.3f}   recall {row['recall']:.3f}   "
            f"F1 {row['f1']:.3f}"
        )
    for pair in figures["most_confused"]:
        print(f"  {pair['count']:5} x {pair['true']} taken for {pair['predicted']} ({pair['share']:.1%})")


def _print_figures(figures: dict[str, Any]) -> None:
    print(f"scored by        {figures['scored_by']}")
    print(f"images           {figures['images']}  skipped {figures['skipped']}")
    if image := figures.get("image"):
        low, high = image["auroc_interval"]
        print(f"image AUROC      {image['auroc']:.4f}  (95 % {low:.4f} to {high:.4f})")
        print(f"image AP         {image['average_precision']:.4f}   F1 {image['f1']:.4f}   found {image['found']:.1%}")
    if pixel := figures.get("pixel"):
        print(f"pixel AUROC      {pixel['auroc']:.4f}   AUPRO {pixel['aupro']:.4f}")
    for name, alarms in figures["false_alarms"].items():
        print(
            f"false alarms     {name}: {alarms['alarms']} of {alarms['images']} good images, "
            f"promised {alarms['promised']:.1%}, 95 % bound {alarms['bound']:.1%}"
        )
    for name, row in figures.get("defects", {}).items():
        print(f"  {name:14} {row['images']:4} images   AUROC {row['auroc']:.4f}   found {row['found']:.1%}")
    if unsure := figures.get("unsure"):
        print(f"  unsure         {unsure['images']:4} images   flagged {unsure['flagged']:.1%} (in no figure above)")
