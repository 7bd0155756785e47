from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cosine

from edge_anomaly.backbones import BACKBONES, build_backbone
from edge_anomaly.detectors import config_from_record
from edge_anomaly.image_set import ImageSet
from edge_anomaly.stpm import (
    DEFAULT_LAYERS,
    Stpm,
    StpmConfig,
    StpmHead,
    TeacherAndStudent,
    announce,
    build,
    check_learnt,
    difference,
    fit,
    losses,
    probe,
)
from edge_anomaly.training import FitSession
from edge_anomaly_export.graph import onnx_from_detector
from edge_anomaly_runtime.errors import UsageError
from tests.small_models import grey_blocks

Doubles = npt.NDArray[np.float64]

SIDE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Twelve pictures with blocks of random grey."""
    return grey_blocks(tmp_path_factory.mktemp("normal"), 12, SIDE)


def config(**changes: object) -> StpmConfig:
    """A detector whose student learns in a second."""
    quick = {"backbone": "efficientnet_lite0", "layers": ("layer1", "layer2"), "epochs": 10, "batch_size": 4}
    return StpmConfig(**{**quick, **changes})  # type: ignore[arg-type]


_NEWER = ("shared_layer", "student_blocks")


def untrained(**changes: object) -> Stpm:
    return build(config(**changes), SIDE, SIDE, weights="random")


def fitted(images: ImageSet, folder: Path, **changes: object) -> Stpm:
    model = untrained(**changes)
    fit(model, images, FitSession(folder, device="cpu"))
    return model


@pytest.fixture(scope="module")
def taught(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stpm, Path]:
    """A fitted detector, and the folder with its metrics."""
    folder = tmp_path_factory.mktemp("taught")
    return fitted(images, folder), folder


def bytes_of(count: int, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)


def features(*shapes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def one_minus_cosine(teacher: torch.Tensor, student: torch.Tensor) -> Doubles:
    """Place by place with scipy, in float64."""
    count, _, rows, columns = teacher.shape
    result = np.empty((count, rows, columns))
    for place in np.ndindex(result.shape):
        image, row, column = place
        t, s = (value[image, :, row, column].double().numpy() for value in (teacher, student))
        result[place] = cosine(t, s)
    return result


def bilinear(values: Doubles, rows: int, columns: int) -> Doubles:
    """Value by value, with pixel centres at half numbers (align_corners=False)."""
    height, width = values.shape
    result = np.empty((rows, columns))
    for row, column in np.ndindex(rows, columns):
        y = max((row + 0.5) * height / rows - 0.5, 0.0)
        x = max((column + 0.5) * width / columns - 0.5, 0.0)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = values[top, left] * (1 - (x - left)) + values[top, right] * (x - left)
        lower = values[bottom, left] * (1 - (x - left)) + values[bottom, right] * (x - left)
        result[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return result


def test_difference_is_one_minus_the_cosine_of_scipy() -> None:
    (teacher,), (student,) = features((2, 7, 3, 4), seed=0), features((2, 7, 3, 4), seed=1)

    result = difference(100 * teacher, 0.01 * student)

    np.testing.assert_allclose(result.numpy(), one_minus_cosine(teacher, student), rtol=1e-5, atol=1e-7)


def test_difference_is_0_for_equal_1_for_orthogonal_and_2_for_opposite_features() -> None:
    teacher = torch.tensor([[3.0, 0.0]]).reshape(1, 2, 1, 1).expand(1, 2, 1, 3)
    student = torch.tensor([[[7.0, 0.0, -1.0]], [[0.0, 2.0, 0.0]]])[None]

    assert difference(teacher, student).flatten().tolist() == pytest.approx([0, 1, 2], abs=1e-6)


def test_places_without_features_have_a_finite_difference_and_gradient() -> None:
    teacher, student = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
    teacher[0, 0, 0, 1] = 1.0
    student.requires_grad_(True)

    result = difference(teacher, student)
    (gradient,) = torch.autograd.grad(result.sum(), student)

    assert result.flatten().tolist() == [0.0, 0.5]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_difference_of_large_half_precision_features_does_not_overflow(half: torch.dtype) -> None:
    """The square of 300 is no float16."""
    (teacher,), (student,) = features((1, 5, 2, 2), seed=0), features((1, 5, 2, 2), seed=1)
    teacher, student = (300 * teacher).to(half), (300 * student).to(half)

    result = difference(teacher, student)

    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), one_minus_cosine(teacher, student), rtol=1e-5)


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize(("map_layer", "side", "smoothing", "top_k"), [("layer2", 8, 0.7, 5), ("layer1", 16, 0.0, 1)])
def test_map_and_score_are_those_of_a_slow_reference(
    combine: str, map_layer: str, side: int, smoothing: float, top_k: int
) -> None:
    settings = StpmConfig(combine=combine, map_layer=map_layer, smoothing=smoothing, top_k=top_k)  # type: ignore[arg-type]
    shapes = ((2, 6, 16, 16), (2, 5, 8, 8), (2, 9, 4, 4))
    teacher, student = features(*shapes, seed=0), features(*shapes, seed=1)

    score, anomaly_map = StpmHead(settings, settings.grid(64, 64))(teacher, student)

    layers = [one_minus_cosine(t, s) for t, s in zip(teacher, student, strict=True)]
    for image in range(2):
        on_grid = [bilinear(layer[image], side, side) for layer in layers]
        joint = np.prod(on_grid, axis=0) if combine == "product" else np.sum(on_grid, axis=0)
        if smoothing:
            joint = gaussian_filter(joint, smoothing, mode="nearest", radius=math.ceil(3 * smoothing))
        np.testing.assert_allclose(anomaly_map[image].numpy(), joint, rtol=2e-5)
        assert score[image].item() == pytest.approx(np.sort(joint.ravel())[-top_k:].mean(), rel=2e-5)


def test_loss_is_averaged_over_batch_and_places_and_summed_over_layers() -> None:
    model = untrained(layers=("layer1", "layer2", "layer3"))
    batch = bytes_of(3)

    with torch.no_grad():
        values = losses(model, batch)
        twice = losses(model, torch.cat([batch, batch]))
        teacher, student = model.backbone(batch)

    means = [one_minus_cosine(t, s).mean() for t, s in zip(teacher, student, strict=True)]
    assert list(values) == ["loss", "layer1", "layer2", "layer3"]
    assert [values[layer].item() for layer in model.config.used_layers] == pytest.approx(means, rel=1e-5)
    assert values["loss"].item() == pytest.approx(sum(means), rel=1e-5)
    assert twice["loss"].item() == pytest.approx(values["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_backbone_has_default_layers_and_gives_a_score_and_a_map(name: str) -> None:
    model = untrained(backbone=name, layers=None)

    with torch.inference_mode():
        score, anomaly_map = model(bytes_of(1))

    assert (score.shape, anomaly_map.shape) == ((1,), (1, 4, 4))
    assert 0 < score.item() < anomaly_map.max().item() * 1.001
    assert model.config.layers == DEFAULT_LAYERS[name]


def test_both_halves_see_what_backbones_of_their_own_would_see() -> None:
    layers = ("layer3", "layer1")
    teacher = build_backbone("resnet18", layers=layers, weights="random", seed=1)
    student = build_backbone("resnet18", layers=layers, weights="random", seed=2, trainable=True).eval()
    image = bytes_of(2)

    with torch.no_grad():
        seen, expected = TeacherAndStudent(teacher, student)(image), (teacher(image), student(image))

    for ours, theirs in zip(seen, expected, strict=True):
        assert [value.shape[1] for value in ours] == [256, 64]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "layers"), [("efficientnet_lite0", None), ("resnet18", ("layer2",))])
def test_a_student_learns_only_above_the_layer_that_it_shares(name: str, layers: tuple[str, ...] | None) -> None:
    model = untrained(backbone=name, layers=layers, map_layer="layer2", shared_layer="layer1")
    whole = untrained(backbone=name, layers=layers, map_layer="layer2", shared_layer=None)
    image = bytes_of(2)

    with torch.no_grad():
        teacher, student = model.backbone(image)
        below = build_backbone(name, layers=("layer1",), weights="random", seed=model.config.seed)(image)[0]
        for stage, found in zip(model.backbone.student.stages, student, strict=True):
            below = stage(below)
            assert torch.equal(below, found)
        assert all(torch.equal(a, b) for a, b in zip(teacher, whole.backbone(image)[0], strict=True))
    learnt, all_of_it = (sum(weight.numel() for weight in one.backbone.student.parameters()) for one in (model, whole))
    assert learnt < all_of_it


@pytest.mark.parametrize(("name", "blocks"), [("efficientnet_lite0", 2), ("resnet18", 1), ("resnet50", 2)])
def test_a_thin_student_has_only_the_first_blocks_of_each_layer(name: str, blocks: int) -> None:
    model = untrained(backbone=name, layers=None, map_layer="layer2", student_blocks=blocks)
    whole = untrained(backbone=name, layers=None, map_layer="layer2", student_blocks=None)

    with torch.no_grad():
        teacher, student = model.backbone(bytes_of(2))
    assert [learnt.shape for learnt in student] == [taught.shape for taught in teacher]
    kept, every = (dict(one.backbone.student.named_parameters()) for one in (model, whole))
    assert all(torch.equal(weight, every[key]) for key, weight in kept.items())
    assert {key for key in every if key not in kept} == {key for key in every if _block(key, name) >= blocks}


def _block(key: str, name: str) -> int:
    """Return which block of its row a parameter of a student above its stem belongs to."""
    parts = key.split(".")
    if parts[0] != "stages":
        return 0
    return int(parts[3 if name == "efficientnet_lite0" else 2])


def test_what_is_shared_by_default_is_below_all_compared_layers_and_recorded_by_name() -> None:
    assert StpmConfig("efficientnet_lite0").used_shared == "layer1"
    assert StpmConfig("efficientnet_lite0", layers=("layer1", "layer2")).used_shared is None
    assert StpmConfig("resnet18").used_shared is None
    model = build(StpmConfig("efficientnet_lite0"), SIDE, SIDE, weights="random")
    assert (model.config.layers, model.config.shared_layer) == (("layer2", "layer3"), "layer1")


def test_blocks_by_default_are_recorded_by_number() -> None:
    model = build(StpmConfig("efficientnet_lite0"), SIDE, SIDE, weights="random")
    assert model.config.student_blocks == 2
    assert build(StpmConfig("resnet18"), SIDE, SIDE, weights="random").config.student_blocks is None


def test_a_run_older_than_sharing_and_thinning_does_neither() -> None:
    record = asdict(StpmConfig("efficientnet_lite0"))
    old = config_from_record("stpm", {name: record[name] for name in record if name not in _NEWER})
    assert (old.used_shared, old.used_blocks) == (None, None)


def test_student_starts_unlike_its_teacher_even_if_both_are_random() -> None:
    model = untrained()

    with torch.no_grad():
        assert losses(model, bytes_of(2))["loss"].item() > 1


def test_training_mode_reaches_the_student_alone() -> None:
    model = untrained().train()

    assert model.backbone.student.training
    assert not any(module.training for module in model.backbone.teacher.modules())
    assert not any(weight.requires_grad for weight in model.backbone.teacher.parameters())
    assert all(weight.requires_grad for weight in model.backbone.student.parameters())


def test_fit_teaches_the_student_and_leaves_the_teacher_alone(images: ImageSet, taught: tuple[Stpm, Path]) -> None:
    start, model = untrained(), taught[0]

    before, after = start.state_dict(), model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("backbone.student.") for name in moved)
    assert any(name.endswith("running_mean") for name in moved)
    batch = torch.stack([images[index] for index in range(len(images))])
    with torch.no_grad():
        assert losses(model, batch)["loss"] < 0.5 * losses(start, batch)["loss"]
    assert not model.training


def test_metrics_tell_of_each_layer_and_of_synthetic_anomalies(taught: tuple[Stpm, Path]) -> None:
    records = [json.loads(line) for line in (taught[1] / "metrics.jsonl").read_text().splitlines()]

    assert [record["epoch"] for record in records] == list(range(1, 11))
    for record in records:
        assert record["loss"] == pytest.approx(record["layer1"] + record["layer2"], rel=1e-5)
        assert 0 <= record["synthetic_auroc"] <= 1
    assert records[-1]["normal_loss"] < records[-1]["synthetic_loss"]


def test_two_fits_of_one_seed_are_bit_identical_and_another_seed_differs(
    images: ImageSet, taught: tuple[Stpm, Path], tmp_path: Path
) -> None:
    first, second = taught[0].state_dict(), fitted(images, tmp_path).state_dict()
    other = fitted(images, tmp_path, seed=1).state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "backbone.student.stem.0.weight"
    assert not torch.equal(first[name], other[name])


def test_probe_finds_no_loss_in_a_student_that_equals_its_teacher() -> None:
    model = untrained()
    model.backbone.student.load_state_dict(model.backbone.teacher.state_dict())

    with torch.no_grad():
        values = probe(model, bytes_of(3), bytes_of(3, seed=1))

    assert values == {"normal_loss": 0.0, "synthetic_loss": 0.0, "synthetic_auroc": 0.5}


def test_probe_reports_the_mean_loss_of_each_side_and_the_auroc_of_scores() -> None:
    model = untrained()
    normal, synthetic = bytes_of(3), bytes_of(4, seed=1)

    with torch.no_grad():
        values = probe(model, normal, synthetic)
        low, high = model(normal)[0], model(synthetic)[0]
        expected = [losses(model, normal)["loss"].item(), losses(model, synthetic)["loss"].item()]

    assert [values["normal_loss"], values["synthetic_loss"]] == pytest.approx(expected, rel=1e-5)
    wins = (high[:, None] > low[None, :]).double().mean().item()
    assert values["synthetic_auroc"] == pytest.approx(wins)


@pytest.mark.parametrize(("before", "after"), [(2.0, 1.0), (2.0, 0.1), (2.0, 0.0)])
def test_a_loss_that_fell_to_half_or_less_passes_as_learnt(before: float, after: float) -> None:
    check_learnt(before, after)


@pytest.mark.parametrize(("before", "after"), [(2.0, 1.01), (2.0, 2.0), (2.0, 3.0), (2.0, math.nan), (math.nan, 0.1)])
def test_a_loss_that_did_not_clearly_fall_is_an_error_with_both_values(before: float, after: float) -> None:
    with pytest.raises(UsageError, match="has not learnt") as caught:
        check_learnt(before, after)
    assert f"{before:.3g}" in caught.value.what
    assert f"{after:.3g}" in caught.value.what


def test_a_fit_whose_student_does_not_learn_is_an_error(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The student has not learnt"):
        fitted(images, tmp_path, epochs=1, learning_rate=1e-9)


def test_too_few_images_are_refused_with_both_numbers(images: ImageSet, tmp_path: Path) -> None:
    few = ImageSet(images.paths[:9], images.spec)

    with pytest.raises(UsageError, match="9 images") as caught:
        fitted(few, tmp_path)
    assert "10" in caught.value.hint


def test_state_dict_and_json_record_bring_the_model_back() -> None:
    model = untrained(seed=3)
    record = json.loads(json.dumps(asdict(model.config)))

    settings = config_from_record("stpm", record)
    other = build(settings, SIDE, SIDE, weights="random")
    for weight in other.parameters():
        weight.data.zero_()
    other.load_state_dict(model.state_dict())

    assert settings == model.config
    with torch.inference_mode():
        for ours, theirs in zip(other(bytes_of(2)), model(bytes_of(2)), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_batch_gives_the_scores_of_single_images(combine: str) -> None:
    model, batch = untrained(combine=combine), bytes_of(4)

    with torch.inference_mode():
        together, maps = model(batch)
        alone = [model(image[None]) for image in batch]

    torch.testing.assert_close(together, torch.cat([score for score, _ in alone]))
    torch.testing.assert_close(maps, torch.cat([one for _, one in alone]))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("efficientnet_lite0", {}),
        ("efficientnet_lite0", {"shared_layer": "layer1", "layers": ("layer2", "layer3")}),
        ("efficientnet_lite0", {"student_blocks": 1, "layers": ("layer2", "layer3")}),
        ("resnet18", {"combine": "sum", "map_layer": "layer1", "top_k": 1, "smoothing": 0.0}),
    ],
)
def test_onnx_graph_gives_the_scores_and_maps_of_torch(name: str, changes: dict[str, object]) -> None:
    model, image = untrained(backbone=name, **changes), bytes_of(1)

    graph = onnx_from_detector(model, SIDE, SIDE)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    score, anomaly_map = session.run(None, {"image": image.numpy()})

    with torch.inference_mode():
        expected, expected_map = model(image)
    np.testing.assert_allclose(score, expected.numpy(), rtol=1e-4)
    np.testing.assert_allclose(anomaly_map, expected_map.numpy(), rtol=1e-4)
    convolutions = [node.name for node in graph.graph.node if node.op_type == "Conv"]
    assert {"/".join(conv.split("/")[:2]) for conv in convolutions if conv.startswith("backbone/")} == {
        "backbone/teacher",
        "backbone/student",
    }
    assert all(node.name.startswith(("backbone/", "head/")) for node in graph.graph.node)
    casts = [node for node in graph.graph.node if node.op_type == "Cast"]
    assert len(casts) == 1, "bytes are prepared once for both"


def test_announcement_has_grid_layers_and_the_true_number_of_parameters() -> None:
    settings = config(epochs=7, batch_size=32)
    state = torch.random.get_rng_state()

    place, steps = announce(settings, 224, 192, 282)

    assert torch.equal(torch.random.get_rng_state(), state)
    parameters = sum(weight.numel() for weight in untrained().backbone.student.parameters())
    assert "28x24" in place
    assert "product of layer1, layer2" in place
    assert f"{parameters / 1e6:.2f} M" in place
    assert "7 epochs of 9 batches" in steps


def test_announcement_warns_of_few_images() -> None:
    assert "Warning: 99 images are few" in announce(config(), SIDE, SIDE, 99)[-1]
    assert not any("Warning" in line for line in announce(config(), SIDE, SIDE, 100))


def test_a_top_k_beyond_the_map_is_refused_with_the_largest_possible() -> None:
    with pytest.raises(UsageError, match="17 largest") as caught:
        untrained(top_k=17)
    assert "16" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backbone": "resnet19"}, "resnet19"),
        ({"layers": ("layer2", "layer4")}, "layer4"),
        ({"layers": ()}, r"\(\)"),
        ({"layers": ("layer2", "layer2")}, "layer2"),
        ({"map_layer": "stem"}, "stem"),
        ({"shared_layer": "stem"}, "stem"),
        ({"shared_layer": "layer1"}, "teacher's layer1"),
        ({"student_blocks": 0}, "0 blocks"),
        ({"combine": "max"}, "max"),
        ({"smoothing": -1.0}, "-1"),
        ({"smoothing": math.nan}, "nan"),
        ({"top_k": 0}, "top_k of 0"),
        ({"epochs": 0}, "0 epochs"),
        ({"batch_size": 1}, "batches of 1"),
        ({"learning_rate": 0.0}, "rate of 0"),
        ({"learning_rate": math.nan}, "nan"),
        ({"momentum": 1.0}, "momentum of 1"),
        ({"weight_decay": -0.1}, "-0.1"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config(**changes)
