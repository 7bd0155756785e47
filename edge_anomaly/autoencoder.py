"""Autoencoders: trained to rebuild normal images through a narrow code, and judged by what they fail to rebuild.

Variant A (`encoder` None) rebuilds pixels with a small convolutional network from scratch. Its errors are the squared
difference of pixels and 1 - SSIM (Wang et al. 2004; Bergmann et al. 2019), which also sees structure and contrast.

Variant B (`encoder` given) rebuilds features of a frozen ImageNet encoder, as RD4AD (Deng & Li 2022) and DFM do; its
error is 1 - cosine. Why features: a pixel decoder blurs fine texture, so that good texture has a large error, and it
rebuilds most defects as well, since copying edges and grey values needs no idea of what a normal part looks like.
Features of layers 2 and 3 say what is at a place rather than how bright each pixel is: noise hardly moves them, and a
defect moves them out of the small set of combinations that the code can express.

In both, an error is compared with the errors of normal images at the same place: the map is the weighted sum of
(error - mean) / spread over the kinds of error. Edges and contacts are hard to rebuild in every good part; without this
step they outshine the defects (ELPV mono, variant A: AUROC below 0.70 without it, above 0.85 with it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from edge_anomaly_runtime.errors import UsageError

from .backbones import BACKBONES, DEFAULT_WEIGHTS, RANDOM_WEIGHTS, Backbone, build_backbone, check_layers
from .features import blurred, embeddings_of, gaussian_kernel, mean_of_largest, on_grid
from .image_set import ImageSet, too_few_images
from .training import FitSession, Losses, fit_epochs, resolve_device

Embeddings = npt.NDArray[np.float32]

MIN_IMAGES = 10
ADVISED_IMAGES = 50
# About where the AUROC on ELPV stops rising.
ADVISED_STEPS = 150

# Input sides are multiples of this, so that every grid is halved and doubled exactly.
SIDE = 32

# Variant A: channels at strides 2, 4, 8 and 16, and the stride of its map.
PIXEL_CHANNELS = (16, 32, 48, 64)
PIXEL_STRIDE = 8
# Of the decoder and the bottleneck of variant B.
FEATURE_CHANNELS = 64

# Brings the squared difference of pixels in [0, 1] near 1 - SSIM: after training 0.003 beside 0.08.
_PIXEL_SCALE = 10.0
# Wang et al. 2004: a Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01 and K2 = 0.03 for a range of 1.
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
# Windows overlap so much that one every 4 pixels says the same as one at every pixel, at a 16th of the work.
_SSIM_STRIDE = 4
# Least variance of an error: keeps places that are rebuilt alike in all images from dividing by zero.
_EPSILON = 1e-10
_COLOURS = 3


@dataclass(frozen=True)
class Settings:
    """The values that variants A and B have different defaults for; see `AutoencoderConfig`."""

    shrinkage: float
    smoothing: float
    top_k: int
    epochs: int
    batch_size: int
    learning_rate: float


PIXEL_SETTINGS = Settings(shrinkage=0.01, smoothing=1.0, top_k=1, epochs=15, batch_size=8, learning_rate=2e-3)
FEATURE_SETTINGS = Settings(shrinkage=0.3, smoothing=0.5, top_k=8, epochs=10, batch_size=16, learning_rate=3e-3)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that decides an autoencoder apart from its images; None is the variant's default, see `settings`.

    encoder: None is variant A; the name of a backbone is variant B with this encoder, frozen.
    layers: the encoder's layers that variant B rebuilds.
    code: channels of the code at stride 16 (variant A) or the stride of the coarsest layer (B).
    structural: 0 to 1, weight of 1 - SSIM beside the pixel error in loss and map of variant A.
    shrinkage: 0 to 1, pull of each place's variance of errors towards the mean variance of all places.
    smoothing: standard deviation of the Gaussian blur of the map, in cells of its grid; 0 for none.
    top_k: the score is the mean of so many largest values of the map.
    epochs, batch_size, learning_rate, weight_decay: training by AdamW, the rate falling to zero as a cosine.
    seed: of the random start and of the order of images.
    """

    encoder: str | None = None
    layers: tuple[str, ...] = ("layer2", "layer3")
    code: int = 16
    structural: float = 0.5
    shrinkage: float | None = None
    smoothing: float | None = None
    top_k: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.encoder is not None:
            check_layers(self.encoder, self.layers, what="encoder")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise UsageError(f"Layers {self.layers} are not possible.", "Name one layer or more, each once.")
        if self.code < 1:
            raise UsageError(f"A code of {self.code} channels is not possible.", "Give 1 or more; the default is 16.")
        if not 0 <= self.structural <= 1:
            raise UsageError(f"A structural weight of {self.structural:g} is not possible.", "Choose 0 to 1.")
        chosen = self.settings
        if not (0 <= chosen.shrinkage <= 1 and 0 <= chosen.smoothing < math.inf and chosen.top_k >= 1):
            raise UsageError(
                f"A shrinkage of {chosen.shrinkage:g} with a smoothing of {chosen.smoothing:g} and the top "
                f"{chosen.top_k} is not possible.",
                "The shrinkage must be 0 to 1, the smoothing 0 or more, the top 1 or more.",
            )
        if chosen.epochs < 1 or chosen.batch_size < 1:
            raise UsageError(
                f"{chosen.epochs} epochs with batches of {chosen.batch_size} are not possible.", "Give 1 or more."
            )
        if not (0 < chosen.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise UsageError(
                f"A learning rate of {chosen.learning_rate:g} with weight decay {self.weight_decay:g} is not possible.",
                "The rate must be above 0, the decay 0 or more.",
            )

    @property
    def settings(self) -> Settings:
        """The chosen values, and the variant's defaults in place of None."""
        defaults = PIXEL_SETTINGS if self.encoder is None else FEATURE_SETTINGS
        given = {name: getattr(self, name) for name in asdict(defaults)}
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})

    @property
    def errors(self) -> dict[str, float]:
        """The kinds of error, in the order of the embedding's channels, and their weights in the map."""
        if self.encoder is None:
            return {"pixel": 1 - self.structural, "structural": self.structural}
        return {layer: 1 / len(self.layers) for layer in self.layers}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the map: stride 8 in variant A, the finest layer's grid in B.

        Raises:
            UsageError: a side is not a multiple of 32, or the map has fewer places than `top_k`.
        """
        if height % SIDE or width % SIDE:
            raise UsageError(
                f"An autoencoder cannot work at {height}x{width}.",
                f"Choose multiples of {SIDE} for both sides, for instance 224 or 256.",
            )
        stride = PIXEL_STRIDE
        if self.encoder is not None:
            stride = min(BACKBONES[self.encoder].layers[layer][1] for layer in self.layers)
        rows, columns = height // stride, width // stride
        if self.settings.top_k > rows * columns:
            raise UsageError(
                f"The mean of the top {self.settings.top_k} is not possible on a map of {rows}x{columns}.",
                f"Choose at most {rows * columns}, or a larger image.",
            )
        return rows, columns


class PixelAutoencoder(nn.Module):
    """Variant A: strided convolutions down to the code, nearest-neighbour upsampling and convolutions back."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(_convolution(i, o, stride=2) for i, o in itertools.pairwise((_COLOURS, *PIXEL_CHANNELS))),
            nn.Conv2d(PIXEL_CHANNELS[-1], code, 1),
        )
        falling = PIXEL_CHANNELS[::-1]
        self.decoder = nn.Sequential(
            _convolution(code, falling[0]),
            *(nn.Sequential(_doubled(), _convolution(i, o)) for i, o in itertools.pairwise(falling)),
            _doubled(),
            nn.Conv2d(falling[-1], _COLOURS, 3, padding=1),
        )

    def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the image and what is made of it, float32 [N, 3, H, W] with 1 for white, from uint8 [N, H, W, 3]."""
        pixels = image.permute(0, 3, 1, 2).float() * (1 / 255)
        return [pixels], [self.decoder(self.encoder(pixels))]


class FeatureAutoencoder(nn.Module):
    """Variant B: frozen encoder, a bottleneck that fuses its layers to the code, a decoder that rebuilds them."""

    def __init__(self, encoder: Backbone, code: int) -> None:
        super().__init__()
        sizes = [encoder.spec.layers[layer] for layer in encoder.layers]
        self.encoder = encoder
        self.bottleneck = Bottleneck(sizes, code)
        self.decoder = FeatureDecoder(sizes, code)

    def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the features and what is made of them, float32 [N, C, h, w] per layer, from uint8 [N, H, W, 3]."""
        features = self.encoder(image)
        return features, self.decoder(self.bottleneck(features))


class Bottleneck(nn.Module):
    """Layers of given (channels, stride) brought to the coarsest grid, joined and squeezed to the code."""

    def __init__(self, sizes: list[tuple[int, int]], code: int) -> None:
        super().__init__()
        coarsest = max(stride for _, stride in sizes)
        self.down = nn.ModuleList(_downwards(channels, coarsest // stride) for channels, stride in sizes)
        self.fuse = nn.Sequential(
            _convolution(FEATURE_CHANNELS * len(sizes), FEATURE_CHANNELS, kernel=1),
            nn.Conv2d(FEATURE_CHANNELS, code, 1, bias=False),
            nn.BatchNorm2d(code),
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the code float32 [N, code, h, w] on the coarsest layer's grid."""
        joined = torch.cat([down(feature) for down, feature in zip(self.down, features, strict=True)], dim=1)
        return self.fuse(joined)  # type: ignore[no-any-return]


class FeatureDecoder(nn.Module):
    """From the code up through the grids, with one 1x1 convolution for each layer on the way."""

    def __init__(self, sizes: list[tuple[int, int]], code: int) -> None:
        super().__init__()
        coarsest, finest = max(stride for _, stride in sizes), min(stride for _, stride in sizes)
        doublings = int(math.log2(coarsest // finest))
        self.open = nn.Sequential(
            _convolution(code, FEATURE_CHANNELS), _convolution(FEATURE_CHANNELS, FEATURE_CHANNELS)
        )
        self.up = nn.ModuleList(
            nn.Sequential(_doubled(), _convolution(FEATURE_CHANNELS, FEATURE_CHANNELS)) for _ in range(doublings)
        )
        self.outputs = nn.ModuleList(nn.Conv2d(FEATURE_CHANNELS, channels, 1) for channels, _ in sizes)
        # How many doublings lie between the code and each layer.
        self._levels = [int(math.log2(coarsest // stride)) for _, stride in sizes]

    def forward(self, code: torch.Tensor) -> list[torch.Tensor]:
        """Return the rebuilt features, one per layer in the given order."""
        grids = [self.open(code)]
        for up in self.up:
            grids.append(up(grids[-1]))
        return [output(grids[level]) for output, level in zip(self.outputs, self._levels, strict=True)]


class PixelErrors(nn.Module):
    """Squared difference and 1 - SSIM of two images, averaged over colours and over cells of 8x8 pixels.

    SSIM is computed by depthwise convolutions with the two halves of the separable Gaussian window, centred on pixel
    2 (of 0 to 3) of every cell of 4x4; pixels beyond the border repeat those at it.
    """

    vertical: torch.Tensor
    horizontal: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.exp(-0.5 * ((torch.arange(_WINDOW) - _WINDOW // 2) / _SIGMA) ** 2)
        line = line / line.sum()
        # Five local means for each colour: x, y, xx, yy and xy.
        self.groups = 5 * _COLOURS
        self.register_buffer("vertical", line.reshape(1, 1, -1, 1).repeat(self.groups, 1, 1, 1), persistent=False)
        self.register_buffer("horizontal", line.reshape(1, 1, 1, -1).repeat(self.groups, 1, 1, 1), persistent=False)

    def forward(self, originals: list[torch.Tensor], rebuilt: list[torch.Tensor]) -> torch.Tensor:
        """Return the pixel and the structural error, float32 [N, 2, H/8, W/8], of images [N, 3, H, W] in [0, 1]."""
        x, y = originals[0], rebuilt[0]
        pixel = F.avg_pool2d((x - y).square().mean(dim=1, keepdim=True), PIXEL_STRIDE)
        structural = F.avg_pool2d(1 - self.ssim(x, y).mean(dim=1, keepdim=True), PIXEL_STRIDE // _SSIM_STRIDE)
        return torch.cat([pixel, structural], dim=1)

    def ssim(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the structural similarity (equation 13), float32 [N, 3, H/4, W/4], of images [N, 3, H, W]."""
        before = _WINDOW // 2 - _SSIM_STRIDE // 2
        after = _WINDOW - _SSIM_STRIDE - before
        x = F.pad(x, (before, after, before, after), mode="replicate")
        y = F.pad(y, (before, after, before, after), mode="replicate")
        means = torch.cat([x, y, x * x, y * y, x * y], dim=1)
        means = F.conv2d(means, self.vertical, stride=(_SSIM_STRIDE, 1), groups=self.groups)
        means = F.conv2d(means, self.horizontal, stride=(1, _SSIM_STRIDE), groups=self.groups)
        # Slices, since the exporter forgets which module a Split comes from.
        x_mean, y_mean, xx, yy, xy = (means[:, i * _COLOURS : (i + 1) * _COLOURS] for i in range(5))
        squares, product = x_mean * x_mean + y_mean * y_mean, x_mean * y_mean
        similarity = (2 * product + _C1) * (2 * (xy - product) + _C2)
        return similarity / ((squares + _C1) * (xx + yy - squares + _C2))


class FeatureErrors(nn.Module):
    """1 - cosine of two feature vectors at every place of every layer, brought to the finest layer's grid."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, originals: list[torch.Tensor], rebuilt: list[torch.Tensor]) -> torch.Tensor:
        """Return the errors, float32 [N, layers, h, w] in [0, 2], of features [N, C, h, w] per layer."""
        maps = [
            on_grid(1 - F.cosine_similarity(x, y, dim=1)[:, None], self.grid)
            for x, y in zip(originals, rebuilt, strict=True)
        ]
        return torch.cat(maps, dim=1)


class AutoencoderHead(nn.Module):
    """From originals and rebuilt ones to `score` [N] and `anomaly_map` [N, h, w], all in float.

    `mean` and `scale`, float32 [1, errors, h, w], come from `refit`; before that the map is the weighted sum of errors.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    kernel: torch.Tensor

    def __init__(self, config: AutoencoderConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.top_k = config.settings.top_k
        self.measure = PixelErrors() if config.encoder is None else FeatureErrors(grid)
        self.register_buffer("mean", torch.zeros(1, len(config.errors), *grid))
        self.register_buffer("scale", _weights(config).expand(1, -1, *grid).contiguous())
        self.register_buffer("kernel", gaussian_kernel(config.settings.smoothing), persistent=False)

    def judge(self, errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score [N], the mean of the largest values of the map, and the map [N, h, w]."""
        anomaly_map = blurred(((errors - self.mean) * self.scale).sum(dim=1), self.kernel)
        return mean_of_largest(anomaly_map.flatten(1), self.top_k), anomaly_map

    def forward(
        self, originals: list[torch.Tensor], rebuilt: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score, anomaly map, and the errors that mean and scale are fitted on."""
        errors = self.measure(originals, rebuilt)
        score, anomaly_map = self.judge(errors)
        return score, anomaly_map, errors


class Autoencoder(nn.Module):
    """The detector: convolutions in `backbone`, errors and their comparison in `head`. Input uint8 [N, H, W, 3]."""

    def __init__(
        self, config: AutoencoderConfig, backbone: PixelAutoencoder | FeatureAutoencoder, height: int, width: int
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = AutoencoderHead(config, config.grid(height, width))
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score float32 [N], anomaly map float32 [N, h, w] and errors float32 [N, errors, h, w]."""
        originals, rebuilt = self.backbone(image)
        return self.head(originals, rebuilt)  # type: ignore[no-any-return]


def build(config: AutoencoderConfig, height: int, width: int, *, weights: str = DEFAULT_WEIGHTS) -> Autoencoder:
    """Return the untrained model; the config's None become numbers. `weights` is for the encoder of variant B.

    Raises:
        UsageError: a size that is not possible, or weights that do not fit.
        MissingRequirementError: the weights cannot be reached.
    """
    config = replace(config, **asdict(config.settings))
    config.grid(height, width)  # refuses a size before weights are downloaded
    backbone = _backbone(config, weights)
    return Autoencoder(config, backbone, height, width)


def announce(config: AutoencoderConfig, height: int, width: int, images: int) -> list[str]:
    """Return what to tell the user before the training: parameters per part, grid, steps, warnings."""
    rows, columns = config.grid(height, width)
    counts = parameter_counts(config)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    kinds = " and ".join(config.errors)
    if config.encoder is None:
        lines = [
            f"rebuilds pixels: {parts}, {sum(counts.values()):,} parameters in all; "
            f"{kinds} error on {rows}x{columns} places, structural weight {config.structural:g}"
        ]
    else:
        lines = [
            f"rebuilds features of {config.encoder}, frozen: {parts} parameters; error of {kinds} on "
            f"{rows}x{columns} places"
        ]
    chosen = config.settings
    batches = -(-images // chosen.batch_size)
    lines.append(f"training for {chosen.epochs} epochs of {batches} batches, learning rate {chosen.learning_rate:g}")
    if images >= MIN_IMAGES and chosen.epochs * batches < ADVISED_STEPS:
        lines.append(
            f"Warning: {chosen.epochs * batches} steps are few; {-(-ADVISED_STEPS // batches)} epochs would make "
            f"{ADVISED_STEPS}."
        )
    if MIN_IMAGES <= images < ADVISED_IMAGES:
        lines.append(
            f"Warning: {images} images are few to know the usual errors at each place; {ADVISED_IMAGES} or more are "
            "advisable (or a shrinkage nearer to 1)."
        )
    return lines


def parameter_counts(config: AutoencoderConfig) -> dict[str, int]:
    """Return the number of parameters of each part of the backbone, without making any."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = _backbone(config, RANDOM_WEIGHTS)
    return {name: sum(value.numel() for value in part.parameters()) for name, part in backbone.named_children()}


def fit(model: Autoencoder, images: ImageSet, session: FitSession) -> None:
    """Train what is not frozen, then learn the usual errors of normal images in one more pass.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, or a loss or an error is not finite.
    """
    if len(images) < MIN_IMAGES:
        raise too_few_images(len(images), MIN_IMAGES, ADVISED_IMAGES)
    config, chosen = model.config, model.config.settings
    optimizer = torch.optim.AdamW(
        [value for value in model.parameters() if value.requires_grad],
        lr=chosen.learning_rate,
        weight_decay=config.weight_decay,
    )
    fit_epochs(
        model,
        losses,
        images,
        optimizer,
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.epochs),
        session,
        settings=asdict(config),
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        seed=config.seed,
    )
    device, measure = resolve_device(session.device), model.head.measure
    errors = embeddings_of(model, images, device, lambda both: measure(*both), "usual errors")
    for name, value in refit(config, errors).items():
        getattr(model.head, name).copy_(torch.from_numpy(value))


def losses(model: nn.Module, image: torch.Tensor) -> Losses:
    """Return the mean of every kind of error over batch and places, and as `loss` their weighted sum."""
    assert isinstance(model, Autoencoder)
    originals, rebuilt = model.backbone(image)
    # In half precision E[xx] - E[x]^2 would be nothing but rounding.
    with torch.autocast(image.device.type, enabled=False):
        errors = model.head.measure([x.float() for x in originals], [y.float() for y in rebuilt])
        means = errors.mean(dim=(0, 2, 3))
    config = model.config
    scales = [_PIXEL_SCALE if name == "pixel" else 1.0 for name in config.errors]
    terms = [scale * weight * mean for scale, weight, mean in zip(scales, config.errors.values(), means, strict=True)]
    return {"loss": torch.stack(terms).sum(), **dict(zip(config.errors, means, strict=True))}


def refit(config: AutoencoderConfig, embeddings: Iterable[Embeddings]) -> dict[str, Embeddings]:
    """Return the head's `mean` and `scale`, fitted on errors float32 [N, errors, h, w] of whichever graph made them.

    With v the variance at a place and s the shrinkage, scale = weight / sqrt((1 - s) v + s mean(v)), the mean being
    over all places. Sums are kept in float64 about the first batch's mean.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES, or an error is not finite.
    """
    count, shift, total, squares = 0, np.zeros(1), np.zeros(1), np.zeros(1)
    for batch in embeddings:
        errors = batch.astype(np.float64)
        if not np.isfinite(errors).all():
            raise UsageError("The errors of reconstruction are not finite.", "Check the weights, or train again.")
        if count == 0:
            shift = errors.mean(axis=0)
        centred = errors - shift
        total = total + centred.sum(axis=0)
        squares = squares + np.square(centred).sum(axis=0)
        count += len(batch)
    if count < MIN_IMAGES:
        raise too_few_images(count, MIN_IMAGES, ADVISED_IMAGES)
    variance = np.maximum(squares - total**2 / count, 0) / (count - 1)
    shrinkage = config.settings.shrinkage
    pooled = (1 - shrinkage) * variance + shrinkage * variance.mean(axis=(1, 2), keepdims=True)
    scale = _weights(config).numpy()[0] / np.sqrt(pooled + _EPSILON)
    return {
        "mean": (shift + total / count)[np.newaxis].astype(np.float32),
        "scale": scale[np.newaxis].astype(np.float32),
    }


def _backbone(config: AutoencoderConfig, weights: str) -> PixelAutoencoder | FeatureAutoencoder:
    if config.encoder is None:
        torch.manual_seed(config.seed)
        return PixelAutoencoder(config.code)
    encoder = build_backbone(config.encoder, layers=config.layers, weights=weights, seed=config.seed)
    torch.manual_seed(config.seed)  # the decoder starts alike whatever the weights
    return FeatureAutoencoder(encoder, config.code)


def _weights(config: AutoencoderConfig) -> torch.Tensor:
    """Return the weight of each kind of error, float32 [1, errors, 1, 1]."""
    return torch.tensor(list(config.errors.values())).reshape(1, -1, 1, 1)


def _convolution(inputs: int, outputs: int, *, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Return a convolution that keeps the grid or divides it by the stride, with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _downwards(channels: int, times: int) -> nn.Sequential:
    """Return convolutions that make the grid `times` (a power of two) coarser: one 1x1 when it stays as it is."""
    if times == 1:
        return _convolution(channels, FEATURE_CHANNELS, kernel=1)
    halvings = int(math.log2(times))
    inputs = (channels, *(FEATURE_CHANNELS,) * (halvings - 1))
    return nn.Sequential(*(_convolution(i, FEATURE_CHANNELS, stride=2) for i in inputs))


def _doubled() -> nn.Upsample:
    return nn.Upsample(scale_factor=2.0, mode="nearest")
