"""The one resize: pixels written out, and the geometry that the overlay relies on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.overlay import map_to_source
from edge_anomaly_runtime.preprocess import Policy, Preprocess, Roi, content_area, preprocess, shrinks_by, source_box

Pixels = npt.NDArray[np.uint8]


def _grey(values: npt.ArrayLike) -> Pixels:
    """Return an RGB picture [h, w, 3] with three equal channels."""
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., np.newaxis], 3, axis=2)


def test_enlarging_two_pixels_gives_a_ramp() -> None:
    out = preprocess(_grey([[0, 160], [0, 160]]), Preprocess(16, 16))
    ramp = [0, 0, 0, 0, 10, 30, 50, 70, 90, 110, 130, 150, 160, 160, 160, 160]
    assert out.dtype == np.uint8
    assert out.shape == (16, 16, 3)
    assert out.tolist() == _grey([ramp] * 16).tolist()


def test_halving_is_antialiased() -> None:
    # Each new pixel weighs its four neighbours 1, 3, 3, 1: a step from 0 to 160 becomes 0, 20, 140, 160.
    image = _grey([[0] * 16 + [160] * 16] * 32)
    assert preprocess(image, Preprocess(16, 16))[5, :, 0].tolist() == [0] * 7 + [20, 140] + [160] * 7


def test_fine_stripes_become_grey_and_not_stripes() -> None:
    image = _grey([[0, 200] * 64] * 128)
    assert np.unique(preprocess(image, Preprocess(16, 16))[:, 1:-1]).tolist() == [100]


def _surface(height: int, width: int) -> Pixels:
    """Return a picture with structure of every size, as of a real surface: noise blurred to several scales."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for scale in (1, 4, 16, 64):
        coarse = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (total / 4).astype(np.uint8)


def test_much_too_large_pictures_are_reduced_in_two_steps_to_nearly_the_same_pixels() -> None:
    large, moderate = _surface(1080, 1920), _surface(400, 640)
    one, two = Preprocess(224, 224, version=1), Preprocess(224, 224)
    difference = np.abs(preprocess(large, two).astype(int) - preprocess(large, one))
    assert difference.any()
    assert difference.mean() < 0.7
    assert difference.max() <= 8
    assert np.array_equal(preprocess(moderate, two), preprocess(moderate, one))


@pytest.mark.parametrize(
    ("size", "spec", "expected"),
    [
        ((1920, 1080), Preprocess(224, 224), 1080 / 224 / 2),
        ((1920, 1080), Preprocess(224, 224, "letterbox"), 1920 / 224 / 2),
        ((1920, 1080), Preprocess(224, 224, "crop"), 1080 / 224 / 2),
        ((1920, 1080), Preprocess(224, 224, roi=(0.0, 0.0, 0.25, 0.5)), 480 / 224 / 2),
        ((1920, 1080), Preprocess(224, 224, version=1), 1.0),
    ],
)
def test_how_much_smaller_a_picture_may_be_decoded(size: tuple[int, int], spec: Preprocess, expected: float) -> None:
    assert shrinks_by(size, spec) == pytest.approx(expected)


def test_equal_sizes_change_nothing_and_give_a_copy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    before = image.copy()
    for policy in ("squash", "crop", "letterbox"):
        out = preprocess(image, Preprocess(16, 20, policy))
        assert np.array_equal(out, image)
        out[:] = 7  # the caller owns it
        assert np.array_equal(image, before)


def test_a_picture_and_its_array_give_the_same_pixels() -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    spec = Preprocess(16, 24, "letterbox", (0.1, 0.0, 0.9, 0.8))
    assert np.array_equal(preprocess(image, spec), preprocess(Image.fromarray(image), spec))
    flipped = np.ascontiguousarray(image[::-1])
    assert np.array_equal(preprocess(image[::-1], spec), preprocess(flipped, spec))


def test_rows_and_columns_are_not_mixed_up() -> None:
    assert preprocess(_grey(np.zeros((10, 30))), Preprocess(16, 48)).shape == (16, 48, 3)


def test_roi_cuts_shares_of_the_picture() -> None:
    image = _grey(np.arange(32 * 64).reshape(32, 64) % 251)
    out = preprocess(image, Preprocess(16, 16, roi=(0.25, 0.5, 0.5, 1.0)))
    assert np.array_equal(out, image[16:32, 16:32])


def test_crop_cuts_the_longer_side_in_the_middle() -> None:
    image = _grey(np.arange(16 * 64).reshape(16, 64) % 251)
    assert np.array_equal(preprocess(image, Preprocess(16, 16, "crop")), image[:, 24:40])
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    assert np.array_equal(preprocess(tall, Preprocess(16, 16, "crop")), tall[24:40])


def test_letterbox_pads_with_black_above_and_below_or_left_and_right() -> None:
    out = preprocess(_grey(np.full((16, 32), 99)), Preprocess(16, 16, "letterbox"))
    assert out[:, 0, 0].tolist() == [0] * 4 + [99] * 8 + [0] * 4
    assert out[4:12].min() == 99
    out[:] = 7  # the caller owns it
    out = preprocess(_grey(np.full((32, 16), 99)), Preprocess(16, 16, "letterbox"))
    assert out[0, :, 0].tolist() == [0] * 4 + [99] * 8 + [0] * 4


def test_masks_keep_their_values_with_nearest() -> None:
    mask = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    nearest = Image.Resampling.NEAREST
    out = preprocess(mask, Preprocess(16, 16), resample=nearest)
    assert out.tolist() == [[0] * 8 + [255] * 8] * 8 + [[255] * 8 + [0] * 8] * 8
    grown = preprocess(np.full((20, 50), 255, np.uint8), Preprocess(20, 20, "letterbox"), resample=nearest)
    assert grown.shape == (20, 20)
    assert sorted(set(grown.ravel().tolist())) == [0, 255]


@pytest.mark.parametrize(
    ("size", "spec", "expected"),
    [
        pytest.param((200, 100), Preprocess(64, 64), (0, 0, 200, 100), id="squash sees all"),
        pytest.param((200, 100), Preprocess(64, 64, "letterbox"), (0, 0, 200, 100), id="letterbox sees all"),
        pytest.param((200, 100), Preprocess(64, 64, "crop"), (50, 0, 150, 100), id="crop, wide picture"),
        pytest.param((100, 200), Preprocess(64, 64, "crop"), (0, 50, 100, 150), id="crop, tall picture"),
        pytest.param((200, 100), Preprocess(50, 200, "crop"), (0, 25, 200, 75), id="crop to a wide input"),
        pytest.param((200, 100), Preprocess(64, 64, "squash", (0.1, 0.2, 0.6, 0.9)), (20, 20, 120, 90), id="roi"),
        pytest.param((200, 100), Preprocess(64, 64, "crop", (0.5, 0.0, 1.0, 0.5)), (125, 0, 175, 50), id="crop in roi"),
    ],
)
def test_source_box(size: tuple[int, int], spec: Preprocess, expected: tuple[float, ...]) -> None:
    assert source_box(size, spec) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("size", "spec", "expected"),
    [
        pytest.param((200, 100), Preprocess(64, 64), (0, 0, 64, 64), id="squash fills"),
        pytest.param((200, 100), Preprocess(64, 64, "crop"), (0, 0, 64, 64), id="crop fills"),
        pytest.param((200, 100), Preprocess(64, 64, "letterbox"), (16, 0, 32, 64), id="bars above and below"),
        pytest.param((100, 200), Preprocess(64, 64, "letterbox"), (0, 16, 64, 32), id="bars left and right"),
        pytest.param((100, 100), Preprocess(64, 96, "letterbox"), (0, 16, 64, 64), id="bars in a wide input"),
        pytest.param((10_000, 1), Preprocess(64, 64, "letterbox"), (31, 0, 1, 64), id="never thinner than a pixel"),
    ],
)
def test_content_area(size: tuple[int, int], spec: Preprocess, expected: tuple[int, ...]) -> None:
    assert content_area(size, spec) == expected


@pytest.mark.parametrize("policy", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("roi", [(0.0, 0.0, 1.0, 1.0), (0.25, 0.1, 0.95, 0.8)], ids=["whole", "roi"])
@pytest.mark.parametrize("size", [(320, 200), (150, 310)], ids=["wide", "tall"])
def test_a_bright_spot_comes_back_to_where_it_was(policy: Policy, roi: Roi, size: tuple[int, int]) -> None:
    """Picture to model input to feature grid and back to the picture: within a cell of the grid."""
    spec = Preprocess(64, 96, policy, roi)
    left, top, right, bottom = source_box(size, spec)
    for share_x, share_y in [(0.3, 0.7), (0.75, 0.4)]:
        x, y = left + share_x * (right - left), top + share_y * (bottom - top)
        image = np.zeros((size[1], size[0], 3), np.uint8)
        image[int(y) - 5 : int(y) + 6, int(x) - 5 : int(x) + 6] = 255
        pixels = preprocess(image, spec)[..., 0].astype(np.float32)
        grid = pixels.reshape(16, 4, 24, 4).mean(axis=(1, 3))
        found_y, found_x = _centre(map_to_source(grid, size, spec))
        assert found_x == pytest.approx(x, abs=0.02 * size[0] + 2)
        assert found_y == pytest.approx(y, abs=0.02 * size[1] + 2)


def _centre(picture: npt.NDArray[np.float32]) -> tuple[float, float]:
    weights = picture / picture.sum()
    rows, columns = np.indices(picture.shape)
    return float((weights * rows).sum()), float((weights * columns).sum())


def test_a_map_is_zero_where_the_model_saw_nothing() -> None:
    ones = np.ones((4, 4), np.float32)
    cropped = map_to_source(ones, (64, 32), Preprocess(32, 32, "crop"))
    assert cropped.shape == (32, 64)
    assert cropped[0].tolist() == [0.0] * 16 + [1.0] * 32 + [0.0] * 16
    part = map_to_source(ones, (40, 40), Preprocess(32, 32, roi=(0.5, 0.5, 1.0, 1.0)))
    assert part[:20].max() == part[:, :20].max() == 0
    assert part[20:, 20:].min() == 1


def test_the_bars_of_a_letterbox_reach_no_further_than_half_a_cell_into_the_picture() -> None:
    grid = np.full((8, 8), 50.0, np.float32)
    grid[2:6] = 1.0  # a 2:1 picture fills rows 2 to 5, 8 pixels each
    back = map_to_source(grid, (64, 32), Preprocess(32, 32, "letterbox"))
    assert back[4:28].min() == back[4:28].max() == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_any_size_policy_and_roi_give_the_right_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(1, 200, 2))
    left, right = sorted(rng.random(2).tolist())
    top, bottom = sorted(rng.random(2).tolist())
    policy: Any = rng.choice(["squash", "crop", "letterbox"])
    spec = Preprocess(int(rng.integers(16, 100)), int(rng.integers(16, 100)), str(policy), (left, top, right, bottom))  # type: ignore[arg-type]
    assert preprocess(np.zeros((height, width, 3), np.uint8), spec).shape == (spec.height, spec.width, 3)
    assert map_to_source(np.ones((5, 7), np.float32), (width, height), spec).shape == (height, width)
    box = source_box((width, height), spec)
    assert 0 <= box[0] < box[2] <= width
    assert 0 <= box[1] < box[3] <= height


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param({"height": 15}, "15x64", id="too low"),
        pytest.param({"width": 4097}, "64x4097", id="too wide"),
        pytest.param({"policy": "zoom"}, "'zoom'", id="policy"),
        pytest.param({"roi": (0.5, 0.0, 0.5, 1.0)}, "(0.5, 0.0, 0.5, 1.0)", id="empty roi"),
        pytest.param({"roi": (0.0, 0.6, 1.0, 0.4)}, "0.6", id="upside-down roi"),
        pytest.param({"roi": (-0.1, 0.0, 1.0, 1.0)}, "-0.1", id="roi outside, left"),
        pytest.param({"roi": (0.0, 0.0, 1.0, 1.1)}, "1.1", id="roi outside, below"),
        pytest.param({"roi": (math.nan, 0.0, 1.0, 1.0)}, "nan", id="roi of NaN"),
        pytest.param({"version": 3}, "version 3", id="newer version"),
    ],
)
def test_impossible_specifications_are_refused_with_the_value(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        Preprocess(**{"height": 64, "width": 64, **arguments})
    assert named in caught.value.what
    assert caught.value.hint
