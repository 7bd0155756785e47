"""Figures as PNG: readable size, the numbers given, the same bytes for the same arrays."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from edge_anomaly import plots
from edge_anomaly.gallery import Example
from edge_anomaly_runtime.bundle import Threshold, Thresholds
from edge_anomaly_runtime.errors import UsageError

Floats = npt.NDArray[np.float64]

LABELS = ["good"] * 6 + ["hole"] * 3 + ["stain"]
SCORES = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 5.5, 8.0, 9.0, 2.5])
DEFECTIVE = np.array([label != "good" for label in LABELS])


def limit(value: float) -> Threshold:
    return Threshold(value=value, alpha=0.05, method="conformal", n=60, order=58, upper95=0.1)


LIMITS = Thresholds(warn=limit(5.2), fail=limit(6.0), pixel=limit(4.0), scores={"n": 60.0})

RECORDS: list[dict[str, float | None]] = [
    {
        "epoch": epoch,
        "loss": 2.0 / epoch,
        "accuracy": 0.6 + 0.05 * epoch,
        "lr": 0.1 if epoch < 4 else 0.01,
        "seconds": 3.0,
        "images_per_second": 800.0,
        "validation_loss": 2.5 / epoch,
        "validation_accuracy": (0.55, 0.65, 0.72, 0.8, 0.78)[epoch - 1],
    }
    for epoch in range(1, 6)
]


def blobs(n: int = 30, dims: int = 80, distance: float = 40.0) -> tuple[Floats, list[str]]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2 * n, dims))
    features[n:, 0] += distance
    return features, ["good"] * n + ["hole"] * n


def example(label: str = "hole", mask: bool = True) -> Example:
    picture = Image.new("RGB", (60, 40), (120, 130, 140))
    region = Image.new("L", (60, 40))
    region.paste(255, (20, 10, 40, 30))
    return Example(f"{label}/0.png", label, "NG", 8.5, picture, picture, region if mask else None)


def picture(value: int) -> npt.NDArray[np.uint8]:
    return np.full((8, 8, 3), value, np.uint8)


FIGURES: dict[str, Callable[[], bytes]] = {
    "training": lambda: plots.training_curves(RECORDS, best="validation_accuracy"),
    "scores": lambda: plots.score_histogram(SCORES, LABELS, LIMITS),
    "roc": lambda: plots.roc_plot(SCORES, DEFECTIVE, LIMITS, interval=(0.6, 0.99)),
    "pro": lambda: plots.pro_plot(np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.8, 1.0]), 0.75, interval=(0.7, 0.8)),
    "tsne": lambda: plots.tsne_plot(*blobs(10), names_inside=True),
    "confusion": lambda: plots.confusion_plot(np.array([[8, 2], [1, 9]]), ["cat", "dog"]),
    "grid": lambda: plots.pictures_grid([picture(9), picture(200)], ["cat\n98 %", "dog\n→ cat 51 %"], [True, False]),
    "heat maps": lambda: plots.heat_maps([example(), example("good", mask=False)], ["worst", "best"]),
    "comparison": lambda: plots.comparison_plot([bar("padim", 0.95), bar("stpm", 0.91, latency=None)]),
}


def bar(name: str, quality: float | None, latency: float | None = 12.5) -> plots.ComparedBar:
    interval = None if quality is None else (quality - 0.02, quality + 0.01)
    return plots.ComparedBar(name, "detector", quality, interval, latency, 12.8)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, as matplotlib has them."""
    figures: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(plots, "_png", keep)
    return figures


def texts(figure: Figure) -> list[str]:
    return [text for item in figure.findobj(lambda item: hasattr(item, "get_text")) if (text := item.get_text())]  # type: ignore[attr-defined]


# Every figure


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_a_png_of_1280_pixels_and_the_same_bytes_again(name: str) -> None:
    data = FIGURES[name]()
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert image.width == 1280
        assert 100 < image.height < 1500
        assert set(image.info) <= {"dpi"}  # neither time nor versions
        pixels = np.asarray(image.convert("L"))
    assert 0.001 < (pixels < 200).mean() < 0.9
    assert FIGURES[name]() == data


@pytest.mark.parametrize("name", ["training", "scores", "roc", "pro", "confusion"])
def test_axes_are_named(name: str, drawn: list[Figure]) -> None:
    FIGURES[name]()
    words = drawn[0].get_supylabel()
    for axes in drawn[0].axes:
        assert axes.get_ylabel() or words or name == "roc"
    assert any(axes.get_xlabel() for axes in drawn[0].axes)


def test_settings_of_matplotlib_stay_as_they_were() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    FIGURES["confusion"]()
    assert dict(matplotlib.rcParams) == before


# Training


def test_training_has_a_panel_per_quantity_and_the_gap_at_the_kept_epoch(drawn: list[Figure]) -> None:
    plots.training_curves(RECORDS, best="validation_accuracy")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["Loss", "Accuracy", "Learning rate"]
    loss, accuracy, rate = drawn[0].axes
    assert [line.get_label() for line in accuracy.lines[:2]] == ["accuracy", "validation accuracy"]
    assert np.allclose(np.asarray(accuracy.lines[1].get_ydata()), [0.55, 0.65, 0.72, 0.8, 0.78])
    # Epoch 4 has the best validation accuracy: 0.8 against 0.8 in training; loss 0.5 against 0.625.
    assert accuracy.get_title(loc="right") == "gap +0.0 points in epoch 4"
    assert loss.get_title(loc="right") == "gap −0.125 in epoch 4"
    assert "dashed: the epoch that was kept, 4" in texts(drawn[0])
    assert len(rate.lines) == 2  # the rate and the mark


def test_gap_without_a_chosen_epoch_is_that_of_the_last(drawn: list[Figure]) -> None:
    plots.training_curves(RECORDS)
    assert drawn[0].axes[1].get_title(loc="right") == "gap +7.0 points in epoch 5"
    assert not any("dashed" in text for text in texts(drawn[0]))


def test_metrics_of_unknown_name_get_panels_of_their_own(drawn: list[Figure]) -> None:
    record = {
        "epoch": 1,
        "loss": 3.0,
        "normal_loss": 2.0,
        "synthetic_auroc": 0.9,
        "rank": 12.0,
        "lr": 1e-3,
        "lr_1": 1e-5,
    }
    plots.training_curves([record, {**record, "epoch": 2}])
    panels = {axes.get_title(loc="left"): [line.get_label() for line in axes.lines] for axes in drawn[0].axes}
    assert panels == {
        "Loss": ["loss", "normal loss"],
        "Synthetic AUROC": ["synthetic AUROC"],
        "Rank": ["rank"],
        "Learning rate": ["learning rate", "learning rate, group 1"],
    }


def test_a_metric_that_was_not_finite_is_a_gap(drawn: list[Figure]) -> None:
    plots.training_curves([{"epoch": 1, "loss": None}, {"epoch": 2, "loss": 1.0}, {"epoch": 3, "loss": 0.5}])
    assert np.isnan(np.asarray(drawn[0].axes[0].lines[0].get_ydata())[0])


def test_a_series_that_is_never_finite_and_phases_with_other_metrics_can_be_drawn(drawn: list[Figure]) -> None:
    plots.training_curves([{"epoch": 1, "loss": 1.0, "rank": None}, {"epoch": 2, "loss": 0.9, "anchor": 0.1}])
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["Loss", "Anchor"]


def test_no_epoch_is_refused() -> None:
    with pytest.raises(UsageError, match="no training records"):
        plots.training_curves([])


# Scores


def test_histogram_rows_count_every_image_and_split_at_the_limit(drawn: list[Figure]) -> None:
    plots.score_histogram(SCORES, LABELS, LIMITS)
    rows = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    assert list(rows) == ["good: 6 images", "hole: 3 images", "stain: 1 images"]
    assert [axes.get_title(loc="right") for axes in rows.values()] == ["1 NG", "2 NG", "0 NG"]
    for axes, images, alarms in zip(rows.values(), (6, 3, 1), (1, 2, 0), strict=True):
        bars: list[Any] = axes.containers[0].patches  # type: ignore[attr-defined]
        assert sum(bar.get_height() for bar in bars) == images
        assert sum(bar.get_height() for bar in bars if bar.get_x() >= 6.0 - 1e-9) == alarms
    assert "WARN above 5.2, solid: NG above 6" in drawn[0].axes[-1].get_xlabel()


def test_histogram_of_a_wide_range_is_logarithmic(drawn: list[Figure]) -> None:
    plots.score_histogram(np.array([1.0, 900.0]), ["good", "hole"], LIMITS)
    assert drawn[0].axes[-1].get_xscale() == "log"


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be drawn"):
        plots.score_histogram(np.array([1.0, np.nan]), ["good", "hole"], LIMITS)


def test_roc_marks_the_rates_of_the_deployed_limits(drawn: list[Figure]) -> None:
    plots.roc_plot(SCORES, DEFECTIVE, LIMITS)
    whole = drawn[0].axes[0]
    # Good above 5.2: 6.5; above 6: 6.5. Defective above 5.2: 5.5, 8, 9; above 6: 8, 9.
    marks = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in whole.lines[2:]}  # type: ignore[index]
    assert {str(name).split(" ")[0]: place for name, place in marks.items()} == {
        "WARN": (pytest.approx(1 / 6), pytest.approx(3 / 4)),
        "NG": (pytest.approx(1 / 6), pytest.approx(2 / 4)),
    }
    # Pairs won: 5.5 beats 5 good, 8 and 9 all 6, 2.5 beats 2.
    assert whole.get_title(loc="left") == f"AUROC {(5 + 6 + 6 + 2) / 24:.4f}"


def test_left_edge_of_the_roc_reaches_past_the_warn_limit(drawn: list[Figure]) -> None:
    plots.roc_plot(SCORES, DEFECTIVE, LIMITS)
    assert drawn[0].axes[1].get_xlim()[1] == pytest.approx(0.2)


def test_pro_curve_ends_at_its_limit(drawn: list[Figure]) -> None:
    plots.pro_plot(np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.8, 1.0]), 0.75)
    line = drawn[0].axes[0].lines[0]
    assert np.asarray(line.get_xdata())[-1] == 0.3
    assert np.asarray(line.get_ydata())[-1] == pytest.approx(0.8 + 0.2 * 0.2 / 0.9)
    assert drawn[0].axes[0].get_title(loc="left") == "Overlap with marked regions, AUPRO 0.7500"


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    x = np.linspace(0, 1, 100_000)
    thin_x, thin_y = plots._thinned(x, x**2)
    assert len(thin_x) == len(thin_y) == 4000
    assert (thin_x[0], thin_x[-1], thin_y[-1]) == (0.0, 1.0, 1.0)


# Features


def test_tsne_separates_two_far_blobs() -> None:
    features, labels = blobs()
    plane, rows = plots.tsne_layout(features, labels)
    assert rows.tolist() == list(range(60))
    distance = np.linalg.norm(plane[:, np.newaxis] - plane[np.newaxis], axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    assert (nearest // 30 == np.arange(60) // 30).all()


def test_tsne_is_fixed_by_its_seed() -> None:
    features, labels = blobs(12)
    first, _ = plots.tsne_layout(features, labels, seed=3)
    again, _ = plots.tsne_layout(features, labels, seed=3)
    assert (first == again).all()


def test_tsne_takes_the_same_share_of_every_label_and_loses_none() -> None:
    labels = ["good"] * 80 + ["hole"] * 19 + ["stain"]
    rows = plots._stratified(labels, 20, seed=0)
    chosen = np.asarray(labels)[rows]
    assert len(rows) == 20 and (np.diff(rows) > 0).all()
    assert {name: int((chosen == name).sum()) for name in ("good", "hole", "stain")} == {
        "good": 15,
        "hole": 4,
        "stain": 1,
    }


def test_tsne_takes_feature_maps_as_vectors() -> None:
    features = np.random.default_rng(0).normal(size=(12, 3, 2, 2))
    assert plots.tsne_layout(features, ["a"] * 12)[0].shape == (12, 2)


@pytest.mark.parametrize("features", [np.zeros((4, 3)), np.ones((20, 3)), np.full((20, 3), np.nan)])
def test_features_that_cannot_be_laid_out_are_refused(features: Floats) -> None:
    with pytest.raises(UsageError, match="cannot be laid out"):
        plots.tsne_layout(features, ["good"] * len(features))


def test_every_kind_has_a_style_of_its_own() -> None:
    kinds = ["good", *(f"kind {index}" for index in range(40)), "unsure"]
    styles = [style for _, *style in plots._kind_styles(kinds)]
    assert len({tuple(style) for style in styles}) == 42
    assert styles[0] == [plots.BLUE, "o"]


def test_labels_are_written_as_they_are(drawn: list[Figure]) -> None:
    features, _ = blobs(10)
    plots.tsne_plot(features, ["a$b$"] * 10 + ["_hidden"] * 10, names_inside=True)
    assert {"a$b$", "_hidden"} <= set(texts(drawn[0]))
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [" _hidden (10)", " a$b$ (10)"]  # type: ignore[union-attr]


# Classifier


def test_confusion_shows_every_count_and_the_accuracy(drawn: list[Figure]) -> None:
    plots.confusion_plot(np.array([[80, 17, 3], [6, 94, 0], [11, 2, 87]]), ["cat", "dog", "a$b$"])
    words = texts(drawn[0])
    assert {"80", "17", "3", "6", "94", "11", "2", "87", "cat", "dog", "a$b$"} <= set(words)
    assert "0" not in [text.get_text() for text in drawn[0].axes[0].texts]
    places = {text.get_text(): text.get_position() for text in drawn[0].axes[0].texts}
    assert places["17"] == (1, 0)  # column: predicted, row: true
    assert "300 images, 87.00\u00a0% right" in words


def test_large_confusion_matrices_have_no_numbers(drawn: list[Figure]) -> None:
    plots.confusion_plot(np.eye(30, dtype=np.int64), [f"class {index}" for index in range(30)])
    assert not drawn[0].axes[0].texts


def test_rare_mistakes_are_never_dark(drawn: list[Figure]) -> None:
    plots.confusion_plot(np.array([[999, 1], [0, 1000]]), ["a", "b"])
    assert drawn[0].axes[0].images[0].norm.vmax == 0.05


def test_confusion_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(2, 2\) does not fit 3 classes"):
        plots.confusion_plot(np.eye(2, dtype=np.int64), ["a", "b", "c"])


def test_pictures_are_framed_by_right_and_wrong(drawn: list[Figure]) -> None:
    plots.pictures_grid([picture(9), picture(200)], ["cat", "dog → cat"], [True, False])
    right, wrong = (axes.spines["left"] for axes in drawn[0].axes)
    assert right.get_linestyle() != wrong.get_linestyle()
    assert right.get_edgecolor() != wrong.get_edgecolor()
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["cat", "dog → cat"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.pictures_grid([], [], []),
        lambda: plots.heat_maps([], []),
        lambda: plots.comparison_plot([]),
    ],
    ids=["grid", "heat maps", "comparison"],
)
def test_nothing_to_draw_is_refused(draw: Callable[[], bytes]) -> None:
    with pytest.raises(UsageError, match="There are no"):
        draw()


def test_heat_maps_show_picture_map_and_region(drawn: list[Figure]) -> None:
    plots.heat_maps([example(), example("good", mask=False)], ["worst", "best"])
    assert [len(axes.images) for axes in drawn[0].axes] == [1, 1, 1, 1, 1, 0]
    words = texts(drawn[0])
    assert "worst: hole, score 8.5, NG" in words and "best: good, score 8.5, NG" in words
    assert "nothing\nmarked" in words


# Comparison


def test_comparison_says_what_was_not_measured(drawn: list[Figure]) -> None:
    plots.comparison_plot([bar("padim", 0.951, None), bar("stpm", None, None)])
    words = texts(drawn[0])
    assert "not measured" in words and "0.951" in words
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["padim", "stpm"]
    assert drawn[0].axes[0].get_xlabel() == "image AUROC, 95\u00a0% interval"
