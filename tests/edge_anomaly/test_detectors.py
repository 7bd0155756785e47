"""Every detector goes the same way: train, run folder, back again, the same scores; interrupted ones go on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_anomaly.detectors import DETECTORS, config_from_record, kind_of
from edge_anomaly.evaluate import evaluate_items, open_judge
from edge_anomaly.evaluation_report import image_features, report_detector, training_records
from edge_anomaly.prediction import predict, torch_scores
from edge_anomaly.runs import load_model, load_run
from edge_anomaly.train import TrainOptions, train_detector
from edge_anomaly.vit_knn import VitKnnConfig
from edge_anomaly_runtime.errors import ArtefactError, UsageError
from tests.small_models import CONFIGS, SMALL


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_comes_back_with_the_scores_that_it_was_saved_with(detector_runs: dict[str, Path], name: str) -> None:
    run = load_run(detector_runs[name])
    model = load_model(run)
    from edge_anomaly.image_set import ImageSet

    holdout = ImageSet(run.holdout, run.preprocess)
    scores = predict(torch_scores(model), [holdout.image(i) for i in range(len(holdout))], what="", total=12).scores
    assert kind_of(run.config) == run.kind == name.removesuffix("-b")
    assert scores.max() == pytest.approx(run.thresholds.scores["max"], rel=1e-5)
    assert scores.min() == pytest.approx(run.thresholds.scores["min"], rel=1e-5)


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"autoencoder"}))
def test_a_trained_detector_tells_defects_from_good_parts(detector_runs: dict[str, Path], name: str) -> None:
    """All defects of the drawn parts are visible; even two epochs on 48 images of 64 px must beat a coin.

    (Not so one epoch of an autoencoder that starts from nothing.)
    """
    with open_judge(detector_runs[name]) as judge:
        figures, _, _ = evaluate_items(judge, load_run(detector_runs[name]).test)
    assert figures["image"]["auroc"] > 0.6
    assert figures["distinct_scores"] > 0.9


@pytest.mark.parametrize("name", ["stpm", "padim"])
def test_the_report_of_a_run_is_written_whole(detector_runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    run = load_run(detector_runs[name])
    with open_judge(detector_runs[name]) as judge:
        figures, items, predictions = evaluate_items(judge, run.test)
        page = report_detector(detector_runs[name], tmp_path / "report", judge, items, predictions, figures)
    text = page.read_text()
    assert f"{figures['image']['auroc']:.4f}" in text
    assert ("training.png" in text) == (name == "stpm")
    assert len(training_records(detector_runs[name])) == (8 if name == "stpm" else 0)
    assert not (tmp_path / "report/.tmp").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_json(name: str) -> None:
    config = CONFIGS[name]
    assert config_from_record(kind_of(config), json.loads(json.dumps(asdict(config)))) == config


def test_an_unknown_detector_in_a_run_is_refused() -> None:
    with pytest.raises(ArtefactError, match="no detector 'spade'"):
        config_from_record("spade", {})


def test_each_detector_says_what_it_is_about_to_do() -> None:
    for name, config in CONFIGS.items():
        lines = DETECTORS[name.removesuffix("-b")].announce(config, 224, 224, 100)
        assert lines and all(isinstance(line, str) and line for line in lines)


def test_random_vit_trains_without_a_hub(sample_folder: Path, tmp_path: Path) -> None:
    from edge_anomaly.vit_knn import VIT_BASE

    sizes = {"hidden": 32, "layers": 2, "heads": 2, "mlp": 64, "patch": 16, "image_size": 64}
    tiny = {**asdict(VIT_BASE), **sizes}
    config = VitKnnConfig(architecture=tiny, blocks=(0, 1))
    train_detector(str(sample_folder), tmp_path / "run", config=config, preprocess=SMALL, weights="random")
    model = load_model(load_run(tmp_path / "run"))
    score, anomaly_map, _ = model(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert score.shape == (2,) and anomaly_map.shape == (2, 4, 4)


# Interruption and resumption


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let a Ctrl-C arrive while the monitor of STPM looks at epoch `after`."""
    import edge_anomaly.stpm as stpm

    probe, calls = stpm.probe, []

    def stop(model: Any, normal: Any, synthetic: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == after + 1:  # the first call is before the training
            raise KeyboardInterrupt
        return probe(model, normal, synthetic)

    monkeypatch.setattr(stpm, "probe", stop)


def test_an_interrupted_training_goes_on_to_the_same_model(
    sample_folder: Path, detector_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", CONFIGS["stpm"]
    with monkeypatch.context() as patch:
        interrupted(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            train_detector(str(sample_folder), out, config=config, preprocess=SMALL)
    assert not out.exists() and (tmp_path / "run.unfinished").is_dir()

    with pytest.raises(UsageError, match="interrupted training"):
        train_detector(str(sample_folder), out, config=config, preprocess=SMALL)
    with pytest.raises(UsageError, match="learning_rate"):
        other = replace(config, learning_rate=0.1)
        train_detector(str(sample_folder), out, config=other, preprocess=SMALL, options=TrainOptions(resume=True))
    train_detector(str(sample_folder), out, config=config, preprocess=SMALL, options=TrainOptions(resume=True))

    whole, resumed = (load_model(load_run(path)).state_dict() for path in (detector_runs["stpm"], out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "run.unfinished").exists()


def test_resume_without_an_interrupted_training_is_refused(sample_folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(resume=True)
    with pytest.raises(UsageError, match="no interrupted training"):
        train_detector(str(sample_folder), tmp_path / "run", config=CONFIGS["stpm"], preprocess=SMALL, options=options)
    with pytest.raises(UsageError, match="trained by epochs"):
        train_detector(str(sample_folder), tmp_path / "run", config=CONFIGS["padim"], preprocess=SMALL, options=options)
    assert list(tmp_path.iterdir()) == []


def test_features_of_a_report_are_those_at_the_hottest_place(detector_runs: dict[str, Path]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for name in ("padim", "stpm", "autoencoder-b"):
        model = load_model(load_run(detector_runs[name]))
        maps = predict(torch_scores(model), pixels, what="", total=3).maps
        features = image_features(model, pixels, maps)
        assert features.shape[0] == 3 and np.isfinite(features).all()
    model = load_model(load_run(detector_runs["padim"]))
    fine, coarse = model.get_submodule("backbone")(torch.from_numpy(pixels[:1]))
    assert fine.shape[-1] == 2 * coarse.shape[-1] == 8
    chosen = np.zeros((1, 8, 8), dtype=np.float32)
    chosen[0, 3, 6] = 1
    expected = torch.cat([fine[0, :, 3, 6], coarse[0, :, 1, 3]])
    np.testing.assert_allclose(image_features(model, pixels[:1], chosen)[0], expected.numpy(), rtol=1e-6)


def test_features_of_tokens_are_those_at_the_hottest_place() -> None:
    class Tokens(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [torch.arange(len(image) * 6 * 2).reshape(len(image), 6, 2).float()]

    model = torch.nn.Module()
    model.backbone = Tokens()
    maps = np.zeros((2, 2, 3), dtype=np.float32)
    maps[0, 1, 0] = maps[1, 0, 2] = 1
    features = image_features(model, np.zeros((2, 8, 8, 3), dtype=np.uint8), maps)
    assert features.tolist() == [[6, 7], [16, 17]]
