from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from PIL import Image
from sklearn import metrics as sklearn_metrics
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from edge_anomaly import classifier
from edge_anomaly.classifier import (
    RECIPES,
    ClassData,
    Classifier,
    ClassifierConfig,
    LabeledImages,
    announce,
    augment,
    build,
    classification_figures,
    fit,
    open_class_data,
    predict,
    rate_factor,
    split_validation,
    whole_batch,
)
from edge_anomaly.resnet import CIFAR_MEAN
from edge_anomaly.training import FitSession
from edge_anomaly_runtime.errors import ImageError, UsageError
from edge_anomaly_runtime.preprocess import Preprocess

DIGITS = tuple(map(str, range(10)))
SIZE_16 = Preprocess(16, 16)


def small(**changes: Any) -> ClassifierConfig:
    return ClassifierConfig(**{"classes": ("a", "b", "c"), "image_size": 16, **changes})


def random_images(count: int, size: int = 16, classes: int = 3, seed: int = 0) -> LabeledImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return LabeledImages(pixels, torch.arange(count) % classes)


def random_data() -> ClassData:
    return ClassData("random", ("a", "b", "c"), random_images(6), random_images(3, seed=1), None)


def write_classes(root: Path, counts: dict[str, int], size: tuple[int, int] = (16, 16)) -> Path:
    rng = np.random.default_rng(len(counts))
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03}.png")
    return root


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hand-written zeros and ones as PNG of 32x32: 30 of each to learn from, 20 of each to test with."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for digit in range(2):
        for index, row in enumerate(np.flatnonzero(digits.target == digit)[:50]):
            folder = root / ("test" if index < 20 else "train") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((digits.images[row] * 15.9).astype(np.uint8))
            picture.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{row:04}.png")
    return root


# Configuration and recipes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"depth": 20}, "ResNet-20"),
        ({"recipe": "stronk"}, "stronk"),
        ({"image_size": 8}, "8"),
        ({"classes": ("a", "b", "a")}, "twice"),
        ({"epochs": 0}, "0 epochs"),
        ({"batch_size": 1}, "batch of 1"),
        ({"learning_rate": 0.0}, "learning rate of 0"),
        ({"learning_rate": float("inf")}, "learning rate of inf"),
        ({"momentum": 1.0}, "momentum of 1"),
        ({"weight_decay": -1e-4}, "-0.0001"),
        ({"label_smoothing": 1.0}, "smoothing of 1"),
        ({"cutout": 17}, "cutout of 17"),
        ({"padding": 9}, "padding of 9"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        small(**changes)


def test_the_documented_recipe_is_the_documented_one() -> None:
    config = ClassifierConfig()
    recipe = config.training

    assert (config.depth, config.batch_size, config.learning_rate, config.momentum) == (18, 128, 0.1, 0.9)
    assert (recipe.epochs, recipe.weight_decay, recipe.label_smoothing, recipe.cutout) == (100, 1e-4, 0.0, 0.0)
    factors = [rate_factor(recipe, epoch) for epoch in range(100)]
    np.testing.assert_allclose(factors, [1.0] * 60 + [0.1] * 20 + [0.01] * 20)
    shorter = [rate_factor(replace(recipe, epochs=5), epoch) for epoch in range(5)]
    np.testing.assert_allclose(shorter, [1, 1, 1, 0.1, 0.01])


@pytest.mark.parametrize(("epochs", "warm_up"), [(100, 5), (30, 3), (10, 1), (3, 0), (1, 0)])
def test_the_strong_recipe_warms_up_and_falls_towards_0(epochs: int, warm_up: int) -> None:
    factors = [rate_factor(replace(RECIPES["strong"], epochs=epochs), epoch) for epoch in range(epochs)]

    expected = [(step + 1) / (warm_up + 1) for step in range(warm_up)]
    steps = epochs - warm_up
    expected += [0.5 * (1 + np.cos(np.pi * (step + 0.5) / steps)) for step in range(steps)]
    np.testing.assert_allclose(factors, expected)
    assert epochs < 10 or factors[-1] < 0.01


def test_a_field_of_the_configuration_overrides_the_recipe() -> None:
    recipe = ClassifierConfig(recipe="strong", epochs=7, weight_decay=0.0, label_smoothing=0.0, cutout=8).training

    assert (recipe.epochs, recipe.weight_decay, recipe.label_smoothing, recipe.cutout) == (7, 0.0, 0.0, 0.25)
    assert recipe.schedule == "cosine"


def test_announcement_names_the_parameters_the_recipe_and_the_memory() -> None:
    text = "\n".join(announce(ClassifierConfig(classes=DIGITS), 32, 32, 45_000))

    assert "11,173,962 parameters" in text
    assert "100 epochs on 45000 images" in text
    assert "0.7 GB" in text
    assert "Warning" not in text
    assert "Warning: 200 images are 2 steps" in announce(ClassifierConfig(classes=DIGITS), 32, 32, 200)[-1]


# Augmentation


def test_augmentation_is_padding_cropping_flipping_and_cutout_of_each_picture() -> None:
    images = random_images(40, size=20).pixels
    torch.manual_seed(3)
    augmented = augment(images, padding=3, cutout=5)

    torch.manual_seed(3)
    offsets = torch.randint(0, 7, (2, 40))
    flipped = torch.rand(40) < 0.5
    rows, columns = torch.randint(0, 20, (40,)), torch.randint(0, 20, (40,))
    for index, image in enumerate(images):
        padded = torchvision.transforms.functional.pad(image.permute(2, 0, 1), [3])
        top, left = offsets[:, index].tolist()
        picture = torchvision.transforms.functional.crop(padded, top, left, 20, 20)
        if flipped[index]:
            picture = torchvision.transforms.functional.hflip(picture)
        expected = picture.permute(1, 2, 0).clone()
        row, column = int(rows[index]), int(columns[index])
        square = expected[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
        square[:] = torch.tensor([125, 123, 114], dtype=torch.uint8)
        assert torch.equal(augmented[index], expected)
    assert 10 < int(flipped.sum()) < 30


def test_augmentation_depends_on_the_seed_alone_and_leaves_its_input() -> None:
    images = random_images(8).pixels
    before = images.clone()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(images, padding=2, cutout=4))

    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(images, before)
    assert results[0].dtype == torch.uint8


def test_without_padding_and_cutout_a_picture_is_at_most_mirrored() -> None:
    images = random_images(16).pixels

    for image, augmented in zip(images, augment(images, padding=0), strict=True):
        assert torch.equal(augmented, image) or torch.equal(augmented, image.flip(1))


# Data


def test_whole_batches_equal_pictures_collated_one_by_one() -> None:
    images = random_images(10)
    batches = DataLoader(images, batch_sampler=[[3, 1, 4], [9, 0]], collate_fn=whole_batch)
    singles = [
        (torch.stack([images[i][0] for i in rows]), [images[i][1] for i in rows]) for rows in ([3, 1, 4], [9, 0])
    ]

    for (pixels, labels), (expected_pixels, expected_labels) in zip(batches, singles, strict=True):
        assert torch.equal(pixels, expected_pixels)
        assert labels.tolist() == expected_labels


def test_validation_takes_the_same_share_of_every_class_and_no_picture_twice() -> None:
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3)
    numbered = torch.arange(143).reshape(-1, 1, 1, 1).expand(-1, 16, 16, 3).to(torch.uint8)
    images = LabeledImages(numbered, labels, tuple(Path(str(number)) for number in range(143)))

    train, validation = split_validation(images, 0.1, seed=0)

    assert torch.bincount(validation.labels).tolist() == [10, 4, 1]
    both = torch.cat([train.pixels, validation.pixels])[:, 0, 0, 0].tolist()
    assert sorted(both) == list(range(143))
    assert [path.name for path in validation.paths] == [str(int(pixel)) for pixel in validation.pixels[:, 0, 0, 0]]
    assert torch.equal(split_validation(images, 0.1, seed=0)[1].pixels, validation.pixels)
    assert not torch.equal(split_validation(images, 0.1, seed=1)[1].pixels, validation.pixels)


def test_folders_become_pictures_labels_and_names_in_alphabetical_order(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"nut": 4, "bolt": 6})
    write_classes(tmp_path / "test", {"nut": 1, "bolt": 2})
    (tmp_path / "train" / ".cache").mkdir()

    data = open_class_data(str(tmp_path), SIZE_16, validation_share=0.5)

    assert data.classes == ("bolt", "nut")
    assert data.test is not None
    assert data.test.labels.tolist() == [0, 0, 1]
    assert data.summary() == {
        "name": tmp_path.name,
        "classes": ["bolt", "nut"],
        "train": 5,
        "validation": 5,
        "test": 3,
    }
    for part in (data.train, data.validation, data.test):
        for pixels, label, path in zip(part.pixels, part.labels, part.paths, strict=True):
            assert np.array_equal(pixels.numpy(), np.asarray(Image.open(path)))
            assert path.parent.name == data.classes[label]


def test_class_folders_alone_give_no_test_set(tmp_path: Path) -> None:
    data = open_class_data(str(write_classes(tmp_path, {"a": 3, "b": 3})), SIZE_16)

    assert data.test is None
    assert (len(data.train), len(data.validation)) == (4, 2)


@pytest.mark.parametrize(
    ("train", "test", "text"),
    [
        ({"a": 3, "b": 1}, None, "class b in .*train has 1 image"),
        ({"a": 3, "b": 0}, None, "class b in .*train has no images"),
        ({"a": 3}, None, "one class folder"),
        ({}, None, "no class folders"),
        ({"a": 3, "b": 3}, {"a": 1}, "missing b, unknown none"),
        ({"a": 3, "b": 3}, {"a": 1, "c": 1}, "missing b, unknown c"),
        ({"a": 3, "b": 3}, {"a": 1, "b": 0}, "class b in .*test has no images"),
    ],
)
def test_folders_that_cannot_be_learnt_from_are_refused(
    tmp_path: Path, train: dict[str, int], test: dict[str, int] | None, text: str
) -> None:
    (tmp_path / "train").mkdir()
    write_classes(tmp_path / "train", train)
    if test is not None:
        write_classes(tmp_path / "test", test)

    with pytest.raises(UsageError, match=text):
        open_class_data(str(tmp_path), SIZE_16)


def test_a_missing_folder_and_an_impossible_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data folder"):
        open_class_data(str(tmp_path / "nowhere"), SIZE_16)
    with pytest.raises(UsageError, match=r"share of 0\.9"):
        open_class_data(str(tmp_path), SIZE_16, validation_share=0.9)


def test_images_of_other_sizes_are_resized_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "train", {"a": 3, "b": 3}, size=(40, 24))
    write_classes(tmp_path / "train2", {"a": 2}, size=(16, 16))
    write_classes(tmp_path / "test", {"a": 1, "b": 1}, size=(64, 64))
    for path in (tmp_path / "train2" / "a").iterdir():
        path.rename(tmp_path / "train" / "a" / f"other-{path.name}")

    data = open_class_data(str(tmp_path), SIZE_16)

    assert data.train.pixels.shape[1:] == (16, 16, 3)
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ["Images of 3 sizes from 16x16 to 64x64: 8 of 10 were resized to 16x16 (squash)."]


def test_unreadable_images_are_skipped_and_named_unless_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path, {"a": 3, "b": 4})
    (tmp_path / "b" / "001.png").write_bytes(b"no picture")

    data = open_class_data(str(tmp_path), SIZE_16)

    assert len(data.train) + len(data.validation) == 6
    assert "001.png" in capsys.readouterr().err
    assert all(path.name != "001.png" for path in (*data.train.paths, *data.validation.paths) if "b" in path.parts)
    with pytest.raises(ImageError, match=r"001\.png"):
        open_class_data(str(tmp_path), SIZE_16, strict=True)
    for name in ("000.png", "002.png"):
        (tmp_path / "b" / name).write_bytes(b"no picture")
    with pytest.raises(UsageError, match="class b in the readable files has 1 image"):
        open_class_data(str(tmp_path), SIZE_16)


def test_more_pictures_than_memory_are_refused_with_the_figures() -> None:
    with pytest.raises(UsageError, match=r"50331\.6 GB"):
        classifier._empty_pixels(1_000_000, Preprocess(4096, 4096))


def write_cifar10(folder: Path, per_batch: int = 20) -> dict[str, str]:
    """Write random pictures in the format of CIFAR-10's Python version; return the MD5 sums by file name."""
    rng = np.random.default_rng(0)
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    contents: dict[str, object] = {
        name: {"data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    }
    contents["batches.meta"] = {"label_names": list(DIGITS)}
    for name, content in contents.items():
        (base / name).write_bytes(pickle.dumps(content))
    return {name: torchvision.datasets.utils.calculate_md5(str(base / name)) for name in contents}


def test_cifar10_is_read_from_its_python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = write_cifar10(tmp_path)
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[name, sums[name]] for name, _ in cifar.test_list])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})

    data = open_class_data(f"cifar10:{tmp_path}", Preprocess(32, 32))
    smaller = open_class_data(f"cifar10:{tmp_path}", SIZE_16)

    assert (data.classes, len(data.train), len(data.validation)) == (DIGITS, 90, 10)
    assert data.test is not None
    assert data.test.pixels.shape == (20, 32, 32, 3)
    assert data.test.labels.tolist() == list(range(10)) * 2
    stored = pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())["data"][0]
    assert np.array_equal(data.test.pixels[0].numpy(), stored.reshape(3, 32, 32).transpose(1, 2, 0))
    assert smaller.train.pixels.shape == (90, 16, 16, 3)


def test_a_folder_without_cifar10_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no intact CIFAR-10") as caught:
        open_class_data(f"cifar10:{tmp_path}", Preprocess(32, 32))
    assert "--download" in caught.value.hint
    assert "cifar10:" in caught.value.hint


# Model


def test_bytes_become_logits_and_on_request_pooled_features() -> None:
    image = random_images(2).pixels

    with torch.inference_mode():
        logits = build(small(), 16, 16)(image)
        again, features = build(small(features=True), 16, 16)(image)

    assert logits.shape == (2, 3)
    assert features.shape == (2, 512)
    assert torch.equal(logits, again)


def test_the_seed_decides_the_weights_and_a_stored_state_replaces_them() -> None:
    first, same, other = build(small(), 16, 16), build(small(), 16, 16), build(small(seed=1), 16, 16)
    image = random_images(2).pixels

    states = [model.state_dict() for model in (first, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other.load_state_dict(states[0])
    with torch.inference_mode():
        assert torch.equal(first(image), other(image))


def test_a_batch_gives_the_logits_of_single_images_in_either_memory_layout() -> None:
    model = build(small(), 16, 16)
    images = random_images(4).pixels

    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        channels_last = model.to(memory_format=torch.channels_last)(images)

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, channels_last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "size", "weights", "text"),
    [
        (ClassifierConfig(), 32, "default", "0 classes"),
        (small(), 32, "default", "32x32 does not fit"),
        (small(), 16, "weights.pth", "cannot start from weights.pth"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(config: ClassifierConfig, size: int, weights: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        build(config, size, size, weights=weights)


def test_the_exported_graph_gives_the_same_logits_and_names_backbone_and_head() -> None:
    model = build(small(features=True), 16, 16)
    image = random_images(1).pixels

    program = torch.onnx.export(
        model,
        (image,),
        input_names=["image"],
        output_names=["logits", "features"],
        opset_version=18,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    logits, features = session.run(["logits", "features"], {"image": image.numpy()})

    with torch.inference_mode():
        expected_logits, expected_features = model(image)
    np.testing.assert_allclose(logits, expected_logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features, expected_features.numpy(), rtol=1e-4, atol=1e-5)
    scopes = [entry.value for node in graph.graph.node for entry in node.metadata_props if "name_scopes" in entry.key]
    assert len(scopes) == len(graph.graph.node)
    assert all("'backbone'" in scope or "'head'" in scope for scope in scopes)


# Training


def trained(folder: Path, *, resume: bool = False, **changes: Any) -> Classifier:
    folder.mkdir(exist_ok=True)
    config = small(**{"recipe": "strong", "epochs": 2, "batch_size": 3, "learning_rate": 0.01, **changes})
    model = build(config, 16, 16)
    fit(model, random_data(), FitSession(folder, resume=resume, device="cpu"))
    return model


def test_a_resumed_training_ends_with_the_weights_of_one_that_was_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole").state_dict()
    calls = []

    def interrupted(images: torch.Tensor, *, padding: int, cutout: int) -> torch.Tensor:
        calls.append(images)
        if len(calls) == 3:  # the first batch of the second epoch
            raise KeyboardInterrupt
        return augment(images, padding=padding, cutout=cutout)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(classifier, "augment", interrupted)
        trained(tmp_path / "cut")
    resumed = trained(tmp_path / "cut", resume=True)

    assert not resumed.training
    state = resumed.state_dict()
    assert all(torch.equal(whole[name], state[name]) for name in whole)


def test_digits_are_learnt_far_above_chance(digits_folder: Path, tmp_path: Path) -> None:
    data = open_class_data(str(digits_folder), SIZE_16)
    # Few steps want a small rate: BatchNorm's running statistics must keep up with the weights.
    config = small(classes=data.classes, recipe="strong", cutout=0, epochs=2, batch_size=6, learning_rate=0.004)
    model = build(config, 16, 16)

    fit(model, data, FitSession(tmp_path, device="cpu"))

    assert data.test is not None
    logits, features = predict(model, data.test)
    figures = classification_figures(logits.numpy(), data.test.labels.numpy(), data.classes)
    assert figures["accuracy_interval"][0] > 0.6
    assert features.shape == (40, 512)


def test_data_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    data = random_data()
    session = FitSession(tmp_path, device="cpu")

    with pytest.raises(UsageError, match="classes a, b, c, the model a, b"):
        fit(build(small(classes=("a", "b")), 16, 16), data, session)
    with pytest.raises(UsageError, match="read at 16x16"):
        fit(build(small(image_size=32), 32, 32), data, session)


@pytest.mark.slow
def test_compiled_training_learns_the_same_within_rounding(tmp_path: Path) -> None:
    plain, compiled = (trained(tmp_path / str(compile), epochs=1, compile=compile) for compile in (False, True))

    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif("EDGE_ANOMALY_CIFAR10" not in os.environ, reason="EDGE_ANOMALY_CIFAR10 names no CIFAR-10 folder")
def test_cifar10_has_the_mean_in_the_graph_and_a_short_run_learns(tmp_path: Path) -> None:
    data = open_class_data(os.environ["EDGE_ANOMALY_CIFAR10"], Preprocess(32, 32))
    assert (len(data.train), len(data.validation)) == (45_000, 5_000)
    assert data.test is not None
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    pixels = data.train.pixels.numpy().reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(axis=0) / 255, np.array(CIFAR_MEAN), atol=0.002)

    rows = np.random.default_rng(0).permutation(45_000)
    part = replace(
        data, train=data.train.chosen(rows[:1500]), validation=data.validation.chosen(np.arange(0, 5000, 10))
    )
    config = ClassifierConfig(
        classes=data.classes, recipe="strong", cutout=0, epochs=3, batch_size=32, learning_rate=0.01
    )
    model = build(config, 32, 32)
    fit(model, part, FitSession(tmp_path, device="cpu"))

    logits, _ = predict(model, data.test.chosen(np.arange(0, 10_000, 10)))
    assert float((logits.argmax(dim=1) == data.test.labels[::10]).float().mean()) > 0.2


# Figures


def test_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 400)
    logits = rng.standard_normal((400, 7)).astype(np.float32)
    logits[np.arange(400), labels] += 1.5
    names = [f"class {index}" for index in range(7)]

    figures = classification_figures(logits, labels, names)

    predicted = logits.argmax(axis=1)
    report = sklearn_metrics.classification_report(labels, predicted, target_names=names, output_dict=True)
    assert figures["accuracy"] == pytest.approx(report["accuracy"])
    for name in names:
        own = figures["classes"][name]
        theirs = report[name]
        assert own["precision"] == pytest.approx(theirs["precision"])
        assert own["recall"] == pytest.approx(theirs["recall"])
        assert own["f1"] == pytest.approx(theirs["f1-score"])
        assert own["images"] == theirs["support"]
    assert figures["macro"]["f1"] == pytest.approx(report["macro avg"]["f1-score"])
    assert figures["confusion"] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert figures["top5"] == pytest.approx(sklearn_metrics.top_k_accuracy_score(labels, logits, k=5))
    low, high = figures["accuracy_interval"]
    assert 0.4 < low < figures["accuracy"] < high < 0.9
    counts = [pair["count"] for pair in figures["most_confused"]]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == 10


def test_most_confused_pairs_come_with_count_and_share_of_the_true_class() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    logits = np.eye(3, dtype=np.float32)[[0, 2, 2, 1, 1, 0, 2]]

    figures = classification_figures(logits, labels, ["cat", "deer", "dog"])

    assert figures["most_confused"] == [
        {"true": "cat", "predicted": "dog", "count": 2, "share": 0.5},
        {"true": "cat", "predicted": "deer", "count": 1, "share": 0.25},
        {"true": "deer", "predicted": "cat", "count": 1, "share": 0.5},
    ]
    assert figures["confusion"] == [[1, 1, 2], [1, 1, 0], [0, 0, 1]]
    assert figures["top5"] is None


def test_equal_logits_never_count_as_found_in_the_top_5() -> None:
    figures = classification_figures(np.zeros((4, 6), np.float32), np.arange(4), list("abcdef"))

    assert figures["top5"] == 0.0
    assert figures["accuracy"] == 0.25
    assert figures["classes"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 1}


@pytest.mark.parametrize(
    ("logits", "labels", "text"),
    [
        (np.zeros((3, 2)), [0, 1], r"\(3, 2\) do not fit 2 labels"),
        (np.zeros((0, 2)), [], "do not fit 0 labels"),
        (np.array([[0.0, np.nan]]), [0], "1 of 2 logits"),
        (np.zeros((2, 2)), [0, 2], "from 0 to 2"),
    ],
)
def test_figures_of_broken_predictions_are_refused(logits: Any, labels: list[int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        classification_figures(logits.astype(np.float32), np.array(labels, dtype=np.int64), ["a", "b"])
