"""The page of a training run: how it went, how good the model is, what it gets wrong, what it is made of.

A report is a folder with `index.html`, which fetches nothing and can be sent alone, and its figures as PNG files.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_anomaly_runtime.atomic import replace_file
from edge_anomaly_runtime.bundle import Thresholds
from edge_anomaly_runtime.images import load_image
from edge_anomaly_runtime.overlay import draw_overlay
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.scoring import verdict_of

from . import html, metrics, plots
from .architecture import StageRow
from .data import GOOD, UNSURE, Item
from .evaluate import maps_and_masks
from .gallery import Example, colour_scale, example_figures
from .histogram import histogram_section, kinds_in_order
from .prediction import Predictions
from .report import LIMITS_LEAD, defect_table, limits_list, measured_rate, methods_list, quality_tiles

INDEX = "index.html"

Floats = npt.NDArray[np.floating[Any]]
Pictures = Mapping[str, bytes]

_TSNE_LEAST = 8
_GALLERY_KINDS = 12
_SHOWN = 24  # right and wrong predictions each
_RANKS = ("worst", "median", "best")


def detector_report(
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    summary_rows: Sequence[StageRow],
    figures: dict[str, Any],
    items: Sequence[Item],
    predictions: Predictions,
    thresholds: Thresholds,
    preprocess: Preprocess,
    records: Sequence[plots.Record] = (),
    best: str | None = None,
    features: Floats | None = None,
) -> Path:
    """Write the page and the figures of a detector's run into `folder` and return the page.

    figures: what `evaluate_predictions` returns for these `items` and `predictions`. facts: name and value, as they are
    to be read. records: lines of metrics.jsonl, none for a detector that is not trained by epochs; best: the metric
    that chose the epoch. features: float [n, d], one vector per item, or None.

    Raises:
        ImageError: an image of the gallery cannot be read.
        OutputError, UsageError: the folder cannot be written.
    """
    labels = [item.label for item in items]
    pictures: dict[str, bytes] = {"scores.png": plots.score_histogram(predictions.scores, labels, thresholds)}
    if "image" in figures:
        pictures["roc.png"] = _roc(figures, labels, predictions, thresholds)
    if "pixel" in figures:
        pictures["pro.png"] = _pro(figures["pixel"], items, predictions, preprocess)
    ranked = _ranked_examples(items, predictions, thresholds, preprocess)
    examples = [(rank, example) for rank, several in ranked.items() for example in several]
    if examples:
        pictures["heat_maps.png"] = plots.heat_maps(
            [example for _, example in examples], [rank for rank, _ in examples]
        )
    pictures |= _training_pictures(records, best, features, labels, names_inside=False)
    histogram = histogram_section(predictions.scores, labels, thresholds, title="Scores of the test images")
    body = [
        html.header(title, html.escape(_counted(figures["images"]))),
        html.tiles(quality_tiles(figures)),
        html.section(*histogram),
        html.section("Figures", _figure_table(figures), _FIGURES_LEAD),
        html.section("By kind of defect", defect_table(figures)),
        html.section("What a limit costs and finds", _plot(pictures, "roc.png", "ROC curve"), _ROC_LEAD),
        html.section("How well defects are located", _plot(pictures, "pro.png", "Overlap curve"), _PRO_LEAD),
        *(_gallery(rank, several, thresholds) for rank, several in ranked.items()),
        html.section("Training", _plot(pictures, "training.png", "Training curves"), _training_words(records)),
        html.section("Features", _plot(pictures, "tsne.png", "t-SNE of the features"), _DETECTOR_TSNE_LEAD),
        html.section("Alarm limits", _limits(figures, thresholds), LIMITS_LEAD),
        html.section("Architecture", _architecture(summary_rows), _ARCHITECTURE_LEAD),
        html.section("Run", html.facts(facts)),
        html.section("Figures as files", _files(pictures)),
    ]
    return _write(folder, title, body, pictures)


def classifier_report(
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    summary_rows: Sequence[StageRow],
    figures: dict[str, Any],
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer[Any]],
    logits: Floats,
    records: Sequence[plots.Record] = (),
    best: str | None = "validation_accuracy",
    features: Floats | None = None,
) -> Path:
    """Write the page and the figures of a classifier's run into `folder` and return the page.

    figures: what `classification_figures` returns for these `labels`, int [n], and `logits`, float [n, K]. images:
    uint8 [n, H, W, 3]. The other arguments are those of `detector_report`.

    Raises:
        OutputError, UsageError: the folder cannot be written.
    """
    classes = list(figures["classes"])
    names = [classes[label] for label in labels]
    pictures = {"confusion.png": plots.confusion_plot(np.array(figures["confusion"]), classes)}
    pictures |= _prediction_pictures(images, labels, logits, classes)
    pictures |= _training_pictures(records, best, features, names, names_inside=True)
    body = [
        html.header(title, f"{figures['images']} test images, {len(classes)} classes"),
        html.tiles(_classifier_tiles(figures)),
        html.section("Training", _plot(pictures, "training.png", "Training curves"), _training_words(records)),
        html.section("What is taken for what", _plot(pictures, "confusion.png", "Confusion matrix"), _CONFUSION_LEAD),
        html.section("Most confused", _confused_table(figures)),
        html.section("By class", _class_table(figures)),
        html.section("Wrong", _plot(pictures, "wrong.png", "Wrong predictions"), _WRONG_LEAD),
        html.section("Right", _plot(pictures, "right.png", "Right predictions"), _RIGHT_LEAD),
        html.section("Features", _plot(pictures, "tsne.png", "t-SNE of the features"), _CLASSIFIER_TSNE_LEAD),
        html.section("Architecture", _architecture(summary_rows), _ARCHITECTURE_LEAD),
        html.section("Run", html.facts(facts)),
        html.section("Figures as files", _files(pictures)),
    ]
    return _write(folder, title, body, pictures)


def _write(folder: Path, title: str, body: Sequence[str], pictures: Pictures) -> Path:
    """Write the pictures, then the page, so that a page that is there is complete."""
    for name, data in pictures.items():
        replace_file(folder / name, data)
    replace_file(folder / INDEX, html.page(title, body).encode())
    return folder / INDEX


# Both


def _plot(pictures: Pictures, name: str, alt: str) -> str:
    """Return a figure inside the page, or nothing where it was not drawn."""
    if name not in pictures:
        return ""
    data = base64.b64encode(pictures[name]).decode()
    return f'<div class="plot"><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"></div>'


def _files(pictures: Pictures) -> str:
    links = " · ".join(f'<a href="{name}">{name}</a>' for name in pictures)
    return f"<p>{links}</p>"


def _training_pictures(
    records: Sequence[plots.Record],
    best: str | None,
    features: Floats | None,
    labels: Sequence[str],
    *,
    names_inside: bool,
) -> dict[str, bytes]:
    """Return training curves and t-SNE, where there is something to draw."""
    pictures = {"training.png": plots.training_curves(records, best=best)} if records else {}
    if features is not None and len(features) >= _TSNE_LEAST and np.ptp(features, axis=0).any():
        pictures["tsne.png"] = plots.tsne_plot(features, labels, names_inside=names_inside)
    return pictures


def _training_words(records: Sequence[plots.Record]) -> str:
    """Say how many epochs there were and how long they took."""
    seconds = sum(record.get("seconds") or 0.0 for record in records)
    epochs = f"{len(records)} epoch{'s' if len(records) != 1 else ''}"
    return f"{epochs}, {_duration(seconds)} without the tests after each." if seconds else f"{epochs}."


def _duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _architecture(rows: Sequence[StageRow]) -> str:
    """Return the table of stages with a line of totals, or nothing without rows."""
    if not rows:
        return ""
    head = ["Stage", "Output for one image", "Parameters", "Trained", "Size"]
    cells = [
        [
            html.escape(row.name),
            html.escape(row.output_text) or "–",
            f"{row.parameters:,}",
            f"{row.trainable:,}",
            _size(row.bytes),
        ]
        for row in rows
    ]
    total = [
        "<b>Total</b>",
        "",
        f"<b>{sum(row.parameters for row in rows):,}</b>",
        f"<b>{sum(row.trainable for row in rows):,}</b>",
        f"<b>{_size(sum(row.bytes for row in rows))}</b>",
    ]
    return html.table(head, [*cells, total])


def _size(size: int) -> str:
    if size < 1000:
        return f"{size}{html.NBSP}B"
    return html.megabytes(size) if size >= 50_000 else f"{size / 1e3:.1f}{html.NBSP}kB"


# Detector


def _counted(images: Mapping[str, int]) -> str:
    """Return the numbers of test images, such as '80 test images: 60 good, 20 hole'."""
    kinds = kinds_in_order(np.array(list(images), dtype=np.str_))
    return f"{sum(images.values())} test images: {', '.join(f'{images[kind]} {kind}' for kind in kinds)}"


def _figure_table(figures: dict[str, Any]) -> str:
    """Return all figures over images and pixels with their intervals."""
    image, pixel = figures.get("image", {}), figures.get("pixel", {})
    rows = [
        _figure_row("Image AUROC", image, "auroc"),
        _figure_row("Image average precision", image, "average_precision"),
        _figure_row("F1 at the NG limit", image, "f1"),
        _figure_row("Defective images found at the NG limit", image, "found"),
        _figure_row("Pixel AUROC", pixel, "auroc"),
        _figure_row(f"AUPRO up to 30{html.NBSP}% false pixels", pixel, "aupro"),
    ]
    distinct = ["Distinct scores", html.percent(figures["distinct_scores"]), ""]
    return html.table(["Figure", "Value", f"95{html.NBSP}% interval"], [*(row for row in rows if row), distinct])


def _figure_row(name: str, figures: Mapping[str, Any], key: str) -> list[str]:
    """Return the cells of one figure, or nothing where it is not known."""
    if key not in figures:
        return []
    interval = figures.get(f"{key}_interval")
    between = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
    return [name, f"{figures[key]:.4f}", between]


def _roc(figures: dict[str, Any], labels: Sequence[str], predictions: Predictions, thresholds: Thresholds) -> bytes:
    names = np.array(labels)
    known = names != UNSURE
    low, high = figures["image"]["auroc_interval"]
    return plots.roc_plot(predictions.scores[known], (names != GOOD)[known], thresholds, interval=(low, high))


def _pro(pixel: dict[str, Any], items: Sequence[Item], predictions: Predictions, spec: Preprocess) -> bytes:
    fpr, overlap = metrics.pro_curve(*maps_and_masks(items, predictions, spec))
    low, high = pixel["aupro_interval"]
    return plots.pro_plot(fpr, overlap, pixel["aupro"], interval=(low, high))


def _ranked_examples(
    items: Sequence[Item], predictions: Predictions, thresholds: Thresholds, spec: Preprocess
) -> dict[str, list[Example]]:
    """Return, for worst, median and best, one example of each kind of image, at most twelve kinds.

    The best good image has the lowest score, the best defective one the highest.
    """
    labels = np.array([item.label for item in items])
    ranked: dict[str, list[Example]] = {rank: [] for rank in _RANKS}
    for kind in [kind for kind in kinds_in_order(labels) if kind != UNSURE][:_GALLERY_KINDS]:
        rows = np.flatnonzero(labels == kind)
        rising = rows[np.argsort(predictions.scores[rows], kind="stable")]
        from_worst = rising[::-1] if kind == GOOD else rising
        for rank, place in zip(_RANKS, (0, len(rows) // 2, len(rows) - 1), strict=True):
            index = int(from_worst[place])
            example = _example(items[index], predictions, index, thresholds, spec)
            if example.name not in {other.name for several in ranked.values() for other in several}:
                ranked[rank].append(example)
    return {rank: examples for rank, examples in ranked.items() if examples}


def _example(item: Item, predictions: Predictions, index: int, thresholds: Thresholds, spec: Preprocess) -> Example:
    picture, score = load_image(item.path), float(predictions.scores[index])
    overlay = draw_overlay(picture, predictions.maps[index], spec, thresholds.pixel.value)
    mask = None
    if item.mask is not None:
        with Image.open(item.mask) as file:
            mask = file.convert("L")
    name = f"{item.label}/{item.path.name}"
    return Example(name, item.label, verdict_of(score, thresholds), score, picture, overlay, mask)


def _gallery(rank: str, examples: Sequence[Example], thresholds: Thresholds) -> str:
    scale = colour_scale(thresholds.pixel) if rank == "best" else ""
    return html.section(f"Heat maps: {rank}", example_figures(examples, thresholds) + scale, _GALLERY_LEADS[rank])


def _limits(figures: dict[str, Any], thresholds: Thresholds) -> str:
    measured = {name: measured_rate(row) for name, row in figures["false_alarms"].items()}
    return limits_list(thresholds, measured) + methods_list([thresholds])


# Classifier


def _classifier_tiles(figures: dict[str, Any]) -> list[html.Tile]:
    low, high = figures["accuracy_interval"]
    interval = f"95{html.NBSP}% interval {html.percent(low, 2)} to {html.percent(high, 2)}"
    tiles = [html.Tile("Accuracy", html.percent(figures["accuracy"], 2), interval)]
    if figures["top5"] is not None:
        tiles.append(html.Tile("Top-5", html.percent(figures["top5"], 2), "the true class is among the five likeliest"))
    tiles.append(html.Tile("Macro F1", f"{figures['macro']['f1']:.4f}", "mean over the classes"))
    wrong = round(figures["images"] * (1 - figures["accuracy"]))
    tiles.append(html.Tile("Wrong", str(wrong), f"of {figures['images']} test images"))
    return tiles


def _class_table(figures: dict[str, Any]) -> str:
    rows = [
        [
            html.escape(name),
            str(row["images"]),
            f"{row['precision']:.4f}",
            f"{row['recall']:.4f}",
            f"{row['f1']:.4f}",
        ]
        for name, row in figures["classes"].items()
    ]
    macro = figures["macro"]
    mean = [
        "<b>Mean</b>",
        str(figures["images"]),
        *(f"<b>{macro[name]:.4f}</b>" for name in ("precision", "recall", "f1")),
    ]
    return html.table(["Class", "Images", "Precision", "Recall", "F1"], [*rows, mean])


def _confused_table(figures: dict[str, Any]) -> str:
    rows = [
        [
            f"{html.escape(row['true'])} → {html.escape(row['predicted'])}",
            str(row["count"]),
            html.percent(row["share"]),
        ]
        for row in figures["most_confused"]
    ]
    if not rows:
        return "<p>Nothing was confused.</p>"
    return html.table(["True class → predicted class", "Images", "Of the true class"], rows)


def _prediction_pictures(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer[Any]], logits: Floats, classes: Sequence[str]
) -> dict[str, bytes]:
    """Return the surest mistakes, and of the right predictions the same number from each class."""
    predicted, sureness = logits.argmax(axis=1), _sureness(logits)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-sureness[wrong], kind="stable")][:_SHOWN]
    chosen = {"wrong.png": surest, "right.png": _evenly(np.flatnonzero(predicted == labels), labels)}
    pictures = {}
    for name, rows in chosen.items():
        if len(rows):
            captions = [_caption(classes, int(labels[row]), int(predicted[row]), float(sureness[row])) for row in rows]
            shown = [images[row] for row in rows]
            pictures[name] = plots.pictures_grid(shown, captions, [name == "right.png"] * len(rows))
    return pictures


def _sureness(logits: Floats) -> npt.NDArray[np.float64]:
    """Return the softmax probability of the predicted class, float64 [n]."""
    shifted = np.asarray(logits, dtype=np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(1.0 / np.exp(shifted).sum(axis=1))


def _evenly(rows: npt.NDArray[np.intp], labels: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.intp]:
    """Return the first rows of each class, class after class, as many as are shown."""
    turn = np.empty(len(rows), dtype=np.intp)
    for label in np.unique(labels[rows]):
        own = labels[rows] == label
        turn[own] = np.arange(own.sum())
    chosen = rows[np.lexsort((labels[rows], turn))][:_SHOWN]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def _caption(classes: Sequence[str], true: int, predicted: int, sureness: float) -> str:
    """Return two short lines: what it is, what it was taken for and how surely."""
    sure = html.percent(sureness, 0)
    if true == predicted:
        return f"{_brief(classes[true])}\n{sure}"
    return f"{_brief(classes[true])}\n→ {_brief(classes[predicted])} {sure}"


def _brief(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "…"


_FIGURES_LEAD = (
    "Intervals over whole images by bootstrap, of shares exact (Clopper-Pearson). Equal scores count as ties."
)
_ROC_LEAD = "Each point of the curve is a possible limit. Marked are the two that the model carries."
_PRO_LEAD = (
    "Every marked region weighs the same, however large it is. The area is taken where false pixels are few enough to "
    "be of use."
)
_DETECTOR_TSNE_LEAD = (
    "Every test image as a point. Defects that lie among the good images here look alike to the backbone."
)
_CLASSIFIER_TSNE_LEAD = "Every test image as a point: its pooled features, of which the last layer makes the classes."
_ARCHITECTURE_LEAD = (
    "Parameters are what an optimizer could change; what training did change is in the column Trained. The size holds "
    "statistics and banks, too."
)
_CONFUSION_LEAD = "Rows add up to the images of a class. A dark orange cell is a mistake that the model makes often."
_WRONG_LEAD = "True class → predicted class and its probability; the surest mistakes first."
_RIGHT_LEAD = "Of each class the first ones in the test set, with the probability of the class."
_GALLERY_LEADS = {
    "worst": "Of each kind the image that is judged worst: the highest score among the good ones, the lowest among the "
    "defective ones.",
    "median": "Of each kind the image in the middle: what to expect.",
    "best": "Of each kind the clearest image.",
}
