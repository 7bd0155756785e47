"""FastFlow (Yu et al. 2021): how likely is every patch under a 2-D normalising flow of normal features?

Each scale of the backbone has a flow of affine couplings that maps its features f to z, normal features to white noise.
It is trained on the likelihood 0.5 ||z||^2 - log|det dz/df|; the map is 0.5 z^2, the mean over channels, joined over
scales. The paper's map is -exp(-0.5 z^2): the same order of places, but equal to 0 in float32 for clear anomalies.

Likelihood alone rewards a collapse once the backbone learns too: features shrunk by eps gain log(1/eps) per dimension.
Four things stand against it: features are standardised by fixed numbers, measured anew after every epoch; an anchor
holds them near those of the frozen backbone; stem, layer1 and BatchNorm never move; and a guard ends the training.
With an anchor of weight a, a common factor s of all features costs a (1 - s)^2 and gains at most log(1/s) per
dimension, so s stops where s (1 - s) = 1 / (2 a): at 0.947 for a = 10, and nowhere for a below 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from edge_anomaly_calibration.selection import synthetic_anomaly
from edge_anomaly_runtime.errors import UsageError, did_you_mean
from edge_anomaly_runtime.progress import say, track

from .backbones import BACKBONES, DEFAULT_WEIGHTS, Backbone, build_backbone, check_layers
from .features import blurred, gaussian_kernel, mean_of_largest, on_grid
from .image_set import ImageSet, too_few_images
from .metrics import auroc
from .prediction import Pixels, batched
from .training import CHECKPOINT, FitSession, Losses, Record, StopTraining, fit_epochs, resolve_device

FinetuneKind = Literal["anchored", "off", "free"]
KernelKind = Literal["alternating", "3x3"]
Embeddings = npt.NDArray[np.float32]
Features = list[torch.Tensor]  # of each scale, float32 [N, C, h, w]

# Hidden channels of a subnet as a share of the channels that it sees; at 1.0 the flows of a ResNet-50 would cost twice
# as much as the network itself.
DEFAULT_HIDDEN_RATIO = {"resnet50": 0.16, "wide_resnet50_2": 0.16}

# The guard: geometric mean of the channels' standard deviations and effective rank of the features, both against the
# frozen backbone, and what AUROC on synthetic anomalies may lose.
STD_RATIO_LIMITS = (0.8, 1.25)
LEAST_RANK_RATIO = 0.8
LARGEST_AUROC_LOSS = 0.05

# What chooses the epoch to keep.
BEST = "held_out_likelihood"

MIN_IMAGES = 10
ADVISED_IMAGES = 50

# Fine-tuning sees so many images at most: with the default epochs and batches, a few hundred steps.
FINETUNE_IMAGES = 512

# Features of a frozen backbone are kept while they fit; else every epoch computes them again.
FEATURE_BUDGET = 2 << 30

# On a quantised backbone's features the flows learn for another fifth of their epochs, at half the rate.
_REFIT_EPOCHS, _REFIT_RATE = 0.2, 0.5

# Channels that hardly vary are divided by this share of the scale's typical deviation, not by their own. A share, not a
# constant: shrinking all channels must gain nothing.
_LEAST_DEVIATION = 0.01
_CLIP_NORM = 1.0
# Contrast of the synthetic anomalies that watch over the training: with full contrast alone, the AUROC is 1 throughout.
_STRENGTHS = (1.0, 0.3, 0.1)
_MOST_WATCHED = 32
_BATCH = 16
_BYTES = 4


@dataclass(frozen=True)
class FastflowConfig:
    """Everything that decides a FastFlow model apart from its images.

    layers: the scales, each with a flow of its own.
    steps: couplings of each flow, an even number: every two of them change every channel once.
    kernels: of the couplings' subnets; `alternating` is 3x3 and 1x1 in turn, nearly half the cost.
    hidden_ratio: hidden channels of a subnet as a share of those it sees; None is the backbone's default.
    clamp: a coupling multiplies a channel by exp(clamp) at the most, exp(-clamp) at the least.
    smoothing: standard deviation of the Gaussian blur of the map, in cells of the feature grid; 0 for none.
    top_k: the score is the mean of so many largest values of the map.
    epochs, batch_size, learning_rate, weight_decay: Adam on the flows, the rate falling along a cosine.
    finetune: `off` leaves the backbone as it is, `anchored` trains it after the flows and holds it near its start,
        `free` follows the likelihood alone, which may collapse: the guard stays.
    unfreeze: layers of the backbone that are fine-tuned, layer2, layer3 or both; None is the last one used.
    finetune_epochs: of at most FINETUNE_IMAGES images.
    finetune_rate: the flows' learning rate while the backbone is fine-tuned, as a share of `learning_rate`.
    backbone_rate: the backbone's learning rate as a share of the flows'.
    anchor: weight of the mean squared distance between standardised features and those of the frozen backbone.
    seed: of the flows' start, of the order of images and of the images held out to watch the training.
    """

    backbone: str = "resnet18"
    layers: tuple[str, ...] = ("layer2", "layer3")
    steps: int = 4
    kernels: KernelKind = "alternating"
    hidden_ratio: float | None = None
    clamp: float = 2.0
    smoothing: float = 0.5
    top_k: int = 10
    epochs: int = 30
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5
    finetune: FinetuneKind = "anchored"
    unfreeze: tuple[str, ...] | None = None
    finetune_epochs: int = 3
    finetune_rate: float = 0.3
    backbone_rate: float = 1e-2
    anchor: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_layers(self.backbone, self.layers)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise UsageError(f"Layers {self.layers} are not possible.", "Name one layer or more, each once.")
        if self.kernels not in get_args(KernelKind):
            raise did_you_mean("kernels", self.kernels, list(get_args(KernelKind)))
        if self.finetune not in get_args(FinetuneKind):
            raise did_you_mean("fine-tuning", self.finetune, list(get_args(FinetuneKind)))
        self._check_flow()
        self._check_training()
        if self.finetune != "off":
            self._check_finetuning()

    def _check_flow(self) -> None:
        if self.steps < 2 or self.steps % 2:
            raise UsageError(f"Flows of {self.steps} steps are not possible.", "Choose 2, 4, 6 or 8 steps, say.")
        if not 0 < self.hidden < math.inf or not 0 < self.clamp < math.inf:
            raise UsageError(
                f"A hidden ratio of {self.hidden:g} with a clamp of {self.clamp:g} is not possible.",
                "Both must be above 0.",
            )
        if not 0 <= self.smoothing < math.inf or self.top_k < 1:
            raise UsageError(
                f"A smoothing of {self.smoothing:g} with the top {self.top_k} is not possible.",
                "The smoothing must be 0 or more, the top 1 or more.",
            )

    def _check_training(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise UsageError(
                f"{self.epochs} epochs with batches of {self.batch_size} are not possible.", "Give 1 or more of each."
            )
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise UsageError(
                f"A learning rate of {self.learning_rate:g} with weight decay {self.weight_decay:g} is not possible.",
                "The rate must be above 0, the decay 0 or more.",
            )

    def _check_finetuning(self) -> None:
        possible = [layer for layer in ("layer2", "layer3") if layer <= max(self.layers)]
        if not self.unfrozen or not set(self.unfrozen) <= set(possible):
            raise UsageError(
                f"Layers {self.unfrozen} cannot be fine-tuned for the features of {self.layers}.",
                f"Choose among {possible} (stem and layer1 never learn, layers above the last one used are not there), "
                "or --finetune off.",
            )
        if self.finetune_epochs < 1 or not all(
            0 < value < math.inf for value in (self.finetune_rate, self.backbone_rate, self.anchor)
        ):
            raise UsageError(
                f"Fine-tuning for {self.finetune_epochs} epochs at rates {self.finetune_rate:g} and "
                f"{self.backbone_rate:g} with an anchor of {self.anchor:g} is not possible.",
                "Give 1 epoch or more, rates and anchor above 0.",
            )

    @property
    def unfrozen(self) -> tuple[str, ...]:
        """Layers of the backbone that are fine-tuned."""
        return (max(self.layers),) if self.unfreeze is None else self.unfreeze

    @property
    def hidden(self) -> float:
        """Hidden channels of a subnet as a share of those it sees."""
        return DEFAULT_HIDDEN_RATIO.get(self.backbone, 1.0) if self.hidden_ratio is None else self.hidden_ratio

    def channels(self, layer: str) -> int:
        """Return the number of channels of one scale."""
        return BACKBONES[self.backbone].layers[layer][0]

    def scale_grid(self, layer: str, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of one scale for an input of this size."""
        stride = BACKBONES[self.backbone].layers[layer][1]
        return -(-height // stride), -(-width // stride)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the map for an input of this size: those of the finest layer."""
        return max(self.scale_grid(layer, height, width) for layer in self.layers)

    def feature_bytes(self, height: int, width: int) -> int:
        """Return what the features of one image take in memory."""
        grids = {layer: self.scale_grid(layer, height, width) for layer in self.layers}
        return _BYTES * sum(self.channels(layer) * rows * columns for layer, (rows, columns) in grids.items())


class Coupling(nn.Module):
    """One half of the channels scaled and shifted by what a subnet (conv, ReLU, conv) makes of the other half."""

    def __init__(self, channels: int, kernel: int, hidden: int, clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        self.half_channels = channels // 2
        self.first = nn.Conv2d(self.half_channels, hidden, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(hidden, channels, kernel, padding=kernel // 2)
        # The flow begins as a reordering of channels: its first loss is that of standardised features.
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def affine(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-scale, within (-clamp, clamp), and shift for the other half, both [N, C/2, h, w]."""
        # Back from half precision: what the flow adds up stays float.
        both = self.second(F.relu(self.first(kept))).to(kept.dtype)
        raw, shift = both[:, : self.half_channels], both[:, self.half_channels :]
        return self.clamp * torch.tanh(raw / self.clamp), shift

    def forward(self, kept: torch.Tensor, moved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the other half after the map, and the log-scale, whose sum is the log-determinant."""
        log_scale, shift = self.affine(kept)
        return moved * torch.exp(log_scale) + shift, log_scale


class Flow(nn.Module):
    """A bijection of feature maps [N, C, h, w]: pairs of affine couplings, channels in a new fixed order after each.

    A pair changes every channel once: the first coupling one half, the second the other. Then the halves are
    interleaved like those of a pack of cards, so that others meet in the next pair. As a graph, that is a Concat and a
    Reshape, where an arbitrary permutation would be a Gather or a matrix product.
    """

    def __init__(self, channels: int, steps: int, kernels: KernelKind, hidden_ratio: float, clamp: float) -> None:
        super().__init__()
        self.half_channels = channels // 2
        hidden = max(1, round(hidden_ratio * self.half_channels))
        second = 1 if kernels == "alternating" else 3
        self.pairs = nn.ModuleList(
            nn.ModuleList(Coupling(channels, kernel, hidden, clamp) for kernel in (3, second))
            for _ in range(steps // 2)
        )

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z [N, C, h, w] and log|det dz/df| [N]."""
        z, log_det = features, features.new_zeros(len(features))
        for pair in self.pairs:
            first, second = pair.children()
            # Slices, not chunk(): its Split loses the name of the module in the exported graph.
            left, right = z[:, : self.half_channels], z[:, self.half_channels :]
            right, right_scale = first(left, right)
            left, left_scale = second(right, left)
            z = torch.stack((left, right), dim=2).flatten(1, 2)
            log_det = log_det + (left_scale + right_scale).flatten(1).sum(dim=1)
        return z, log_det


class FastflowHead(nn.Module):
    """From feature maps to `score` [N] and `anomaly_map` [N, h, w], all in float.

    Each layer has buffers mean_<layer> and scale_<layer>, float32 [1, C, 1, 1]: features enter a flow as
    (f - mean) * scale, of mean 0 and deviation 1 over the images of the fit.
    """

    kernel: torch.Tensor

    def __init__(self, config: FastflowConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        finest = min(BACKBONES[config.backbone].layers[layer][1] for layer in config.layers)
        self.layers = config.layers
        self.grid = grid
        self.scale_shapes = [
            (config.channels(layer), *config.scale_grid(layer, finest * grid[0], finest * grid[1]))
            for layer in config.layers
        ]
        self.top_k = config.top_k
        self.flows = nn.ModuleList(
            Flow(config.channels(layer), config.steps, config.kernels, config.hidden, config.clamp)
            for layer in config.layers
        )
        for layer in config.layers:
            self.register_buffer(f"mean_{layer}", torch.zeros(1, config.channels(layer), 1, 1))
            self.register_buffer(f"scale_{layer}", torch.ones(1, config.channels(layer), 1, 1))
        self.register_buffer("kernel", gaussian_kernel(config.smoothing))

    def standardised(self, features: Features) -> Features:
        """Return features of mean 0 and deviation 1 in every channel, as the flows expect them."""
        return [
            (feature - self.get_buffer(f"mean_{layer}")) * self.get_buffer(f"scale_{layer}")
            for layer, feature in zip(self.layers, features, strict=True)
        ]

    def negative_log_likelihood(self, features: Features) -> torch.Tensor:
        """Return 0.5 ||z||^2 - log|det| in nats per dimension, the mean over scales, [N]; without the constant."""
        per_scale = []
        for flow, feature in zip(self.flows, self.standardised(features), strict=True):
            z, log_det = flow(feature)
            per_scale.append((0.5 * z.square().flatten(1).sum(dim=1) - log_det) / z[0].numel())
        return torch.stack(per_scale).mean(dim=0)

    def judge(self, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score [N], the mean of the largest values of the map, and the map [N, h, w]."""
        maps = [
            on_grid(0.5 * flow(feature)[0].square().mean(dim=1, keepdim=True), self.grid)
            for flow, feature in zip(self.flows, self.standardised(features), strict=True)
        ]
        anomaly_map = blurred(torch.cat(maps, dim=1).mean(dim=1), self.kernel)
        return mean_of_largest(anomaly_map.flatten(1), self.top_k), anomaly_map

    def moments(self, features: Features) -> torch.Tensor:
        """Return mean and variance over places of every channel, [N, 2 C]: all means of a layer, then its variances.

        All that the standardisation needs of an image, whatever its size: a few hundred numbers.
        """
        parts = []
        for feature in features:
            mean = feature.mean(dim=(2, 3), keepdim=True)
            parts += [mean.flatten(1), (feature - mean).square().mean(dim=(2, 3))]
        return torch.cat(parts, dim=1)

    def unflattened(self, row: torch.Tensor) -> Features:
        """Return an image's features of each scale, [1, C, h, w], from all of them in one row."""
        shapes = [(1, *shape) for shape in self.scale_shapes]
        parts = torch.split(row, [math.prod(shape) for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(self, features: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score, anomaly map, and the features of all scales in one row, which `refit` reads."""
        score, anomaly_map = self.judge(features)
        return score, anomaly_map, torch.cat([feature.flatten(1) for feature in features], dim=1)


class Fastflow(nn.Module):
    """The detector: backbone, float head with the flows. Input uint8 [N, H, W, 3]."""

    def __init__(self, config: FastflowConfig, backbone: Backbone, height: int, width: int) -> None:
        super().__init__()
        rows, columns = config.grid(height, width)
        if config.top_k > rows * columns:
            raise UsageError(
                f"The mean of the top {config.top_k} is not possible on a map of {rows}x{columns}.",
                f"Choose at most {rows * columns}, or a larger image.",
            )
        self.config = config
        self.backbone = backbone
        self.head = FastflowHead(config, (rows, columns))
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score float32 [N], anomaly map float32 [N, h, w] and all features float32 [N, sum of C h w]."""
        return self.head(self.backbone(image))  # type: ignore[no-any-return]


def build(config: FastflowConfig, height: int, width: int, *, weights: str = DEFAULT_WEIGHTS) -> Fastflow:
    """Return the model with the backbone's weights and flows that do nothing yet.

    `weights`: `default`, a path or `random`, as in `build_backbone`.

    Raises:
        UsageError: weights that do not fit, or a map smaller than `top_k`.
        MissingRequirementError: the weights cannot be reached.
    """
    backbone = build_backbone(config.backbone, layers=config.layers, weights=weights, seed=config.seed)
    torch.manual_seed(config.seed)  # the flows start alike whatever the weights
    return Fastflow(config, backbone, height, width)


def announce(config: FastflowConfig, height: int, width: int, images: int) -> list[str]:
    """Return what to tell the user before the training: grid, flows, memory, and what may go wrong."""
    rows, columns = config.grid(height, width)
    with torch.device("meta"):
        parameters = sum(value.numel() for value in FastflowHead(config, (rows, columns)).parameters())
    memory = images * config.feature_bytes(height, width)
    kept = f"kept in {memory / 1e6:.0f} MB" if memory <= FEATURE_BUDGET else "computed anew in every epoch"
    lines = [
        f"{config.backbone}: {config.steps} coupling steps on each of {', '.join(config.layers)}, a map of "
        f"{rows}x{columns} places; flows of {parameters / 1e6:.2f} M parameters ({_BYTES * parameters / 1e6:.1f} MB)",
        f"the flows learn for {config.epochs} epochs of {-(-images // config.batch_size)} batches on features of the "
        f"frozen backbone, {kept}",
    ]
    if config.finetune != "off":
        lines.append(f"then {' and '.join(config.unfrozen)} learn with them for {config.finetune_epochs} epochs")
    if config.finetune == "free":
        lines.append(
            "Warning: likelihood alone rewards features that collapse; expect the guard to end the fine-tuning."
        )
    if MIN_IMAGES <= images < ADVISED_IMAGES:
        lines.append(f"Warning: {images} images are few for flows; {ADVISED_IMAGES} or more are advisable.")
    return lines


def fit(model: Fastflow, images: ImageSet, session: FitSession) -> None:
    """Train the flows of a model that `build` has just made, then, unless `finetune` is off, the backbone with them.

    A tenth of the images is held out: their likelihood chooses the epoch to keep, and with their synthetic anomalies
    they watch over the fine-tuning. Logs and checkpoints go to `flow` and `finetune` in the session's folder.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, or a loss is not finite.
    """
    if len(images) < MIN_IMAGES:
        raise too_few_images(len(images), MIN_IMAGES, ADVISED_IMAGES)
    order = np.random.default_rng(model.config.seed).permutation(len(images)).tolist()
    held = min(_MOST_WATCHED, max(2, len(images) // 10))
    model.to(resolve_device(session.device))
    watch = _watch(model, images, order[:_MOST_WATCHED], held)
    if not session.resume:
        # An older training's: without this, a resume of this training's first phase would go on to it.
        (session.folder / "finetune" / CHECKPOINT).unlink(missing_ok=True)
    _train_flows(model, images, order[held:], watch, session)
    if model.config.finetune != "off":
        _finetune(model, images, order[held:], watch, session)


def refit(
    config: FastflowConfig,
    embeddings: Iterable[Embeddings],
    *,
    flows: nn.ModuleList,
    grid: tuple[int, int],
) -> dict[str, Embeddings]:
    """Return the head's standardisation and flows, by name, fitted to features of whichever graph made them.

    embeddings: float32 [N, sum of C h w], all scales of an image in a row.
    flows, grid: the trained head's; the flows are not changed but copied.

    Flows stretch the directions along which normal features hardly vary, and with them any rounding error: a flow that
    has learnt float features takes those of an INT8 backbone for anomalies. So it learns for some epochs on these. Of
    more images than FEATURE_BUDGET has room for, it sees a random sample.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, or a feature is not finite.
    """
    head = FastflowHead(config, grid)
    head.flows.load_state_dict(flows.state_dict())
    rng = np.random.default_rng(config.seed)
    kept: list[Features] = []
    moments = []
    for number, row in enumerate(itertools.chain.from_iterable(embeddings)):
        room = max(MIN_IMAGES, FEATURE_BUDGET // (2 * row.nbytes))  # twice: joining them copies them
        features = head.unflattened(torch.from_numpy(np.array(row)))
        moments.append(head.moments(features).numpy())
        if len(kept) < room:
            kept.append(features)
        elif (place := rng.integers(number + 1)) < room:  # each image with the same chance (Vitter 1985, algorithm R)
            kept[place] = features
    arrays = _standardised(head, config, moments)
    _train_on_features(config, head, _joined(kept))
    return {**arrays, **{f"flows.{name}": value.detach().numpy() for name, value in head.flows.named_parameters()}}


def _train_on_features(config: FastflowConfig, head: FastflowHead, features: Features) -> None:
    """Train the flows of a head on the CPU, the rate falling along a cosine."""
    epochs = math.ceil(_REFIT_EPOCHS * config.epochs)
    rate = _REFIT_RATE * config.learning_rate
    optimizer = torch.optim.Adam(head.parameters(), lr=rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in track(range(epochs), "flows learn INT8 features", epochs):
        for chosen in torch.split(torch.randperm(len(features[0]), generator=generator), config.batch_size):
            optimizer.zero_grad()
            loss = head.negative_log_likelihood([feature[chosen] for feature in features]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(head.parameters(), _CLIP_NORM)
            optimizer.step()
        scheduler.step()


def standardisation(config: FastflowConfig, moments_of_batches: Iterable[Embeddings]) -> dict[str, Embeddings]:
    """Return the head's mean_<layer> and scale_<layer> from moments float32 [N, 2 C] as `FastflowHead.moments` makes.

    The variance over all images and places is the mean of the images' variances plus the variance of their means.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, or a feature is not finite.
    """
    batches = [np.asarray(batch, dtype=np.float64) for batch in moments_of_batches]
    count = sum(map(len, batches))
    if count < MIN_IMAGES:
        raise too_few_images(count, MIN_IMAGES, ADVISED_IMAGES)
    moments = np.concatenate(batches)
    if not np.isfinite(moments).all():
        raise UsageError("The backbone's features are not finite.", "Check the weights file.")
    arrays, start = {}, 0
    for layer in config.layers:
        channels = config.channels(layer)
        means, variances = np.split(moments[:, start : start + 2 * channels], 2, axis=1)
        variance = variances.mean(axis=0) + means.var(axis=0)
        if not variance.mean() > 0:
            raise UsageError(f"The features of {layer} are the same everywhere.", "Check the images and the weights.")
        deviation = np.sqrt(np.maximum(variance, _LEAST_DEVIATION**2 * variance.mean()))
        arrays[f"mean_{layer}"] = means.mean(axis=0).reshape(1, -1, 1, 1).astype(np.float32)
        arrays[f"scale_{layer}"] = (1 / deviation).reshape(1, -1, 1, 1).astype(np.float32)
        start += 2 * channels
    return arrays


def feature_health(features: Features, frozen: Features) -> Record:
    """Return `std_ratio` and `rank_ratio` of features against those of the frozen backbone; of all scales, the worst.

    The first is the geometric mean over channels of the ratio of standard deviations, worst where furthest from 1; the
    second the ratio of effective ranks, worst where lowest. Both are 1 for equal features.
    """
    std_ratios, rank_ratios = [], []
    for feature, start in zip(features, frozen, strict=True):
        now, before = _covariance(feature), _covariance(start)
        least = _LEAST_DEVIATION**2 * np.trace(before) / len(before)
        std_ratios.append(float(np.exp(0.5 * np.log((np.diag(now) + least) / (np.diag(before) + least)).mean())))
        rank_ratios.append(effective_rank(now) / effective_rank(before))
    return {"std_ratio": max(std_ratios, key=lambda ratio: abs(math.log(ratio))), "rank_ratio": min(rank_ratios)}


def effective_rank(covariance: npt.NDArray[np.float64]) -> float:
    """Return exp(-sum p log p), p being the features' singular values (square roots of the eigenvalues) over their sum.

    `covariance`: [C, C]; the result is in [1, C]. Source: Roy & Vetterli, EUSIPCO 2007.

    >>> round(effective_rank(np.diag([4.0, 4.0, 0.0])), 6)
    2.0
    """
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(covariance), 0))
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _covariance(feature: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the covariance [C, C] of features [N, C, h, w] over all images and places."""
    rows = feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1]).cpu().numpy().astype(np.float64)
    rows -= rows.mean(axis=0)
    return np.asarray(rows.T @ rows / len(rows))


@dataclass(frozen=True)
class _Watch:
    """Normal images and a synthetic anomaly of each, with their features of the frozen backbone.

    The first `held` images are not trained on. Of few images that is too little to compare scores with: others join.
    """

    held: int
    normal: list[Pixels]
    anomalous: list[Pixels]
    normal_features: Features
    anomalous_features: Features


def _watch(model: Fastflow, images: ImageSet, watched: list[int], held: int) -> _Watch:
    normal = [images.image(index) for index in watched]
    anomalous = [
        _fainter(synthetic_anomaly(image, np.random.default_rng([model.config.seed, number])), image, strength)
        for number, (image, strength) in enumerate(zip(normal, itertools.cycle(_STRENGTHS), strict=False))
    ]
    return _Watch(held, normal, anomalous, _features(model, normal), _features(model, anomalous))


def _fainter(anomalous: Pixels, normal: Pixels, strength: float) -> Pixels:
    """Return the normal image with so much of its difference to the anomalous one."""
    return np.asarray(np.round(normal + strength * (anomalous.astype(np.float32) - normal)), dtype=np.uint8)


def _train_flows(model: Fastflow, images: ImageSet, fitted: list[int], watch: _Watch, session: FitSession) -> None:
    """Phase one: the flows on the frozen backbone, whose features are computed once where memory allows."""
    config, head, spec = model.config, model.head, images.spec
    batches = _feature_batches(model, (images.image(index) for index in track(fitted, "features", len(fitted))))
    keep = len(fitted) * config.feature_bytes(spec.height, spec.width) <= FEATURE_BUDGET
    dataset: Dataset[Any] = Subset(images, fitted)
    if keep:
        features = _joined(batches)
        dataset, batches = TensorDataset(*features), _split(features)
    _standardise(model, itertools.chain(batches, [[part[: watch.held] for part in watch.normal_features]]))

    def losses(_: nn.Module, batch: Any) -> Losses:
        return {"loss": head.negative_log_likelihood(batch if keep else model.backbone(batch)).mean()}

    optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    _fit_phase(
        model,
        "flow",
        losses,
        dataset,
        optimizer,
        lambda: _judgement(head, watch.normal_features, watch.anomalous_features, watch.held),
        config.epochs,
        session,
    )


def _finetune(model: Fastflow, images: ImageSet, fitted: list[int], watch: _Watch, session: FitSession) -> None:
    """Phase two: backbone and flows together; the model stays as it was where that has gained nothing.

    Images are never augmented, so that of the frozen copy only its features are needed, once.
    """
    config, head, spec = model.config, model.head, images.spec
    model.to(resolve_device(session.device))
    room = max(MIN_IMAGES, FEATURE_BUDGET // config.feature_bytes(spec.height, spec.width))
    chosen = [images.image(index) for index in fitted[: min(FINETUNE_IMAGES, room)]]
    frozen = _features(model, chosen)
    anchor_scales = [head.get_buffer(f"scale_{layer}").clone() for layer in config.layers]
    before = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    start = _judgement(head, watch.normal_features, watch.anomalous_features, watch.held)

    def losses(_: nn.Module, batch: Any) -> Losses:
        image, *targets = batch
        features = model.backbone(image)
        nll = head.negative_log_likelihood(features).mean()
        if config.finetune == "free":
            return {"loss": nll}
        distance = _mean_squared_distance(features, targets, anchor_scales)
        return {"loss": nll + config.anchor * distance, "nll": nll, "distance": distance}

    def judge() -> Record:
        if config.finetune == "anchored":
            _standardise(model, _feature_batches(model, [*chosen, *watch.normal[: watch.held]]))
        features = _features(model, watch.normal)
        metrics = {
            **_judgement(head, features, _features(model, watch.anomalous), watch.held),
            **feature_health(features, watch.normal_features),
        }
        check_health(metrics, start)
        return metrics

    rate = config.finetune_rate * config.learning_rate
    # No decay for the backbone: where its gradient is zero, Adam would follow the decay at the full rate.
    groups: list[dict[str, Any]] = [
        {"params": list(head.parameters()), "lr": rate, "weight_decay": config.weight_decay},
        {"params": _unfrozen(model), "lr": rate * config.backbone_rate},
    ]
    optimizer = torch.optim.Adam(groups)
    dataset = TensorDataset(torch.from_numpy(np.stack(chosen)), *frozen)
    _fit_phase(model, "finetune", losses, dataset, optimizer, judge, config.finetune_epochs, session)
    model.backbone.requires_grad_(False)
    end = _judgement(head, _features(model, watch.normal), _features(model, watch.anomalous), watch.held)
    if end[BEST] < start[BEST]:
        say("fine-tuning the backbone has gained nothing; the model is kept as it was before")
        model.load_state_dict(before)


def check_health(metrics: Record, start: Record) -> None:
    """End the training of a backbone whose features collapse or blow up; `start` was measured before it.

    Raises:
        StopTraining: std_ratio, rank_ratio or synthetic_auroc of `metrics` is beyond the guard's limit.
    """
    low, high = STD_RATIO_LIMITS
    least_auroc = start["synthetic_auroc"] - LARGEST_AUROC_LOSS
    against = "of those of the frozen backbone"
    if not low <= metrics["std_ratio"] <= high:
        reason = f"the features' deviations are {metrics['std_ratio']:.3f} {against}, outside {low:g} to {high:g}"
    elif not metrics["rank_ratio"] >= LEAST_RANK_RATIO:
        reason = f"the features' effective rank is {metrics['rank_ratio']:.3f} {against}, below {LEAST_RANK_RATIO:g}"
    elif not metrics["synthetic_auroc"] >= least_auroc:
        reason = f"AUROC on synthetic anomalies is {metrics['synthetic_auroc']:.3f}, below {least_auroc:.3f}"
    else:
        return
    raise StopTraining(reason, metrics)


def _fit_phase(
    model: Fastflow,
    name: str,
    losses: Callable[[nn.Module, Any], Losses],
    dataset: Dataset[Any],
    optimizer: torch.optim.Optimizer,
    judge: Callable[[], Record],
    epochs: int,
    session: FitSession,
) -> None:
    """Train in a folder of its own; resumed where this phase has a checkpoint, begun where an earlier one ended."""
    folder = session.folder / name
    folder.mkdir(exist_ok=True)
    fit_epochs(
        model,
        losses,
        dataset,
        optimizer,
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        replace(session, folder=folder, resume=session.resume and (folder / CHECKPOINT).exists()),
        settings=asdict(model.config),
        epochs=epochs,
        batch_size=model.config.batch_size,
        seed=model.config.seed,
        clip_norm=_CLIP_NORM,
        monitor=lambda *_: judge(),
        best=BEST,
    )


def _judgement(head: FastflowHead, normal: Features, anomalous: Features, held: int) -> Record:
    """Return the mean log-likelihood of the first `held` normal images, and how well scores tell both kinds apart."""
    device = head.kernel.device
    likelihoods, scores = [], []
    with torch.no_grad():
        for batch in _split(normal):
            on_device = [feature.to(device) for feature in batch]
            likelihoods.append(-head.negative_log_likelihood(on_device))
            scores.append(head.judge(on_device)[0])
        for batch in _split(anomalous):
            scores.append(head.judge([feature.to(device) for feature in batch])[0])
    values = torch.cat(scores).cpu().numpy()
    return {
        BEST: float(torch.cat(likelihoods)[:held].mean()),
        "synthetic_auroc": auroc(values, np.arange(len(values)) >= len(normal[0])),
    }


def _mean_squared_distance(features: Features, targets: Features, scales: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean squared distance to the frozen features in units of their standard deviations; one number."""
    per_scale = [
        ((feature.float() - target) * scale.to(feature.device)).square().mean()
        for feature, target, scale in zip(features, targets, scales, strict=True)
    ]
    return torch.stack(per_scale).mean()


def _unfrozen(model: Fastflow) -> list[torch.Tensor]:
    """Let the convolutions of the layers to fine-tune take a gradient, and return their weights.

    Not BatchNorm: its gamma would shrink whole channels with one number.
    """
    backbone = model.backbone
    stages = [backbone.stages[sorted(backbone.spec.layers).index(layer)] for layer in model.config.unfrozen]
    weights = [module.weight for stage in stages for module in stage.modules() if isinstance(module, nn.Conv2d)]
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def _standardise(model: Fastflow, batches: Iterable[Features]) -> None:
    """Measure mean and deviation of every channel and put them into the head."""
    _standardised(model.head, model.config, (model.head.moments(batch).numpy() for batch in batches))


def _standardised(head: FastflowHead, config: FastflowConfig, moments: Iterable[Embeddings]) -> dict[str, Embeddings]:
    """Put the standardisation that these moments give into the head, and return it."""
    arrays = standardisation(config, moments)
    for name, value in arrays.items():
        head.get_buffer(name).copy_(torch.from_numpy(value))
    return arrays


def _features(model: Fastflow, images: list[Pixels]) -> Features:
    return _joined(_feature_batches(model, images))


def _feature_batches(model: Fastflow, images: Iterable[Pixels]) -> Iterator[Features]:
    """Yield what the backbone makes of images uint8 [H, W, 3], on the CPU; it works on the model's device."""
    device = model.head.kernel.device
    for batch in batched(images):
        with torch.no_grad():
            features = model.backbone(torch.from_numpy(batch).to(device))
        yield [feature.cpu() for feature in features]


def _joined(batches: Iterable[Features]) -> Features:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _split(features: Features) -> Iterator[Features]:
    for start in range(0, len(features[0]), _BATCH):
        yield [feature[start : start + _BATCH] for feature in features]
