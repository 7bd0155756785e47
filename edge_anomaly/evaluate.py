"""`evaluate`: how well a detector judges labelled images, and whether its thresholds keep their promise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_anomaly_runtime.bundle import Threshold, Thresholds
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.preprocess import Preprocess, preprocess
from edge_anomaly_runtime.scoring import open_scorer

from . import metrics
from .data import GOOD, UNSURE, Item
from .prediction import Predictions, ScoreFunction, predict, read_pixels, session_scores, torch_scores
from .runs import RECORD, load_model, load_run

SCHEMA = "edge-anomaly.evaluation/1"

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Judge:
    """Whatever scores images: a bundle on an engine, or the trained torch model, with its own thresholds.

    `seed` is the training's: it chose which images of a named data set were learnt from.
    """

    name: str
    score: ScoreFunction
    spec: Preprocess
    thresholds: Thresholds
    seed: int


@contextlib.contextmanager
def open_judge(path: Path, *, engine: str = "auto", precision: str = "auto") -> Iterator[Judge]:
    """Open a bundle, or a run folder, whose torch model then does the scoring.

    Raises:
        UsageError, ArtefactError, MissingRequirementError: as `open_scorer` and `load_run`.
    """
    if (path / RECORD).exists():
        run = load_run(path)
        yield Judge("torch fp32", torch_scores(load_model(run)), run.preprocess, run.thresholds, run.seed)
        return
    with open_scorer(path, engine=engine, precision=precision) as scorer:
        manifest, name = scorer.bundle.manifest, f"{scorer.engine} {scorer.precision}"
        score = session_scores(scorer.session)
        yield Judge(name, score, manifest.input.preprocess, scorer.thresholds, manifest.seed)


def evaluate_items(
    judge: Judge, items: Sequence[Item], *, strict: bool = False
) -> tuple[dict[str, Any], list[Item], Predictions]:
    """Score labelled images and return the JSON-ready figures, the items that could be read, and their predictions.

    Raises:
        UsageError: there are no labelled images, or none of them can be read.
    """
    if not items:
        raise UsageError("There are no labelled test images.", "Give a data set with test/good and test/<defect>.")
    by_path = {item.path: item for item in items}
    paths, pixels = read_pixels(list(by_path), judge.spec, strict=strict, what="reading")
    readable = [by_path[path] for path in paths]
    predictions = predict(judge.score, pixels, what="scoring", total=len(pixels))
    figures = evaluate_predictions(readable, predictions, judge.spec, judge.thresholds)
    return {**figures, "scored_by": judge.name, "skipped": len(by_path) - len(readable)}, readable, predictions


def evaluate_predictions(
    items: Sequence[Item], predictions: Predictions, spec: Preprocess, thresholds: Thresholds
) -> dict[str, Any]:
    """Return image and pixel figures; images labelled `unsure` are reported apart and count nowhere else."""
    labels = np.array([item.label for item in items])
    known = labels != UNSURE
    defective = (labels != GOOD)[known]
    scores = predictions.scores[known]
    figures: dict[str, Any] = {
        "schema": SCHEMA,
        "images": {str(label): int((labels == label).sum()) for label in np.unique(labels)},
        "distinct_scores": metrics.distinct_share(scores),
        "false_alarms": {
            name: false_alarms(scores[~defective], limit)
            for name, limit in (("fail", thresholds.fail), ("warn", thresholds.warn))
        },
    }
    if 0 < defective.sum() < defective.size:
        figures["image"] = _image_figures(scores, defective, thresholds)
        figures["defects"] = _defect_figures(labels, predictions.scores, thresholds)
    if (labels == UNSURE).any():
        unsure = predictions.scores[labels == UNSURE]
        figures["unsure"] = {"images": unsure.size, "flagged": float((unsure > thresholds.fail.value).mean())}
    pixel = _pixel_figures(items, predictions, spec)
    return {**figures, "pixel": pixel} if pixel else figures


def false_alarms(normal_scores: npt.NDArray[np.float64], limit: Threshold) -> dict[str, Any]:
    """Compare the rate measured on unseen normal images with the promised one and its 95 % bound."""
    n, alarms = normal_scores.size, int((normal_scores > limit.value).sum())
    if not n:
        return {"images": 0, "alarms": 0, "promised": limit.alpha, "bound": limit.upper95}
    low, high = metrics.binomial_interval(alarms, n)
    return {
        "images": n,
        "alarms": alarms,
        "rate": alarms / n,
        "rate_interval": [low, high],
        "promised": limit.alpha,
        "bound": limit.upper95,
        "inside_bound": alarms / n <= limit.upper95,
    }


def _image_figures(scores: npt.NDArray[np.float64], defective: Mask, thresholds: Thresholds) -> dict[str, Any]:
    limit = thresholds.fail.value

    def f1(values: npt.NDArray[np.float64], truth: Mask) -> float:
        return metrics.f1_at(values, truth, limit)

    return {
        **_ranking_figures(scores, defective),
        "f1": f1(scores, defective),
        "f1_interval": list(metrics.bootstrap_interval(f1, scores, defective)),
        **_found(scores[defective], limit),
    }


def _ranking_figures(scores: npt.NDArray[np.float64], defective: Mask) -> dict[str, Any]:
    """Return the figures that need no threshold, each with its 95 % bootstrap interval."""
    figures: dict[str, Any] = {}
    for name, statistic in (("auroc", metrics.auroc), ("average_precision", metrics.average_precision)):
        figures[name] = statistic(scores, defective)
        figures[f"{name}_interval"] = list(metrics.bootstrap_interval(statistic, scores, defective))
    return figures


def _found(defective_scores: npt.NDArray[np.float64], limit: float) -> dict[str, Any]:
    """Return the share of defective images above the limit with its exact 95 % interval."""
    hits = int((defective_scores > limit).sum())
    interval = metrics.binomial_interval(hits, defective_scores.size)
    return {"found": hits / defective_scores.size, "found_interval": list(interval)}


def _defect_figures(
    labels: npt.NDArray[np.str_], scores: npt.NDArray[np.float64], thresholds: Thresholds
) -> dict[str, Any]:
    good = scores[labels == GOOD]
    rows = {}
    for label in np.unique(labels[(labels != GOOD) & (labels != UNSURE)]):
        bad = scores[labels == label]
        both, truth = np.concatenate([good, bad]), np.repeat([False, True], [good.size, bad.size])
        rows[str(label)] = {
            "images": int(bad.size),
            **_ranking_figures(both, truth),
            **_found(bad, thresholds.fail.value),
        }
    return rows


def _pixel_figures(items: Sequence[Item], predictions: Predictions, spec: Preprocess) -> dict[str, Any]:
    """Pixel figures at the model's input size, over good images and those with a mask; empty without masks."""
    maps, masks = maps_and_masks(items, predictions, spec)
    if not maps:
        return {}
    intervals = metrics.pixel_intervals(maps, masks)
    return {
        "auroc": metrics.pixel_auroc(maps, masks),
        "auroc_interval": list(intervals["auroc"]),
        "aupro": metrics.aupro(maps, masks),
        "aupro_interval": list(intervals["aupro"]),
    }


def maps_and_masks(
    items: Sequence[Item], predictions: Predictions, spec: Preprocess
) -> tuple[list[npt.NDArray[np.float32]], list[Mask]]:
    """Return maps and masks, bool [height, width] of the model's input, of all good images and those with a mask.

    Both are empty where no image has a mask.
    """
    chosen = [index for index, item in enumerate(items) if item.label == GOOD or item.mask is not None]
    if not any(items[index].mask for index in chosen):
        return [], []
    return [predictions.maps[index] for index in chosen], [_read_mask(items[index].mask, spec) for index in chosen]


def _read_mask(path: Path | None, spec: Preprocess) -> Mask:
    if path is None:
        return np.zeros((spec.height, spec.width), dtype=np.bool_)
    with Image.open(path) as file:
        mask = preprocess(file.convert("L"), spec, resample=Image.Resampling.NEAREST)
    return np.asarray(mask > 127)
