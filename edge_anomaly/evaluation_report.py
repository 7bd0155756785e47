"""`evaluate --report`: gathers what is known of a run or a bundle for its page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.scoring import open_scorer

from .architecture import architecture_summary
from .classifier import ClassData, LabeledImages, classification_figures, open_class_data, predict
from .data import Item
from .detectors import DETECTORS
from .evaluate import Judge
from .prediction import Predictions, batched, read_pixels
from .run_report import classifier_report, detector_report
from .runs import RECORD, load_model, load_run
from .train_classifier import load_classifier
from .training import METRICS


def report_detector(
    path: Path,
    folder: Path,
    judge: Judge,
    items: Sequence[Item],
    predictions: Predictions,
    figures: dict[str, Any],
) -> Path:
    """Write the page about a run or a bundle into `folder` and return it; only a run knows its architecture."""
    facts: dict[str, object] = {"scored by": judge.name, "images": len(items)}
    rows, records, features, best = [], [], None, None
    if (path / RECORD).exists():
        run = load_run(path)
        model = load_model(run)
        facts |= {"model": run.kind, **vars(run.config), "weights": run.weights, "trained in": f"{run.seconds:g} s"}
        rows = architecture_summary(model, run.preprocess.height, run.preprocess.width)
        records = training_records(path)
        _, pixels = read_pixels([item.path for item in items], run.preprocess, strict=False, what="features")
        features = image_features(model, pixels, predictions.maps)
        best = DETECTORS[run.kind].best
    page = detector_report(
        folder,
        title=path.name,
        facts=facts,
        summary_rows=rows,
        figures=figures,
        items=items,
        predictions=predictions,
        thresholds=judge.thresholds,
        preprocess=judge.spec,
        records=records,
        best=best,
        features=features,
    )
    say(f"report: {page}")
    return page


def evaluate_classifier(path: Path, data: str | None, *, report: Path | None, strict: bool) -> dict[str, Any]:
    """Judge the labelled test pictures of `data` (default: the run's own) and return the figures, ready for JSON.

    Raises:
        UsageError: the data has no test set, or other classes than the model.
    """
    run, model = load_classifier(path)
    source = data or run.source
    images = open_class_data(
        source, run.preprocess, validation_share=run.validation, seed=run.config.seed, strict=strict
    )
    test = _test_pictures(images, run.config.classes, source)
    logits, features = predict(model, test)
    labels = test.labels.numpy()
    figures = classification_figures(logits.numpy(), labels, images.classes)
    if report is not None:
        facts = {"model": f"ResNet-{run.config.depth}", **run.data, "trained in": f"{run.seconds:g} s"}
        page = classifier_report(
            report,
            title=path.name,
            facts=facts,
            summary_rows=architecture_summary(model, run.config.image_size, run.config.image_size),
            figures=figures,
            images=test.pixels.numpy(),
            labels=labels,
            logits=logits.numpy().astype(np.float64),
            records=training_records(path),
            features=features.numpy().astype(np.float64),
        )
        say(f"report: {page}")
    return figures


def evaluate_classifier_bundle(
    path: Path, data: str | None, *, engine: str, precision: str, report: Path | None, strict: bool
) -> dict[str, Any]:
    """Judge the labelled test pictures of `data` with a classifier's bundle; `scored_by` says on what.

    Raises:
        UsageError: there is no data, it has no test set, or it has other classes than the model.
    """
    if data is None:
        raise UsageError("There is nothing to judge.", "Give pictures with --data: train/CLASS and test/CLASS.")
    with open_scorer(path, engine=engine, precision=precision) as scorer:
        manifest = scorer.bundle.manifest
        images = open_class_data(data, manifest.input.preprocess, seed=manifest.seed, strict=strict)
        test = _test_pictures(images, scorer.classes, data)
        pixels = test.pixels.numpy()
        rows = [scorer.session.run(image[np.newaxis])["logits"] for image in track(pixels, "scoring", len(pixels))]
        facts = {"scored by": f"{scorer.engine} {scorer.precision}", **manifest.training}
    logits, labels = np.concatenate(rows), test.labels.numpy()
    figures = {"scored_by": facts["scored by"], **classification_figures(logits, labels, images.classes)}
    if report is not None:
        page = classifier_report(
            report,
            title=path.name,
            facts=facts,
            summary_rows=[],
            figures=figures,
            images=pixels,
            labels=labels,
            logits=logits.astype(np.float64),
        )
        say(f"report: {page}")
    return figures


def _test_pictures(images: ClassData, classes: tuple[str, ...], source: str) -> LabeledImages:
    if images.test is None:
        raise UsageError(f"{source} has no test pictures.", "Give a folder with train/CLASS and test/CLASS.")
    if images.classes != classes:
        raise UsageError(
            f"{source} has the classes {', '.join(images.classes)}; the model has {', '.join(classes)}.",
            "Give pictures of the model's classes.",
        )
    return images.test


def training_records(path: Path) -> list[dict[str, float]]:
    """Return the epochs of all phases of a run's training in order, counted through; empty where there were none."""
    files = sorted(path.rglob(METRICS), key=lambda file: file.stat().st_mtime)
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{**record, "epoch": index} for index, record in enumerate(records, start=1)]


def image_features(
    model: nn.Module, pixels: npt.NDArray[np.uint8], maps: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return one vector per image, float64 [n, d]: the backbone's outputs where the anomaly map is highest.

    Not their mean over all places: a defect fills a few of hundreds, and the mean hides what kind it is.
    `maps`: anomaly maps [n, h, w] of these images.
    """
    backbone = model.get_submodule("backbone")
    places = maps.reshape(len(maps), -1).argmax(axis=1)
    rows, start = [], 0
    for batch in batched(pixels):
        with torch.inference_mode():
            tensors = list(_tensors(backbone(torch.from_numpy(batch))))
        hottest = torch.from_numpy(places[start : start + len(batch)])
        rows.append(torch.cat([_at(tensor, hottest, maps.shape[1:]) for tensor in tensors], dim=1))
        start += len(batch)
    return np.asarray(torch.cat(rows).numpy(), dtype=np.float64)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
        return
    for part in output:
        yield from _tensors(part)


def _at(tensor: torch.Tensor, places: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Return [N, C] of features [N, C, h, w], or of tokens [N, h w, C], at flat indices [N] into the map's grid."""
    images = torch.arange(len(tensor))
    if tensor.dim() == 3:
        return tensor[images, places]
    height, width = tensor.shape[-2:]
    rows = (places // grid[1] * 2 + 1) * height // (2 * grid[0])
    columns = (places % grid[1] * 2 + 1) * width // (2 * grid[1])
    return tensor[images, :, rows, columns]
