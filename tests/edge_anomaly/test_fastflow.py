from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from edge_anomaly import fastflow
from edge_anomaly.backbones import RANDOM_WEIGHTS
from edge_anomaly.fastflow import (
    Coupling,
    Fastflow,
    FastflowConfig,
    FastflowHead,
    Flow,
    announce,
    build,
    check_health,
    effective_rank,
    feature_health,
    fit,
    refit,
    standardisation,
)
from edge_anomaly.image_set import ImageSet
from edge_anomaly.training import FitSession, StopTraining
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.preprocess import Preprocess

Floats = npt.NDArray[np.float32]


def config(**changes: Any) -> FastflowConfig:
    """Small, and quick to show what fine-tuning does: its rates are above the defaults."""
    small = {"backbone": "efficientnet_lite0", "steps": 2, "top_k": 3, "epochs": 2}
    return FastflowConfig(**{**small, "finetune_epochs": 3, "finetune_rate": 1.0, "backbone_rate": 0.1, **changes})


def lively_flow(channels: int = 8, steps: int = 4, **changes: Any) -> Flow:
    """A flow in float64 that is not the identity: the last layer of each subnet is no longer zero."""
    torch.manual_seed(0)
    settings = {"kernels": "alternating", "hidden_ratio": 1.5, "clamp": 1.0, **changes}
    flow = Flow(channels, steps, **settings).double()
    for weight in flow.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return flow


def couplings_of(flow: Flow) -> list[Any]:
    return [module for module in flow.modules() if isinstance(module, Coupling)]


def lively_head(settings: FastflowConfig, grid: tuple[int, int], seed: int = 0) -> FastflowHead:
    """A head with random flows and random standardisation."""
    torch.manual_seed(seed)
    head = FastflowHead(settings, grid)
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_(std=0.1)
        for name, buffer in head.named_buffers():
            if name != "kernel":
                buffer.uniform_(0.5, 2.0)
    return head


def feature_maps(settings: FastflowConfig, images: int, height: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    """Features of another mean and deviation in every channel, float32 [images, C, h, w] per layer."""
    rng = np.random.default_rng(seed)
    features = []
    for layer in settings.layers:
        channels, (rows, columns) = settings.channels(layer), settings.scale_grid(layer, height, width)
        noise = rng.standard_normal((images, channels, rows, columns)) + 0.5 * rng.standard_normal((images, 1, 1, 1))
        deviation, mean = rng.uniform(0.5, 3, (1, channels, 1, 1)), rng.uniform(-4, 4, (1, channels, 1, 1))
        features.append(torch.from_numpy((mean + deviation * noise).astype(np.float32)))
    return features


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Twelve pictures of soft coloured patches, 48 pixels wide."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number:02d}.png" for number in range(12)]
    for path in paths:
        patches = rng.normal(128, 30, (6, 6, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(patches).resize((48, 48), Image.Resampling.BICUBIC).save(path)
    return ImageSet(paths, Preprocess(48, 48))


@dataclass(frozen=True)
class Fitted:
    """A model and the folder of its training."""

    model: Fastflow
    folder: Path

    def records(self, phase: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / phase / "metrics.jsonl").read_text().splitlines()]


def fitted(settings: FastflowConfig, images: ImageSet, folder: Path, *, resume: bool = False) -> Fitted:
    model = build(settings, 48, 48, weights=RANDOM_WEIGHTS)
    fit(model, images, FitSession(folder, resume=resume, device="cpu"))
    return Fitted(model, folder)


@pytest.fixture(scope="module")
def frozen(pictures: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fitted(config(finetune="off"), pictures, tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="module")
def anchored(pictures: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fitted(config(), pictures, tmp_path_factory.mktemp("anchored"))


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == same and torch.equal(value, twin) for (name, value), (same, twin) in pairs)


# The flow


@pytest.mark.parametrize(("kernels", "steps"), [("alternating", 4), ("3x3", 2)])
def test_log_determinant_is_that_of_the_autograd_jacobian(kernels: str, steps: int) -> None:
    flow = lively_flow(steps=steps, kernels=kernels)
    features = torch.randn(2, 8, 3, 2, dtype=torch.float64)

    _, log_det = flow(features)

    for image, value in zip(features, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
            lambda x: flow(x[None])[0].flatten(), image, vectorize=True
        )
        _, expected = torch.linalg.slogdet(jacobian.reshape(48, 48))
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        assert abs(value) > 0.1


def test_flow_is_a_bijection_that_can_be_undone_step_by_step() -> None:
    flow = lively_flow(steps=6)
    features = torch.randn(3, 8, 5, 4, dtype=torch.float64)

    z, _ = flow(features)

    back = z
    for pair in reversed(list(flow.pairs)):
        first, second = pair.children()
        assert isinstance(first, Coupling) and isinstance(second, Coupling)
        left, right = back[:, 0::2], back[:, 1::2]
        log_scale, shift = second.affine(right)
        left = (left - shift) * torch.exp(-log_scale)
        log_scale, shift = first.affine(left)
        back = torch.cat((left, (right - shift) * torch.exp(-log_scale)), dim=1)
    torch.testing.assert_close(back, features, rtol=1e-10, atol=1e-10)
    assert (z - features).abs().max() > 0.1


def test_every_two_steps_change_every_channel_once() -> None:
    flow = Flow(8, 4, "alternating", 1.0, 2.0)
    for coupling in couplings_of(flow):
        coupling.second.bias.data[4:] = 1.0  # the shift

    z, log_det = flow(torch.arange(8.0).reshape(1, 8, 1, 1))

    assert sorted(z.flatten().tolist()) == [value + 2 for value in range(8)]
    assert log_det.item() == 0


def test_untrained_flow_only_reorders_channels_and_brings_others_together() -> None:
    flow = Flow(8, 2, "alternating", 1.0, 2.0)

    z, _ = flow(torch.arange(8.0).reshape(1, 8, 1, 1))

    assert z.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_one_step_multiplies_a_channel_by_exp_clamp_at_most() -> None:
    flow = Flow(4, 2, "3x3", 1.0, 0.5)
    for coupling in couplings_of(flow):
        coupling.second.bias.data[:2] = 1e6  # the log-scale

    z, log_det = flow(torch.ones(1, 4, 3, 3))

    torch.testing.assert_close(z, torch.full((1, 4, 3, 3), float(np.exp(0.5))))
    torch.testing.assert_close(log_det, torch.tensor([0.5 * 36]))


# The head


def test_map_without_blur_is_the_mean_over_scales_of_half_the_mean_square_of_z() -> None:
    settings = config(smoothing=0.0)
    head = lively_head(settings, (4, 6)).double()
    features = [feature.double() for feature in feature_maps(settings, 2, 32, 48)]

    _, anomaly_map = head.judge(features)

    expected = torch.zeros(2, 4, 6, dtype=torch.float64)
    for layer, flow, feature in zip(settings.layers, head.flows, features, strict=True):
        mean, scale = head.get_buffer(f"mean_{layer}"), head.get_buffer(f"scale_{layer}")
        z, _ = flow((feature - mean) * scale)
        half = 0.5 * np.square(z.detach().numpy()).sum(axis=1, keepdims=True) / z.shape[1]
        expected += F.interpolate(torch.from_numpy(half), size=(4, 6), mode="bilinear", align_corners=False)[:, 0] / 2
    torch.testing.assert_close(anomaly_map, expected)


def test_negative_log_likelihood_is_per_dimension_and_counts_the_jacobian() -> None:
    settings = config(layers=("layer2",))
    head = lively_head(settings, (4, 6)).double()
    (features,) = (feature.double() for feature in feature_maps(settings, 3, 32, 48))

    nll = head.negative_log_likelihood([features])

    z, log_det = head.flows[0]((features - head.get_buffer("mean_layer2")) * head.get_buffer("scale_layer2"))
    torch.testing.assert_close(nll, (0.5 * (z**2).sum(dim=(1, 2, 3)) - log_det) / (40 * 4 * 6))
    assert log_det.abs().min() > 1


def test_score_is_the_mean_of_the_largest_values_of_the_smoothed_map() -> None:
    features = feature_maps(config(), 2, 32, 48)
    for top_k, smoothing in [(1, 0.0), (3, 1.0)]:
        score, anomaly_map = lively_head(config(top_k=top_k, smoothing=smoothing), (4, 6)).judge(features)

        largest = np.sort(anomaly_map.detach().flatten(1).numpy(), axis=1)[:, -top_k:]
        np.testing.assert_allclose(score.detach().numpy(), largest.mean(axis=1), rtol=1e-6)


def test_batch_gives_the_scores_of_single_images() -> None:
    model = build(config(), 64, 64, weights=RANDOM_WEIGHTS)
    model.head = lively_head(model.config, (8, 8)).eval()
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)

    with torch.inference_mode():
        together = model(images)
        alone = [torch.cat(parts) for parts in zip(*(model(image[None]) for image in images), strict=True)]

    for whole, single in zip(together, alone, strict=True):
        torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)


# The standardisation


@pytest.mark.parametrize("size", [1, 5, 12])
def test_standardisation_finds_mean_and_deviation_of_every_channel_however_images_are_batched(size: int) -> None:
    settings = config()
    head, features = FastflowHead(settings, (8, 4)), feature_maps(settings, 12, 64, 32)

    moments = [head.moments([f[start : start + size] for f in features]).numpy() for start in range(0, 12, size)]
    arrays = standardisation(settings, moments)

    assert moments[0].shape == (min(size, 12), 2 * (40 + 112))
    assert list(arrays) == ["mean_layer2", "scale_layer2", "mean_layer3", "scale_layer3"]
    for layer, feature in zip(settings.layers, features, strict=True):
        values = feature.numpy().astype(np.float64)
        mean, deviation = values.mean(axis=(0, 2, 3), keepdims=True), values.std(axis=(0, 2, 3), keepdims=True)
        np.testing.assert_allclose(arrays[f"mean_{layer}"], mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(arrays[f"scale_{layer}"], 1 / deviation, rtol=1e-4)
        assert arrays[f"mean_{layer}"].shape == head.get_buffer(f"mean_{layer}").shape
        assert arrays[f"mean_{layer}"].dtype == np.float32


def test_shrinking_all_features_gains_no_likelihood_once_the_standardisation_is_measured_again() -> None:
    settings = config()
    head, features = lively_head(settings, (8, 8)), feature_maps(settings, 12, 64, 64)
    features[0][:, :3] = 0.01 * torch.randn(12, 3, 8, 8)  # channels that hardly vary are no way out either
    likelihoods = []
    for factor in (1.0, 0.01):
        shrunk = [factor * feature for feature in features]
        for name, value in standardisation(settings, [head.moments(shrunk).numpy()]).items():
            head.get_buffer(name).copy_(torch.from_numpy(value))
        likelihoods.append(head.negative_log_likelihood(shrunk))

    torch.testing.assert_close(likelihoods[0], likelihoods[1], rtol=1e-4, atol=1e-4)


def test_a_channel_that_hardly_varies_is_not_blown_up_beyond_its_scale() -> None:
    settings = config(layers=("layer2",))
    moments = np.zeros((12, 80), dtype=np.float32)
    moments[:, 41:] = 4.0  # channel 0 has no variance at all, the others a deviation of 2

    scale = standardisation(settings, [moments])["scale_layer2"].ravel()

    assert scale[1] == pytest.approx(0.5)
    assert scale[0] == pytest.approx(0.5 / 0.01, rel=0.02)


@pytest.mark.parametrize(
    ("moments", "text"),
    [
        (np.ones((9, 304), np.float32), "9 images"),
        (np.full((12, 304), np.nan, np.float32), "not finite"),
        (np.zeros((12, 304), np.float32), "layer2 are the same everywhere"),
    ],
)
def test_moments_that_give_no_standardisation_are_refused(moments: Floats, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        standardisation(config(), [moments])


def test_refit_teaches_the_flows_what_rounded_features_look_like() -> None:
    """Flows take the rounding error of features for an anomaly until they have learnt it."""
    settings = config(epochs=100, learning_rate=1e-2)
    torch.manual_seed(1)
    # Two channels in step with one another: the flows stretch what little one tells that the other does not.
    features = [feature.repeat_interleave(2, dim=1) for feature in feature_maps(config(), 24, 64, 64)]
    features = [feature[:, : feature.shape[1] // 2] for feature in features]
    rounded = [feature + 0.1 * torch.randn_like(feature) for feature in features]
    head = FastflowHead(settings, (8, 8))
    trained = refit(settings, rows(features), flows=head.flows, grid=head.grid)
    fill(head, trained)
    start = {name: value.clone() for name, value in head.flows.state_dict().items()}

    arrays = refit(settings, rows(rounded), flows=head.flows, grid=head.grid)

    for name, value in start.items():
        assert torch.equal(value, head.flows.state_dict()[name]), name
    with torch.no_grad():
        fill(head, standardisation(settings, [head.moments(rounded).numpy()]))
        before = head.negative_log_likelihood(rounded).mean()
        fill(head, arrays)
        after = head.negative_log_likelihood(rounded).mean()
    assert after < before - 0.1


def test_refit_is_repeatable_and_names_what_the_graph_holds() -> None:
    settings = config()
    head, features = lively_head(settings, (8, 8)), feature_maps(settings, 12, 64, 64)

    first, second = (refit(settings, rows(features), flows=head.flows, grid=head.grid) for _ in range(2))

    names = {name for name, _ in head.named_buffers()} | {name for name, _ in head.named_parameters()}
    assert first.keys() == names - {"kernel"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
        assert value.shape == head.state_dict()[name].shape
        assert value.dtype == np.float32


def test_refit_of_more_images_than_memory_has_room_for_sees_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    head, features = FastflowHead(settings, (8, 8)), feature_maps(settings, 40, 64, 64)
    seen: list[int] = []
    monkeypatch.setattr(fastflow, "FEATURE_BUDGET", 2 * 15 * next(rows(features))[0].nbytes)
    monkeypatch.setattr(fastflow, "_train_on_features", lambda _, __, given: seen.append(len(given[0])))

    arrays = refit(settings, rows(features), flows=head.flows, grid=head.grid)

    assert seen == [15]
    everything = standardisation(settings, [head.moments(features).numpy()])
    for name, value in everything.items():
        np.testing.assert_allclose(arrays[name], value, rtol=1e-5, atol=1e-6)


def rows(features: list[torch.Tensor]) -> Iterator[Floats]:
    """Features of all scales as the graph returns them, one image at a time."""
    for number in range(len(features[0])):
        yield torch.cat([feature[number : number + 1].flatten(1) for feature in features], dim=1).numpy()


def fill(head: FastflowHead, arrays: dict[str, Floats]) -> None:
    head.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()}, strict=False)


# Training


def test_two_fits_are_bit_identical_and_give_a_model_that_reads_back(
    anchored: Fitted, pictures: ImageSet, tmp_path: Path
) -> None:
    again = build(anchored.model.config, 48, 48, weights=RANDOM_WEIGHTS)
    again.load_state_dict(anchored.model.state_dict())

    assert same_state(anchored.model, fitted(anchored.model.config, pictures, tmp_path).model)
    assert not anchored.model.training
    batch = torch.from_numpy(pictures.image(0)[None])
    with torch.inference_mode():
        torch.testing.assert_close(again(batch), anchored.model(batch), rtol=0, atol=0)


def test_without_fine_tuning_the_backbone_stays_and_the_likelihood_rises(frozen: Fitted) -> None:
    assert same_state(frozen.model.backbone, build(frozen.model.config, 48, 48, weights=RANDOM_WEIGHTS).backbone)
    first, *_, last = frozen.records("flow")
    assert last["loss"] < first["loss"]
    assert last["held_out_likelihood"] > first["held_out_likelihood"]
    assert not (frozen.folder / "finetune").exists()


def test_fine_tuning_moves_only_convolutions_of_the_last_layer(anchored: Fitted, frozen: Fitted) -> None:
    backbone, before = anchored.model.backbone, frozen.model.backbone.state_dict()

    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}

    last = backbone.stages[2].named_modules()
    assert moved == {f"stages.2.{name}.weight" for name, module in last if isinstance(module, torch.nn.Conv2d)}
    assert not any(weight.requires_grad for weight in backbone.parameters())


def test_guard_trips_under_free_and_holds_under_anchored(
    anchored: Fitted, frozen: Fitted, pictures: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rates and images: only anchor and repeated standardisation keep the features from shrinking."""
    epochs = anchored.model.config.finetune_epochs
    free = fitted(replace(anchored.model.config, finetune="free"), pictures, tmp_path)

    tripped, held = free.records("finetune"), anchored.records("finetune")
    assert len(tripped) < epochs
    assert tripped[-1]["std_ratio"] < 0.8
    assert "of those of the frozen backbone, outside 0.8 to 1.25; the state of" in capsys.readouterr().err
    assert len(held) == epochs
    assert all(0.8 <= record["std_ratio"] <= 1.25 and record["rank_ratio"] >= 0.8 for record in held)
    images = torch.from_numpy(np.stack([pictures.image(index) for index in range(len(pictures))]))
    with torch.inference_mode():
        start, kept, ended = (model.model.backbone(images) for model in (frozen, anchored, free))
    for features in (kept, ended):
        assert 0.8 <= feature_health(features, start)["std_ratio"] <= 1.25


def test_fine_tuning_stopped_at_once_leaves_the_model_as_it_was(
    frozen: Fitted, pictures: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    violent = replace(frozen.model.config, finetune="free", backbone_rate=1.0)

    stopped = fitted(violent, pictures, tmp_path)

    assert len(stopped.records("finetune")) == 1
    assert "the state of before the training is kept" in capsys.readouterr().err
    assert same_state(stopped.model, frozen.model)


def test_fine_tuning_that_gains_nothing_is_undone(
    frozen: Fitted, pictures: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch at many times the rate leaves the flows worse than they were."""
    useless = replace(
        frozen.model.config, finetune="anchored", finetune_epochs=1, finetune_rate=30.0, backbone_rate=1e-6
    )

    model = fitted(useless, pictures, tmp_path).model

    assert "gained nothing" in capsys.readouterr().err
    assert same_state(model, frozen.model)


def test_training_resumed_in_the_second_phase_equals_one_never_interrupted(
    anchored: Fitted, pictures: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health, calls = fastflow.feature_health, []

    def interrupt_in_second_epoch(*features: list[torch.Tensor]) -> dict[str, float]:
        calls.append(features)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return health(*features)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fastflow, "feature_health", interrupt_in_second_epoch)
        fitted(anchored.model.config, pictures, tmp_path)

    resumed = fitted(anchored.model.config, pictures, tmp_path, resume=True)
    assert same_state(resumed.model, anchored.model)


def test_features_that_do_not_fit_into_memory_are_computed_again(
    frozen: Fitted, pictures: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam turns rounding into steps, so that only the course of the training can be compared."""
    monkeypatch.setattr(fastflow, "FEATURE_BUDGET", 0)

    computed = fitted(frozen.model.config, pictures, tmp_path)

    for record, expected in zip(computed.records("flow"), frozen.records("flow"), strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_too_few_images_are_refused_with_both_numbers(pictures: ImageSet, tmp_path: Path) -> None:
    few = ImageSet(pictures.paths[:9], pictures.spec)
    with pytest.raises(UsageError, match="9 images") as caught:
        fitted(config(), few, tmp_path)
    assert "10" in caught.value.hint


# The guard


def test_effective_rank_counts_directions_by_their_share() -> None:
    assert effective_rank(np.diag([9.0, 9.0, 9.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.diag([1.0, 1e-12])) == pytest.approx(1, abs=1e-4)
    shares = np.array([0.5, 0.25, 0.25])
    assert effective_rank(np.diag(shares**2)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_feature_health_reports_the_worst_scale() -> None:
    frozen = feature_maps(config(), 4, 64, 64)
    flat = frozen[1].clone()
    flat[:, 10:] = flat[:, :1]

    same = feature_health(frozen, frozen)
    halved = feature_health([frozen[0], 0.5 * frozen[1]], frozen)
    collapsed = feature_health([frozen[0], flat], frozen)

    assert same == {"std_ratio": pytest.approx(1), "rank_ratio": pytest.approx(1)}
    assert halved == {"std_ratio": pytest.approx(0.5, rel=1e-3), "rank_ratio": pytest.approx(1)}
    assert collapsed["rank_ratio"] < 0.5


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"std_ratio": 0.79}, "0.790"),
        ({"std_ratio": 1.26}, "1.260"),
        ({"std_ratio": float("nan")}, "nan"),
        ({"rank_ratio": 0.79}, "effective rank is 0.790"),
        ({"synthetic_auroc": 0.84}, "0.840, below 0.850"),
    ],
)
def test_guard_stops_with_the_figure_that_is_out_of_bounds(metrics: dict[str, float], text: str) -> None:
    healthy = {"std_ratio": 1.0, "rank_ratio": 1.0, "synthetic_auroc": 0.9}
    check_health(healthy, healthy)
    with pytest.raises(StopTraining, match=text) as caught:
        check_health({**healthy, **metrics}, healthy)
    assert caught.value.metrics.keys() == healthy.keys()


# Graph, announcements, settings


def test_exported_graph_gives_the_same_and_its_flows_gather_nothing() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from edge_anomaly_export.graph import onnx_from_detector

    model = build(config(steps=4, smoothing=0.5), 64, 96, weights=RANDOM_WEIGHTS)
    model.head = lively_head(model.config, (8, 12)).eval()

    graph = onnx_from_detector(model, 64, 96)

    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    outputs = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"image": image})
    with torch.inference_mode():
        expected = model(torch.from_numpy(image))
    for got, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)
    shapes = {value.name: tuple(value.dims) for value in graph.graph.initializer}
    assert {name: shapes[f"head.{name}"] for name in ("mean_layer2", "scale_layer3")} == {
        "mean_layer2": (1, 40, 1, 1),
        "scale_layer3": (1, 112, 1, 1),
    }
    kinds = {node.op_type for node in graph.graph.node if node.name.startswith("head/flows")}
    assert kinds == {"Slice", "Conv", "Relu", "Div", "Tanh", "Mul", "Exp", "Add", "Unsqueeze", "Concat", "Reshape"}


def test_announcement_counts_parameters_and_warns_of_what_may_go_wrong() -> None:
    settings = FastflowConfig(finetune="free")
    lines = "\n".join(announce(settings, 224, 224, 30))

    parameters = sum(value.numel() for value in FastflowHead(settings, (28, 28)).parameters())
    assert f"{parameters / 1e6:.2f} M parameters" in lines
    assert "28x28 places" in lines
    assert f"kept in {30 * 4 * (128 * 784 + 256 * 196) / 1e6:.0f} MB" in lines
    assert "collapse" in lines
    assert "30 images are few" in lines
    assert "computed anew in every epoch" in "\n".join(announce(FastflowConfig(), 224, 224, 10_000))


def test_a_wide_backbone_gets_narrow_subnets_unless_told_otherwise() -> None:
    assert FastflowConfig(backbone="resnet50").hidden == 0.16
    assert FastflowConfig(backbone="resnet50", hidden_ratio=0.5).hidden == 0.5
    assert FastflowConfig().hidden == 1.0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backbone": "resnet20"}, "resnet20"),
        ({"layers": ("layer4",)}, "layer4"),
        ({"layers": ()}, "Layers"),
        ({"layers": ("layer2", "layer2")}, "Layers"),
        ({"kernels": "5x5"}, "5x5"),
        ({"finetune": "ancored"}, "ancored"),
        ({"steps": 3}, "3 steps"),
        ({"hidden_ratio": 0.0}, "hidden ratio of 0"),
        ({"clamp": -1.0}, "clamp of -1"),
        ({"smoothing": -1.0}, "smoothing of -1"),
        ({"top_k": 0}, "top 0"),
        ({"epochs": 0}, "0 epochs"),
        ({"learning_rate": 0.0}, "learning rate of 0"),
        ({"weight_decay": -1.0}, "weight decay -1"),
        ({"unfreeze": ("layer1",)}, "layer1"),
        ({"unfreeze": ()}, "cannot be fine-tuned"),
        ({"layers": ("layer1", "layer2"), "unfreeze": ("layer3",)}, "layer3"),
        ({"layers": ("layer1",)}, "layer1"),
        ({"finetune_epochs": 0}, "0 epochs"),
        ({"anchor": 0.0}, "anchor of 0"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config(**changes)


def test_settings_of_the_fine_tuning_do_not_matter_without_it() -> None:
    assert config(finetune="off", layers=("layer1",), anchor=0.0).grid(64, 96) == (16, 24)


def test_the_last_layer_used_is_the_one_to_fine_tune_unless_told_otherwise() -> None:
    assert config(layers=("layer1", "layer2")).unfrozen == ("layer2",)
    assert config(layers=("layer3", "layer2")).unfrozen == ("layer3",)
    assert config(unfreeze=("layer2", "layer3")).unfrozen == ("layer2", "layer3")


def test_a_map_smaller_than_the_places_of_the_score_is_refused() -> None:
    with pytest.raises(UsageError, match=r"top 65 .* map of 8x8") as caught:
        build(config(top_k=65), 64, 64, weights=RANDOM_WEIGHTS)
    assert "64" in caught.value.hint
