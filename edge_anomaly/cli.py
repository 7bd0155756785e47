"""The full command line: the device's commands and the workstation's, whose bodies import late."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edge_anomaly_runtime.cli import app, run
from edge_anomaly_runtime.errors import MissingRequirementError, UsageError, did_you_mean

MODELS = ["padim"]

DataOption = Annotated[
    str, typer.Option(help="A folder with train/good, a folder of normal images, or elpv-mono, elpv-poly.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
AlphaFail = Annotated[float, typer.Option(help="Share of good parts that may be NG.")]
AlphaWarn = Annotated[float, typer.Option(help="Share of good parts that may be WARN or NG.")]


@app.command()
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="padim.")],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    backbone: Annotated[str, typer.Option(help="wide_resnet50_2, resnet18, resnet50 or efficientnet_lite0.")] = (
        "wide_resnet50_2"
    ),
    weights: Annotated[str, typer.Option(help="default, a .pth or .safetensors file, or random (tests only).")] = (
        "default"
    ),
    size: Annotated[int, typer.Option(help="Side of the model's square input in pixels.")] = 224,
    resize: Annotated[str, typer.Option(help="squash, crop or letterbox.")] = "squash",
    roi: Annotated[str, typer.Option(help="left,top,right,bottom as shares of the picture.")] = "0,0,1,1",
    dims: Annotated[int | None, typer.Option(help="Channels kept; 0 for all. Default: 64 or 100 by backbone.")] = None,
    reduction: Annotated[str, typer.Option(help="semi-orthogonal or random.")] = "semi-orthogonal",
    covariance: Annotated[str, typer.Option(help="location (one per place) or tied (one for all).")] = "location",
    shrinkage: Annotated[float, typer.Option(help="0 to 1: pull of the covariance to the identity.")] = 0.0,
    holdout: Annotated[float, typer.Option(help="Share of normal images kept to set the thresholds.")] = 0.2,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn from normal images and write a run folder.

    Example: edge-anomaly train padim --data parts/ --backbone efficientnet_lite0 --out runs/parts
    """
    if model not in MODELS:
        raise did_you_mean("model", model, MODELS)
    _require("train", "torch", "torchvision", "timm", "sklearn", "matplotlib", "safetensors")
    from edge_anomaly_runtime.preprocess import Preprocess

    from .padim import PadimConfig
    from .train import TrainOptions, train_padim

    trained = train_padim(
        data,
        out,
        config=PadimConfig(
            backbone=_known_backbone(backbone),
            dims=dims,
            reduction=reduction,  # type: ignore[arg-type]  # checked by PadimConfig
            covariance=covariance,  # type: ignore[arg-type]
            shrinkage=shrinkage,
            seed=seed,
        ),
        preprocess=Preprocess(size, size, resize, _parse_roi(roi)),  # type: ignore[arg-type]  # checked there
        weights=weights,
        options=TrainOptions(holdout, alpha_warn, alpha_fail, strict, force),
    )
    if as_json:
        limits = trained.thresholds.model_dump()
        _print_json({"schema": "edge-anomaly.train/1", "run": str(out), "data": trained.data, "thresholds": limits})


@app.command()
def export(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Default: the newest run in ./runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The bundle folder to write, NAME.eab.")] = Path("part.eab"),
    target: Annotated[list[str], typer.Option(help="onnx or openvino; repeatable.")] = ["openvino"],  # noqa: B006
    precision: Annotated[str, typer.Option(help="fp32 or int8.")] = "int8",
    calibration_images: Annotated[int, typer.Option(help="Normal images to measure INT8 ranges on.")] = 128,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    max_auroc_drop: Annotated[float, typer.Option(help="What INT8 may cost in image AUROC.")] = 0.005,
    max_flips: Annotated[float, typer.Option(help="Share of verdicts that INT8 may change.")] = 0.02,
    allow_drop: Annotated[bool, typer.Option("--allow-drop", help="Write the bundle although a gate failed.")] = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantise a run, check it against the trained model and write a bundle.

    Example: edge-anomaly export runs/parts --target openvino --precision int8 --out part.eab
    """
    _require("export", "torch", "onnx", "onnxscript", "onnxruntime")
    from edge_anomaly_calibration.guard import GuardLimits
    from edge_anomaly_export.exporting import ExportOptions, export_run
    from edge_anomaly_runtime.bundle import manifest_bytes

    from .runs import newest_run

    options = ExportOptions(
        targets=tuple(target),
        precision=precision,
        calibration_images=calibration_images,
        seed=seed,
        alpha_warn=alpha_warn,
        alpha_fail=alpha_fail,
        limits=GuardLimits(max_auroc_drop, max_flips),
        allow_drop=allow_drop,
        force=force,
    )
    manifest = export_run(run_folder or newest_run(), out, options)
    if as_json:
        print(manifest_bytes(manifest).decode(), end="")


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle NAME.eab, or a run folder.")],
    data: DataOption,
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime (bundles only).")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or int8 (bundles only).")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Split of a named data set. Default: the training's.")] = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Judge labelled images: AUROC, AUPRO, and the false-alarm rate against the promised one.

    Example: edge-anomaly evaluate part.eab --data parts/ --engine openvino --json
    """
    _require("train", "torch", "sklearn", "scipy")
    from .data import open_dataset
    from .evaluate import evaluate_items, open_judge

    with open_judge(bundle, engine=engine, precision=precision) as judge:
        dataset = open_dataset(data, seed=judge.seed if seed is None else seed)
        figures, _, _ = evaluate_items(judge, dataset.test, strict=strict)
    if as_json:
        _print_json(figures)
    else:
        _print_figures(figures)


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
    _require("all", "torch", "sklearn", "onnx", "onnxscript", "onnxruntime", "openvino")
    from .demo import run_demo

    summary = run_demo(data, out, seed=seed, force=force)
    if as_json:
        _print_json(summary)


def main() -> NoReturn:
    """Entry point of the console script."""
    run(app)


def _require(extra: str, *packages: str) -> None:
    """Refuse a workstation command on a lean install with the line to type."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise MissingRequirementError(
            f"This command needs packages that are not installed: {', '.join(absent)}.",
            f'Run: pip install "edge-anomaly[{extra}]"',
        )


def _known_backbone(name: str) -> str:
    from .backbones import BACKBONES

    if name not in BACKBONES:
        raise did_you_mean("backbone", name, list(BACKBONES))
    return name


def _parse_roi(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--roi {text!r} is not left,top,right,bottom.", "Example: --roi 0.1,0.1,0.9,0.9") from None
    return left, top, right, bottom


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


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
