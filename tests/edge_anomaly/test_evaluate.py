from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_anomaly.data import GOOD, UNSURE, Item, open_dataset
from edge_anomaly.evaluate import evaluate_items, evaluate_predictions, false_alarms, open_judge
from edge_anomaly.prediction import Predictions
from edge_anomaly_runtime.bundle import Threshold
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.thresholds import fit_thresholds

SPEC = Preprocess(32, 32)
THRESHOLDS = fit_thresholds(np.arange(1.0, 101), np.arange(1.0, 101), alpha_warn=0.1, alpha_fail=0.05)  # 91, 96


def predictions(scores: list[float], maps: np.ndarray | None = None) -> Predictions:
    return Predictions(np.array(scores), np.zeros((len(scores), 4, 4), np.float32) if maps is None else maps)


def test_image_figures_by_hand() -> None:
    items = [Item(Path(f"{n}.png"), label) for n, label in enumerate([GOOD, GOOD, "hole", "hole", "stain"])]

    figures = evaluate_predictions(items, predictions([10.0, 97.0, 97.0, 200.0, 50.0]), SPEC, THRESHOLDS)

    # Pairs: hole 97 beats 10 and ties 97; hole 200 beats both; stain 50 beats 10 only.
    assert figures["image"]["auroc"] == pytest.approx((1.5 + 2 + 1) / 6)
    assert figures["image"]["found"] == pytest.approx(2 / 3)
    assert figures["image"]["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    hole = figures["defects"]["hole"]
    assert (hole["images"], hole["auroc"], hole["found"]) == (2, pytest.approx(3.5 / 4), 1.0)
    assert figures["defects"]["stain"]["auroc"] == pytest.approx(0.5)
    assert hole["found_interval"] == pytest.approx([0.025 ** (1 / 2), 1.0])
    for row in (figures["image"], hole):
        for name in ("auroc", "average_precision"):
            low, high = row[f"{name}_interval"]
            assert 0 <= low <= row[name] <= high <= 1
    assert figures["false_alarms"]["fail"]["alarms"] == 1
    assert figures["distinct_scores"] == pytest.approx(4 / 5)
    assert "pixel" not in figures


def test_unsure_images_count_in_no_figure_but_their_own() -> None:
    items = [Item(Path("a"), GOOD), Item(Path("b"), "hole"), Item(Path("c"), UNSURE), Item(Path("d"), UNSURE)]

    figures = evaluate_predictions(items, predictions([1.0, 99.0, 500.0, 0.5]), SPEC, THRESHOLDS)

    assert figures["image"]["auroc"] == 1.0
    assert figures["unsure"] == {"images": 2, "flagged": 0.5}
    assert figures["false_alarms"]["warn"]["images"] == 1


def test_pixel_figures_use_masks_at_the_models_size(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:16, :16] = 255  # the upper left cell of a 4 x 4 grid
    Image.fromarray(mask).save(tmp_path / "mask.png")
    items = [Item(Path("a"), GOOD), Item(Path("b"), "hole", tmp_path / "mask.png")]
    maps = np.zeros((2, 4, 4), np.float32)
    maps[1, 0, 0] = 1.0

    figures = evaluate_predictions(items, predictions([0.0, 1.0], maps), SPEC, THRESHOLDS)
    maps[1, 0, 0], maps[1, 3, 3] = 0.0, 1.0
    wrong = evaluate_predictions(items, predictions([0.0, 1.0], maps), SPEC, THRESHOLDS)

    assert figures["pixel"]["auroc"] > 0.99
    for name in ("auroc", "aupro"):  # one image of each kind: every resample is the same
        assert figures["pixel"][f"{name}_interval"] == pytest.approx([figures["pixel"][name]] * 2, abs=1e-3)
    assert figures["pixel"]["aupro"] > 0.95
    assert wrong["pixel"]["auroc"] < 0.51


def test_false_alarms_are_set_against_promise_and_bound() -> None:
    limit = Threshold(value=10.0, alpha=0.05, method="conformal", n=100, order=96, upper95=0.089)

    row = false_alarms(np.array([1.0, 10.0, 11.0, 5.0]), limit)

    assert (row["alarms"], row["images"], row["rate"]) == (1, 4, 0.25)  # 10.0 is not above 10.0
    assert row["inside_bound"] is False
    assert row["rate_interval"][0] < 0.25 < row["rate_interval"][1]


def test_bundle_and_run_judge_alike(bundle_folder: Path, run_folder: Path, sample_folder: Path) -> None:
    items = open_dataset(str(sample_folder)).test
    figures = {}
    for path, precision in ((run_folder, "auto"), (bundle_folder, "fp32"), (bundle_folder, "int8")):
        with open_judge(path, precision=precision) as judge:
            figures[judge.name], _, _ = evaluate_items(judge, items)

    assert list(figures) == ["torch fp32", "openvino fp32", "openvino int8"]
    torch_auroc = figures["torch fp32"]["image"]["auroc"]
    assert torch_auroc > 0.9
    assert figures["openvino fp32"]["image"]["auroc"] == torch_auroc
    # 16 good images: one of them changing its place by three moves the AUROC by 0.01.
    assert figures["openvino int8"]["image"]["auroc"] > torch_auroc - 0.05
    assert figures["openvino int8"]["pixel"]["auroc"] > 0.9


def test_no_labelled_images_is_refused(bundle_folder: Path) -> None:
    with open_judge(bundle_folder) as judge, pytest.raises(UsageError, match="no labelled test images"):
        evaluate_items(judge, ())
