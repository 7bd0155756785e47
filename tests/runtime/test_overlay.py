"""Heat maps whose colours mean the same in every picture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_runtime.overlay import draw_overlay
from edge_anomaly_runtime.preprocess import Preprocess

SPEC = Preprocess(32, 32)
OUTLINE = [255, 0, 60]


def _overlay(anomaly_map: npt.ArrayLike, threshold: float, grey: int = 52, size: int = 32) -> npt.NDArray[np.uint8]:
    picture = Image.new("RGB", (size, size), (grey, grey, grey))
    return np.asarray(draw_overlay(picture, np.asarray(anomaly_map, dtype=np.float32), SPEC, threshold))


@pytest.mark.parametrize(
    ("relative", "colour"),
    [
        pytest.param(0.0, [52, 52, 52], id="nothing"),
        pytest.param(0.5, [52, 52, 52], id="half the threshold: transparent"),
        pytest.param(1.0, [143, 123, 29], id="at the threshold: 45 % yellow"),
        pytest.param(1.5, [165, 75, 21], id="60 % orange"),
        pytest.param(2.0, [121, 16, 30], id="twice the threshold: 70 % dark red"),
        pytest.param(9.0, [121, 16, 30], id="no other colour above"),
    ],
)
@pytest.mark.parametrize("threshold", [0.25, 8.0])
def test_colour_depends_on_the_ratio_to_the_threshold_only(
    relative: float, colour: list[int], threshold: float
) -> None:
    picture = _overlay(np.full((4, 4), relative * threshold), threshold)
    assert np.abs(np.unique(picture.reshape(-1, 3), axis=0).astype(int) - [colour]).max() <= 1  # 256 shades


def test_the_same_value_has_the_same_colour_beside_a_larger_one() -> None:
    calm, loud = np.full((8, 8), 0.8), np.full((8, 8), 0.8)
    loud[7, 7] = 1000.0
    assert np.array_equal(_overlay(calm, 1.0)[:20, :20], _overlay(loud, 1.0)[:20, :20])


def test_below_half_the_threshold_the_picture_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    low = np.random.default_rng(1).random((8, 8)).astype(np.float32) * 0.49
    assert np.array_equal(np.asarray(draw_overlay(Image.fromarray(pixels), low, SPEC, 1.0)), pixels)


def test_outline_runs_round_what_is_above_the_threshold() -> None:
    anomaly_map = np.zeros((32, 32))
    anomaly_map[8:16, 10:20] = 1.01
    picture = _overlay(anomaly_map, 1.0)
    rim = (picture == OUTLINE).all(axis=2)
    expected = np.zeros((32, 32), dtype=np.bool_)
    expected[7:17, 9:21] = True
    expected[9:15, 11:19] = False
    assert np.array_equal(rim, expected)


def test_no_outline_at_the_threshold_itself() -> None:
    anomaly_map = np.zeros((32, 32))
    anomaly_map[8:16, 8:16] = 1.0
    assert not (_overlay(anomaly_map, 1.0) == OUTLINE).all(axis=2).any()


def test_size_and_mode_are_those_of_the_picture() -> None:
    picture = draw_overlay(Image.new("RGB", (70, 30)), np.ones((4, 4), np.float32), SPEC, 0.5)
    assert (picture.size, picture.mode) == ((70, 30), "RGB")


def test_the_given_picture_is_not_changed() -> None:
    picture = Image.new("RGB", (32, 32), (9, 9, 9))
    draw_overlay(picture, np.full((4, 4), 5.0, np.float32), SPEC, 1.0)
    assert picture.getcolors() == [(1024, (9, 9, 9))]


def test_a_threshold_of_zero_does_not_divide_by_zero() -> None:
    assert np.array_equal(_overlay(np.ones((4, 4)), 0.0), _overlay(np.full((4, 4), 9.0), 1.0))
    assert np.unique(_overlay(np.zeros((4, 4)), 0.0)).tolist() == [52]
