"""Damage that no decoder reports, and pictures that show nothing: what is found, when, and what is left alone."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from edge_anomaly_runtime.stream.health import BLACK, BLURRED, FROZEN, WHITE, WRONG_SIZE, Health, HealthLimits, Trust
from edge_anomaly_runtime.stream.source import Picture
from edge_anomaly_runtime.stream.source_test import TestSource, pattern_from_options

from .camera import Script, encode

PIXELS = np.zeros((16, 16, 3), np.uint8)


def trust_of(*pictures: tuple[float | None, bool, str]) -> list[str]:
    """Return what is said of pictures given as (time, key frame, fault)."""
    trust = Trust()
    return [trust.check(Picture(PIXELS, pts, key, fault)) for pts, key, fault in pictures]


def steady(count: int, start: float = 0.0) -> list[tuple[float | None, bool, str]]:
    return [(start + n * 0.04, n == 0, "") for n in range(count)]


# Trust


def test_a_clean_stream_is_trusted_from_its_first_key_frame_on() -> None:
    assert trust_of((0.0, False, ""), (0.04, False, ""), (0.08, True, ""), (0.12, False, "")) == [
        *("no key frame yet", "no key frame yet", "", "")
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ((0.24, False, ""), "gap in the stream"),
        ((0.20, False, "corrupt packet"), "corrupt packet"),
        ((0.16, False, ""), "time went back"),
        ((None, False, ""), "no time stamp"),
    ],
)
def test_after_a_fault_nothing_is_trusted_until_a_key_frame(bad: tuple[Any, bool, str], reason: str) -> None:
    after = [(0.28, False, ""), (0.32, False, ""), (0.36, True, ""), (0.40, False, "")]

    found = trust_of(*steady(5), bad, *after)

    assert not any(found[:5])
    assert found[5] == reason and found[6] and found[7]
    assert found[8:] == ["", ""]


def test_a_damaged_key_frame_heals_nothing() -> None:
    found = trust_of(*steady(5), (0.2, True, "corrupt frame"), (0.24, False, ""), (0.28, True, ""))

    assert found[5:] == ["corrupt frame", "corrupt frame", ""]


def test_a_camera_that_halves_its_frame_rate_is_trusted_again() -> None:
    slower = [(0.4 + n * 0.08, n % 5 == 3, "") for n in range(30)]

    found = trust_of(*steady(10), *slower)

    assert found[11] == "gap in the stream"
    assert not any(found[25:])


def test_pictures_without_any_time_are_judged_by_their_flags_alone() -> None:
    assert trust_of((None, True, ""), (None, True, ""), (None, True, "truncated JPEG"), (None, True, "")) == [
        *("", "", "truncated JPEG", "")
    ]


# Exposure, size, focus


def texture(seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(60, 160, (120, 160, 3), dtype=np.uint8)


@pytest.mark.parametrize(("level", "reason"), [(0, BLACK), (4, BLACK), (6, ""), (249, ""), (251, WHITE), (255, WHITE)])
def test_black_and_white_are_seen_in_the_first_picture(level: int, reason: str) -> None:
    assert Health().check(Picture(np.full((120, 160, 3), level, np.uint8)), 0.0) == reason


def test_a_limit_that_fits_dark_parts_keeps_them_valid() -> None:
    dark = Picture(np.full((120, 160, 3), 3, np.uint8))

    assert Health(HealthLimits(black=1.0)).check(dark, 0.0) == ""


def test_another_size_than_the_expected_one_is_invalid() -> None:
    health = Health(HealthLimits(size=(160, 120)))

    assert health.check(Picture(texture()), 0.0) == ""
    assert health.check(Picture(texture()[:100]), 0.04) == WRONG_SIZE


def test_a_strong_blur_is_seen_within_two_seconds_and_ends_with_it() -> None:
    health, found = Health(), []
    blurred = np.array(Image.fromarray(texture()).filter(ImageFilter.GaussianBlur(6)))
    for n in range(200):
        pixels = blurred if 150 <= n < 180 else texture(n)
        found.append(health.check(Picture(pixels, is_keyframe=True), n * 0.1))

    assert not any(found[:150])
    assert found.index(BLURRED) <= 150 + 20
    assert not any(found[180:])


def test_an_empty_belt_between_two_parts_is_not_out_of_focus() -> None:
    belt = np.full((120, 160, 3), 100, np.uint8)
    health, found = Health(), []
    for n in range(600):
        is_part = n // 30 % 2 == 0
        noise = np.random.default_rng(n).normal(0, 2, belt.shape)
        pixels = texture(n) if is_part else np.clip(belt + noise, 0, 255).astype(np.uint8)
        found.append(health.check(Picture(pixels), n * 0.1))

    assert not any(found)


def test_few_pictures_are_not_enough_to_judge_focus() -> None:
    health = Health()
    assert health.check(Picture(texture()), 0.0) == ""
    assert health.check(Picture(np.full((120, 160, 3), 100, np.uint8)), 2.0) == ""


# Frozen, behind a real encoder


def decoded(script: Script, count: int) -> list[Picture]:
    decoder: Any = av.CodecContext.create("h264", "r")
    pictures = []
    for number, unit in enumerate(encode(script, count)):
        for frame in decoder.decode(av.Packet(unit)):
            pictures.append(Picture(frame.to_ndarray(format="rgb24"), number / script.fps, bool(frame.key_frame)))
    return pictures


def first_alarm(pictures: list[Picture], fps: int) -> float | None:
    """Return the stream time in seconds of the first picture that is called frozen."""
    health = Health()
    for number, picture in enumerate(pictures):
        if health.check(picture, 1000 + number / fps) == FROZEN:
            return number / fps
    return None


def test_a_frozen_camera_is_found_within_12_seconds() -> None:
    script = Script(fault="frozen", at=50, fps=10, noise=1.0)

    alarm = first_alarm(decoded(script, 180), 10)

    assert alarm is not None and 5 < alarm <= 5 + 12


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_a_minute_of_a_live_resting_scene_gives_no_alarm(noise: float) -> None:
    assert first_alarm(decoded(Script(is_moving=False, fps=10, noise=noise), 600), 10) is None


def test_a_camera_that_thaws_is_valid_at_once_and_tells_since_when_it_was_still() -> None:
    health, found = Health(), []
    for number in range(120):
        pixels = texture(30 if 30 <= number < 100 else number)
        found.append(health.check(Picture(pixels, is_keyframe=number % 10 == 0), number / 10))
        if number == 90:
            assert health.still_since_s == pytest.approx(3.0, abs=1.5)

    assert FROZEN in found[30:100]
    assert FROZEN not in found[:30] + found[115:]
    assert health.still_since_s is None


def test_a_new_connection_starts_with_a_clean_slate() -> None:
    health = Health()
    for number in range(60):
        last = health.check(Picture(texture()), number / 10)
    assert last == FROZEN

    health.restart()

    assert health.check(Picture(texture()), 6.0) == ""


def test_the_synthetic_camera_freezes_as_told() -> None:
    options = {"fps": "0", "size": "64x48", "frozen_at": "20", "count": "200"}
    source = TestSource(pattern_from_options("moving", options))
    source.open()
    pictures = [picture for picture in (source.read(1.0) for _ in range(200)) if picture is not None]

    alarm = first_alarm(pictures, 25)

    assert alarm is not None and 2.8 <= alarm < 6
