"""The classifier: a ResNet for small pictures, trained from scratch on CIFAR-10 or on folders of classes.

The documented recipe is that of He et al. 2016 shortened to 100 epochs; `strong` adds what later work found to pay:
weight decay 5e-4, a cosine schedule (Loshchilov & Hutter 2017), label smoothing (Szegedy et al. 2016) and cutout
(DeVries & Taylor 2017). The test set is used once, at the end; the checkpoint is chosen on a part of the training set.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import ImageError, MissingRequirementError, UsageError, did_you_mean
from edge_anomaly_runtime.images import SUFFIXES, load_image
from edge_anomaly_runtime.preprocess import WHOLE_IMAGE, Preprocess, full_size, preprocess
from edge_anomaly_runtime.progress import say, track

from .backbones import DEFAULT_WEIGHTS, RANDOM_WEIGHTS
from .metrics import binomial_interval
from .prediction import report_bad
from .resnet import CIFAR_MEAN, VARIANTS, ResNetBackbone, ResNetHead, summary
from .training import FitSession, fit_epochs, resolve_device

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Batch = tuple[torch.Tensor, torch.Tensor]  # uint8 [N, H, W, 3] and int64 [N]

CIFAR10_PREFIX = "cifar10:"
MIN_PER_CLASS = 2  # one to learn from, one to choose the checkpoint by

_EVALUATION_BATCH = 250
_FILES_PER_TASK = 64
_MOST_CONFUSED = 10


@dataclass(frozen=True)
class Recipe:
    """How the learning rate falls and what holds the network back.

    schedule: `multistep` divides the rate by 10 at 60 and at 80 % of the epochs; `cosine` warms up and falls to 0.
    cutout: side of the square that is blanked, as a share of the picture's side; 0 for none.
    """

    epochs: int
    schedule: Literal["multistep", "cosine"]
    weight_decay: float
    label_smoothing: float
    cutout: float


RECIPES = {
    "documented": Recipe(epochs=100, schedule="multistep", weight_decay=1e-4, label_smoothing=0.0, cutout=0.0),
    "strong": Recipe(epochs=100, schedule="cosine", weight_decay=5e-4, label_smoothing=0.1, cutout=0.5),
}


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that decides a classifier apart from its images.

    depth: 18, 34, 50, 101 or 152.
    classes: names in the order of the logits; set from the data.
    image_size: side of the square input in pixels.
    recipe: `documented` or `strong`; the fields that are None are the recipe's.
    epochs, weight_decay, label_smoothing: None, or what to use instead of the recipe's.
    cutout: None, or the side of the blanked square in pixels; 0 for none.
    padding: random crops shift by up to this many pixels; None is an eighth of the image size, 4 at 32.
    features: the model returns the pooled features beside the logits.
    compile: train through torch.compile (slow to start, faster steps).
    """

    depth: int = 18
    classes: tuple[str, ...] = ()
    image_size: int = 32
    recipe: str = "documented"
    epochs: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float | None = None
    label_smoothing: float | None = None
    cutout: int | None = None
    padding: int | None = None
    features: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.depth not in VARIANTS:
            raise UsageError(f"There is no ResNet-{self.depth}.", f"Choose: {', '.join(map(str, VARIANTS))}.")
        if self.recipe not in RECIPES:
            raise did_you_mean("recipe", self.recipe, list(RECIPES))
        if self.image_size < 16:
            raise UsageError(f"An image size of {self.image_size} is too small.", "Choose 16 or more; usual is 32.")
        if len(set(self.classes)) != len(self.classes):
            raise UsageError(f"Class names occur twice: {', '.join(self.classes)}.", "Give every class its own name.")
        if self.epochs is not None and self.epochs < 1:
            raise UsageError(f"{self.epochs} epochs are not possible.", "Choose 1 or more.")
        if self.batch_size < 2:
            raise UsageError(
                f"A batch of {self.batch_size} is not possible.", "BatchNorm needs 2 images or more; usual is 128."
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UsageError(f"A learning rate of {self.learning_rate:g} is not possible.", "Usual is 0.1.")
        if not 0 < self.momentum < 1:
            raise UsageError(f"A momentum of {self.momentum:g} is not possible.", "Choose above 0 and below 1.")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UsageError(f"A weight decay of {self.weight_decay:g} is not possible.", "Choose 0 or more.")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise UsageError(f"Label smoothing of {self.label_smoothing:g} is not possible.", "Choose 0 to below 1.")
        if self.cutout is not None and not 0 <= self.cutout <= self.image_size:
            raise UsageError(f"A cutout of {self.cutout} is not possible.", f"Choose 0 to {self.image_size} pixels.")
        if self.padding is not None and not 0 <= self.padding <= self.image_size // 2:
            raise UsageError(
                f"A padding of {self.padding} is not possible.", f"Choose 0 to {self.image_size // 2} pixels."
            )

    @property
    def training(self) -> Recipe:
        """Return the recipe with the fields that this configuration sets."""
        recipe = RECIPES[self.recipe]
        return replace(
            recipe,
            epochs=recipe.epochs if self.epochs is None else self.epochs,
            weight_decay=recipe.weight_decay if self.weight_decay is None else self.weight_decay,
            label_smoothing=recipe.label_smoothing if self.label_smoothing is None else self.label_smoothing,
            cutout=recipe.cutout if self.cutout is None else self.cutout / self.image_size,
        )


class Classifier(nn.Module):
    """Bytes to logits: `backbone` is the ResNet, `head` pools and maps to classes."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNetBackbone(config.depth)
        self.head = ResNetHead(VARIANTS[config.depth].features, len(config.classes))
        self.eval()

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return logits float32 [N, K] of uint8 [N, H, W, 3]; with `features` also the pooled ones, [N, features]."""
        logits, pooled = self.head(self.backbone(image))
        return (logits, pooled) if self.config.features else logits


def build(config: ClassifierConfig, height: int, width: int, *, weights: str = DEFAULT_WEIGHTS) -> Classifier:
    """Return the untrained classifier, its weights drawn with the configuration's seed.

    Raises:
        UsageError: no classes, an input that is not `image_size` squared, or a weights file.
    """
    if len(config.classes) < 2:
        raise UsageError(
            f"A classifier with {len(config.classes)} classes is not possible.",
            "Give 2 or more; they come from the data.",
        )
    if (height, width) != (config.image_size, config.image_size):
        raise UsageError(
            f"An input of {height}x{width} does not fit the image size {config.image_size}.", "Give both alike."
        )
    if weights not in (DEFAULT_WEIGHTS, RANDOM_WEIGHTS):
        raise UsageError(
            f"The classifier cannot start from {weights}.", "It is trained from scratch: leave --weights out."
        )
    torch.manual_seed(config.seed)
    return Classifier(config)


# Data


class LabeledImages(Dataset[tuple[torch.Tensor, int]]):
    """Pictures in memory, or on a GPU: `pixels` uint8 [n, H, W, 3], `labels` int64 [n].

    A DataLoader that knows `__getitems__` gets whole batches, already stacked: use it with `collate_fn=whole_batch`.
    `paths` are the files in the same order, empty where the pictures came in one file.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, paths: tuple[Path, ...] = ()) -> None:
        self.pixels = pixels
        self.labels = labels
        self.paths = paths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.pixels[index], int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one batch, uint8 [N, H, W, 3] and int64 [N], where the pictures are."""
        chosen = torch.tensor(indices, dtype=torch.int64, device=self.labels.device)
        return self.pixels[chosen], self.labels[chosen]

    def to(self, device: torch.device) -> LabeledImages:
        """Return the same pictures on a device."""
        return LabeledImages(self.pixels.to(device), self.labels.to(device), self.paths)

    def chosen(self, indices: npt.NDArray[np.int64]) -> LabeledImages:
        """Return some of the pictures, in the order of `indices`."""
        rows = torch.from_numpy(indices)
        paths = tuple(self.paths[index] for index in indices) if self.paths else ()
        return LabeledImages(self.pixels[rows], self.labels[rows], paths)


def whole_batch(batch: Any) -> Any:
    """Return what `LabeledImages.__getitems__` has stacked already; for DataLoader's `collate_fn`."""
    return batch


@dataclass(frozen=True)
class ClassData:
    """Labelled pictures: to learn from, to choose the checkpoint by, and to test with once.

    `test` is None where the folder has no test set of its own.
    """

    name: str
    classes: tuple[str, ...]
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages | None

    def summary(self) -> dict[str, Any]:
        """Return the counts for a run's record."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "train": len(self.train),
            "validation": len(self.validation),
            "test": 0 if self.test is None else len(self.test),
        }


def open_class_data(
    source: str,
    spec: Preprocess,
    *,
    validation_share: float = 0.1,
    seed: int = 0,
    download: bool = False,
    strict: bool = False,
) -> ClassData:
    """Read labelled pictures once, at the size of `spec`, into memory.

    `source` is a folder with train/<class>/ and, if there is one, test/<class>/; a folder of class folders; or
    `cifar10:FOLDER` with the Python version of CIFAR-10 (fetched with `download`). The seed splits the training set,
    class by class, into what is learnt from and the validation set.

    Raises:
        UsageError: no such folder, fewer than two classes, an empty class or one with a single picture, other classes
            in test/ than in train/, more pictures than memory holds.
        MissingRequirementError: the download failed.
    """
    if not 0 < validation_share <= 0.5:
        raise UsageError(
            f"A validation share of {validation_share:g} is not possible.", "Choose above 0 and up to 0.5."
        )
    if source.startswith(CIFAR10_PREFIX):
        name, classes, learn, test = _read_cifar10(Path(source.removeprefix(CIFAR10_PREFIX)), spec, download=download)
    else:
        name, classes, learn, test = _read_folders(Path(source), spec, strict=strict)
    train, validation = split_validation(learn, validation_share, seed)
    return ClassData(name, classes, train, validation, test)


def split_validation(images: LabeledImages, share: float, seed: int) -> tuple[LabeledImages, LabeledImages]:
    """Split into training and validation set, the same share of every class (at least one picture) in each."""
    labels = images.labels.numpy()
    rng = np.random.default_rng(seed)
    held: list[npt.NDArray[np.int64]] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.append(rows[: max(1, round(share * len(rows)))])
    validation = np.sort(np.concatenate(held))
    train = np.setdiff1d(np.arange(len(labels)), validation)
    return images.chosen(train), images.chosen(validation)


# Name, classes, pictures to learn from, and those to test with.
_Source = tuple[str, tuple[str, ...], LabeledImages, LabeledImages | None]


def _read_folders(root: Path, spec: Preprocess, *, strict: bool) -> _Source:
    """Read train/ and test/, or the class folders of `root` itself."""
    if not root.is_dir():
        raise UsageError(
            f"There is no data folder {root}.",
            f"Give a folder with train/<class>/ and test/<class>/, or {CIFAR10_PREFIX}FOLDER for CIFAR-10's own files.",
        )
    train_folder = root / "train" if (root / "train").is_dir() else root
    files = _class_files(train_folder, at_least=MIN_PER_CLASS)
    classes = tuple(files)
    test_files = None
    if train_folder != root and (root / "test").is_dir():
        test_files = _class_files(root / "test", at_least=1, expected=classes)
    sizes: Counter[tuple[int, int]] = Counter()
    learn = _read_class_files(files, spec, sizes, strict=strict, at_least=MIN_PER_CLASS, what="reading")
    test: LabeledImages | None = None
    if test_files is not None:
        test = _read_class_files(test_files, spec, sizes, strict=strict, at_least=1, what="reading test")
    _say_resized(sizes, spec)
    return root.resolve().name, classes, learn, test


def _class_files(folder: Path, *, at_least: int, expected: tuple[str, ...] | None = None) -> dict[str, list[Path]]:
    """Return the image files of every class folder, in the order of the names, checked."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = tuple(path.name for path in folders)
    if expected is not None and names != expected:
        missing, unknown = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
        raise UsageError(
            f"{folder} has other classes than the training set: missing {', '.join(missing) or 'none'}, "
            f"unknown {', '.join(unknown) or 'none'}.",
            "Give both the same class folders.",
        )
    if len(names) < 2:
        raise UsageError(
            f"There {'is one class folder' if names else 'are no class folders'} in {folder}.",
            "Give two or more, each with the images of one class.",
        )
    files = {path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) for path in folders}
    _check_counts({name: len(paths) for name, paths in files.items()}, at_least, str(folder))
    return files


def _check_counts(counts: Mapping[str, int], at_least: int, where: str) -> None:
    """Refuse classes with too few images."""
    for name, count in counts.items():
        if count < at_least:
            images = "no images" if count == 0 else f"{count} image{'s' if count > 1 else ''}"
            raise UsageError(
                f"The class {name} in {where} has {images}.",
                f"Give at least {at_least}, or remove the folder; read are {', '.join(sorted(SUFFIXES))}.",
            )


def _read_class_files(
    files: Mapping[str, list[Path]],
    spec: Preprocess,
    sizes: Counter[tuple[int, int]],
    *,
    strict: bool,
    at_least: int,
    what: str,
) -> LabeledImages:
    """Read the files of all classes and count their (width, height); unreadable ones are listed and skipped."""
    paths = [path for group in files.values() for path in group]
    labels = np.repeat(np.arange(len(files)), [len(group) for group in files.values()])
    pixels = _empty_pixels(len(paths), spec)
    bad: list[ImageError] = []
    good = np.zeros(len(paths), dtype=np.bool_)
    for index, result in enumerate(track(_decoded(paths, spec), what, len(paths))):
        if isinstance(result, ImageError):
            if strict:
                raise result
            bad.append(result)
            continue
        pixels[index], size = result
        sizes[size] += 1
        good[index] = True
    report_bad(bad, len(paths))
    _check_counts(
        {name: int(good[labels == label].sum()) for label, name in enumerate(files)}, at_least, "the readable files"
    )
    kept = np.flatnonzero(good)
    if len(kept) < len(paths):
        pixels, labels, paths = pixels[kept], labels[kept], [paths[index] for index in kept]
    return LabeledImages(torch.from_numpy(pixels), torch.from_numpy(labels), tuple(paths))


def _decoded(paths: Sequence[Path], spec: Preprocess) -> Iterator[tuple[Pixels, tuple[int, int]] | ImageError]:
    """Yield for each file its pixels and its own (width, height), or what is wrong with it; decoded in threads."""

    def read(some: Sequence[Path]) -> list[tuple[Pixels, tuple[int, int]] | ImageError]:
        results: list[tuple[Pixels, tuple[int, int]] | ImageError] = []
        for path in some:
            try:
                image = load_image(path, spec)
                results.append((preprocess(image, spec), full_size(image)))
            except ImageError as error:
                results.append(error)
        return results

    tasks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    with ThreadPoolExecutor(usable_cpus()) as pool:
        for results in pool.map(read, tasks):
            yield from results


def _empty_pixels(count: int, spec: Preprocess) -> Pixels:
    """Return room for all pictures, or refuse with the figures."""
    needed = count * spec.height * spec.width * 3
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed * 2
    if needed > 0.6 * available:
        raise UsageError(
            f"{count} images of {spec.height}x{spec.width} take {needed / 1e9:.1f} GB, "
            f"and this machine has {available / 1e9:.1f} GB of memory.",
            "Choose a smaller --size, or give fewer images.",
        )
    return np.empty((count, spec.height, spec.width, 3), dtype=np.uint8)


def _say_resized(sizes: Counter[tuple[int, int]], spec: Preprocess) -> None:
    """Say once that pictures did not have the model's size."""
    others = [size for size in sizes if size != (spec.width, spec.height)]
    if not others:
        return
    smallest, largest = min(sizes, key=math.prod), max(sizes, key=math.prod)
    span = f"{smallest[0]}x{smallest[1]}"
    if len(sizes) > 1:
        span = f"{len(sizes)} sizes from {span} to {largest[0]}x{largest[1]}"
    count = sum(sizes[size] for size in others)
    say(f"Images of {span}: {count} of {sizes.total()} were resized to {spec.width}x{spec.height} ({spec.policy}).")


def _read_cifar10(folder: Path, spec: Preprocess, *, download: bool) -> _Source:
    """Read the Python version of CIFAR-10 through torchvision, which checks its files."""
    from torchvision.datasets import CIFAR10

    try:
        # torchvision announces a download on standard output, which is for data.
        with contextlib.redirect_stdout(sys.stderr):
            parts = [CIFAR10(str(folder), train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if download:
            raise MissingRequirementError(
                f"Cannot get CIFAR-10: {error}.",
                f"Fetch cifar-10-python.tar.gz by hand, unpack it in {folder} and leave out --download.",
            ) from error
        raise UsageError(
            f"There is no intact CIFAR-10 in {folder} (looked for cifar-10-batches-py).",
            "Add --download to fetch it (170 MB). For folders of images leave out the cifar10: before the path.",
        ) from error
    learn, test = (
        LabeledImages(torch.from_numpy(_at_size(part.data, spec)), torch.tensor(part.targets, dtype=torch.int64))
        for part in parts
    )
    return "cifar10", tuple(parts[0].classes), learn, test


def _at_size(pixels: Pixels, spec: Preprocess) -> Pixels:
    """Return pictures uint8 [n, h, w, 3] at the size of `spec`."""
    if pixels.shape[1:3] == (spec.height, spec.width) and spec.roi == WHOLE_IMAGE:
        return pixels
    resized = _empty_pixels(len(pixels), spec)
    for index, picture in enumerate(track(pixels, "resizing", len(pixels))):
        resized[index] = preprocess(picture, spec)
    return resized


# Training


def augment(images: torch.Tensor, *, padding: int, cutout: int = 0) -> torch.Tensor:
    """Shift, flip and blank every picture of a batch at random, uint8 [N, H, W, 3] to the same, on its device.

    Each picture is padded with black on all sides and cut to its size again at a random place, mirrored with
    probability 1/2, and a square of `cutout` pixels around a random centre takes the mean color. The draws come from
    torch's global generator on the CPU, so that every device sees the same pictures.
    """
    count, height, width, _ = images.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, count))
    flipped = torch.rand(count) < 0.5
    centres = torch.stack([torch.randint(0, height, (count,)), torch.randint(0, width, (count,))])
    rows = offsets[0, :, None] + torch.arange(height)
    forward = torch.arange(width)
    columns = offsets[1, :, None] + torch.where(flipped[:, None], width - 1 - forward, forward)
    rows, columns, centres = (indices.to(images.device) for indices in (rows, columns, centres))
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    pictures = torch.arange(count, device=images.device)[:, None, None]
    shifted = padded[pictures, rows[:, :, None], columns[:, None, :]]
    if cutout == 0:
        return shifted
    blank = _within(centres[0], cutout, height)[:, :, None] & _within(centres[1], cutout, width)[:, None, :]
    color = torch.tensor([round(255 * mean) for mean in CIFAR_MEAN], dtype=torch.uint8, device=images.device)
    return torch.where(blank[..., None], color, shifted)


def _within(centre: torch.Tensor, side: int, length: int) -> torch.Tensor:
    """Return bool [N, length]: the places from centre - side / 2 on, `side` of them, as far as they exist."""
    distance = torch.arange(length, device=centre.device) - (centre[:, None] - side // 2)
    return (distance >= 0) & (distance < side)


def rate_factor(recipe: Recipe, epoch: int) -> float:
    """Return by what the learning rate is multiplied in an epoch, counted from 0.

    Cosine: a linear warm-up over a tenth of the epochs, at most 5, then (1 + cos(pi t)) / 2 with t at the middle of
    the epoch, so that a short run also ends near 0.
    """
    if recipe.schedule == "multistep":
        return 0.1 ** sum(epoch >= round(share * recipe.epochs) for share in (0.6, 0.8))
    warm_up = min(5, recipe.epochs // 10)
    if epoch < warm_up:
        return (epoch + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - warm_up + 0.5) / (recipe.epochs - warm_up)))


def fit(model: Classifier, data: ClassData, session: FitSession) -> None:
    """Train in place; afterwards the model is that of the epoch with the best validation accuracy, in eval mode.

    On a GPU the pictures live there, convolutions work channels-last, and the session's precision applies.

    Raises:
        UsageError: the data has other classes or another size than the model, or a loss is not finite.
    """
    config, recipe = model.config, model.config.training
    _check_fits(config, data)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    device = resolve_device(session.device)
    model.to(memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    validation = _on_device(data.validation, device)

    def monitor(network: nn.Module, epoch: int) -> dict[str, float]:
        logits, _ = predict(model, validation)
        return {
            "validation_loss": float(F.cross_entropy(logits, data.validation.labels)),
            "validation_accuracy": float((logits.argmax(dim=1) == data.validation.labels).double().mean()),
        }

    fit_epochs(
        model,
        _losses(config),
        _on_device(data.train, device),
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rate_factor(recipe, epoch)),
        session,
        settings=asdict(config),
        epochs=recipe.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        monitor=monitor,
        best="validation_accuracy",
        collate=whole_batch,
    )
    model.to(memory_format=torch.contiguous_format)
    model.eval()


def _check_fits(config: ClassifierConfig, data: ClassData) -> None:
    if data.classes != config.classes:
        raise UsageError(
            f"The data has the classes {', '.join(data.classes)}, the model {', '.join(config.classes)}.",
            "Build the model with the data's classes.",
        )
    height, width = data.train.pixels.shape[1:3]
    if (height, width) != (config.image_size, config.image_size):
        raise UsageError(
            f"The data was read at {height}x{width}, the model works at {config.image_size}x{config.image_size}.",
            "Read the data at the model's size.",
        )


def _losses(config: ClassifierConfig) -> Callable[[nn.Module, Batch], dict[str, torch.Tensor]]:
    """Return the function from a batch to its loss and its accuracy, both scalars, on augmented pictures."""
    recipe = config.training
    padding = config.image_size // 8 if config.padding is None else config.padding
    cutout = round(recipe.cutout * config.image_size)
    logits_of = torch.compile(_logits) if config.compile else _logits

    def losses(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = logits_of(network, augment(images, padding=padding, cutout=cutout))
        return {
            "loss": F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing),
            "accuracy": (logits.detach().argmax(dim=1) == labels).float().mean(),
        }

    return losses


def _logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = network(images)
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return logits.float()


def _on_device(images: LabeledImages, device: torch.device) -> LabeledImages:
    """Return the pictures on a GPU, if that is the device and they take less than half of its free memory."""
    if device.type != "cuda":
        return images
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's number of this process
    free, _ = torch.cuda.mem_get_info(own)
    return images.to(own) if images.pixels.nbytes < free / 2 else images


def announce(config: ClassifierConfig, height: int, width: int, images: int) -> list[str]:
    """Return the lines for the user before the work starts."""
    recipe = config.training
    rows = summary(config.depth, len(config.classes), config.image_size)
    parameters, kept = sum(row.parameters for row in rows), sum(row.activation_bytes for row in rows)
    lines = [
        f"classifier ResNet-{config.depth}, {height}x{width}, {len(config.classes)} classes: "
        f"{parameters:,} parameters, {4 * parameters / 1e6:.1f} MB",
        f"recipe {config.recipe}: {recipe.epochs} epochs on {images} images, batch {config.batch_size}, "
        f"learning rate {config.learning_rate:g} ({recipe.schedule}), weight decay {recipe.weight_decay:g}, "
        f"label smoothing {recipe.label_smoothing:g}, cutout {round(recipe.cutout * config.image_size)} px, "
        f"seed {config.seed}",
        # Weights, gradients and momentum, and what the backward pass needs.
        f"training in fp32 takes about {(3 * 4 * parameters + config.batch_size * kept) / 1e9:.1f} GB of memory",
    ]
    if images < config.batch_size * 10:
        lines.append(
            f"Warning: {images} images are {math.ceil(images / config.batch_size)} steps an epoch; "
            "a smaller --batch-size or more epochs may learn more."
        )
    return lines


# Evaluation


def predict(model: Classifier, images: LabeledImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits float32 [n, K] and pooled features float32 [n, features] of all pictures, on the CPU.

    `model` is in evaluation mode; the pictures go to where its weights are.
    """
    device = model.backbone.mean.device
    logits, features = [], []
    with torch.inference_mode():
        for start in range(0, len(images), _EVALUATION_BATCH):
            batch = images.pixels[start : start + _EVALUATION_BATCH].to(device)
            batch_logits, batch_features = model.head(model.backbone(batch))
            logits.append(batch_logits.float().cpu())
            features.append(batch_features.float().cpu())
    return torch.cat(logits), torch.cat(features)


def classification_figures(logits: npt.NDArray[np.float32], labels: Labels, classes: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a test, ready for JSON.

    `logits` [n, K], `labels` int [n] in 0 to K - 1, n >= 1. `accuracy_interval` is the exact binomial 95 % interval;
    `top5` is None for five classes or fewer; `confusion[true][predicted]` counts pictures; `most_confused` lists up to
    ten pairs by count, with their share of the true class. Of equal logits the first class is taken, and top-5 counts
    against the model. Precision of a class that was never predicted is 0; `macro` are means over classes with pictures.

    Raises:
        UsageError: shapes do not match, a logit is not finite, or a label is out of range.
    """
    _check_predictions(logits, labels, classes)
    count, kinds = logits.shape
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * kinds + predicted, minlength=kinds * kinds).reshape(kinds, kinds)
    right = int(confusion.trace())
    own = logits[np.arange(count), labels]
    at_least_own = (logits >= own[:, np.newaxis]).sum(axis=1)
    per_class = {name: _class_figures(confusion, index) for index, name in enumerate(classes)}
    present = [figures for figures in per_class.values() if figures["images"]]
    return {
        "images": count,
        "accuracy": right / count,
        "accuracy_interval": binomial_interval(right, count),
        "top5": float((at_least_own <= 5).mean()) if kinds > 5 else None,
        "macro": {
            name: float(np.mean([figures[name] for figures in present])) for name in ("precision", "recall", "f1")
        },
        "classes": per_class,
        "confusion": confusion.tolist(),
        "most_confused": _most_confused(confusion, classes),
    }


def _check_predictions(logits: npt.NDArray[np.float32], labels: Labels, classes: Sequence[str]) -> None:
    if logits.shape != (len(labels), len(classes)) or not len(labels):
        raise UsageError(
            f"Logits of shape {logits.shape} do not fit {len(labels)} labels and {len(classes)} classes.",
            "Give one row per image and one column per class.",
        )
    bad = logits.size - int(np.count_nonzero(np.isfinite(logits)))
    if bad:
        raise UsageError(f"{bad} of {logits.size} logits are NaN or infinite.", "Check the model.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UsageError(f"Labels reach from {labels.min()} to {labels.max()}.", f"Give 0 to {len(classes) - 1}.")


def _class_figures(confusion: npt.NDArray[np.int64], index: int) -> dict[str, float]:
    """Return precision, recall and F1 of one class, and how many images it has."""
    hits, predicted, images = int(confusion[index, index]), int(confusion[:, index].sum()), int(confusion[index].sum())
    return {
        "precision": hits / max(predicted, 1),
        "recall": hits / max(images, 1),
        "f1": 2 * hits / max(predicted + images, 1),
        "images": images,
    }


def _most_confused(confusion: npt.NDArray[np.int64], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the pairs of a true and a wrong class that occur most often, of equal counts the first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    pairs = [divmod(int(place), len(classes)) for place in order if wrong.flat[place]]
    return [
        {
            "true": classes[true],
            "predicted": classes[predicted],
            "count": int(wrong[true, predicted]),
            "share": float(wrong[true, predicted] / confusion[true].sum()),
        }
        for true, predicted in pairs
    ]
