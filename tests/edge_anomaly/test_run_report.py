"""The page of a run: well formed, sent alone, escaped, with the figures given and the pictures that matter."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly import plots, run_report
from edge_anomaly.architecture import StageRow
from edge_anomaly.classifier import classification_figures
from edge_anomaly.data import Item
from edge_anomaly.evaluate import evaluate_predictions
from edge_anomaly.prediction import Predictions
from edge_anomaly.run_report import classifier_report, detector_report
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.thresholds import fit_thresholds

from .pages import read, row_of, words

EVIL = '<b onload="x">&'
SPEC = Preprocess(32, 32)
LIMITS = fit_thresholds(np.arange(1.0, 101), np.arange(1.0, 101), alpha_warn=0.1, alpha_fail=0.05)  # 91, 96
ROWS = [
    StageRow("backbone.stem", ((32, 16, 16),), 928, 0, 3_976),
    StageRow("backbone.stages.0", ((24, 8, 8),), 14_864, 14_864, 64_128),
    StageRow("head", ((), (8, 8)), 0, 0, 838_756),
]
RECORDS: list[dict[str, float | None]] = [
    {"epoch": epoch, "loss": 1.0 / epoch, "lr": 0.1, "seconds": 40.0, "validation_accuracy": 0.5 + epoch / 100}
    for epoch in (1, 2, 3)
]


# A small run


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Five good images, four with a hole and a mask, one that people were not sure about."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for index in range(10):
        label = "good" if index < 5 else "hole" if index < 9 else "unsure"
        path = folder / f"{index}.png"
        Image.new("RGB", (40, 30), (20 * index, 120, 90)).save(path)
        mask = None
        if label == "hole":
            mask = folder / f"{index}_mask.png"
            region = Image.new("L", (40, 30))
            region.paste(255, (0, 0, 12, 12))
            region.save(mask)
        found.append(Item(path, label, mask))
    return found


def predictions() -> Predictions:
    maps = np.random.default_rng(0).uniform(0, 40, (10, 8, 8)).astype(np.float32)
    maps[5:9, :3, :3] += 80
    return Predictions(np.array([10.0, 20, 30, 40, 99, 97, 150, 95, 50, 70]), maps)


def write_detector(folder: Path, items: list[Item], rows: Sequence[int] = range(10), **changes: Any) -> Path:
    """Write the page about some of the images."""
    items, every = [items[row] for row in rows], predictions()
    scored = Predictions(every.scores[list(rows)], every.maps[list(rows)])
    arguments: dict[str, Any] = {
        "title": "PaDiM on parts",
        "facts": {"Backbone": "efficientnet_lite0", "Layers": ("layer2", "layer3"), "Nothing": None},
        "summary_rows": ROWS,
        "figures": evaluate_predictions(items, scored, SPEC, LIMITS),
        "items": items,
        "predictions": scored,
        "thresholds": LIMITS,
        "preprocess": SPEC,
        "records": RECORDS,
        "features": np.random.default_rng(1).normal(size=(len(items), 4)),
    }
    return detector_report(folder, **{**arguments, **changes})


def class_arrays() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 8)
    logits = rng.normal(size=(24, 3)).astype(np.float32)
    logits[np.arange(24), labels] += 0.8
    return rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), labels, logits


def write_classifier(folder: Path, classes: tuple[str, ...] = ("cat", "dog", "frog"), **changes: Any) -> Path:
    images, labels, logits = class_arrays()
    arguments: dict[str, Any] = {
        "title": "ResNet-18 on pets",
        "facts": {"Recipe": "documented"},
        "summary_rows": ROWS,
        "figures": classification_figures(logits, labels, classes),
        "images": images,
        "labels": labels,
        "logits": logits,
        "records": RECORDS,
        "features": logits,
    }
    return classifier_report(folder, **{**arguments, **changes})


@pytest.fixture(scope="module")
def detector_page(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector"), items)


@pytest.fixture(scope="module")
def classifier_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(params=["detector_page", "classifier_page"])
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


# Both pages


def test_page_is_well_formed_and_fetches_nothing(page: Path) -> None:
    text, reader = page.read_text(), read(page)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    sources = [value for _, name, value in reader.attributes if name in ("src", "srcset")]
    assert sources and all(value.startswith("data:image/") for value in sources)
    assert len([value for tag, name, value in reader.attributes if (tag, name) == ("img", "alt") and value]) == len(
        sources
    )


def test_every_figure_is_in_the_page_and_beside_it(page: Path) -> None:
    links = [value for tag, name, value in read(page).attributes if (tag, name) == ("a", "href")]
    assert sorted(links) == sorted(path.name for path in page.parent.glob("*.png"))
    for name in links:
        with Image.open(page.parent / name) as image:
            assert (image.format, image.width) == ("PNG", 1280)
        if name not in ("scores.png", "heat_maps.png"):  # drawn by the page itself, in its own colours
            assert base64.b64encode((page.parent / name).read_bytes()).decode() in page.read_text()


def test_the_same_run_gives_the_same_bytes(detector_page: Path, items: list[Item], tmp_path: Path) -> None:
    again = write_detector(tmp_path, items)
    for path in detector_page.parent.iterdir():
        assert (again.parent / path.name).read_bytes() == path.read_bytes(), path.name


def test_architecture_has_a_line_per_stage_and_a_sum(page: Path) -> None:
    assert row_of(page, "backbone.stem") == ["32 × 16 × 16", "928", "0", "4.0 kB"]
    assert row_of(page, "head") == ["1, 8 × 8", "0", "0", "0.8 MB"]
    assert row_of(page, "Total") == ["", "15,792", "14,864", "0.9 MB"]


def test_training_says_epochs_and_time(page: Path) -> None:
    assert "3 epochs, 2 min 0 s without the tests after each." in words(page)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(3.14159, "3.14 s"), (59.4, "59.4 s"), (61.0, "1 min 1 s"), (7325.0, "2 h 2 min")]
)
def test_times_are_said_in_their_two_largest_units(seconds: float, expected: str) -> None:
    assert run_report._duration(seconds) == expected


def test_text_from_outside_is_escaped(items: list[Item], tmp_path: Path) -> None:
    renamed = [Item(item.path, EVIL if item.label == "hole" else item.label, item.mask) for item in items]
    changes: dict[str, Any] = {
        "title": EVIL,
        "facts": {EVIL: EVIL},
        "summary_rows": [StageRow(EVIL, (), 1, 1, 4)],
    }
    for path in (
        write_detector(tmp_path / "detector", renamed, **changes),
        write_classifier(tmp_path / "classifier", ("cat", "dog", EVIL), title=EVIL, facts={EVIL: EVIL}),
    ):
        assert EVIL not in path.read_text()
        assert "".join(read(path).text).count(EVIL) >= 4


# Detector


def test_detector_headline_and_table_have_the_figures(detector_page: Path, items: list[Item]) -> None:
    text = words(detector_page)
    assert "10 test images: 5 good, 4 hole, 1 unsure" in text
    # Good: 99 is above 96. Holes above 96: 97 and 150. Pairs: 97 and 95 beat 4, 150 beats 5, 50 beats 4.
    assert "Good parts stopped 1 of 5" in text and "Defects found 2 of 4" in text
    figures = evaluate_predictions(items, predictions(), SPEC, LIMITS)
    low, high = figures["image"]["auroc_interval"]
    assert row_of(detector_page, "Image AUROC") == [f"{17 / 20:.4f}", f"{low:.4f} to {high:.4f}"]
    assert row_of(detector_page, "F1 at the NG limit")[0] == f"{2 * 2 / (3 + 4):.4f}"
    assert row_of(detector_page, "Pixel AUROC")[0] == f"{figures['pixel']['auroc']:.4f}"
    low, high = figures["pixel"]["aupro_interval"]
    expected = [f"{figures['pixel']['aupro']:.4f}", f"{low:.4f} to {high:.4f}"]
    assert row_of(detector_page, "AUPRO up to 30\u00a0% false pixels") == expected
    assert row_of(detector_page, "hole")[:2] == ["4", f"{17 / 20:.4f}"]
    assert "1 images are labelled unsure; 0.0 % of them are NG" in text


def test_worst_median_and_best_image_of_each_kind_are_shown(detector_page: Path) -> None:
    alts = [value for _, name, value in read(detector_page).attributes if name == "alt"]
    shown = [alt.removeprefix("Heat map of ") for alt in alts if alt.startswith("Heat map of ")]
    # Good scores rise 0, 1, 2, 3, 4; holes 8 (50), 7 (95), 5 (97), 6 (150).
    assert shown == ["good/4.png", "hole/8.png", "good/2.png", "hole/5.png", "good/0.png", "hole/6.png"]
    text = words(detector_page)
    assert text.index("Heat maps: worst") < text.index("Heat maps: median") < text.index("Heat maps: best")
    assert "false alarm" in text and "missed" in text


def test_a_kind_with_one_image_is_shown_once_and_equal_features_are_left_out(items: list[Item], tmp_path: Path) -> None:
    path = write_detector(tmp_path, items, [0, 1, 2, 3, 5, 9], features=np.ones((6, 4)))
    alts = [value for _, name, value in read(path).attributes if name == "alt"]
    assert alts.count("Heat map of hole/5.png") == 1
    assert not (tmp_path / "tsne.png").exists()


def test_limits_are_said_in_counts(detector_page: Path) -> None:
    assert "NG above 96 About 50 of 1000 good parts would be stopped" in words(detector_page)


def test_run_without_training_masks_defects_and_features(items: list[Item], tmp_path: Path) -> None:
    path = write_detector(tmp_path, items, range(5), records=[], features=None, summary_rows=[])
    text = words(path)
    absent = ("Training", "t-SNE", "Overlap", "ROC", "Architecture", "Image AUROC", "What a limit costs")
    assert [title for title in absent if title in text] == []
    assert "There are no defective test images" in text
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["heat_maps.png", "scores.png"]


# Classifier


def test_classifier_headline_and_tables_have_the_figures(classifier_page: Path) -> None:
    _, labels, logits = class_arrays()
    figures = classification_figures(logits, labels, ("cat", "dog", "frog"))
    wrong = int((logits.argmax(axis=1) != labels).sum())
    assert wrong > 2
    text = words(classifier_page)
    low, high = figures["accuracy_interval"]
    assert f"Accuracy {(24 - wrong) / 24:.2%}".replace("%", " %") in text
    assert f"95 % interval {100 * low:.2f} % to {100 * high:.2f} %" in text
    assert f"Wrong {wrong} of 24 test images" in text
    assert "Top-5" not in text  # three classes
    row = figures["classes"]["dog"]
    assert row_of(classifier_page, "dog") == ["8", *(f"{row[name]:.4f}" for name in ("precision", "recall", "f1"))]
    pair = figures["most_confused"][0]
    cells = row_of(classifier_page, f"{pair['true']} → {pair['predicted']}")
    assert cells == [str(pair["count"]), f"{100 * pair['share']:.1f} %"]


def test_surest_mistakes_come_first_and_right_ones_from_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[bool, list[str]] = {}

    def keep(pictures: Any, captions: list[str], right: list[bool]) -> bytes:
        shown[right[0]] = captions
        return b""

    monkeypatch.setattr(plots, "pictures_grid", keep)
    labels = np.array([0, 0, 1, 1, 0, 1])
    logits = np.log(np.array([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2], [0.1, 0.9], [0.6, 0.4], [0.45, 0.55]]))
    images = np.zeros((6, 4, 4, 3), np.uint8)
    run_report._prediction_pictures(images, labels, logits, ["cat", "dog"])
    assert [caption.replace("\u00a0", " ") for caption in shown[False]] == ["dog\n→ cat 80 %", "cat\n→ dog 70 %"]
    assert [caption.replace("\u00a0", " ") for caption in shown[True]] == [
        "cat\n90 %",
        "cat\n60 %",
        "dog\n90 %",
        "dog\n55 %",
    ]


def test_shown_right_predictions_are_even_over_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 4])
    rows = run_report._evenly(np.arange(84), labels)
    assert np.bincount(labels[rows]).tolist() == [10, 10, 4]


def test_classifier_without_mistakes(tmp_path: Path) -> None:
    _, labels, _ = class_arrays()
    logits = 9.0 * np.eye(3, dtype=np.float32)[labels]
    path = write_classifier(
        tmp_path, figures=classification_figures(logits, labels, ("cat", "dog", "frog")), logits=logits, features=None
    )
    assert "Nothing was confused." in words(path)
    assert not (tmp_path / "wrong.png").exists()


def test_pictures_in_the_page_can_be_decoded(classifier_page: Path) -> None:
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", classifier_page.read_text())
    assert len(encoded) == 5
    assert all(Image.open(io.BytesIO(base64.b64decode(data))).width == 1280 for data in encoded)
