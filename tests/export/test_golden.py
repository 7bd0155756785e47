"""Golden images: which pictures are stored, and that they reproduce their scores on every graph."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_export.golden import golden_from_images
from edge_anomaly_runtime.bundle import GoldenImage, Threshold, Thresholds, read_bundle
from edge_anomaly_runtime.images import load_image
from edge_anomaly_runtime.preprocess import Preprocess, preprocess
from edge_anomaly_runtime.session import SessionInfo, open_session

Pixels = npt.NDArray[np.uint8]
SPEC = Preprocess(32, 32)


class MeanSession:
    """Scores a picture with its mean grey level times `gain`; the map is that level everywhere."""

    def __init__(self, gain: float) -> None:
        self.info = SessionInfo("fake", "0", "CPU", "f32", 1)
        self.gain = gain
        self.open = True

    def run(self, images: Pixels) -> dict[str, npt.NDArray[np.float32]]:
        assert self.open
        assert images.shape == (1, 32, 32, 3)
        level = np.float32(images.mean() * self.gain)
        return {"score": np.full(1, level), "anomaly_map": np.full((1, 2, 2), level)}

    def close(self) -> None:
        self.open = False


def alarm_above(warn: float, fail: float) -> Thresholds:
    limits = [
        Threshold(value=value, alpha=0.01, method="conformal", n=100, order=100, upper95=0.03) for value in (warn, fail)
    ]
    return Thresholds(warn=limits[0], fail=limits[1], pixel=limits[1], scores={})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty noise pictures of 40 x 48 pixels, one level brighter each time."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [root / f"{index:02}.png" for index in range(20)]
    for index, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 100 + 5 * index, (40, 48, 3), dtype=np.uint8)).save(path)
    return paths


def inputs(paths: list[Path]) -> Pixels:
    return np.stack([preprocess(load_image(path), SPEC) for path in paths])


def golden(
    paths: list[Path], sessions: dict[str, MeanSession] | None = None, *, seed: int = 0
) -> tuple[list[GoldenImage], dict[str, bytes]]:
    sessions = sessions or {"fake/fp32": MeanSession(1.0)}
    openers = {key: (lambda session=session: session) for key, session in sessions.items()}
    limits = {key: alarm_above(60 * session.gain, 80 * session.gain) for key, session in sessions.items()}
    return golden_from_images(paths, inputs(paths), openers, limits, spec=SPEC, seed=seed)


def stored(files: dict[str, bytes], entry: GoldenImage) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(files[entry.file])))


# Which pictures


@pytest.mark.parametrize(("available", "expected"), [(1, 4), (5, 8), (6, 8), (8, 8), (20, 8)])
def test_up_to_five_normal_and_always_three_damaged_pictures_are_stored(
    pictures: list[Path], available: int, expected: int
) -> None:
    entries, files = golden(pictures[:available])
    assert [entry.file for entry in entries] == [f"golden/{index:03}.png" for index in range(expected)]
    assert set(files) == {entry.file for entry in entries} | {"golden/maps.npz"}


def test_five_are_whole_pictures_and_three_are_damaged_inputs(pictures: list[Path]) -> None:
    entries, files = golden(pictures)
    assert [entry.preprocessed for entry in entries] == [False] * 5 + [True] * 3
    for entry, path in zip(entries[:5], pictures, strict=False):
        assert np.array_equal(stored(files, entry), np.asarray(load_image(path))), (
            "the device must do the resize itself"
        )
    for index, entry in enumerate(entries[5:], start=5):
        changed = (stored(files, entry) != inputs(pictures)[index]).any(axis=2)
        assert 0.01 < changed.mean() <= 0.15


def test_large_pictures_are_stored_as_model_inputs(pictures: list[Path], tmp_path: Path) -> None:
    """Two megapixels and more would make the bundle heavy."""
    sizes = {"small.png": (1600, 1250), "large.png": (1601, 1250)}
    for name, size in sizes.items():
        Image.new("RGB", size, (100, 90, 80)).save(tmp_path / name)
    entries, files = golden([tmp_path / name for name in sizes])
    assert [stored(files, entry).shape for entry in entries[:2]] == [(1250, 1600, 3), (32, 32, 3)]
    assert [entry.preprocessed for entry in entries] == [False, True, True, True, True]


def test_the_seed_decides_the_damage(pictures: list[Path]) -> None:
    assert golden(pictures, seed=1) == golden(pictures, seed=1)
    first, second = golden(pictures, seed=1)[1], golden(pictures, seed=2)[1]
    assert [name for name in first if first[name] != second[name]] == [
        "golden/005.png",
        "golden/006.png",
        "golden/007.png",
        "golden/maps.npz",
    ]


# What is stored about them


def test_every_graph_gives_scores_verdicts_and_maps_by_its_own_thresholds(pictures: list[Path]) -> None:
    sessions = {"fake/fp32": MeanSession(1.0), "fake/int8": MeanSession(-2.0)}
    entries, files = golden(pictures, sessions)
    levels = inputs(pictures)[:5].mean(axis=(1, 2, 3))
    for entry, level in zip(entries, levels, strict=False):
        assert entry.scores == pytest.approx({"fake/fp32": level, "fake/int8": -2 * level}, rel=1e-5)
        # 45 to 60 is below the limits of 60 and 80, -90 to -120 is above those of -120 and -160.
        assert entry.verdicts == {"fake/fp32": "OK", "fake/int8": "NG"}
    with np.load(io.BytesIO(files["golden/maps.npz"]), allow_pickle=False) as maps:
        assert set(maps.files) == {"fake-fp32", "fake-int8"}
        assert (maps["fake-fp32"].shape, maps["fake-fp32"].dtype) == ((8, 2, 2), np.float32)
        assert maps["fake-int8"][:, 0, 0].tolist() == [entry.scores["fake/int8"] for entry in entries]
    assert not any(session.open for session in sessions.values())


def test_verdicts_follow_the_thresholds(tmp_path: Path) -> None:
    for index, level in enumerate((50, 60, 70, 90)):
        Image.new("RGB", (32, 32), (level, level, level)).save(tmp_path / f"{index}.png")
    entries, _ = golden(sorted(tmp_path.iterdir()))
    assert [entry.verdicts["fake/fp32"] for entry in entries[:4]] == ["OK", "OK", "WARN", "NG"]


# A real bundle


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_stored_images_reproduce_scores_maps_and_verdicts(bundle_folder: Path, engine: str, precision: str) -> None:
    bundle = read_bundle(bundle_folder)
    key, manifest = f"{engine}/{precision}", bundle.manifest
    session = open_session(bundle, engine=engine, precision=precision, threads=1)[0]
    maps = bundle.golden_maps()[key]
    assert len(manifest.golden) == len(maps) == 8
    for entry, expected in zip(manifest.golden, maps, strict=True):
        image = load_image(bundle_folder / entry.file)
        pixels = np.asarray(image) if entry.preprocessed else preprocess(image, manifest.input.preprocess)
        outputs = session.run(pixels[np.newaxis])
        score = float(outputs["score"][0])
        assert score == pytest.approx(entry.scores[key], rel=1e-4)
        assert np.abs(outputs["anomaly_map"][0] - expected).max() <= 1e-4 * expected.max()
        limits = manifest.thresholds[key]
        by_hand = "NG" if score > limits.fail.value else "WARN" if score > limits.warn.value else "OK"
        assert entry.verdicts[key] == by_hand
    session.close()


def test_damaged_golden_images_score_higher_than_most_normal_ones(bundle_folder: Path) -> None:
    """Else the self-test would never see an alarm."""
    golden_images = read_bundle(bundle_folder).manifest.golden
    for key in ("openvino/int8", "onnxruntime/fp32"):
        normal = [entry.scores[key] for entry in golden_images if not entry.preprocessed]
        damaged = [entry.scores[key] for entry in golden_images if entry.preprocessed]
        assert (len(normal), len(damaged)) == (5, 3)
        assert np.median(damaged) > max(normal)
