from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edge_anomaly.padim import PadimConfig
from edge_anomaly.runs import load_model, load_run, newest_run
from edge_anomaly.train import TrainOptions, train_detector
from edge_anomaly_runtime.errors import ArtefactError, ImageError, UsageError
from edge_anomaly_runtime.preprocess import Preprocess

CONFIG = PadimConfig(backbone="efficientnet_lite0", dims=8)
SMALL = Preprocess(32, 32)


def make_images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(80, 120, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


def test_run_holds_what_was_trained_on_what(run_folder: Path, sample_folder: Path) -> None:
    run = load_run(run_folder)

    assert (len(run.fit), len(run.holdout), len(run.test)) == (48, 12, 32)
    assert not set(run.fit) & set(run.holdout)
    assert run.config == PadimConfig(backbone="efficientnet_lite0", dims=32)
    assert run.preprocess == Preprocess(128, 128)
    assert run.thresholds.fail.n == 12
    assert 0 < run.thresholds.warn.value <= run.thresholds.fail.value
    assert run.data["name"] == sample_folder.name
    assert run.versions["torch"] == version("torch")


def test_loaded_model_scores_like_the_trained_one(run_folder: Path) -> None:
    """The stored held-out scores come back: weights, Gaussian and preprocessing were all kept."""
    from edge_anomaly.prediction import predict, read_pixels, torch_scores

    run = load_run(run_folder)
    _, pixels = read_pixels(run.holdout, run.preprocess, strict=True, what="test")
    scores = predict(torch_scores(load_model(run)), pixels, what="test", total=len(pixels)).scores

    assert scores.max() == pytest.approx(run.thresholds.scores["max"], rel=1e-6)
    assert scores.mean() == pytest.approx(run.thresholds.scores["mean"], rel=1e-6)


def test_same_seed_gives_identical_weights(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 15)
    for name in ("first", "second"):
        train_detector(str(data), tmp_path / name, config=CONFIG, preprocess=SMALL)

    first, second = (load_model(load_run(tmp_path / name)).state_dict() for name in ("first", "second"))

    assert all(torch.equal(first[key], second[key]) for key in first)


def test_bad_files_are_skipped_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "data", 30)
    (data / "003.png").write_bytes(b"")
    (data / "007.png").write_bytes((data / "008.png").read_bytes()[:100])

    run = train_detector(str(data), tmp_path / "run", config=CONFIG, preprocess=SMALL)

    said = capsys.readouterr().err
    assert len(run.fit) + len(run.holdout) == 28
    assert "003.png: the file is empty" in said
    assert "007.png" in said


def test_strict_stops_at_the_first_bad_file_and_leaves_nothing(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 30)
    for path in data.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        train_detector(str(data), tmp_path / "run", config=CONFIG, preprocess=SMALL, options=TrainOptions(strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_folder_with_only_unreadable_images_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for index in range(30):
        (data / f"{index}.jpg").write_bytes(b"not a picture")
    with pytest.raises(UsageError, match="None of the 24 images could be read"):
        train_detector(str(data), tmp_path / "run", config=CONFIG, preprocess=SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "text"), [(1, "1 normal images cannot be split"), (5, "4 images to fit on")])
def test_too_few_images_are_refused(tmp_path: Path, count: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        train_detector(str(make_images(tmp_path / "data", count)), tmp_path / "run", config=CONFIG, preprocess=SMALL)


def test_head_size_is_said_before_fitting_and_few_images_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_detector(str(make_images(tmp_path / "data", 15)), tmp_path / "run", config=CONFIG, preprocess=SMALL)

    said = capsys.readouterr().err
    assert said.index("fitting on 12 images") < said.index("head 0.0 MB") < said.index("fail above")
    assert "Warning: 12 images are few for 8 channels; 50 or more" in said


def test_existing_run_is_kept_unless_forced(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", 15)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="--force"):
        train_detector(str(data), tmp_path / "run", config=CONFIG, preprocess=SMALL)
    assert (tmp_path / "run/mine.txt").read_text() == "keep"

    train_detector(str(data), tmp_path / "run", config=CONFIG, preprocess=SMALL, options=TrainOptions(force=True))
    assert not (tmp_path / "run/mine.txt").exists()


def test_roi_and_policy_reach_the_run(tmp_path: Path) -> None:
    spec = Preprocess(32, 32, "letterbox", (0.1, 0.2, 0.9, 0.8))

    train_detector(str(make_images(tmp_path / "data", 15)), tmp_path / "run", config=CONFIG, preprocess=spec)

    assert load_run(tmp_path / "run").preprocess == spec


@pytest.mark.parametrize("damage", ["no record", "cut record", "other schema", "cut weights", "no weights"])
def test_damaged_run_is_refused(run_folder: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    record, weights = run / "run.json", run / "model.safetensors"
    if damage == "no record":
        record.unlink()
    elif damage == "cut record":
        record.write_text(record.read_text()[:200])
    elif damage == "other schema":
        record.write_text(json.dumps({**json.loads(record.read_text()), "schema": "edge-anomaly.run/9"}))
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    with pytest.raises(ArtefactError, match="run"):
        load_model(load_run(run))


def test_newest_run_is_the_one_written_last(tmp_path: Path) -> None:
    import os

    for age, name in enumerate(["b", "a"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        os.utime(tmp_path / name / "run.json", (1000 + age, 1000 + age))
    assert newest_run(tmp_path).name == "a"
    with pytest.raises(UsageError, match="no finished run"):
        newest_run(tmp_path / "a")
