"""`compare`: runs and bundles side by side, by accuracy, size and speed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from edge_anomaly_runtime.bench.statistics import summary
from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.cpu import cpu_name, usable_cpus
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.progress import track
from edge_anomaly_runtime.scoring import open_scorer

from . import plots
from .data import NAMED, open_dataset
from .evaluate import evaluate_items, open_judge
from .evaluation_report import evaluate_classifier
from .report import graph_bytes
from .runs import RECORD, WEIGHTS, load_model, load_run
from .train_classifier import is_classifier_run, load_classifier

SCHEMA = "edge-anomaly.compare/1"

# Latency: every model in turn, several times over, because a shared machine changes its speed.
_ROUNDS = 5
_CALLS = 20
_WARMUP_SECONDS = 0.5


@dataclass(frozen=True)
class ComparedRun:
    """What is compared of a run or a bundle; None is not known or does not apply.

    kind, backbone: such as padim and resnet18. scored_by: such as `torch fp32` or `openvino int8`. data: what it was
    judged on; images: how many. image_auroc and the other figures of detectors, accuracy of classifiers: in [0, 1],
    with 95 % intervals. false_alarms: good images above the NG limit, of good_images. weight_bytes: size of the weights
    file, or of the graph that the engine reads. latency_p50_ms: of one image, resizing not counted.
    """

    name: str
    kind: str
    backbone: str
    scored_by: str
    data: str
    images: int
    weight_bytes: int
    parameters: int | None = None
    image_auroc: float | None = None
    image_auroc_interval: tuple[float, float] | None = None
    pixel_auroc: float | None = None
    aupro: float | None = None
    false_alarms: int | None = None
    good_images: int | None = None
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    latency_p50_ms: float | None = None
    training_seconds: float | None = None

    @property
    def quality(self) -> float | None:
        """Image AUROC of a detector, accuracy of a classifier."""
        return self.accuracy if self.image_auroc is None else self.image_auroc

    @property
    def quality_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `quality`."""
        return self.accuracy_interval if self.image_auroc is None else self.image_auroc_interval


@dataclass(frozen=True)
class Comparison:
    """A table for the terminal, a JSON-ready record, and a plot as PNG."""

    table: str
    record: dict[str, Any]
    plot: bytes


def compare_paths(paths: Sequence[Path], data: str | None = None) -> Comparison:
    """Judge runs and bundles on labelled images, time them in turn on this CPU, and set them side by side.

    `data` as for `load_compared`.

    Raises:
        UsageError: there is nothing to compare, or as `load_compared`.
    """
    rows = [load_compared(path, data) for path in paths]
    latencies = measure_latencies(paths)
    names = [path.name for path in paths]
    return compare_runs(
        [
            replace(row, latency_p50_ms=latency, name=path.name if names.count(path.name) == 1 else str(path))
            for row, latency, path in zip(rows, latencies, paths, strict=True)
        ]
    )


def compare_runs(rows: Sequence[ComparedRun]) -> Comparison:
    """Set runs side by side, the best first.

    Raises:
        UsageError: there is no run.
    """
    if not rows:
        raise UsageError("There is nothing to compare.", "Name one or more runs or bundles.")
    ranked = sorted(rows, key=lambda row: (row.quality is None, -(row.quality or 0.0)))
    record = {
        "schema": SCHEMA,
        "runs": [asdict(row) for row in ranked],
        "same_images": _same_images(ranked),
        "environment": {"cpu": cpu_name(), "threads": usable_cpus(), "torch": torch.__version__},
    }
    return Comparison(_table(ranked), record, plots.comparison_plot([_bar(row) for row in ranked]))


# One run


def load_compared(path: Path, data: str | None = None) -> ComparedRun:
    """Judge a run folder or a bundle; its latency is measured with others, by `measure_latencies`.

    `data`: labelled images as for `open_dataset`; a run has a default, the test images of its own data.

    Raises:
        UsageError: there are no labelled images, or a bundle is given without `data`.
        ArtefactError: the run or the bundle is damaged.
    """
    if is_classifier_run(path):
        return _compared_classifier(path, data)
    if (path / RECORD).exists():
        return _compared_run(path, data)
    return _compared_bundle(path, data)


def _compared_classifier(path: Path, data: str | None) -> ComparedRun:
    run, model = load_classifier(path)
    figures = evaluate_classifier(path, data, report=None, strict=False)
    low, high = figures["accuracy_interval"]
    return ComparedRun(
        name=path.name,
        kind="classifier",
        backbone=f"resnet{run.config.depth}",
        scored_by="torch fp32",
        data=data or run.source,
        images=figures["images"],
        weight_bytes=(path / WEIGHTS).stat().st_size,
        parameters=sum(value.numel() for value in model.parameters()),
        accuracy=figures["accuracy"],
        accuracy_interval=(low, high),
        training_seconds=run.seconds,
    )


def _compared_run(path: Path, data: str | None) -> ComparedRun:
    run = load_run(path)
    parameters = sum(value.numel() for value in load_model(run).parameters())
    with open_judge(path) as judge:
        items = run.test if data is None else open_dataset(data, seed=judge.seed).test
        figures, _, _ = evaluate_items(judge, items)
    settings = asdict(run.config)
    row = ComparedRun(
        name=path.name,
        kind=run.kind,
        backbone=str(settings.get("backbone") or settings.get("encoder") or settings.get("checkpoint") or "–"),
        scored_by=judge.name,
        data=_data_name(data or str(run.data["name"]), judge.seed),
        images=sum(figures["images"].values()),
        weight_bytes=(path / WEIGHTS).stat().st_size,
        parameters=parameters,
        training_seconds=run.seconds,
    )
    return _with_figures(row, figures)


def _compared_bundle(path: Path, data: str | None) -> ComparedRun:
    manifest = read_bundle(path).manifest
    if data is None:
        raise UsageError(
            f"{path} is a bundle, which has no test images of its own.", "Give labelled images with --data."
        )
    with open_judge(path) as judge:
        figures, _, _ = evaluate_items(judge, open_dataset(data, seed=judge.seed).test)
    row = ComparedRun(
        name=path.name,
        kind=manifest.model.kind,
        backbone=str(manifest.model.parameters.get("backbone", "–")),
        scored_by=judge.name,
        data=_data_name(data, judge.seed),
        images=sum(figures["images"].values()),
        weight_bytes=graph_bytes(manifest, judge.name.replace(" ", "/")) or 0,
    )
    return _with_figures(row, figures)


def _with_figures(row: ComparedRun, figures: dict[str, Any]) -> ComparedRun:
    """Fill in the figures of a detector."""
    image, pixel, alarms = figures.get("image", {}), figures.get("pixel", {}), figures["false_alarms"]["fail"]
    interval = image.get("auroc_interval")
    return replace(
        row,
        image_auroc=image.get("auroc"),
        image_auroc_interval=None if interval is None else (interval[0], interval[1]),
        pixel_auroc=pixel.get("auroc"),
        aupro=pixel.get("aupro"),
        false_alarms=alarms["alarms"] if alarms["images"] else None,
        good_images=alarms["images"],
    )


def _data_name(data: str, seed: int) -> str:
    """Return the name of the data; the seed splits the named ones, so it is a part of their name."""
    return f"{data}, seed {seed}" if data in NAMED else data


# Latency


def measure_latencies(paths: Sequence[Path], *, rounds: int = _ROUNDS, calls: int = _CALLS) -> list[float | None]:
    """Return the median time of one image through each model in milliseconds, on this CPU.

    All models are loaded and warmed up first; then each is called `calls` times in turn, `rounds` times over. None
    stands for fewer calls than a median needs.
    """
    samples: list[list[float]] = [[] for _ in paths]
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        torch.set_num_threads(usable_cpus())
        stack.callback(torch.set_num_threads, threads)
        models = [stack.enter_context(_one_image(path)) for path in paths]
        for model in models:
            _warm_up(model)
        gc.disable()
        stack.callback(gc.enable)
        for turn in track(range(rounds * len(models)), "latency", rounds * len(models)):
            index = turn % len(models)
            samples[index] += [_milliseconds(models[index]) for _ in range(calls)]
    return [summary(times)["p50"] for times in samples]


@contextlib.contextmanager
def _one_image(path: Path) -> Iterator[Callable[[], object]]:
    """Load a run or a bundle and yield what sends one image through it."""
    rng = np.random.default_rng(0)
    if not (path / RECORD).exists():
        with open_scorer(path) as scorer:
            image = rng.integers(0, 256, scorer.bundle.manifest.input.shape, dtype=np.uint8)
            yield lambda: scorer.session.run(image)
        return
    model: torch.nn.Module
    if is_classifier_run(path):
        classifier, model = load_classifier(path)
        spec = classifier.preprocess
    else:
        run = load_run(path)
        model, spec = load_model(run), run.preprocess
    pixels = torch.from_numpy(rng.integers(0, 256, (1, spec.height, spec.width, 3), dtype=np.uint8))

    def call() -> object:
        with torch.inference_mode():
            return model(pixels)

    yield call


def _warm_up(model: Callable[[], object]) -> None:
    start = perf_counter()
    model()
    while perf_counter() - start < _WARMUP_SECONDS:
        model()


def _milliseconds(model: Callable[[], object]) -> float:
    start = perf_counter()
    model()
    return (perf_counter() - start) * 1e3


# Table and plot


def _table(rows: Sequence[ComparedRun]) -> str:
    """Return aligned columns; those in which no run has a value are left out."""
    columns: list[tuple[str, Callable[[ComparedRun], str]]] = [
        ("model", lambda row: row.name),
        ("kind", lambda row: row.kind),
        ("backbone", lambda row: row.backbone),
        ("scored by", lambda row: row.scored_by),
        ("image AUROC (95 %)", lambda row: _with_interval(row.image_auroc, row.image_auroc_interval)),
        ("accuracy (95 %)", lambda row: _with_interval(row.accuracy, row.accuracy_interval)),
        ("pixel AUROC", lambda row: _digits(row.pixel_auroc)),
        ("AUPRO", lambda row: _digits(row.aupro)),
        ("false alarms", _alarms),
        ("MB", lambda row: f"{row.weight_bytes / 1e6:.1f}"),
        ("parameters", lambda row: "" if row.parameters is None else f"{row.parameters:,}"),
        ("p50 ms", lambda row: "" if row.latency_p50_ms is None else f"{row.latency_p50_ms:.1f}"),
        ("training s", lambda row: "" if row.training_seconds is None else f"{row.training_seconds:.0f}"),
    ]
    cells = [[name, *(cell(row) for row in rows)] for name, cell in columns]
    shown = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    lines = [
        "  ".join(
            column[line].ljust(width) if index < 4 else column[line].rjust(width)
            for index, (column, width) in enumerate(zip(shown, widths, strict=True))
        ).rstrip()
        for line in range(len(rows) + 1)
    ]
    if not _same_images(rows):
        lines.append("Not judged on the same images:")
        lines += [f"  {row.name}: {row.data}, {row.images} images" for row in rows]
    return "\n".join(lines)


def _same_images(rows: Sequence[ComparedRun]) -> bool:
    return len({(row.data, row.images) for row in rows}) == 1


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return _digits(value)
    return f"{value:.4f} ({interval[0]:.3f}-{interval[1]:.3f})"


def _alarms(row: ComparedRun) -> str:
    return "" if row.false_alarms is None else f"{row.false_alarms}/{row.good_images}"


def _bar(row: ComparedRun) -> plots.ComparedBar:
    return plots.ComparedBar(
        name=row.name,
        what="classifier" if row.image_auroc is None and row.accuracy is not None else "detector",
        quality=row.quality,
        interval=row.quality_interval,
        latency_ms=row.latency_p50_ms,
        megabytes=row.weight_bytes / 1e6,
    )
