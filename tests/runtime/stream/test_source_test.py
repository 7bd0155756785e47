"""The synthetic camera: the same pictures every time, at its pace, with faults where they were asked for."""

from __future__ import annotations

import time

import numpy as np
import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.source import EndOfFile, Picture, SourceLost
from edge_anomaly_runtime.stream.source_test import TestSource, pattern_from_options


def pictures(number: int, scene: str = "moving", **options: str) -> list[Picture]:
    source = TestSource(pattern_from_options(scene, {"fps": "0", "size": "64x48", **options}))
    source.open()
    found = [source.read(1.0) for _ in range(number)]
    return [picture for picture in found if picture is not None]


def test_a_seed_gives_the_same_pictures_again_and_another_seed_others() -> None:
    first, again, other = (pictures(3, seed=seed) for seed in ("1", "1", "2"))

    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].pixels, other[0].pixels)
    assert first[0].pixels.shape == (48, 64, 3) and first[0].pixels.dtype == np.uint8
    assert not np.array_equal(first[0].pixels, first[1].pixels)


def test_faults_begin_and_end_where_they_were_asked_for() -> None:
    black = [int(picture.pixels.max()) for picture in pictures(6, black_at="2", for_frames="2")]
    white = [int(picture.pixels.min()) for picture in pictures(3, white_at="1")]

    assert [level == 0 for level in black] == [False, False, True, True, False, False]
    assert [level == 255 for level in white] == [False, True, True]


def test_a_frozen_camera_repeats_itself_to_the_last_bit() -> None:
    shown = pictures(8, frozen_at="3")

    assert not np.array_equal(shown[2].pixels, shown[3].pixels)
    assert all(np.array_equal(picture.pixels, shown[3].pixels) for picture in shown[4:])


def test_blur_and_defects_are_visible() -> None:
    sharp, blurred = (np.diff(picture.pixels.astype(int), axis=1) for picture in pictures(2, blurred_at="1", noise="0"))
    assert np.abs(blurred).mean() < np.abs(sharp).mean() / 2

    rows = [picture.pixels[12, 20:40].max() for picture in pictures(4, defect_every="2", noise="0")]
    assert [row <= 10 for row in rows] == [False, True, False, True]


def test_pictures_come_at_their_pace_and_not_before() -> None:
    source = TestSource(pattern_from_options("moving", {"fps": "20", "size": "64x48"}))
    source.open()
    start = time.monotonic()
    times = [picture.pts for picture in (source.read(1.0) for _ in range(6)) if picture is not None]

    assert 0.25 <= time.monotonic() - start < 1.0
    assert times == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25])
    assert source.read(0.001) is None


def test_it_ends_or_breaks_as_told() -> None:
    with pytest.raises(EndOfFile):
        pictures(4, count="3")
    with pytest.raises(SourceLost):
        pictures(4, lost_at="2")


@pytest.mark.parametrize(
    ("scene", "options", "what"),
    [
        ("mooving", {}, "moving"),
        ("moving", {"sede": "1"}, "seed"),
        ("moving", {"fps": "fast"}, "is no number"),
        ("moving", {"size": "640"}, "has no size"),
        ("moving", {"size": "4x4"}, "cannot make"),
    ],
)
def test_wrong_options_are_named(scene: str, options: dict[str, str], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        pattern_from_options(scene, options)
