"""The drawn data set: layout, reproducibility, honest masks, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly.sample_data import DEFECTS, draw_defect, draw_normal, draw_sample_data
from edge_anomaly_runtime.errors import UsageError

SIZE = 96
SEED = 7


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "data"
    draw_sample_data(out, seed=SEED, train=3, test_good=2, per_defect=2, size=SIZE)
    return out


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_layout_is_that_of_mvtec_ad(sample: Path) -> None:
    expected = {"README.md", "train/good/000.png", "train/good/001.png", "train/good/002.png"}
    expected |= {"test/good/000.png", "test/good/001.png"}
    for kind in ("scratch", "hole", "stain", "missing_part"):
        expected |= {f"test/{kind}/{index:03d}.png" for index in range(2)}
        expected |= {f"ground_truth/{kind}/{index:03d}_mask.png" for index in range(2)}
    assert set(_files(sample)) == expected


def test_counts_by_folder_are_returned_and_progress_reaches_the_total(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    counts = draw_sample_data(
        tmp_path / "data",
        train=2,
        test_good=0,
        per_defect=1,
        size=64,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert counts == {
        "train/good": 2,
        "test/good": 0,
        "test/scratch": 1,
        "test/hole": 1,
        "test/stain": 1,
        "test/missing_part": 1,
    }
    assert steps == [(step, 6) for step in range(1, 7)]
    assert not (tmp_path / "data/test/good").exists()


def test_readme_states_origin_seed_counts_and_licence(sample: Path) -> None:
    text = (sample / "README.md").read_text(encoding="utf-8")
    for words in ("edge-anomaly sample-data", f"seed {SEED}", "3 in train/good", "2 in test/stain", "Apache-2.0"):
        assert words in text


def test_images_are_rgb_bytes_of_the_asked_size(sample: Path) -> None:
    for path in [*sample.glob("train/*/*.png"), *sample.glob("test/*/*.png")]:
        pixels = _pixels(path)
        assert pixels.shape == (SIZE, SIZE, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("kind", DEFECTS)
def test_masks_are_binary_and_of_a_sensible_area(sample: Path, kind: str) -> None:
    for path in (sample / "ground_truth" / kind).iterdir():
        mask = _pixels(path)
        assert mask.shape == (SIZE, SIZE)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask).tolist()) == {0, 255}
        assert 0.0002 < (mask > 0).mean() < 0.15


def test_same_seed_gives_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    draw_sample_data(tmp_path / "again", seed=SEED, train=3, test_good=2, per_defect=2, size=SIZE)
    assert _files(tmp_path / "again") == _files(sample)


def test_another_seed_gives_other_images(sample: Path, tmp_path: Path) -> None:
    draw_sample_data(tmp_path / "other", seed=SEED + 1, train=3, test_good=2, per_defect=2, size=SIZE)
    before, after = _files(sample), _files(tmp_path / "other")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] == after[name]] == []


def test_no_two_images_are_alike(sample: Path) -> None:
    images = [data for name, data in _files(sample).items() if name.endswith(".png")]
    assert len(set(images)) == len(images)


def test_counts_do_not_change_the_other_images(sample: Path, tmp_path: Path) -> None:
    draw_sample_data(tmp_path / "fewer", seed=SEED, train=1, test_good=1, per_defect=1, size=SIZE)
    full, fewer = _files(sample), _files(tmp_path / "fewer")
    images = [name for name in fewer if name.endswith(".png")]
    assert len(images) == 10
    assert all(fewer[name] == full[name] for name in images)


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("size", [64, 200])
def test_damage_is_inside_the_mask_and_nowhere_else(kind: str, size: int) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        normal = draw_normal(rng, size)
        damaged, mask = draw_defect(rng, normal, kind)
        change = np.abs(damaged.astype(int) - normal).max(axis=2)
        assert change[mask == 0].max() == 0
        assert change[mask > 0].mean() > 12
        assert (change[mask > 0] >= 4).mean() > 0.85
        assert 0.0002 < (mask > 0).mean() < 0.15


@pytest.mark.parametrize("kind", DEFECTS)
def test_damage_lies_on_the_part_and_varies(kind: str) -> None:
    x, y = np.meshgrid(np.arange(128) - 63.5, np.arange(128) - 63.5)
    radius = np.hypot(x, y) / 128
    masks = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        _, mask = draw_defect(rng, draw_normal(rng, 128), kind)
        masks.append(mask.tobytes())
        assert radius[mask > 0].max() < 0.44, "off the plate"
        assert radius[mask > 0].min() > 0.08, "in the bore"
    assert len(set(masks)) == len(masks)


def test_missing_part_replaces_all_the_yellow_of_exactly_one_screw() -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        normal = draw_normal(rng, 256)
        damaged, mask = draw_defect(rng, normal, "missing_part")
        before, after = _yellow(normal), _yellow(damaged)
        assert after.sum() / before.sum() == pytest.approx(5 / 6, abs=0.02)
        assert not (after & (mask > 0)).any()


def _yellow(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    red_over_blue = image[..., 0].astype(int) - image[..., 2]
    return np.asarray(red_over_blue > 40)


def test_drawing_a_defect_leaves_the_given_image_alone() -> None:
    rng = np.random.default_rng(0)
    normal = draw_normal(rng, 64)
    copy = normal.copy()
    draw_defect(rng, normal, "stain")
    assert np.array_equal(normal, copy)


def test_normal_images_vary_within_the_range_of_one_production_line() -> None:
    images = [draw_normal(np.random.default_rng(seed), 128).astype(float) for seed in range(12)]
    means = np.array([image.mean() for image in images])
    assert 1.0 < means.std() < 0.08 * means.mean()
    mean_image = np.mean(images, axis=0)
    for image in images:
        difference = np.abs(image - mean_image).mean()
        assert 2.0 < difference < 20.0


def test_unknown_defect_names_the_choices() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="'scratsh'") as caught:
        draw_defect(rng, draw_normal(rng, 64), "scratsh")
    assert "'scratch'" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        pytest.param({"size": 63}, "63", id="too small"),
        pytest.param({"size": 2049}, "2049", id="too large"),
        pytest.param({"train": -1}, "train is -1", id="negative train"),
        pytest.param({"test_good": -2}, "test_good is -2", id="negative test_good"),
        pytest.param({"per_defect": -3}, "per_defect is -3", id="negative per_defect"),
        pytest.param({"seed": -4}, "seed is -4", id="negative seed"),
    ],
)
def test_impossible_arguments_are_refused_with_their_value(
    tmp_path: Path, arguments: dict[str, int], value: str
) -> None:
    with pytest.raises(UsageError, match=value):
        draw_sample_data(tmp_path / "data", **arguments)  # type: ignore[arg-type]  # all are int options
    assert list(tmp_path.iterdir()) == []


def _draw_one(out: Path, *, force: bool = False) -> None:
    draw_sample_data(out, train=1, test_good=0, per_defect=0, size=64, force=force)


def test_folder_with_content_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="data exists") as caught:
        _draw_one(out)
    assert "--force" in caught.value.hint
    assert _files(tmp_path) == {"data/mine.txt": b"keep"}


def test_file_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.write_text("keep")
    with pytest.raises(UsageError, match="data exists"):
        _draw_one(out)
    assert out.read_text() == "keep"


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _draw_one(tmp_path / "data")
    assert set(_files(tmp_path)) == {"data/README.md", "data/train/good/000.png"}


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "old.txt").write_text("old")
    _draw_one(out, force=True)
    assert set(_files(tmp_path)) == {"data/README.md", "data/train/good/000.png"}


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_interruption_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(type(error)):
        draw_sample_data(tmp_path / "data", train=2, test_good=0, per_defect=0, size=64, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_interruption_under_force_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "old.txt").write_text("old")

    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw_sample_data(out, train=1, test_good=0, per_defect=0, size=64, force=True, on_progress=stop)
    assert _files(tmp_path) == {"data/old.txt": b"old"}
