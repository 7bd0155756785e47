from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from edge_anomaly import patchcore
from edge_anomaly.features import blurred, gaussian_kernel, joint_features
from edge_anomaly.image_set import ImageSet
from edge_anomaly.patchcore import (
    MAX_PATCHES,
    PatchcoreConfig,
    PatchcoreHead,
    announce,
    available_bytes,
    build,
    fit,
    fit_bytes,
    greedy_k_centre,
    k_centre,
    principal_axes,
    refit,
    sample_patches,
)
from edge_anomaly.training import FitSession
from edge_anomaly_export.graph import onnx_from_detector
from edge_anomaly_runtime.errors import UsageError
from tests.small_models import grey_blocks

Rows = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

CHANNELS = 152
GRID = (4, 5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Eight pictures with blocks of random grey, 64 px."""
    return grey_blocks(tmp_path_factory.mktemp("normal"), 8, 64)


def config(**changes: object) -> PatchcoreConfig:
    settings = {"backbone": "efficientnet_lite0", "share": 0.1, "smoothing": 0.0, **changes}
    return PatchcoreConfig(**settings)  # type: ignore[arg-type]


def embeddings(images: int, seed: int = 0, grid: tuple[int, int] = GRID) -> Rows:
    """Correlated features far from zero, float32 [images, 152, h, w]."""
    rng = np.random.default_rng(99)
    mixing, centre = rng.standard_normal((CHANNELS, 12)), 3 * rng.standard_normal(CHANNELS)
    rng = np.random.default_rng(seed)
    places = rng.standard_normal((images, *grid, 12)) @ mixing.T + 0.3 * rng.standard_normal((images, *grid, CHANNELS))
    return np.ascontiguousarray((centre + places).transpose(0, 3, 1, 2), dtype=np.float32)


def in_batches(values: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def vectors(values: Rows) -> Doubles:
    """The patches of embeddings [N, c, h, w], float64 [N * h * w, c], in the order that they are read in."""
    return values.transpose(0, 2, 3, 1).reshape(-1, values.shape[1]).astype(np.float64)


def head_on(settings: PatchcoreConfig, train: Rows, grid: tuple[int, int] = GRID) -> PatchcoreHead:
    arrays = refit(settings, [train])
    head = PatchcoreHead(replace(settings, bank=len(arrays["bank"])), grid)
    for name, value in arrays.items():
        getattr(head, name).copy_(torch.from_numpy(value))
    return head


def naive_k_centre(points: Doubles, size: int, first: int) -> list[int]:
    chosen, nearest = [first], np.square(points - points[first]).sum(axis=1)
    while len(chosen) < size:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(axis=1))
    return chosen


@pytest.mark.parametrize("pca", [None, 20, 140])
def test_map_is_the_nearest_neighbour_distance_of_scikit_learn(pca: int | None) -> None:
    settings = config(pca=pca)
    train, test = embeddings(30), embeddings(3, seed=7)

    score, anomaly_map = head_on(settings, train).judge(torch.from_numpy(test))

    points, queries = vectors(train), vectors(test)
    compared = points
    if pca is not None:
        projection = PCA(pca, svd_solver="full").fit(points)
        compared, queries = projection.transform(points), projection.transform(queries)
        axes = principal_axes(points.astype(np.float32), pca, settings.seed)
        np.testing.assert_allclose(axes.T @ axes, projection.components_.T @ projection.components_, atol=1e-5)
    chosen = k_centre((points.astype(np.float32) if pca is None else points.astype(np.float32) @ axes.T), 60, 0)
    expected = NearestNeighbors(n_neighbors=1).fit(compared[chosen]).kneighbors(queries)[0].reshape(3, *GRID)
    assert expected.min() > 0.5
    np.testing.assert_allclose(anomaly_map.numpy(), expected, rtol=2e-5)
    np.testing.assert_allclose(score.numpy(), expected.max(axis=(1, 2)), rtol=2e-5)


def test_distances_near_zero_are_off_by_a_thousandth_of_a_typical_one_at_most() -> None:
    """From 0.3 % of a typical distance on, wherever the features lie; at 0 itself float32 leaves twice as much."""
    far = np.float32(20)
    train = embeddings(60) + far
    head = head_on(config(share=0.05), train)
    bank = (head.bank[:, :, 0, 0].double() / -2 + head.mean[0, :, 0, 0].double()).numpy()
    typical = float(np.median(head.judge(torch.from_numpy(embeddings(5, seed=3) + far))[1]))
    away = np.random.default_rng(0).standard_normal(bank.shape)
    away /= np.linalg.norm(away, axis=1, keepdims=True)

    for share, limit in ((0.0, 2e-3), (0.003, 1e-3), (0.1, 1e-4)):
        queries = (bank + share * typical * away).astype(np.float32)
        found = head.judge(torch.from_numpy(queries.reshape(3, *GRID, CHANNELS).transpose(0, 3, 1, 2).copy()))[1]
        exact = NearestNeighbors(n_neighbors=1).fit(bank).kneighbors(queries.astype(np.float64))[0]
        assert np.abs(found.numpy().ravel() - exact.ravel()).max() < limit * typical


@pytest.mark.parametrize(("count", "dims", "size"), [(300, 16, 300), (6000, 16, 250), (5000, 3, 400)])
def test_greedy_coreset_is_that_of_a_naive_one_in_float64(count: int, dims: int, size: int) -> None:
    """With 6,000 points there are more than candidates, so that most points are skipped most of the time."""
    points = np.random.default_rng(1).standard_normal((count, dims)).astype(np.float32)

    chosen = greedy_k_centre(torch.from_numpy(points), size, first=7)

    assert chosen.tolist() == naive_k_centre(points.astype(np.float64), size, first=7)


def test_coreset_on_a_projection_covers_nearly_as_well_as_without() -> None:
    points = vectors(embeddings(60, grid=(8, 8)))

    def radius(chosen: list[int]) -> float:
        return float(NearestNeighbors(n_neighbors=1).fit(points[chosen]).kneighbors(points)[0].max())

    projected = k_centre(points.astype(np.float32), 80, seed=0)

    assert radius(projected.tolist()) < 1.1 * radius(naive_k_centre(points, 80, int(projected[0])))
    assert radius(list(range(80))) > 1.1 * radius(projected.tolist())


def test_equal_patches_are_chosen_once_each() -> None:
    points = torch.ones(3000, 4)
    points[:5] = torch.arange(5)[:, None]

    chosen = greedy_k_centre(points, 2500, first=2999)

    assert len(set(chosen.tolist())) == 2500
    assert set(chosen[1:5].tolist()) == {0, 2, 3, 4}


@pytest.mark.parametrize("size", [1, 7])
def test_sample_holds_every_patch_until_it_is_full_and_does_not_depend_on_batches(size: int) -> None:
    values = embeddings(20)

    whole, seen = sample_patches([values], CHANNELS, 400, seed=0)
    few, seen_by_few = sample_patches([values], CHANNELS, 130, seed=0)
    streamed, _ = sample_patches(in_batches(values, size), CHANNELS, 130, seed=0)

    assert seen == seen_by_few == 400
    np.testing.assert_array_equal(whole, vectors(values).astype(np.float32))
    assert len(few) == 130
    np.testing.assert_array_equal(streamed, few)


def test_every_patch_has_the_same_chance_to_be_sampled() -> None:
    numbers = np.arange(200, dtype=np.float32).reshape(20, 1, 2, 5)
    counts = np.zeros(200)
    for seed in range(400):
        sample, _ = sample_patches(in_batches(numbers, 3), 1, 50, seed)
        assert len(np.unique(sample)) == 50
        counts[sample[:, 0].astype(int)] += 1

    # 400 draws with a chance of 1/4 each: standard deviation 8.7.
    assert counts.sum() == 400 * 50
    assert np.abs(counts - 100).max() < 5 * 8.7
    assert abs(counts[:50].mean() - 100) < 5


def test_two_fits_are_bit_identical_and_another_seed_is_not(images: ImageSet, tmp_path: Path) -> None:
    def fitted(seed: int) -> dict[str, torch.Tensor]:
        model = build(config(seed=0), 64, 64, weights="random")
        model.config = replace(model.config, seed=seed)
        fit(model, images, FitSession(tmp_path, device="cpu"))
        return model.state_dict()

    first, second, other = fitted(0), fitted(0), fitted(1)

    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["head.bank"], other["head.bank"])


def test_fit_sets_the_true_bank_and_its_state_loads_into_a_fresh_model(images: ImageSet, tmp_path: Path) -> None:
    model = build(config(pca=30), 64, 64, weights="random")
    fit(model, images, FitSession(tmp_path, device="cpu"))
    stored = json.loads(json.dumps(asdict(model.config)))

    assert model.config == config(pca=30, bank=51)  # 10 % of 8 images of 8x8 patches
    again = build(PatchcoreConfig(**{**stored, "layers": tuple(stored["layers"])}), 64, 64, weights="random")
    again.load_state_dict(model.state_dict())
    batch = torch.from_numpy(next(images.batches("test")))
    with torch.inference_mode():
        for mine, loaded in zip(model(batch), again(batch), strict=True):
            assert torch.equal(mine, loaded)


def test_refit_on_the_models_own_embeddings_is_its_head(images: ImageSet, tmp_path: Path) -> None:
    model = build(config(), 64, 64, weights="random")
    fit(model, images, FitSession(tmp_path, device="cpu"))
    with torch.inference_mode():
        own = [model(torch.from_numpy(batch))[2].numpy() for batch in images.batches("test")]

    for name, value in refit(model.config, own).items():
        assert torch.equal(getattr(model.head, name), torch.from_numpy(value)), name
    for name, value in refit(model.config, [1.1 * batch for batch in own]).items():
        assert getattr(model.head, name).shape == value.shape


def test_a_bank_keeps_its_patches_on_other_features() -> None:
    """Another graph's features would lead to another choice; with `chosen` they are those of the same patches."""
    settings = config(bank=40)
    features = embeddings(30)
    first, chosen = patchcore._fitted(settings, in_batches(features, 7), None)
    noisy = (features + np.random.default_rng(5).normal(0, 0.5, features.shape)).astype(np.float32)
    kept = refit(settings, in_batches(noisy, 4), chosen=torch.from_numpy(chosen))
    rows = noisy.transpose(0, 2, 3, 1).reshape(-1, CHANNELS)[chosen]
    np.testing.assert_allclose(kept["bank"].reshape(40, -1) / -2 + kept["mean"].reshape(1, -1), rows, atol=1e-5)
    same = refit(settings, in_batches(features, 11), chosen=torch.from_numpy(chosen))
    assert all(np.array_equal(same[name], value) for name, value in first.items())
    with pytest.raises(UsageError, match="the bank needs number"):
        refit(settings, [features[:2]], chosen=torch.from_numpy(chosen))


@pytest.mark.parametrize(
    ("changes", "patches", "size"),
    [
        ({}, 100_000, 1_000),
        ({}, 2_000_000, 10_000),
        ({"share": 0.25}, 3_000, 750),
        ({"share": 1.0, "max_bank": 10**7}, 2_000_000, MAX_PATCHES),
        ({"max_bank": 500}, 100_000, 500),
        ({"memory_budget": 0.5}, 100_000, 816),
        ({"memory_budget": 0.5, "pca": 64}, 200_000, 1_923),
        ({"memory_budget": 0.5, "bank": 800}, 100_000, 800),
        ({"bank": 20_000}, 100_000, 20_000),
        ({}, 20, 1),
    ],
)
def test_bank_has_its_share_up_to_every_cap(changes: dict[str, object], patches: int, size: int) -> None:
    assert config(**{"share": 0.01, **changes}).bank_size(patches) == size


def test_memory_budget_is_what_the_bank_weighs_in_the_head() -> None:
    head = PatchcoreHead(config(bank=816), GRID)

    assert head.bank.numel() * 4 + head.bank_squares.numel() * 4 == 816 * config().vector_bytes <= 0.5e6


@pytest.mark.parametrize("changes", [{}, {"pca": 20, "smoothing": 0.7, "score_top": 3}])
def test_batch_gives_the_scores_of_single_images(changes: dict[str, object]) -> None:
    head = head_on(config(**changes), embeddings(20))
    queries = torch.from_numpy(embeddings(5, seed=1))

    score, anomaly_map = head.judge(queries)
    alone = [head.judge(query[None]) for query in queries]

    torch.testing.assert_close(score, torch.cat([single[0] for single in alone]))
    torch.testing.assert_close(anomaly_map, torch.cat([single[1] for single in alone]))


def test_score_is_the_mean_of_the_highest_of_the_smoothed_map() -> None:
    train, queries = embeddings(20), torch.from_numpy(embeddings(4, seed=1))

    plain = head_on(config(), train).judge(queries)[1]
    score, anomaly_map = head_on(config(smoothing=0.8, score_top=4), train).judge(queries)

    # scipy cuts its kernel at whole cells as well: 3 standard deviations, 2.4 cells, are 3.
    expected = np.stack(
        [ndimage.gaussian_filter(one.astype(np.float64), 0.8, radius=3, mode="nearest") for one in plain.numpy()]
    )
    np.testing.assert_allclose(anomaly_map.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(score.numpy(), np.sort(expected.reshape(4, -1))[:, -4:].mean(axis=1), rtol=1e-5)


def test_joint_features_are_local_means_on_the_finest_grid() -> None:
    rng = np.random.default_rng(0)
    fine, coarse = rng.standard_normal((2, 6, 8)), rng.standard_normal((1, 3, 4))

    joint = joint_features([torch.from_numpy(fine)[None], torch.from_numpy(coarse)[None]], (6, 8))[0].numpy()

    means = [ndimage.uniform_filter(plane, 3, mode="constant") for plane in (*fine, *coarse)]
    # The middle of fine cell i lies at (i + 0.5) / 2 - 0.5 on the coarse grid.
    places = np.meshgrid(np.arange(6) / 2 - 0.25, np.arange(8) / 2 - 0.25, indexing="ij")
    upsampled = ndimage.map_coordinates(means[2], places, order=1, mode="nearest")
    np.testing.assert_allclose(joint, np.stack([means[0], means[1], upsampled]), atol=1e-12)


def test_blur_keeps_a_constant_and_spreads_a_peak() -> None:
    peak = torch.zeros(1, 9, 9)
    peak[0, 4, 4] = 1.0

    torch.testing.assert_close(blurred(torch.full((2, 3, 4), 5.0), gaussian_kernel(1.5)), torch.full((2, 3, 4), 5.0))
    assert torch.equal(blurred(peak, gaussian_kernel(0.0)), peak)
    spread = blurred(peak, gaussian_kernel(1.0))
    assert spread.sum().item() == pytest.approx(1.0, abs=1e-3)
    assert spread[0, 4, 4].item() == spread.max().item() == pytest.approx(1 / (2 * np.pi), rel=0.01)


@pytest.mark.parametrize("changes", [{"smoothing": 0.5}, {"pca": 32, "score_top": 3}])
def test_exported_graph_gives_the_numbers_of_torch(
    changes: dict[str, object], images: ImageSet, tmp_path: Path
) -> None:
    import onnxruntime

    model = build(config(**changes), 64, 64, weights="random")
    fit(model, images, FitSession(tmp_path, device="cpu"))
    graph = onnx_from_detector(model, 64, 64)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    # Not an image of the bank: its distances of 0 have no relative error.
    other = np.random.default_rng(5).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    found = session.run(None, {"image": other})
    with torch.inference_mode():
        expected = model(torch.from_numpy(other))

    assert [output.name for output in graph.graph.output] == ["score", "anomaly_map", "embedding"]
    for mine, exported in zip(expected, found, strict=True):
        np.testing.assert_allclose(exported, mine.numpy(), rtol=1e-4, atol=1e-5)
    fitted = {initializer.name for initializer in graph.graph.initializer}
    assert {f"head.{name}" for name in refit(model.config, [embeddings(9, grid=(8, 8))])} <= fitted
    if "score_top" not in changes:
        assert "TopK" not in {node.op_type for node in graph.graph.node}


def test_fit_on_too_few_images_says_how_many_are_needed(images: ImageSet, tmp_path: Path) -> None:
    two = ImageSet(images.paths[:2], images.spec)

    with pytest.raises(UsageError, match="2 images") as caught:
        fit(build(config(), 64, 64, weights="random"), two, FitSession(tmp_path))
    assert "3" in caught.value.hint


def test_features_that_are_not_finite_are_refused() -> None:
    broken = embeddings(5)
    broken[3, 2, 1, 1] = np.inf

    with pytest.raises(UsageError, match="not finite"):
        refit(config(), [broken])


def test_a_bank_beyond_the_patches_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"1,001 vectors .* 1,000 patches"):
        refit(config(bank=1001), [embeddings(50)])
    with pytest.raises(UsageError, match="300,000 patches"):
        announce(config(bank=300_001), 224, 224, 1000)


def test_a_bank_larger_than_memory_is_refused_with_the_figure(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"612000\.0 GB .* 152 channels") as caught:
        build(config(bank=10**12), 64, 64, weights="random")
    assert "--bank" in caught.value.hint and "--pca" in caught.value.hint


def test_free_memory_is_the_systems_or_the_containers_whichever_is_less(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:  2000 kB\n")

    assert available_bytes(meminfo, limit) == 2_048_000
    limit.write_text("max\n")
    assert available_bytes(meminfo, limit) == 2_048_000
    limit.write_text("1000000\n")
    assert available_bytes(meminfo, limit) == 1_000_000
    assert available_bytes(tmp_path / "none", limit) is None


def test_announcement_names_bank_memory_time_and_what_is_left_out() -> None:
    bank, work, *notes = announce(PatchcoreConfig(), 224, 224, 209)
    assert "28x28 places, 1536 channels, bank of 1,639 of 163,856 patches, 10.1 MB, 1.97 GMAC an image" in bank
    assert "1.2 GB of memory" in work and "3 s of one CPU core" in work
    assert not notes

    assert "300,000 of these" in announce(PatchcoreConfig(), 224, 224, 400)[2]
    assert "Warning: 8 images" in announce(config(), 64, 64, 8)[2]
    assert "30 principal components of 152" in announce(config(pca=30), 64, 64, 80)[0]


def test_fit_bytes_stop_growing_with_the_images() -> None:
    assert fit_bytes(config(max_bank=100), 10**6) == fit_bytes(config(max_bank=100), 10**9)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backbone": "resnet19"}, "resnet19"),
        ({"layers": ("layer2", "layer9")}, "layer9"),
        ({"share": 0.0}, "share of 0"),
        ({"share": 1.5}, "1.5"),
        ({"max_bank": 0}, "0 vectors"),
        ({"bank": 0}, "bank of 0 vectors"),
        ({"bank": -3}, "-3 vectors"),
        ({"memory_budget": 0.0001}, "0.0001 MB"),
        ({"memory_budget": 0.5, "bank": 900}, "900 vectors takes 0.6 MB"),
        ({"pca": 0}, "--pca 0"),
        ({"pca": 152}, "--pca 152"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"score_top": 0}, "top 0"),
        ({"score_top": 21}, "4x5"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        PatchcoreHead(config(**changes), GRID)


@pytest.mark.slow
def test_coreset_of_300000_patches_takes_no_longer_than_their_features() -> None:
    """EfficientNet-Lite0 at 224 px: 383 images make 300,000 patches, 1 % of them the bank."""
    model = build(config(), 224, 224, weights="random")
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8))
    with torch.inference_mode():
        model(pictures)
        start = time.process_time()
        model.head.embed(model.backbone(pictures))
        features = (time.process_time() - start) / 16 * 383
    points = vectors(embeddings(383, grid=(28, 28))).astype(np.float32)[:300_000]

    start = time.process_time()
    chosen = k_centre(points, 3000, seed=0)
    coreset = time.process_time() - start

    assert len(set(chosen.tolist())) == 3000
    assert coreset < features
