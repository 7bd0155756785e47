from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from edge_anomaly.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderHead,
    FeatureErrors,
    PixelErrors,
    announce,
    build,
    fit,
    losses,
    parameter_counts,
    refit,
)
from edge_anomaly.image_set import ImageSet
from edge_anomaly.training import METRICS, FitSession
from edge_anomaly_export.graph import onnx_from_detector, with_head_arrays
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.preprocess import Preprocess

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

PIXELS = AutoencoderConfig(epochs=1)
FEATURES = AutoencoderConfig(encoder="resnet18", epochs=1)
VARIANTS = pytest.mark.parametrize("config", [PIXELS, FEATURES], ids=["pixels", "features"])

pytestmark = pytest.mark.usefixtures("one_thread")


def good_part(rng: np.random.Generator, size: int = 64) -> Pixels:
    """A bright ramp with a dark bar across, a little noise."""
    ramp = np.linspace(60, 200, size)[np.newaxis, :, np.newaxis] * np.ones((size, 1, 3))
    ramp[size // 2 : size // 2 + 4] = 20
    return np.clip(ramp + rng.normal(0, 3, ramp.shape), 0, 255).astype(np.uint8)


def image_set(folder: Path, count: int = 12, size: int = 64) -> ImageSet:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:02}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(good_part(rng, size)).save(path)
    return ImageSet(paths, Preprocess(size, size))


def random_images(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def errors_of(images: int, kinds: int = 2, seed: int = 0) -> Floats:
    """Errors with another mean and another spread at every place."""
    rng = np.random.default_rng(seed)
    mean, spread = rng.uniform(0.1, 1, (2, kinds, 3, 4))
    errors: Doubles = mean + spread * rng.standard_normal((images, kinds, 3, 4))
    return errors.astype(np.float32)


def slow_ssim(x: Doubles, y: Doubles, row: int, column: int) -> float:
    """SSIM of two images [h, w] in the window around one pixel, by the definition: weighted means and moments."""
    weights, xs, ys = [], [], []
    for down in range(-5, 6):
        for right in range(-5, 6):
            i, j = min(max(row + down, 0), x.shape[0] - 1), min(max(column + right, 0), x.shape[1] - 1)
            weights.append(math.exp(-(down**2 + right**2) / (2 * 1.5**2)))
            xs.append(x[i, j])
            ys.append(y[i, j])
    w = np.array(weights) / sum(weights)
    mx, my = np.sum(w * xs), np.sum(w * ys)
    vx, vy, cov = np.sum(w * (xs - mx) ** 2), np.sum(w * (ys - my) ** 2), np.sum(w * (xs - mx) * (ys - my))
    luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
    return float(luminance * (2 * cov + 0.03**2) / (vx + vy + 0.03**2))


def test_ssim_is_that_of_the_definition_in_float64() -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 1, (1, 3, 16, 24))
    y = np.clip(x + rng.normal(0, 0.1, x.shape), 0, 1)

    similarity = PixelErrors().ssim(torch.from_numpy(x).float(), torch.from_numpy(y).float()).numpy()

    expected = np.array(
        [
            [
                [slow_ssim(x[0, colour], y[0, colour], row, column) for column in range(2, 24, 4)]
                for row in range(2, 16, 4)
            ]
            for colour in range(3)
        ]
    )
    np.testing.assert_allclose(similarity[0], expected, atol=2e-5)


def test_pixel_errors_are_means_over_cells_of_eight_pixels() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0, 1, (2, 1, 3, 16, 16))
    measure = PixelErrors()
    first, second = torch.from_numpy(x).float(), torch.from_numpy(y).float()

    errors = measure([first], [second]).numpy()[0]

    similarity = measure.ssim(first, second).double().numpy()[0]
    for row in range(2):
        for column in range(2):
            cell = np.s_[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            windows = np.s_[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert errors[0, row, column] == pytest.approx(np.mean((x[cell] - y[cell]) ** 2), rel=1e-5)
            assert errors[1, row, column] == pytest.approx(1 - similarity[windows].mean(), rel=1e-5)


def test_an_image_has_no_error_against_itself_and_structure_sees_what_a_shifted_grey_value_keeps() -> None:
    rng = np.random.default_rng(3)
    texture = torch.from_numpy(rng.uniform(0.3, 0.7, (1, 3, 32, 32))).float()
    flat = torch.full_like(texture, 0.5)
    measure = PixelErrors()

    same = measure([texture], [texture])
    brighter = measure([texture], [texture + 0.1155]).mean(dim=(2, 3))[0]  # the standard deviation of the texture
    blurred = measure([texture], [flat]).mean(dim=(2, 3))[0]

    assert same.abs().max() < 1e-5
    assert blurred[0] == pytest.approx(float(brighter[0]), rel=0.1)
    assert blurred[1] > 0.8 > 0.2 > brighter[1]


def test_feature_errors_are_one_minus_cosine_on_the_finest_grid() -> None:
    rng = np.random.default_rng(4)
    fine, coarse = rng.standard_normal((2, 2, 5, 4, 6)), rng.standard_normal((2, 2, 7, 2, 3))

    errors = FeatureErrors((4, 6))(
        [torch.from_numpy(fine[0]).float(), torch.from_numpy(coarse[0]).float()],
        [torch.from_numpy(fine[1]).float(), torch.from_numpy(coarse[1]).float()],
    ).numpy()

    def cosine(x: Doubles, y: Doubles) -> float:
        return float(x @ y / math.sqrt((x @ x) * (y @ y)))

    def at(image: int, row: int, column: int) -> float:
        row, column = min(max(row, 0), 1), min(max(column, 0), 2)
        return 1 - cosine(coarse[0, image, :, row, column], coarse[1, image, :, row, column])

    for image in range(2):
        for row in range(4):
            for column in range(6):
                expected = 1 - cosine(fine[0, image, :, row, column], fine[1, image, :, row, column])
                assert errors[image, 0, row, column] == pytest.approx(expected, abs=1e-5)
                y, x = (row + 0.5) / 2 - 0.5, (column + 0.5) / 2 - 0.5
                top, left = math.floor(y), math.floor(x)
                between = sum(
                    (1 - abs(y - i)) * (1 - abs(x - j)) * at(image, i, j)
                    for i in (top, top + 1)
                    for j in (left, left + 1)
                )
                assert errors[image, 1, row, column] == pytest.approx(between, abs=1e-5)


def test_map_compares_errors_with_those_of_normal_images_at_the_same_place() -> None:
    config = AutoencoderConfig(structural=0.7, shrinkage=0.2, smoothing=0.0, top_k=3)
    train, test = errors_of(40), errors_of(5, seed=9)
    head = AutoencoderHead(config, (3, 4))
    for name, value in refit(config, [train]).items():
        getattr(head, name).copy_(torch.from_numpy(value))

    score, anomaly_map = head.judge(torch.from_numpy(test))

    expected = np.zeros((5, 3, 4))
    for kind, weight in enumerate((0.3, 0.7)):
        values = train[:, kind].astype(np.float64)
        variance = values.var(axis=0, ddof=1)
        spread = np.sqrt(0.8 * variance + 0.2 * variance.mean())
        expected += weight * (test[:, kind] - values.mean(axis=0)) / spread
    np.testing.assert_allclose(anomaly_map.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.numpy(), np.sort(expected.reshape(5, -1))[:, -3:].mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_refit_does_not_depend_on_how_images_are_batched(size: int) -> None:
    train = 1000 + errors_of(40)  # far from zero: sums of squares in float32 would lose the spread

    whole = refit(PIXELS, [train])
    streamed = refit(PIXELS, (train[start : start + size] for start in range(0, 40, size)))

    assert whole.keys() == streamed.keys() == {"mean", "scale"}
    for name in whole:
        np.testing.assert_allclose(streamed[name], whole[name], rtol=1e-6)


def test_a_place_that_is_always_rebuilt_alike_gets_a_finite_scale() -> None:
    assert np.isfinite(refit(PIXELS, [np.ones((10, 2, 3, 4), np.float32)])["scale"]).all()


def test_refit_refuses_few_images_and_errors_that_are_not_finite() -> None:
    broken = errors_of(20)
    broken[3, 1, 2, 2] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        refit(PIXELS, [broken])
    with pytest.raises(UsageError, match="9 images"):
        refit(PIXELS, [errors_of(9)])


def test_pixel_variant_has_80_to_120_thousand_parameters_and_says_so() -> None:
    model = build(AutoencoderConfig(), 224, 224)

    total = sum(value.numel() for value in model.parameters())

    assert 80_000 <= total <= 120_000
    assert total == sum(parameter_counts(AutoencoderConfig()).values()) == 103_923
    assert "103,923 parameters" in announce(AutoencoderConfig(), 224, 224, 300)[0]


@pytest.mark.parametrize(
    ("encoder", "frozen", "trained"),
    [
        # ResNet-18: 9,536 in the stem, 147,968 + 525,568 + 2,099,712 in layers 1 to 3.
        ("resnet18", 2_782_784, 208_032),
        ("resnet34", 8_170_304, 208_032),
        ("resnet50", 8_543_296, 553_248),
        ("efficientnet_lite0", 700_768, 133_048),
    ],
)
def test_feature_variant_announces_frozen_and_trained_parameters(encoder: str, frozen: int, trained: int) -> None:
    config = AutoencoderConfig(encoder=encoder)

    counts = parameter_counts(config)

    assert counts["encoder"] == frozen
    assert counts["bottleneck"] + counts["decoder"] == trained
    assert f"encoder {frozen:,}, bottleneck {counts['bottleneck']:,}" in announce(config, 224, 224, 300)[0]


def test_counting_parameters_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    parameter_counts(FEATURES)
    assert torch.equal(torch.rand(1), expected)


def test_announce_warns_of_few_steps_and_few_images() -> None:
    few = announce(AutoencoderConfig(epochs=2), 224, 224, 24)

    assert any("6 steps are few; 50 epochs" in line for line in few)
    assert any("24 images are few" in line for line in few)
    assert not any("Warning" in line for line in announce(AutoencoderConfig(), 224, 224, 282))


@pytest.mark.parametrize(
    ("config", "size", "grid"),
    [
        (AutoencoderConfig(), (224, 224), (28, 28)),
        (AutoencoderConfig(), (256, 256), (32, 32)),
        (AutoencoderConfig(), (64, 96), (8, 12)),
        (AutoencoderConfig(encoder="resnet18"), (64, 96), (8, 12)),
        (AutoencoderConfig(encoder="efficientnet_lite0"), (224, 224), (28, 28)),
        (AutoencoderConfig(encoder="resnet18", layers=("layer3", "layer1")), (64, 64), (16, 16)),
        (AutoencoderConfig(encoder="resnet50", layers=("layer3",), top_k=2), (64, 64), (4, 4)),
    ],
)
def test_bytes_become_score_map_and_one_error_map_per_kind(
    config: AutoencoderConfig, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    model = build(config, *size, weights="random")

    with torch.inference_mode():
        score, anomaly_map, errors = model(random_images(2, *size))

    assert (score.shape, anomaly_map.shape) == ((2,), (2, *grid))
    assert errors.shape == (2, len(config.errors), *grid)
    assert sum(config.errors.values()) == pytest.approx(1)


@VARIANTS
def test_an_image_that_is_no_multiple_of_32_is_refused(config: AutoencoderConfig) -> None:
    with pytest.raises(UsageError, match="224x250") as caught:
        build(config, 224, 250, weights="random")
    assert "32" in caught.value.hint


@VARIANTS
def test_batch_gives_the_scores_of_single_images(config: AutoencoderConfig) -> None:
    model = build(config, 64, 64, weights="random")
    images = random_images(4)

    with torch.inference_mode():
        together, maps, _ = model(images)
        alone = [model(image[None]) for image in images]

    torch.testing.assert_close(together, torch.cat([score for score, _, _ in alone]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps, torch.cat([map_ for _, map_, _ in alone]), rtol=1e-4, atol=1e-6)


@VARIANTS
def test_same_seed_gives_the_same_model_to_the_last_bit(config: AutoencoderConfig, tmp_path: Path) -> None:
    images = image_set(tmp_path / "images")
    states = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        model = build(config, 64, 64, weights="random")
        fit(model, images, FitSession(tmp_path / run, device="cpu"))
        states.append(model.state_dict())

    assert not model.training
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_the_decoder_of_the_feature_variant_learns(tmp_path: Path) -> None:
    model = build(FEATURES, 64, 64, weights="random")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    fit(model, image_set(tmp_path / "images"), FitSession(tmp_path, device="cpu"))

    after = model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("backbone.encoder.") for name in moved)
    assert {name for name, _ in model.named_parameters() if not name.startswith("backbone.encoder.")} <= moved
    assert {"head.mean", "head.scale"} <= moved


def test_pixel_variant_logs_both_parts_of_its_loss_and_finds_a_spot(tmp_path: Path) -> None:
    config = AutoencoderConfig(epochs=15, batch_size=4, learning_rate=5e-3)
    model = build(config, 64, 64)

    fit(model, image_set(tmp_path / "images", count=16), FitSession(tmp_path, device="cpu"))

    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    for name in ("loss", "pixel", "structural"):
        assert records[-1][name] < 0.5 * records[0][name]
    last = records[-1]
    assert last["loss"] == pytest.approx(0.5 * 10 * last["pixel"] + 0.5 * last["structural"], rel=1e-4)
    rng = np.random.default_rng(77)
    images = np.stack([good_part(rng) for _ in range(6)])
    images[5, 8:16, 40:48] = 255 - images[5, 8:16, 40:48]
    with torch.inference_mode():
        score, anomaly_map, _ = model(torch.from_numpy(images))
    assert score[5] > 2 * score[:5].max()
    assert divmod(int(anomaly_map[5].argmax()), 8) == (1, 5)


class _Echo(nn.Module):
    """Gives back the image and the image with a little noise."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pixels = image.permute(0, 3, 1, 2).float() / 255
        return [pixels], [pixels + self.noise]


def test_errors_are_computed_in_float_when_the_network_trains_in_half_precision() -> None:
    model = build(PIXELS, 32, 32)
    torch.manual_seed(0)
    model.backbone = _Echo(0.01 * torch.randn(2, 3, 32, 32))  # type: ignore[assignment]
    images = random_images(2, 32, 32)

    expected = losses(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses(model, images)

    assert expected.keys() == {"loss", "pixel", "structural"}
    assert all(torch.equal(half[name], expected[name]) for name in expected)


@VARIANTS
def test_too_few_images_are_refused_before_training(config: AutoencoderConfig, tmp_path: Path) -> None:
    model = build(config, 64, 64, weights="random")
    with pytest.raises(UsageError, match="9 images") as caught:
        fit(model, image_set(tmp_path / "images", count=9), FitSession(tmp_path, device="cpu"))
    assert "10" in caught.value.hint
    assert not (tmp_path / METRICS).exists()


@VARIANTS
def test_a_saved_model_is_read_back_with_its_config(config: AutoencoderConfig) -> None:
    model = _with_fitted_head(build(dataclasses.replace(config, seed=3), 64, 64, weights="random"))
    record = json.loads(json.dumps(dataclasses.asdict(model.config)))
    again = build(
        AutoencoderConfig(**{**record, "layers": tuple(record["layers"]), "seed": 4}), 64, 64, weights="random"
    )

    again.load_state_dict(model.state_dict())

    assert all(value is not None for name, value in record.items() if name != "encoder")
    with torch.inference_mode():
        assert torch.equal(again(random_images(2))[0], model(random_images(2))[0])


@VARIANTS
def test_exported_graph_gives_the_scores_of_torch_and_takes_a_head_fitted_anew(config: AutoencoderConfig) -> None:
    model = _with_fitted_head(build(config, 64, 64, weights="random"))
    graph = onnx_from_detector(model, 64, 64)
    other = refit(model.config, [_head_errors(model, seed=8)])

    assert {node.name.split("/")[0] for node in graph.graph.node} == {"backbone", "head"}
    for arrays in ({}, other):
        for name, value in arrays.items():
            getattr(model.head, name).copy_(torch.from_numpy(value))
        session = onnxruntime.InferenceSession(with_head_arrays(graph, arrays).SerializeToString())
        for image in random_images(3):
            with torch.inference_mode():
                expected = model(image[None])
            score, anomaly_map, errors = session.run(None, {"image": image[None].numpy()})
            np.testing.assert_allclose(errors, expected[2], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(score, expected[0], rtol=1e-4)
            np.testing.assert_allclose(anomaly_map, expected[1], rtol=1e-4, atol=1e-4 * float(expected[0].abs()))


def _head_errors(model: Autoencoder, seed: int) -> Floats:
    shape = model.head.mean.shape[1:]
    return np.random.default_rng(seed).uniform(0.5, 1.5, (20, *shape)).astype(np.float32)


def _with_fitted_head(model: Autoencoder) -> Autoencoder:
    for name, value in refit(model.config, [_head_errors(model, seed=0)]).items():
        getattr(model.head, name).copy_(torch.from_numpy(value))
    return model


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoder": "resnet19"}, "resnet19"),
        ({"encoder": "resnet18", "layers": ("layer5",)}, "layer5"),
        ({"layers": ()}, "Layers"),
        ({"layers": ("layer2", "layer2")}, "Layers"),
        ({"code": 0}, "code of 0"),
        ({"structural": 1.5}, "1.5"),
        ({"shrinkage": -0.1}, "-0.1"),
        ({"smoothing": math.inf}, "inf"),
        ({"top_k": 0}, "top 0"),
        ({"epochs": 0}, "0 epochs"),
        ({"batch_size": 0}, "batches of 0"),
        ({"learning_rate": 0.0}, "learning rate of 0"),
        ({"weight_decay": -1.0}, "decay -1"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        AutoencoderConfig(**changes)  # type: ignore[arg-type]


def test_a_top_k_beyond_the_map_is_refused() -> None:
    with pytest.raises(UsageError, match="top 65") as caught:
        build(AutoencoderConfig(top_k=65), 64, 64)
    assert "64" in caught.value.hint


def test_defaults_differ_by_variant_and_given_values_win() -> None:
    pixels, features = AutoencoderConfig().settings, AutoencoderConfig(encoder="resnet18").settings
    assert (pixels.epochs, pixels.batch_size, pixels.top_k) == (15, 8, 1)
    assert (features.epochs, features.batch_size, features.top_k) == (10, 16, 8)
    assert AutoencoderConfig(encoder="resnet18", epochs=3, smoothing=0.0).settings == dataclasses.replace(
        features, epochs=3, smoothing=0.0
    )
