"""STPM (Wang et al. 2021): a student learns to repeat a frozen teacher on normal images, and cannot on anomalies.

Both see the same bytes. At every place of every layer used, features are brought to unit length and the layer's map is
0.5 ||t - s||^2 = 1 - cos(t, s): 0 where the student agrees, 2 at the most. The maps of the layers are joined by their
product (the paper) or their sum.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn

from edge_anomaly_calibration.selection import synthetic_anomaly
from edge_anomaly_runtime.errors import UsageError, did_you_mean

from .backbones import BACKBONES, DEFAULT_WEIGHTS, RANDOM_WEIGHTS, Backbone, build_backbone, check_layers, thin
from .features import blurred, gaussian_kernel, mean_of_largest, on_grid
from .image_set import ImageSet, too_few_images
from .metrics import auroc
from .training import FitSession, fit_epochs

CombineKind = Literal["product", "sum"]

# The paper's three layers. On solar cells, the fine grain that layer1 of EfficientNet-Lite0 sees is noise: without it
# the polycrystalline ones gain 0.045 in AUROC, the others lose 0.003 (one seed each).
DEFAULT_LAYERS = {
    "resnet18": ("layer1", "layer2", "layer3"),
    "resnet34": ("layer1", "layer2", "layer3"),
    "resnet50": ("layer1", "layer2", "layer3"),
    "wide_resnet50_2": ("layer1", "layer2", "layer3"),
    "efficientnet_lite0": ("layer2", "layer3"),
}

# Edges and colours are those of every picture: learning them anew only takes time. On the monocrystalline cells the
# student that shares them is better by 0.018 in AUROC (one seed). Not tried on the ResNets, whose layer1 is compared.
DEFAULT_SHARED = {"efficientnet_lite0": "layer1"}
# Three blocks in a row become two: a tenth less to compute, for 0.003 in AUROC on those cells; one block costs 0.012.
DEFAULT_BLOCKS = {"efficientnet_lite0": 2}
BY_BACKBONE: Literal["default"] = "default"

MIN_IMAGES = 10
ADVISED_IMAGES = 100

# How much of an untrained student's loss may be left.
LARGEST_SHARE = 0.5

# Added to squared lengths: a place without any feature has no direction, and no gradient that is not finite.
_EPSILON = 1e-12
_PROBES = 16
_BYTES = 4


@dataclass(frozen=True)
class StpmConfig:
    """Everything that decides an STPM model apart from its images.

    layers: the layers whose features are compared; None is the backbone's default.
    shared_layer: the student has the teacher's layers up to this one and learns those above; None learns all,
        `default` is the backbone's default where that is below all `layers`.
    student_blocks: the student has only so many of the blocks that each layer repeats; None has all, `default` is the
        backbone's default.
    combine: `product` marks places where all layers differ, `sum` those where any does.
    map_layer: the map has this layer's grid; it need not be one of `layers`.
    smoothing: standard deviation of the Gaussian blur of the map, in cells of its grid; 0 for none.
    top_k: the score is the mean of so many largest values of the map.
    epochs, batch_size, learning_rate, momentum, weight_decay: the student's stochastic gradient descent.
    seed: of the student's random start and of the order of the images.
    """

    backbone: str = "resnet18"
    layers: tuple[str, ...] | None = None
    shared_layer: str | None = BY_BACKBONE
    student_blocks: int | Literal["default"] | None = BY_BACKBONE
    combine: CombineKind = "product"
    map_layer: str = "layer2"
    smoothing: float = 0.5
    top_k: int = 10
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        shared = () if self.shared_layer in (None, BY_BACKBONE) else (str(self.shared_layer),)
        check_layers(self.backbone, (*(self.layers or ()), self.map_layer, *shared))
        if not self.used_layers or len(set(self.used_layers)) < len(self.used_layers):
            raise UsageError(f"The layers {self.used_layers} are not possible.", "Name one or more, each once.")
        if self.used_shared is not None and self.used_shared >= min(self.used_layers):
            raise UsageError(
                f"A student that has the teacher's {self.used_shared} cannot differ at {min(self.used_layers)}.",
                "Share a layer below all that are compared, or compare others with --layer.",
            )
        if self.used_blocks is not None and self.used_blocks < 1:
            raise UsageError(f"A student of {self.used_blocks} blocks a layer is not possible.", "Give 1 or more.")
        if self.combine not in get_args(CombineKind):
            raise did_you_mean("combination", self.combine, list(get_args(CombineKind)))
        if not 0 <= self.smoothing < math.inf or self.top_k < 1:
            raise UsageError(
                f"A smoothing of {self.smoothing:g} with a top_k of {self.top_k} is not possible.",
                "The smoothing must be 0 or more, top_k 1 or more.",
            )
        if self.epochs < 1 or self.batch_size < 2:
            raise UsageError(
                f"{self.epochs} epochs with batches of {self.batch_size} are not possible.",
                "Give 1 epoch or more, and batches of 2 images or more.",
            )
        if not (0 < self.learning_rate < math.inf and 0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise UsageError(
                f"A learning rate of {self.learning_rate:g} with a momentum of {self.momentum:g} and a weight decay of "
                f"{self.weight_decay:g} is not possible.",
                "The rate must be above 0, the momentum in [0, 1), the decay 0 or more.",
            )

    @property
    def used_layers(self) -> tuple[str, ...]:
        """The layers whose features are compared."""
        return DEFAULT_LAYERS[self.backbone] if self.layers is None else self.layers

    @property
    def used_shared(self) -> str | None:
        """The layer up to which the student is the teacher; None where it learns all."""
        if self.shared_layer != BY_BACKBONE:
            return self.shared_layer
        shared = DEFAULT_SHARED.get(self.backbone)
        return shared if shared is not None and shared < min(self.used_layers) else None

    @property
    def used_blocks(self) -> int | None:
        """How many blocks a layer of the student repeats at most; None where it repeats as many as the teacher."""
        return DEFAULT_BLOCKS.get(self.backbone) if self.student_blocks == BY_BACKBONE else self.student_blocks

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the map for an input of this size."""
        stride = BACKBONES[self.backbone].layers[self.map_layer][1]
        return -(-height // stride), -(-width // stride)


class TeacherAndStudent(nn.Module):
    """Two backbones of one architecture: the teacher frozen, the student trainable above what it shares with it."""

    def __init__(self, teacher: Backbone, student: Backbone, shared_layer: str | None = None) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = student
        self.shared_layer = shared_layer
        if shared_layer is not None:
            student.stem = nn.Identity()
            shared = student.stage_names.index(shared_layer) + 1
            student.stages = nn.ModuleList(list(student.stages)[shared:])
            student.stage_names = student.stage_names[shared:]

    def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the maps of teacher and of student, float32 [N, C, h, w] per layer, from uint8 [N, H, W, 3]."""
        pixels = (image.permute(0, 3, 1, 2).float() - self.teacher.mean) * self.teacher.scale
        taught = _layer_outputs(self.teacher, pixels)
        learnt = _layer_outputs(self.student, pixels if self.shared_layer is None else taught[self.shared_layer])
        return [taught[layer] for layer in self.teacher.layers], [learnt[layer] for layer in self.teacher.layers]


class StpmHead(nn.Module):
    """From the maps of both to `score` [N] and `anomaly_map` [N, h, w], all in float."""

    kernel: torch.Tensor

    def __init__(self, config: StpmConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.combine = config.combine
        self.grid = grid
        self.top_k = config.top_k
        self.register_buffer("kernel", gaussian_kernel(config.smoothing))

    def forward(self, teacher: list[torch.Tensor], student: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score [N], the mean of the largest values of the blurred map, and the map [N, h, w]."""
        maps = [on_grid(difference(t, s), self.grid) for t, s in zip(teacher, student, strict=True)]
        anomaly_map = blurred(
            functools.reduce(torch.mul if self.combine == "product" else torch.add, maps), self.kernel
        )
        return mean_of_largest(anomaly_map.flatten(1), self.top_k), anomaly_map


class Stpm(nn.Module):
    """The detector: teacher and student, float head. Input uint8 [N, H, W, 3]."""

    def __init__(self, config: StpmConfig, backbone: TeacherAndStudent, height: int, width: int) -> None:
        super().__init__()
        rows, columns = config.grid(height, width)
        if config.top_k > rows * columns:
            raise UsageError(
                f"The mean of the {config.top_k} largest values is not possible on a map of {rows}x{columns}.",
                f"Choose a top_k of {rows * columns} at most, or larger images.",
            )
        self.config = config
        self.backbone = backbone
        self.head = StpmHead(config, (rows, columns))
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score float32 [N] and anomaly map float32 [N, h, w]."""
        return self.head(*self.backbone(image))  # type: ignore[no-any-return]


def build(config: StpmConfig, height: int, width: int, *, weights: str = DEFAULT_WEIGHTS) -> Stpm:
    """Return the detector with the teacher's weights and an untrained student; the config's defaults become names.

    `weights`: of the teacher, as in `build_backbone`.

    Raises:
        UsageError: the weights do not fit, or the map has fewer values than `top_k`.
        MissingRequirementError: the weights cannot be reached.
    """
    layers = config.used_layers
    teacher = build_backbone(config.backbone, layers=layers, weights=weights, seed=config.seed)
    # Not the teacher's seed: if its weights were random too, the student would be born as its equal.
    student = build_backbone(
        config.backbone, layers=layers, weights=RANDOM_WEIGHTS, seed=config.seed + 1, trainable=True
    )
    if config.used_blocks is not None:
        thin(student, config.used_blocks)
    both = TeacherAndStudent(teacher, student, config.used_shared)
    named = replace(config, layers=layers, shared_layer=config.used_shared, student_blocks=config.used_blocks)
    return Stpm(named, both, height, width)


def announce(config: StpmConfig, height: int, width: int, images: int) -> list[str]:
    """Return what to tell the user before the training: grid, parameters, steps, and whether images are few."""
    rows, columns = config.grid(height, width)
    taught, learnt = _parameters(config, height, width)
    shared = "" if config.used_shared is None else f" above {config.used_shared}, which it shares"
    lines = [
        f"{config.backbone}: {config.combine} of {', '.join(config.used_layers)} on {rows}x{columns} places; teacher "
        f"{taught / 1e6:.2f} M parameters ({_BYTES * taught / 1e6:.1f} MB), student {learnt / 1e6:.2f} M{shared}",
        f"the student learns for {config.epochs} epochs of {-(-images // config.batch_size)} batches",
    ]
    if MIN_IMAGES <= images < ADVISED_IMAGES:
        lines.append(
            f"Warning: {images} images are few for a student that starts from nothing; {ADVISED_IMAGES} or more are "
            "advisable, or more epochs."
        )
    return lines


def fit(model: Stpm, images: ImageSet, session: FitSession) -> None:
    """Train the student of a model as `build` makes it; the metrics tell what it makes of synthetic anomalies.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, a loss is not finite, or the student has not learnt.
    """
    if len(images) < MIN_IMAGES:
        raise too_few_images(len(images), MIN_IMAGES, ADVISED_IMAGES)
    config = model.config
    normal, synthetic = _probes(images, config.seed)
    with torch.no_grad():
        before = probe(model, normal, synthetic)["normal_loss"]
    optimizer = torch.optim.SGD(
        model.backbone.student.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    fit_epochs(
        model,
        lambda _, batch: losses(model, batch),
        images,
        optimizer,
        None,
        session,
        settings=asdict(config),
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        monitor=lambda _, epoch: probe(model, normal, synthetic),
    )
    with torch.no_grad():
        check_learnt(before, probe(model, normal, synthetic)["normal_loss"])


def losses(model: Stpm, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mean difference over batch and places by layer, and their sum over the layers as `loss`."""
    teacher, student = model.backbone(image)
    by_layer = {
        layer: difference(t, s).mean() for layer, t, s in zip(model.config.used_layers, teacher, student, strict=True)
    }
    return {"loss": torch.stack(list(by_layer.values())).sum(), **by_layer}


def difference(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return 0.5 ||t - s||^2 of the channels brought to unit length, float32 [N, h, w] in [0, 2] (equation 2).

    `teacher`, `student`: [N, C, h, w] of any float type. A place without any feature counts as the zero vector.
    """
    return 0.5 * (_unit_length(teacher) - _unit_length(student)).square().sum(dim=1)


def probe(model: Stpm, normal: torch.Tensor, synthetic: torch.Tensor) -> dict[str, float]:
    """Return the student's loss on both, and the AUROC of the scores between them; no label is involved.

    `normal`, `synthetic`: uint8 [n, H, W, 3], training images as they are and with a synthetic anomaly.
    """
    image = torch.cat([normal, synthetic]).to(model.head.kernel.device)
    teacher, student = model.backbone(image)
    scores, _ = model.head(teacher, student)
    by_layer = [difference(t, s).mean(dim=(1, 2)) for t, s in zip(teacher, student, strict=True)]
    by_image = torch.stack(by_layer).sum(dim=0)
    anomalous = np.arange(len(image)) >= len(normal)
    return {
        "normal_loss": float(by_image[: len(normal)].mean()),
        "synthetic_loss": float(by_image[len(normal) :].mean()),
        "synthetic_auroc": auroc(scores.cpu().numpy(), anomalous),
    }


def check_learnt(before: float, after: float) -> None:
    """Refuse a student whose loss on normal images, in evaluation mode, has not clearly fallen in the training.

    Without this check the scores of a student that never learnt would pass for those of a poor model.

    Raises:
        UsageError: `after` is more than LARGEST_SHARE of `before`, or not a number.
    """
    if not after <= LARGEST_SHARE * before:
        raise UsageError(
            f"The student has not learnt: its loss on normal images was {before:.3g} before the training and is "
            f"{after:.3g} after it, more than {LARGEST_SHARE:.0%} of that.",
            "Train for more epochs, on more images, or with another learning rate.",
        )


def _layer_outputs(backbone: Backbone, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each layer of `backbone`, from what its lowest part reads: normalised pixels or a shared layer."""
    x = backbone.stem(x)
    outputs = {}
    for name, stage in zip(backbone.stage_names, backbone.stages, strict=True):
        outputs[name] = x = stage(x)
    return outputs


def _unit_length(features: torch.Tensor) -> torch.Tensor:
    """Return features [N, C, h, w] of length 1 over the channels, in float32: squares overflow in half precision."""
    wide = features.float()
    # A least value, not a sum: the exporter takes x + 1e-12 for x, and a place without any feature would give 0/0.
    return wide * torch.rsqrt(wide.square().sum(dim=1, keepdim=True).clamp(min=_EPSILON))


def _probes(images: ImageSet, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return evenly spread images, uint8 [n, H, W, 3], as they are and with a synthetic anomaly each."""
    chosen = np.linspace(0, len(images) - 1, min(_PROBES, len(images))).round().astype(int)
    normal = [images.image(int(index)) for index in chosen]
    synthetic = [
        synthetic_anomaly(image, np.random.default_rng([seed, int(index)]))
        for image, index in zip(normal, chosen, strict=True)
    ]
    return torch.from_numpy(np.stack(normal)), torch.from_numpy(np.stack(synthetic))


def _parameters(config: StpmConfig, height: int, width: int) -> tuple[int, int]:
    """Return how many parameters the teacher has and how many the student learns, without drawing or holding them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build(config, height, width, weights=RANDOM_WEIGHTS)
    taught, learnt = (
        sum(parameter.numel() for parameter in network.parameters())
        for network in (model.backbone.teacher, model.backbone.student)
    )
    return taught, learnt
