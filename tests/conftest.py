"""One small real data set, run and bundle, made once per test session and never changed by a test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before numpy, torch and the engines start their thread pools.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "2")
os.environ["CI"] = "true"  # no progress bars

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Give torch a single thread: networks as small as those of many tests are slower on several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn parts in MVTec layout: 60 to learn from, 16 good and 4 x 4 defective to test with, 160 px."""
    from edge_anomaly.sample_data import draw_sample_data

    folder = tmp_path_factory.mktemp("data") / "parts"
    draw_sample_data(folder, seed=0, train=60, test_good=16, per_defect=4, size=160)
    return folder


@pytest.fixture(scope="session")
def run_folder(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PaDiM run on the drawn parts: EfficientNet-Lite0, 128 px, 32 channels."""
    from edge_anomaly.padim import PadimConfig
    from edge_anomaly.train import train_detector
    from edge_anomaly_runtime.preprocess import Preprocess

    folder = tmp_path_factory.mktemp("runs") / "parts"
    config = PadimConfig(backbone="efficientnet_lite0", dims=32)
    train_detector(str(sample_folder), folder, config=config, preprocess=Preprocess(128, 128))
    return folder


@pytest.fixture(scope="session")
def bundle_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as an INT8 bundle with all four graphs: OpenVINO and ONNX Runtime, fp32 and int8."""
    from edge_anomaly_calibration.guard import GuardLimits
    from edge_anomaly_export.exporting import export_run
    from edge_anomaly_export.options import ExportOptions

    folder = tmp_path_factory.mktemp("bundles") / "parts.eab"
    # 44 images: one flipped verdict is 2.3 %, so the limit on flips is wider than the default.
    limits = GuardLimits(auroc_drop=0.2, flips=0.3)
    export_run(
        run_folder,
        folder,
        ExportOptions(("onnx", "openvino"), "int8", calibration_images=32, limits=limits, allow_drop=True),
    )
    return folder


@pytest.fixture(scope="session")
def detector_runs(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small run of every detector that needs no transformer; see `small_models`."""
    from tests.small_models import train_small_detectors

    return train_small_detectors(sample_folder, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def vit_run(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the k-NN on a transformer with random weights."""
    from tests.small_models import train_small_vit

    return train_small_vit(sample_folder, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of red, green and blue pictures."""
    from tests.small_models import train_small_classifier

    return train_small_classifier(tmp_path_factory.mktemp("classifier"))
