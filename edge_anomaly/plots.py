"""Figures of a run as PNG: arrays in, bytes out, the same bytes for the same arrays.

Every figure is 1280 pixels wide and made to be read at 800. Blue and orange carry the meaning (good and defective,
training and validation), shapes, lines and words repeat it, and nothing rests on telling red from green.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from edge_anomaly_runtime.bundle import Thresholds
from edge_anomaly_runtime.errors import UsageError

from . import metrics
from .data import GOOD, UNSURE
from .gallery import Example, marked
from .histogram import bin_counts, kinds_in_order, score_axis
from .html import NBSP, percent

Record = Mapping[str, float | None]
Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]

BLUE, ORANGE, GREY, OCHRE, RED, INK = "#2368b0", "#c2500c", "#6b7785", "#9a6700", "#b4123f", "#17212b"
# Okabe & Ito 2008 without blue, which is the good images'; with markers, 7 x 9 kinds stay apart.
_KINDS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_MARKERS = "s^Dv<>Pph"

_WIDTH, _DPI = 8.0, 160
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e9ee",
    "text.color": INK,
    "text.parse_math": False,  # a class may be called a$b$
    "xtick.color": "#46525e",
    "ytick.color": "#46525e",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}

# Of a training's record, what is not a curve.
_OTHER_LINES = (("#009e73", "-."), ("#cc79a7", ":"))
_NOT_CURVES = {"epoch", "seconds", "images_per_second"}
# Longest first, because "validation_" also begins with "val".
_HELD_OUT_PREFIXES = ("validation_", "held_out_", "val_", "test_")
_OTHER_PREFIXES = ("normal_", "synthetic_")
_ACRONYMS = {"auroc", "aupro", "nll", "ssim", "mse", "ema", "l1", "l2", "kl"}
_LOG_RATIO = 30.0  # a loss that falls by more than this is shown on a logarithmic axis

TSNE_CAP = 1000
_TSNE_LEAST = 8
_PCA_DIMS = 50
_LEGEND_ROWS = 20
_CURVE_POINTS = 4000
_COUNTED_CLASSES = 20  # larger confusion matrices have no room for numbers
_NAMED_CLASSES = 60
_FAINT = 0.05  # mistakes that are rarer than this are never dark


# Training


def training_curves(records: Sequence[Record], *, best: str | None = None) -> bytes:
    """Return the curves of a training, one panel per quantity: loss, accuracy, what else was logged, learning rate.

    `records`: lines of metrics.jsonl, one per epoch, with `epoch` and any numbers; None is a gap. What was measured on
    held-out images (`validation_`, `val_`, `held_out_`, `test_` before the name) shares the panel of the same quantity
    on training images (no prefix, or `train_`), and the distance between the two is shaded and given in words.
    `best`: the metric that chose the model; its highest epoch is marked.
    Raises UsageError when there is no epoch.
    """
    if not records:
        raise UsageError("There are no training records to draw.", "Give one record per epoch.")
    epochs = np.array([_number(record.get("epoch")) for record in records])
    panels = _panels(records)
    chosen = _chosen_epoch(records, best)
    rows = -(-len(panels) // 2)
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.75 * rows), layout="constrained")
        grid = figure.add_gridspec(rows, 2)
        for index, (quantity, series) in enumerate(panels.items()):
            alone = index % 2 == 0 and index == len(panels) - 1
            axes = figure.add_subplot(grid[index // 2, :] if alone else grid[index // 2, index % 2])
            _draw_panel(axes, quantity, series, epochs)
            _draw_gap(axes, quantity, series, epochs, len(epochs) - 1 if chosen is None else chosen)
            if chosen is not None:
                axes.axvline(epochs[chosen], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if chosen is not None:
            figure.supxlabel(f"dashed: the epoch that was kept, {epochs[chosen]:g}", fontsize=9, color=GREY)
        return _png(figure)


def _panels(records: Sequence[Record]) -> dict[str, dict[str, Floats]]:
    """Return the series by quantity and name, in the order loss, accuracy, others, learning rates."""
    names = dict.fromkeys(name for record in records for name in record if name not in _NOT_CURVES)
    curves = {name: np.array([_number(record.get(name)) for record in records]) for name in names}
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    panels: dict[str, dict[str, Floats]] = {}
    for name, values in curves.items():
        panels.setdefault(_quantity(name, curves), {})[name] = values
    return dict(sorted(panels.items(), key=lambda panel: _panel_order(panel[0])))


def _panel_order(quantity: str) -> int:
    return {"loss": 0, "accuracy": 1, "lr": 3}.get(quantity, 2)


def _quantity(name: str, curves: Mapping[str, Floats]) -> str:
    """Return the panel of a series: what it measures on training images where that is logged too, else its own name."""
    if name.startswith("lr_"):
        return "lr"
    for prefix in (*_HELD_OUT_PREFIXES, *_OTHER_PREFIXES):
        base = name.removeprefix(prefix)
        if base != name and (base in curves or f"train_{base}" in curves):
            return base
    return name.removeprefix("train_")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _chosen_epoch(records: Sequence[Record], best: str | None) -> int | None:
    """Return the index of the first epoch with the highest `best`."""
    values = np.array([_number(record.get(best)) for record in records]) if best else np.empty(0)
    return int(np.nanargmax(values)) if np.isfinite(values).any() else None


def _draw_panel(axes: Axes, quantity: str, series: Mapping[str, Floats], epochs: Floats) -> None:
    marker = "o" if len(epochs) <= 12 else ""
    others = iter(_OTHER_LINES * len(series))
    for name, values in series.items():
        if quantity == "lr":
            color, style = GREY, "-" if name == "lr" else ":"
        elif name.startswith(_HELD_OUT_PREFIXES):
            color, style = ORANGE, "--"
        else:
            color, style = (BLUE, "-") if name in (quantity, f"train_{quantity}") else next(others)
        axes.plot(epochs, values, color=color, linestyle=style, marker=marker, markersize=3.5, label=_words(name))
    axes.set_title(_words(quantity)[0].upper() + _words(quantity)[1:])
    axes.set_ylabel(
        {"loss": "mean over the epoch", "accuracy": "share of images", "lr": "step size"}.get(
            quantity, _words(quantity)
        )
    )
    if quantity.endswith("accuracy"):
        axes.yaxis.set_major_formatter(_shares())
    elif quantity == "lr" and not _falls_far(series):
        axes.set_ylim(0, 1.08 * max(float(np.nanmax(values)) for values in series.values()))
    elif _falls_far(series):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(series) > 1:
        axes.legend(loc="best")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)


def _draw_gap(axes: Axes, quantity: str, series: Mapping[str, Floats], epochs: Floats, at: int) -> None:
    """Shade what lies between training and held-out images, and say how much it is at the epoch of index `at`."""
    held_out = [values for name, values in series.items() if name.startswith(_HELD_OUT_PREFIXES)]
    training = [values for name, values in series.items() if name in (quantity, f"train_{quantity}")]
    if quantity == "lr" or len(held_out) != 1 or len(training) != 1:
        return
    axes.fill_between(epochs, training[0], held_out[0], color=GREY, alpha=0.15, linewidth=0)
    gap = training[0][at] - held_out[0][at]
    if math.isfinite(gap):
        size = f"{100 * gap:+.1f} points" if quantity.endswith("accuracy") else f"{gap:+.3g}"
        text = f"gap {size} in epoch {epochs[at]:g}".replace("-", "−")
        axes.set_title(text, loc="right", color=GREY, fontsize=9, fontweight="normal")


def _falls_far(series: Mapping[str, Floats]) -> bool:
    values = np.concatenate([values[np.isfinite(values)] for values in series.values()])
    return bool(values.min() > 0 and values.max() / values.min() > _LOG_RATIO)


def _words(name: str) -> str:
    """Return the name of a metric as people write it."""
    words = {"lr": "learning rate"}.get(name, name.replace("lr_", "learning rate, group ")).split("_")
    return " ".join(word.upper() if word in _ACRONYMS else word for word in words)


# Scores


def score_histogram(scores: Floats, labels: Sequence[str], thresholds: Thresholds) -> bytes:
    """Return the scores of all kinds of images, a row of bars each, with the WARN and NG limits through all rows.

    `scores` float [n], finite, `labels` of length n; good comes first, `unsure` last, each row with its own scale.
    An edge of the bars lies exactly at the NG limit. Raises UsageError when there is no score.
    """
    values, names = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.str_)
    if not values.size or not np.isfinite(values).all():
        raise UsageError(f"{values.size} scores cannot be drawn.", "Give at least one score, all of them finite.")
    axis, kinds = score_axis(values, thresholds), kinds_in_order(names)
    warn, fail = thresholds.warn.value, thresholds.fail.value
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.15 + 0.95 * len(kinds)), layout="constrained")
        rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        for axes, kind in zip(rows, kinds, strict=True):
            chosen = values[names == kind]
            axes.axvspan(warn, fail, color=OCHRE, alpha=0.08, linewidth=0)
            axes.axvspan(fail, axis.edges[-1], color=RED, alpha=0.06, linewidth=0)
            color = {GOOD: BLUE, UNSURE: GREY}.get(kind, ORANGE)
            axes.bar(
                axis.edges[:-1],
                bin_counts(chosen, axis.edges),
                np.diff(axis.edges),
                align="edge",
                color=color,
                edgecolor="white",
                linewidth=0.6,
            )
            axes.axvline(warn, color=OCHRE, linewidth=1.3, linestyle=(0, (4, 3)))
            axes.axvline(fail, color=RED, linewidth=1.5)
            axes.set_title(f"{kind}: {chosen.size} images")
            axes.set_title(f"{int((chosen > fail).sum())} NG", loc="right", fontweight="normal")
            axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
            axes.grid(visible=False, axis="x")
            axes.set_xlim(axis.edges[0], axis.edges[-1])
        if axis.logarithmic:
            rows[-1].set_xscale("log")
            rows[-1].set_xticks(axis.ticks(), [f"{tick:g}" for tick in axis.ticks()])
            rows[-1].minorticks_off()
        scale = ", logarithmic scale" if axis.logarithmic else ""
        rows[-1].set_xlabel(f"anomaly score{scale}; dashed: WARN above {warn:.4g}, solid: NG above {fail:.4g}")
        figure.supylabel("images", fontsize=9.5)
        return _png(figure)


def roc_plot(
    scores: Floats,
    defective: npt.NDArray[np.bool_],
    thresholds: Thresholds,
    *,
    interval: tuple[float, float] | None = None,
) -> bytes:
    """Return the ROC curve with the deployed limits marked, whole and at its left edge, where factories work.

    `scores` float [n], `defective` bool [n]; `interval`: of the AUROC, for the title.
    Raises UsageError when a class is missing.
    """
    fpr, tpr, _ = metrics.roc_curve(scores, defective)
    area = metrics.auroc(scores, defective)
    title = f"AUROC {area:.4f}"
    if interval is not None:
        title += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    warned = float((np.asarray(scores)[~np.asarray(defective)] > thresholds.warn.value).mean())
    edge = min(1.0, max(0.1, math.ceil(24 * warned) / 20))  # both limits lie inside, with air
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.9), layout="constrained")
        whole, left = figure.subplots(1, 2)
        for axes in (whole, left):
            axes.plot(*_thinned(fpr, tpr), color=BLUE)
            axes.fill_between(*_thinned(fpr, tpr), color=BLUE, alpha=0.08, linewidth=0)
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (1, 2)))
            _mark_limits(axes, np.asarray(scores), np.asarray(defective), thresholds)
            axes.xaxis.set_major_formatter(_shares(0))
            axes.yaxis.set_major_formatter(_shares(0))
            axes.set_xlabel("good images that raise an alarm")
            axes.set_ylim(-0.02, 1.03)
        whole.set(title=title, ylabel="defective images found", xlim=(-0.02, 1.02))
        left.set(title=f"Up to {percent(edge, 0)} false alarms", xlim=(-0.02 * edge, edge))
        left.set_xticks(np.linspace(0, edge, 6))
        figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return _png(figure)


def _mark_limits(axes: Axes, scores: Floats, defective: npt.NDArray[np.bool_], thresholds: Thresholds) -> None:
    for name, limit, color, marker in (
        ("WARN", thresholds.warn.value, OCHRE, "D"),
        ("NG", thresholds.fail.value, RED, "o"),
    ):
        x, y = float((scores[~defective] > limit).mean()), float((scores[defective] > limit).mean())
        label = f"{name} limit: {percent(x)} false alarms, {percent(y)} found"
        axes.plot(x, y, marker, color=color, markersize=8, markeredgecolor="white", label=label, linestyle="none")


def pro_plot(
    fpr: Floats, overlap: Floats, aupro: float, *, max_fpr: float = 0.3, interval: tuple[float, float] | None = None
) -> bytes:
    """Return the curve of per-region overlap up to the false positive rate at which its area is taken.

    `fpr`, `overlap` float [n] as of `metrics.pro_curve`, `aupro` as of `metrics.aupro`; `interval`: of the area.
    """
    below = fpr <= max_fpr
    x = np.append(fpr[below], max_fpr)
    y = np.append(overlap[below], np.interp(max_fpr, fpr, overlap))
    title = f"Overlap with marked regions, AUPRO {aupro:.4f}"
    if interval is not None:
        title += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(*_thinned(x, y), color=BLUE)
        axes.fill_between(*_thinned(x, y), color=BLUE, alpha=0.08, linewidth=0)
        for rate in (0.01, 0.05):
            axes.annotate(
                f"{percent(float(np.interp(rate, x, y)), 0)} at {percent(rate, 0)}",
                (rate, float(np.interp(rate, x, y))),
                xytext=(10, -16),
                textcoords="offset points",
                color=BLUE,
                arrowprops={"arrowstyle": "-", "color": BLUE},
            )
            axes.plot(rate, np.interp(rate, x, y), "o", color=BLUE, markersize=5)
        axes.xaxis.set_major_formatter(_shares(0))
        axes.yaxis.set_major_formatter(_shares(0))
        axes.set(
            title=title,
            xlabel="normal pixels above the threshold, of all images",
            ylabel="mean share of a marked region found",
            xlim=(0, max_fpr),
            ylim=(0, 1.03),
        )
        return _png(figure)


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return a curve with so many points as can be seen; both ends stay."""
    if len(x) <= _CURVE_POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, _CURVE_POINTS).round().astype(np.intp))
    return x[kept], y[kept]


# Features


def tsne_layout(
    features: Floats, labels: Sequence[str], *, seed: int = 0, cap: int = TSNE_CAP
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Return where t-SNE puts the features on a plane, float64 [m, 2], and which rows these are, [m].

    `features` float [n, d], `labels` of length n. Of more than `cap` rows the same share of every label is drawn.
    Features of more than 50 dimensions go through PCA first. The same seed gives the same plane.
    Raises UsageError for fewer than 8 rows, or when all rows are equal or not finite.
    Source: van der Maaten & Hinton, JMLR 9 (2008); scikit-learn.
    """
    rows = _stratified(labels, cap, seed)
    chosen = np.asarray(features, dtype=np.float64).reshape(len(labels), -1)[rows]
    if len(rows) < _TSNE_LEAST or not np.isfinite(chosen).all() or not np.ptp(chosen, axis=0).any():
        raise UsageError(
            f"{len(rows)} feature vectors cannot be laid out.",
            f"Give {_TSNE_LEAST} or more, all finite and not all equal.",
        )
    # Threads add up in the order in which they finish; one thread gives the same plane every time.
    with threadpool_limits(1):
        dims = min(_PCA_DIMS, *chosen.shape)
        reduced = PCA(dims, svd_solver="full").fit_transform(chosen) if chosen.shape[1] > dims else chosen
        perplexity = min(30.0, (len(rows) - 1) / 3)
        plane = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return np.asarray(plane, dtype=np.float64), rows


def tsne_plot(
    features: Floats, labels: Sequence[str], *, seed: int = 0, cap: int = TSNE_CAP, names_inside: bool = False
) -> bytes:
    """Return the plane of `tsne_layout` with a color and a marker per label, `good` in blue.

    `names_inside`: write each label at the middle of its points, too.
    """
    plane, rows = tsne_layout(features, labels, seed=seed, cap=cap)
    names = np.asarray(labels, dtype=np.str_)[rows]
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
        axes = figure.subplots()
        for kind, color, marker in _kind_styles(kinds_in_order(names)):
            points = plane[names == kind]
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=20,
                marker=marker,
                color=color,
                edgecolor="white",
                linewidth=0.4,
                label=f" {_short(kind)} ({len(points)})",
            )
            if names_inside:
                middle = np.median(points, axis=0)
                plate = {"facecolor": "white", "edgecolor": color, "alpha": 0.85, "boxstyle": "round,pad=0.2"}
                axes.text(middle[0], middle[1], _short(kind), ha="center", va="center", fontsize=8.5, bbox=plate)
        axes.set(title=f"t-SNE of {len(rows)} feature vectors", xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        axes.set_xlabel("neighbours are alike; distances across the picture and axes have no unit")
        handles, texts = axes.get_legend_handles_labels()
        more = [f"… and {len(texts) - _LEGEND_ROWS} more"] if len(texts) > _LEGEND_ROWS else []
        axes.legend(
            handles[:_LEGEND_ROWS],
            texts[:_LEGEND_ROWS],
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            title=more[0] if more else None,
        )
        return _png(figure)


def _stratified(labels: Sequence[str], cap: int, seed: int) -> npt.NDArray[np.intp]:
    """Return at most `cap` rows in rising order, of every label the same share, and one at least."""
    names = np.asarray(labels, dtype=np.str_)
    rng = np.random.default_rng(seed)
    position = np.empty(len(names))
    for name in np.unique(names):
        rows = rng.permutation(np.flatnonzero(names == name))
        position[rows] = np.arange(len(rows)) / len(rows)
    return np.sort(np.argsort(position, kind="stable")[:cap])


def _kind_styles(kinds: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each label with its color and marker."""
    others = [kind for kind in kinds if kind not in (GOOD, UNSURE)]
    for kind in kinds:
        if kind in (GOOD, UNSURE):
            yield kind, *((BLUE, "o") if kind == GOOD else (GREY, "X"))
        else:
            index = others.index(kind)
            yield kind, _KINDS[index % len(_KINDS)], _MARKERS[index % len(_MARKERS)]


# Classifier


def confusion_plot(confusion: npt.NDArray[np.integer[Any]], classes: Sequence[str]) -> bytes:
    """Return the confusion matrix: rows are true classes, columns predicted ones.

    `confusion` int [K, K], `classes` of length K >= 2. Colors show the share of the true class, right ones in blue and
    wrong ones in orange on a scale of their own, numbers the counts (up to 20 classes).
    Raises UsageError when the shapes do not match.
    """
    counts = np.asarray(confusion)
    size = len(classes)
    if counts.shape != (size, size) or size < 2:
        raise UsageError(f"A matrix of shape {counts.shape} does not fit {size} classes.", "Give int [K, K], K >= 2.")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = np.where(np.eye(size, dtype=np.bool_), np.nan, share)
    right = np.where(np.eye(size, dtype=np.bool_), share, np.nan)
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 6.2), layout="constrained")
        axes = figure.subplots()
        darkest = max(float(np.nanmax(wrong)), _FAINT)
        mistakes = axes.imshow(wrong, cmap=_shades("Oranges"), vmin=0, vmax=darkest)
        hits = axes.imshow(right, cmap=_shades("Blues"), vmin=0, vmax=1)
        if size <= _COUNTED_CLASSES:
            for true, predicted in np.ndindex(size, size):
                if counts[true, predicted]:
                    _write_count(axes, int(counts[true, predicted]), true, predicted, share, darkest)
        step = -(-size // _NAMED_CLASSES)
        ticks, names = range(0, size, step), [_short(name) for name in classes[::step]]
        small = 9.5 if size <= _COUNTED_CLASSES else 6.5
        axes.set_xticks(ticks, names, rotation=45 if size <= _COUNTED_CLASSES else 90, fontsize=small)
        for text in axes.get_xticklabels():
            text.set_horizontalalignment("right" if size <= _COUNTED_CLASSES else "center")
            text.set_rotation_mode("anchor" if size <= _COUNTED_CLASSES else "default")
        axes.set_yticks(ticks, names, fontsize=small)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        accuracy = counts.trace() / max(int(counts.sum()), 1)
        axes.set_title(f"{counts.sum()} images, {percent(accuracy, 2)} right")
        for image, label in ((mistakes, "wrong, share of the true class"), (hits, "right, share of the true class")):
            bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.015, aspect=28, format=_shares())
            bar.set_label(label)
            bar.outline.set_visible(False)
        return _png(figure)


def _shades(name: str) -> ListedColormap:
    """Return a sequential color map without its darkest part, so that numbers can be read on it."""
    return ListedColormap(colormaps[name](np.linspace(0.0, 0.87, 256)))


def _write_count(axes: Axes, count: int, true: int, predicted: int, share: Floats, darkest: float) -> None:
    dark = share[true, predicted] > (0.6 if true == predicted else 0.6 * darkest)
    axes.text(
        predicted,
        true,
        str(count),
        ha="center",
        va="center",
        color="white" if dark else INK,
        fontsize=9 if len(share) <= 12 else 7,
        fontweight="bold" if true == predicted else "normal",
    )


def pictures_grid(
    pictures: Sequence[Pixels], captions: Sequence[str], right: Sequence[bool], *, columns: int = 8
) -> bytes:
    """Return pictures with a caption below each, framed in blue where `right`, else in orange and dashed.

    `pictures` uint8 [H, W, 3] each, sizes may differ; all three of one length. Small pictures keep their hard pixels.
    Raises UsageError when there is none.
    """
    if not pictures:
        raise UsageError("There are no pictures to draw.", "Give at least one.")
    rows = -(-len(pictures) // columns)
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 1.36 * rows), layout="constrained")
        for index, (picture, caption, good) in enumerate(zip(pictures, captions, right, strict=True)):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.imshow(picture, interpolation="nearest" if max(picture.shape[:2]) <= 64 else "antialiased")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(caption, fontsize=8, labelpad=3, color=INK)
            axes.spines[:].set(
                visible=True, color=BLUE if good else ORANGE, linewidth=1.8, linestyle="-" if good else (0, (3, 2))
            )
        return _png(figure)


# Heat maps


def heat_maps(examples: Sequence[Example], ranks: Sequence[str]) -> bytes:
    """Return picture, heat map and marked region of each example, two examples a row, as they come.

    `ranks`: one word for each, such as worst. Raises UsageError when there is no example.
    """
    if not examples:
        raise UsageError("There are no examples to draw.", "Give at least one.")
    rows = -(-len(examples) // 2)
    side, gap, words = 1.27, 0.04, 0.27  # inches: width of a picture, between pictures, for the line above
    height = side * max(example.picture.height / example.picture.width for example in examples)
    pitch = words + height + 0.1
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, pitch * rows))
        for index, (example, rank) in enumerate(zip(examples, ranks, strict=True)):
            left, top = index % 2 * (_WIDTH / 2 + gap), pitch * (rows - index // 2)
            text = f"{rank}: {_short(example.label)}, score {example.score:.4g}, {example.verdict}"
            figure.text((left + gap) / _WIDTH, (top - 0.2) / (pitch * rows), text, fontsize=9)
            for place, picture in enumerate(_shown(example)):
                x, y = left + gap + place * (side + gap), top - words - height
                axes = figure.add_axes((x / _WIDTH, y / (pitch * rows), side / _WIDTH, height / (pitch * rows)))
                _show(axes, picture)
        return _png(figure)


def _shown(example: Example) -> list[Image.Image | None]:
    """Return picture, heat map and marked region, None where nothing is marked."""
    region = None if example.mask is None else marked(example.picture, example.mask)
    return [example.picture.convert("RGB"), example.overlay.convert("RGB"), region]


def _show(axes: Axes, picture: Image.Image | None) -> None:
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set_visible(False)
    if picture is None:
        axes.text(0.5, 0.5, "nothing\nmarked", ha="center", va="center", color=GREY, transform=axes.transAxes)
    else:
        axes.imshow(np.asarray(picture), interpolation="antialiased")


# Comparison


@dataclass(frozen=True)
class ComparedBar:
    """One line of the comparison; None is not known.

    what: detector or classifier. quality: image AUROC or accuracy, with its 95 % interval.
    """

    name: str
    what: str
    quality: float | None
    interval: tuple[float, float] | None
    latency_ms: float | None
    megabytes: float


def comparison_plot(rows: Sequence[ComparedBar]) -> bytes:
    """Return accuracy with its interval, latency and size of models, a line each, in the order given.

    Latency and size are on logarithmic axes, left is better. Raises UsageError when there is no model.
    """
    if not rows:
        raise UsageError("There are no models to draw.", "Give at least one.")
    kinds = {row.what for row in rows}
    quality = " or ".join(
        name for what, name in (("detector", "image AUROC"), ("classifier", "accuracy")) if what in kinds
    )
    places = np.arange(len(rows))[::-1]
    with rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.42 * len(rows)), layout="constrained")
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1.3, 1, 1))
        for row, place in zip(rows, places, strict=True):
            _draw_quality(left, row, float(place))
        _draw_sizes(middle, [row.latency_ms for row in rows], places)
        _draw_sizes(right, [row.megabytes for row in rows], places)
        left.set_yticks(places, [_short(row.name) for row in rows])
        left.set(title="How well", xlabel=f"{quality}, 95{NBSP}% interval", ylim=(-0.6, len(rows) - 0.4))
        middle.set(title="How fast", xlabel="median time of one image, ms")
        right.set(title="How large", xlabel="weights, MB")
        return _png(figure)


def _draw_quality(axes: Axes, row: ComparedBar, place: float) -> None:
    if row.quality is None:
        return
    if row.interval is not None:
        axes.plot(row.interval, [place, place], color=BLUE, linewidth=5, alpha=0.3, solid_capstyle="butt")
    axes.plot(row.quality, place, "o", color=BLUE, markersize=7)
    axes.annotate(
        f"{row.quality:.3f}", (row.quality, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8.5
    )


def _draw_sizes(axes: Axes, values: Sequence[float | None], places: npt.NDArray[np.intp]) -> None:
    known = [(value, float(place)) for value, place in zip(values, places, strict=True) if value]
    if not known:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
        return
    low, high = min(value for value, _ in known) / 1.6, max(value for value, _ in known) * 2.6
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for power in range(-4, 7) for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)]
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(shown[:: -(-len(shown) // 5)], [f"{tick:g}" for tick in shown[:: -(-len(shown) // 5)]])
    axes.minorticks_off()
    for value, place in known:
        axes.plot([low, value], [place, place], color=GREY, linewidth=0.8)
        axes.plot(value, place, "o", color=ORANGE, markersize=7)
        axes.annotate(
            f"{value:.3g}", (value, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5
        )


# Small parts


def _shares(decimals: int | None = None) -> PercentFormatter:
    return PercentFormatter(1.0, decimals=decimals, symbol=NBSP + "%")


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _png(figure: Figure) -> bytes:
    """Return the figure as PNG without time, version or other traces of the machine."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
