"""Choice of calibration images: by seed, spread over folders, some damaged, all of it in one hash."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_calibration.selection import StratifiedImages, choose_calibration_images, synthetic_anomaly
from edge_anomaly_runtime.errors import ImageError, UsageError
from edge_anomaly_runtime.preprocess import Preprocess

SPEC = Preprocess(32, 32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise pictures of the model's size: 2 in `a`, 10 in `b`, 30 in `c`."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    counts = {"a": 2, "b": 10, "c": 30}
    paths = [root / folder / f"{index:02}.png" for folder, count in counts.items() for index in range(count)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return paths


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(path))


# Which images


def test_a_seed_gives_the_same_choice_whatever_the_order_of_the_files(pictures: list[Path]) -> None:
    first = choose_calibration_images(pictures, SPEC, count=12, seed=5)
    again = choose_calibration_images(pictures[::-1], SPEC, count=12, seed=5)
    assert (first.paths, first.synthetic, first.sha256()) == (again.paths, again.synthetic, again.sha256())


def test_another_seed_gives_another_choice(pictures: list[Path]) -> None:
    choices = [choose_calibration_images(pictures, SPEC, count=12, seed=seed) for seed in range(5)]
    assert len({frozenset(choice.paths) for choice in choices}) == 5
    assert len({choice.synthetic for choice in choices}) > 1


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, {"a": 1, "b": 1, "c": 1}),
        (12, {"a": 2, "b": 5, "c": 5}),
        (40, {"a": 2, "b": 10, "c": 28}),
    ],
)
def test_folders_are_dealt_out_in_turn(pictures: list[Path], count: int, expected: dict[str, int]) -> None:
    chosen = choose_calibration_images(pictures, SPEC, count=count).paths
    assert Counter(path.parent.name for path in chosen) == expected
    assert len(set(chosen)) == count


def test_every_image_of_a_folder_can_be_chosen(pictures: list[Path]) -> None:
    seen = {path for seed in range(40) for path in choose_calibration_images(pictures, SPEC, count=12, seed=seed).paths}
    assert seen == set(pictures)


def test_a_count_above_what_is_there_takes_all(pictures: list[Path]) -> None:
    assert sorted(choose_calibration_images(pictures, SPEC, count=1000).paths) == sorted(pictures)


@pytest.mark.parametrize(
    ("share", "count", "damaged"), [(0.0, 8, 0), (0.25, 8, 2), (0.5, 8, 4), (0.5, 7, 4), (1.0, 8, 8)]
)
def test_share_of_synthetic_anomalies(pictures: list[Path], share: float, count: int, damaged: int) -> None:
    chosen = choose_calibration_images(pictures, SPEC, count=count, synthetic_share=share)
    assert len(chosen.synthetic) == damaged
    assert chosen.synthetic <= set(range(count))


def test_no_images_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="INT8 needs calibration images"):
        choose_calibration_images([], SPEC)


@pytest.mark.parametrize(("count", "share"), [(0, 0.5), (-1, 0.5), (8, 1.5), (8, -0.1)])
def test_impossible_counts_and_shares_are_refused(pictures: list[Path], count: int, share: float) -> None:
    with pytest.raises(UsageError, match="not possible"):
        choose_calibration_images(pictures, SPEC, count=count, synthetic_share=share)


# What the images look like


def test_only_the_synthetic_images_are_damaged_and_every_pass_is_the_same(pictures: list[Path]) -> None:
    chosen = choose_calibration_images(pictures, SPEC, count=12)
    first, second = np.stack(list(chosen)), np.stack(list(chosen))
    assert first.shape == (12, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    changed = {index for index, path in enumerate(chosen.paths) if not np.array_equal(first[index], pixels(path))}
    assert changed == chosen.synthetic


def test_the_seed_decides_the_damage(pictures: list[Path]) -> None:
    one = choose_calibration_images(pictures[:1], SPEC, synthetic_share=1.0, seed=1)
    other = choose_calibration_images(pictures[:1], SPEC, synthetic_share=1.0, seed=2)
    assert one.paths == other.paths
    assert not np.array_equal(next(iter(one)), next(iter(other)))


def test_an_unreadable_image_is_not_skipped(pictures: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"bad\.png"):
        list(choose_calibration_images([pictures[0], bad], SPEC))


# The hash


def test_the_hash_tells_everything_that_changes_the_images(pictures: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures[0].parent, tmp_path / "a"))
    paths = sorted(folder.iterdir())
    base = choose_calibration_images(paths, SPEC, seed=3)
    hashes = {
        "base": base.sha256(),
        "seed": replace(base, seed=4).sha256(),
        "damaged": replace(base, synthetic=frozenset({0, 1})).sha256(),
        "order": replace(base, paths=base.paths[::-1]).sha256(),
        "fewer": replace(base, paths=base.paths[:1]).sha256(),
        "size": replace(base, spec=Preprocess(32, 48)).sha256(),
        "policy": replace(base, spec=Preprocess(32, 32, "crop")).sha256(),
        "roi": replace(base, spec=Preprocess(32, 32, roi=(0, 0, 1, 0.5))).sha256(),
    }
    data = bytearray(paths[1].read_bytes())
    data[-20] ^= 1
    paths[1].write_bytes(data)
    hashes["one bit of one file"] = base.sha256()
    assert len(set(hashes.values())) == len(hashes), hashes
    assert all(len(value) == 64 for value in hashes.values())


def test_the_hash_does_not_depend_on_where_the_files_lie(pictures: list[Path], tmp_path: Path) -> None:
    folder = pictures[0].parent
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    here = choose_calibration_images(sorted(folder.iterdir()), SPEC)
    there = choose_calibration_images(sorted(moved.iterdir()), SPEC)
    assert here.sha256() == there.sha256()


# Synthetic anomalies


@pytest.mark.parametrize("shape", [(128, 128, 3), (64, 96, 3), (200, 120, 3)])
def test_an_anomaly_is_one_rectangle_of_2_to_15_percent(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    shares = []
    for seed in range(300):
        result = synthetic_anomaly(image, np.random.default_rng(seed))
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        rows, columns = np.nonzero((result != image).any(axis=2))
        height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        assert rows.size > 0.9 * height * width, f"seed {seed}: not a full rectangle"
        shares.append(height * width / (shape[0] * shape[1]))
        # Whole pixels: each side may be up to one pixel short.
        assert (height + 1) * (width + 1) >= 0.02 * shape[0] * shape[1], seed
    assert max(shares) <= 0.15
    assert np.mean(shares) == pytest.approx(0.085, abs=0.01)
    assert min(shares) == pytest.approx(0.02, abs=0.01)
    assert max(shares) == pytest.approx(0.15, abs=0.01)


def test_anomalies_are_noise_or_a_changed_piece_of_the_picture() -> None:
    """On a picture of two flat tones noise shows many tones, a pasted piece at most two more."""
    image = np.full((64, 64, 3), 90, dtype=np.uint8)
    image[:, 32:] = 160
    tones = [np.unique(synthetic_anomaly(image, np.random.default_rng(seed))).size for seed in range(200)]
    noisy = sum(tone > 50 for tone in tones)
    assert sum(tone <= 4 for tone in tones) == 200 - noisy
    assert 70 <= noisy <= 130


def test_a_pasted_piece_changes_brightness_by_up_to_40_percent() -> None:
    image = np.full((64, 64, 3), 100, dtype=np.uint8)
    results = [synthetic_anomaly(image, np.random.default_rng(seed)) for seed in range(300)]
    levels = [int(np.unique(result[result != 100])[0]) for result in results if np.unique(result).size == 2]
    assert len(levels) > 100
    assert 60 <= min(levels) < 65
    assert 135 < max(levels) <= 140


def test_bright_pieces_are_clipped_not_wrapped() -> None:
    image = np.full((64, 64, 3), 250, dtype=np.uint8)
    results = [synthetic_anomaly(image, np.random.default_rng(seed)) for seed in range(100)]
    pasted = [result for result in results if np.unique(result).size <= 2]
    assert min(int(result.min()) for result in pasted) >= 149


def test_the_input_is_not_modified() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    before = image.copy()
    image.flags.writeable = False
    for seed in range(20):
        synthetic_anomaly(image, np.random.default_rng(seed))[...] = 0
    assert np.array_equal(image, before)


# A classifier's pictures


def test_classes_are_dealt_out_in_turn_and_nothing_is_damaged() -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1).repeat(3, axis=3)
    labels = np.repeat([0, 1, 2], [40, 15, 5])
    images = StratifiedImages.choose(pixels, labels, count=24, seed=1)
    kinds = [int(labels[image[0, 0, 0]]) for image in images]
    assert [kinds.count(kind) for kind in range(3)] == [10, 9, 5], "as many of each as there are"
    assert images.count == 24 and not images.synthetic
    again, other = (StratifiedImages.choose(pixels, labels, count=24, seed=seed) for seed in (1, 2))
    assert again.sha256() == images.sha256() != other.sha256()
    assert all(np.array_equal(first, second) for first, second in zip(images, images, strict=True))


def test_no_pictures_or_no_count_is_refused() -> None:
    pixels, labels = np.zeros((3, 1, 1, 3), dtype=np.uint8), np.zeros(3, dtype=np.int64)
    with pytest.raises(UsageError, match="0 calibration images of 3 pictures"):
        StratifiedImages.choose(pixels, labels, count=0)
    with pytest.raises(UsageError, match="8 calibration images of 0 pictures"):
        StratifiedImages.choose(pixels[:0], labels[:0], count=8)
