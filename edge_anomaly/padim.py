"""PaDiM (Defard et al. 2021): a Gaussian of normal features at every place of the image.

The anomaly map is the Mahalanobis distance ||W (x - mu)|| with W = L^-1 and L L^T the covariance, non-negative by
construction. Reduction by a semi-orthogonal matrix follows Kim et al. 2021.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from edge_anomaly_runtime.errors import UsageError

from .backbones import BACKBONES, DEFAULT_WEIGHTS, Backbone, build_backbone
from .features import blurred, box_mean, gaussian_kernel, on_grid
from .image_set import ImageSet, too_few_images
from .training import FitSession

CovarianceKind = Literal["location", "tied"]
ReductionKind = Literal["semi-orthogonal", "random"]

# 64 fits a CPU's cache; at 100 the whitening of ResNet-18 takes a third of the INT8 graph's time. What 64 costs in
# accuracy was measured on EfficientNet-Lite0 only (docs/results.md).
DEFAULT_DIMS = {"efficientnet_lite0": 64, "resnet18": 64, "resnet34": 64, "resnet50": 100, "wide_resnet50_2": 100}

MIN_IMAGES = 10
ADVISED_IMAGES = 100  # said where images are too few; the warning of `announce` looks at the channels
_BYTES = 4


@dataclass(frozen=True)
class PadimConfig:
    """Everything that decides a PaDiM model apart from its images.

    dims: channels after the reduction; 0 keeps all, None is the backbone's default.
    covariance: `location` is one matrix per place, `tied` one for all places (small, for unaligned textures).
    shrinkage: 0 to 1, pull of the covariance towards a multiple of the identity.
    epsilon: added to the diagonal (the paper's 0.01).
    smoothing: standard deviation of the Gaussian blur of the map, in cells of the feature grid; 0 for none.
    """

    backbone: str = "wide_resnet50_2"
    layers: tuple[str, ...] = ("layer2", "layer3")
    dims: int | None = None
    reduction: ReductionKind = "semi-orthogonal"
    covariance: CovarianceKind = "location"
    shrinkage: float = 0.0
    epsilon: float = 0.01
    smoothing: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reduction not in get_args(ReductionKind):
            raise UsageError(f"Unknown reduction {self.reduction!r}.", f"Choose: {', '.join(get_args(ReductionKind))}.")
        if self.covariance not in get_args(CovarianceKind):
            raise UsageError(
                f"Unknown covariance {self.covariance!r}.", f"Choose: {', '.join(get_args(CovarianceKind))}."
            )
        if not 0 <= self.shrinkage <= 1:
            raise UsageError(f"A shrinkage of {self.shrinkage:g} is not possible.", "Choose 0 to 1.")
        if self.epsilon <= 0 or self.smoothing < 0:
            raise UsageError(
                f"An epsilon of {self.epsilon:g} with a smoothing of {self.smoothing:g} is not possible.",
                "Epsilon must be above 0, the smoothing 0 or more.",
            )

    @property
    def channels(self) -> int:
        """Number of channels before the reduction."""
        return sum(BACKBONES[self.backbone].layers[layer][0] for layer in self.layers)

    @property
    def reduced(self) -> int:
        """Number of channels after the reduction."""
        dims = DEFAULT_DIMS[self.backbone] if self.dims is None else self.dims or self.channels
        if not 2 <= dims <= self.channels:
            raise UsageError(f"--dims {self.dims} is not possible.", f"Choose 2 to {self.channels}, or 0 for all.")
        return dims

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the map for an input of this size: those of the finest layer."""
        stride = min(BACKBONES[self.backbone].layers[layer][1] for layer in self.layers)
        return -(-height // stride), -(-width // stride)

    def head_bytes(self, height: int, width: int) -> int:
        """Return the size of the head's weights in the exported graph, in bytes."""
        rows, columns = self.grid(height, width)
        places, dims, top = rows * columns, self.reduced, self.reduced // 2
        triangle = top * top + (dims - top) * dims
        matrices = 1 if self.covariance == "tied" else places
        return _BYTES * (matrices * triangle + places * dims + dims * self.channels)


@dataclass(frozen=True)
class Gaussian:
    """Mean, float64 [places, d], and W = L^-1 of the covariance, float64 [places or 1, d, d], lower triangular."""

    mean: npt.NDArray[np.float64]
    whitening: npt.NDArray[np.float64]
    images: int


class PadimHead(nn.Module):
    """From feature maps to `score` [N] and `anomaly_map` [N, h, w], all in float.

    W is lower triangular, so its upper half of rows needs only the first half of the channels: kept in two blocks, a
    quarter of the memory traffic is saved. Both blocks are grouped 1x1 convolutions with one group per place, which
    engines run faster than a batch of matrix-vector products.
    """

    mean: torch.Tensor
    whitening_top: torch.Tensor
    whitening_bottom: torch.Tensor
    kernel: torch.Tensor

    def __init__(self, config: PadimConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = grid
        self.layers = config.layers
        self.dims, self.top = config.reduced, config.reduced // 2
        self.groups = 1 if config.covariance == "tied" else self.rows * self.columns
        bottom = self.dims - self.top
        # One for each layer: TensorRT wants a convolution's weights as they are, not as a slice of others.
        for layer, part in zip(config.layers, _projections(config), strict=True):
            self.register_buffer(f"projection_{layer}", part)
        self.register_buffer("mean", torch.zeros(1, self.dims, *grid))
        self.register_buffer("whitening_top", torch.zeros(self.groups * self.top, self.top, 1, 1))
        self.register_buffer("whitening_bottom", torch.zeros(self.groups * bottom, self.dims, 1, 1))
        self.register_buffer("kernel", gaussian_kernel(config.smoothing))

    def embed(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the joint features float32 [N, d, h, w]: 3x3 means, brought to the finest grid, joined and reduced.

        All of that is linear, so each layer is reduced first, by its part of the projection: there is less to compute.
        """
        parts = [
            F.conv2d(feature, self.get_buffer(f"projection_{layer}"))
            for layer, feature in zip(self.layers, features, strict=True)
        ]
        means = [on_grid(box_mean(part), (self.rows, self.columns)) for part in parts]
        return sum(means[1:], means[0])

    def judge(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score [N], the largest value of the smoothed map, and the map [N, h, w]."""
        centred = embedding - self.mean
        squared = self._squared_tied(centred) if self.groups == 1 else self._squared_per_place(centred)
        distances = torch.sqrt(squared).reshape(-1, self.rows, self.columns)
        anomaly_map = blurred(distances, self.kernel)
        return anomaly_map.amax(dim=(1, 2)), anomaly_map

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score, anomaly map, and the embedding that the Gaussian is fitted on."""
        embedding = self.embed(features)
        score, anomaly_map = self.judge(embedding)
        return score, anomaly_map, embedding

    def _squared_tied(self, centred: torch.Tensor) -> torch.Tensor:
        top = F.conv2d(centred[:, : self.top], self.whitening_top)
        bottom = F.conv2d(centred, self.whitening_bottom)
        return top.square().sum(dim=1) + bottom.square().sum(dim=1)

    def _squared_per_place(self, centred: torch.Tensor) -> torch.Tensor:
        places = centred.permute(0, 2, 3, 1).reshape(-1, self.groups, self.dims)
        first = places[..., : self.top].reshape(-1, self.groups * self.top, 1, 1)
        top = F.conv2d(first, self.whitening_top, groups=self.groups)
        whole = places.reshape(-1, self.groups * self.dims, 1, 1)
        bottom = F.conv2d(whole, self.whitening_bottom, groups=self.groups)
        return top.reshape(-1, self.groups, self.top).square().sum(dim=2) + bottom.reshape(
            -1, self.groups, self.dims - self.top
        ).square().sum(dim=2)


class Padim(nn.Module):
    """The detector: frozen backbone, float head. Input uint8 [N, H, W, 3]."""

    def __init__(self, config: PadimConfig, backbone: Backbone, height: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = PadimHead(config, config.grid(height, width))
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score float32 [N], anomaly map float32 [N, h, w] and embedding float32 [N, d, h, w]."""
        return self.head(self.backbone(image))  # type: ignore[no-any-return]


def build(config: PadimConfig, height: int, width: int, *, weights: str = DEFAULT_WEIGHTS) -> Padim:
    """Return the detector with its backbone's weights and no Gaussian yet; the config's `dims` become a number."""
    backbone = build_backbone(config.backbone, layers=config.layers, weights=weights, seed=config.seed)
    return Padim(replace(config, dims=config.reduced), backbone, height, width)


def announce(config: PadimConfig, height: int, width: int, images: int) -> list[str]:
    """Return what to tell the user before the fit: grid, channels, size of the head, and whether images are few."""
    rows, columns = config.grid(height, width)
    lines = [
        f"{rows}x{columns} places, {config.reduced} of {config.channels} channels, {config.covariance} covariance, "
        f"head {config.head_bytes(height, width) / 1e6:.1f} MB"
    ]
    if MIN_IMAGES <= images < advised_images(config):
        lines.append(
            f"Warning: {images} images are few for {config.reduced} channels; {advised_images(config)} or more are "
            "advisable (or fewer channels with --dims, or --covariance tied)."
        )
    return lines


def fit(model: Padim, images: ImageSet, session: FitSession) -> None:
    """Fit the Gaussian on all images in one pass; `session` has nothing to resume or to log.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, or a feature is not finite.
    """
    if len(images) < MIN_IMAGES:
        raise too_few_images(len(images), MIN_IMAGES, ADVISED_IMAGES)
    for name, value in refit(model.config, _embeddings(model, images)).items():
        getattr(model.head, name).copy_(torch.from_numpy(value))


def refit(config: PadimConfig, embeddings: Iterable[npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the head's buffers by name, fitted on embeddings float32 [N, d, h, w] of whichever graph made them."""
    batches = iter(embeddings)
    first = next(batches, None)
    if first is None:
        raise too_few_images(0, MIN_IMAGES, ADVISED_IMAGES)
    rows, columns = first.shape[2:]
    return head_arrays(config, fit_gaussian(itertools.chain([first], batches), config), (rows, columns))


def _embeddings(model: Padim, images: ImageSet) -> Iterator[npt.NDArray[np.float32]]:
    for batch in images.batches("fitting"):
        with torch.inference_mode():
            yield model.head.embed(model.backbone(torch.from_numpy(batch))).numpy()


def fit_gaussian(embeddings: Iterable[npt.NDArray[np.float32]], config: PadimConfig) -> Gaussian:
    """Fit mean and whitening at every place from batches of embeddings, float32 [N, d, h, w], seen once.

    Sums are kept in float64 about the first batch's mean, so memory does not grow with the number of images.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, or an embedding is not finite.
    """
    count, shift = 0, None
    for batch in embeddings:
        places = batch.transpose(2, 3, 0, 1).reshape(-1, batch.shape[0], batch.shape[1]).astype(np.float64)
        if not np.isfinite(places).all():
            raise UsageError("The backbone's features are not finite.", "Check the weights file.")
        if shift is None:
            shift = places.mean(axis=1, keepdims=True)
            total = np.zeros_like(shift)
            squares = np.zeros((places.shape[0], places.shape[2], places.shape[2]))
        centred = places - shift
        total += centred.sum(axis=1, keepdims=True)
        squares += centred.transpose(0, 2, 1) @ centred
        count += batch.shape[0]
    if shift is None or count < MIN_IMAGES:
        raise too_few_images(count, MIN_IMAGES, ADVISED_IMAGES)
    mean = total / count
    covariance = (squares - count * mean.transpose(0, 2, 1) @ mean) / (count - 1)
    if config.covariance == "tied":
        covariance = covariance.mean(axis=0, keepdims=True)
    return Gaussian((shift + mean)[:, 0], _whitening(covariance, config), count)


def _whitening(covariance: npt.NDArray[np.float64], config: PadimConfig) -> npt.NDArray[np.float64]:
    """Return L^-1, float64 [places, d, d], of the regularised covariance."""
    identity = np.eye(covariance.shape[-1])
    variance = np.trace(covariance, axis1=1, axis2=2)[:, np.newaxis, np.newaxis] / covariance.shape[-1]
    regular = (1 - config.shrinkage) * covariance + (config.shrinkage * variance + config.epsilon) * identity
    return np.asarray(np.linalg.solve(np.linalg.cholesky(regular), identity))


def head_arrays(config: PadimConfig, gaussian: Gaussian, grid: tuple[int, int]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the head's fitted buffers by name, float32 in the shapes of `PadimHead`."""
    top = config.reduced // 2
    whitening = gaussian.whitening.astype(np.float32)
    return {
        "mean": gaussian.mean.T.reshape(1, -1, *grid).astype(np.float32),
        "whitening_top": np.ascontiguousarray(whitening[:, :top, :top]).reshape(-1, top, 1, 1),
        "whitening_bottom": np.ascontiguousarray(whitening[:, top:, :]).reshape(-1, config.reduced, 1, 1),
    }


def advised_images(config: PadimConfig) -> int:
    """Return how many images a covariance of this size wants: more than channels, with room for variation."""
    return 50 if config.covariance == "tied" else max(50, 2 * config.reduced)


def _projections(config: PadimConfig) -> list[torch.Tensor]:
    """Return each layer's part of the reduction as the weight of a 1x1 convolution, float32 [d, C, 1, 1]."""
    channels, dims = config.channels, config.reduced
    rng = np.random.default_rng(config.seed)
    if dims == channels:
        matrix = np.eye(channels)
    elif config.reduction == "random":
        matrix = np.eye(channels)[np.sort(rng.permutation(channels)[:dims])]
    else:
        matrix = np.linalg.qr(rng.standard_normal((channels, dims)))[0].T
    sizes = [BACKBONES[config.backbone].layers[layer][0] for layer in config.layers]
    parts = np.split(matrix.astype(np.float32), np.cumsum(sizes)[:-1], axis=1)
    return [torch.from_numpy(np.ascontiguousarray(part))[..., None, None] for part in parts]
