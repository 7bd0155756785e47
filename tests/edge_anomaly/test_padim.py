from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from edge_anomaly.backbones import build_backbone
from edge_anomaly.features import joint_features
from edge_anomaly.padim import Gaussian, Padim, PadimConfig, PadimHead, fit_gaussian, head_arrays
from edge_anomaly_runtime.errors import UsageError

Embeddings = npt.NDArray[np.float32]


def config(**changes: object) -> PadimConfig:
    return PadimConfig(**{"backbone": "resnet18", "dims": 6, "smoothing": 0.0, **changes})  # type: ignore[arg-type]


def correlated(images: int, dims: int = 6, grid: tuple[int, int] = (2, 3), seed: int = 0) -> Embeddings:
    """Gaussian features with another mean and another covariance at every place."""
    rng = np.random.default_rng(seed)
    rows, columns = grid
    mixing = rng.standard_normal((rows * columns, dims, dims))
    values = rng.standard_normal((images, rows * columns, dims)) @ np.eye(dims)
    mixed = np.einsum("pij,npj->npi", mixing, values) + 5 * rng.standard_normal((rows * columns, dims))
    return mixed.transpose(0, 2, 1).reshape(images, dims, rows, columns).astype(np.float32)  # type: ignore[no-any-return]


def in_batches(embeddings: Embeddings, size: int) -> Iterator[Embeddings]:
    for start in range(0, len(embeddings), size):
        yield embeddings[start : start + size]


def head_with(settings: PadimConfig, gaussian: Gaussian, grid: tuple[int, int]) -> PadimHead:
    head = PadimHead(settings, grid)
    for name, value in head_arrays(settings, gaussian, grid).items():
        getattr(head, name).copy_(torch.from_numpy(value))
    return head


@pytest.mark.parametrize("kind", ["location", "tied"])
def test_map_is_the_mahalanobis_distance_of_scipy(kind: str) -> None:
    settings = config(covariance=kind, shrinkage=0.1)
    train, test = correlated(200), correlated(4, seed=7)
    head = head_with(settings, fit_gaussian([train], settings), (2, 3))

    score, anomaly_map = head.judge(torch.from_numpy(test))

    places = train.reshape(200, 6, 6).astype(np.float64)
    covariances = np.stack([np.cov(places[:, :, place].T) for place in range(6)])
    if kind == "tied":
        covariances[:] = covariances.mean(axis=0)
    expected = np.empty((4, 6))
    for place in range(6):
        covariance = 0.9 * covariances[place]
        covariance += (0.1 * np.trace(covariances[place]) / 6 + 0.01) * np.eye(6)
        inverse = np.linalg.inv(covariance)
        for image in range(4):
            vector = test.reshape(4, 6, 6)[image, :, place]
            expected[image, place] = mahalanobis(vector, places[:, :, place].mean(axis=0), inverse)
    np.testing.assert_allclose(anomaly_map.reshape(4, 6).numpy(), expected, rtol=2e-5)
    np.testing.assert_allclose(score.numpy(), expected.max(axis=1), rtol=2e-5)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_fit_does_not_depend_on_how_images_are_batched(size: int) -> None:
    train = correlated(64)

    whole, streamed = fit_gaussian([train], config()), fit_gaussian(in_batches(train, size), config())

    np.testing.assert_allclose(streamed.mean, whole.mean, rtol=1e-10)
    np.testing.assert_allclose(streamed.whitening, whole.whitening, rtol=1e-8, atol=1e-10)
    assert streamed.images == 64


def test_fit_survives_a_mean_far_from_zero() -> None:
    """Sums of squares about zero would lose a variance of 1 beside a mean of 1e6; sums about the first batch do not."""
    rng = np.random.default_rng(0)
    train = (1e6 + rng.standard_normal((500, 6, 1, 1)) * 16).astype(np.float32)

    gaussian = fit_gaussian(in_batches(train, 50), config(epsilon=1e-6))

    covariance = np.linalg.inv(gaussian.whitening[0].T @ gaussian.whitening[0])
    np.testing.assert_allclose(covariance, np.cov(train.reshape(500, 6).T.astype(np.float64)), rtol=1e-6, atol=1e-5)


def test_fewer_images_than_channels_still_give_a_finite_whitening() -> None:
    gaussian = fit_gaussian([correlated(12, dims=40)], config(dims=40))

    assert np.isfinite(gaussian.whitening).all()


def test_too_few_images_are_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match="9 images to fit on") as caught:
        fit_gaussian([correlated(9)], config())
    assert "10" in caught.value.hint


def test_features_that_are_not_finite_are_refused() -> None:
    broken = correlated(20)
    broken[3, 2, 1, 1] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        fit_gaussian([broken], config())


def projection(**changes: object) -> torch.Tensor:
    """The whole reduction [d, channels], from the parts of all layers."""
    head = PadimHead(config(**changes), (2, 2))
    return torch.cat([head.get_buffer(f"projection_{layer}")[:, :, 0, 0] for layer in head.layers], dim=1)


def test_semi_orthogonal_reduction_has_orthonormal_rows_and_random_selects_channels() -> None:
    rows, chosen = projection(dims=100).double(), projection(dims=100, reduction="random")

    torch.testing.assert_close(rows @ rows.T, torch.eye(100, dtype=torch.float64), atol=1e-6, rtol=0)
    assert chosen.sum(dim=1).tolist() == [1.0] * 100
    assert chosen.sum(dim=0).max() == 1
    assert torch.equal(rows, projection(dims=100).double())
    assert not torch.equal(rows, projection(dims=100, seed=1).double())


def test_reducing_each_layer_first_gives_the_reduced_joint_features() -> None:
    head = PadimHead(config(dims=20), (9, 7))
    features = [torch.randn(2, 128, 9, 7), torch.randn(2, 256, 5, 4)]

    expected = torch.einsum("dc,nchw->ndhw", projection(dims=20), joint_features(features, (9, 7)))

    torch.testing.assert_close(head.embed(features), expected, rtol=1e-4, atol=1e-5)


def test_smoothing_keeps_a_constant_map_and_spreads_a_peak() -> None:
    settings = config(smoothing=1.0)
    head = PadimHead(settings, (9, 9))
    head.whitening_top.copy_(torch.eye(3).repeat(81, 1)[:, :, None, None])
    head.whitening_bottom.copy_(torch.eye(6)[3:].repeat(81, 1)[:, :, None, None])
    constant, peak = torch.ones(1, 6, 9, 9), torch.zeros(1, 6, 9, 9)
    peak[0, 0, 4, 4] = 1.0

    _, flat = head.judge(constant)
    _, spread = head.judge(peak)

    torch.testing.assert_close(flat, torch.full((1, 9, 9), 6**0.5))
    assert spread.sum() == pytest.approx(1.0, abs=1e-3)
    assert spread[0, 4, 4] == spread.max() == pytest.approx(1 / (2 * np.pi), rel=0.01)


@pytest.mark.parametrize("kind", ["location", "tied"])
def test_batch_gives_the_scores_of_single_images(kind: str) -> None:
    settings = config(covariance=kind)
    head = head_with(settings, fit_gaussian([correlated(50)], settings), (2, 3))
    images = torch.from_numpy(correlated(5, seed=1))

    together, _ = head.judge(images)
    alone = torch.cat([head.judge(image[None])[0] for image in images])

    torch.testing.assert_close(together, alone)


def test_head_size_is_what_the_head_weighs() -> None:
    settings = PadimConfig(backbone="efficientnet_lite0", smoothing=0.0)
    head = PadimHead(settings, settings.grid(224, 224))

    weights = sum(value.numel() * 4 for name, value in head.named_buffers() if name != "kernel")

    assert settings.head_bytes(224, 224) == weights == 9_873_408
    assert weights < 32e6
    tied = PadimConfig(backbone="efficientnet_lite0", covariance="tied")
    assert tied.head_bytes(224, 224) == 4 * (32 * 32 + 32 * 64 + 784 * 64 + 64 * 152)


def test_detector_maps_bytes_to_score_map_and_embedding() -> None:
    settings = config(dims=20)
    model = Padim(settings, build_backbone("resnet18", weights="random"), 64, 96)

    with torch.inference_mode():
        score, anomaly_map, embedding = model(torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8))

    assert (score.shape, anomaly_map.shape, embedding.shape) == ((2,), (2, 8, 12), (2, 20, 8, 12))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dims": 1}, "--dims 1"),
        ({"dims": 385}, "385"),
        ({"reduction": "pca"}, "pca"),
        ({"covariance": "diagonal"}, "diagonal"),
        ({"shrinkage": 1.5}, "1.5"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"smoothing": -1.0}, "smoothing"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        assert config(**changes).reduced
