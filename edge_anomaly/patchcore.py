"""PatchCore (Roth et al. 2022): the distance of every patch to the nearest of a bank of normal ones.

The bank is a greedy k-centre coreset (Gonzalez 1985) of the normal patches: whatever patch is farthest from the bank
joins it next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from edge_anomaly_runtime.errors import UsageError

from .backbones import BACKBONES, DEFAULT_WEIGHTS, Backbone, build_backbone, check_layers
from .features import blurred, embeddings_of, gaussian_kernel, joint_features
from .image_set import ImageSet, too_few_images
from .training import FitSession, resolve_device

Rows = npt.NDArray[np.float32]

# Three good parts show some of what may differ between good parts; the holdout of a run needs its share besides.
MIN_IMAGES = 3
ADVISED_IMAGES = 50

# The bank is chosen from at most so many patches, a uniform random sample where there are more: 1.8 GB with
# WideResNet-50-2, 0.2 GB with EfficientNet-Lite0.
MAX_PATCHES = 300_000

# Distances survive a random projection to so many channels (Johnson and Lindenstrauss 1984; the paper's 128).
_PROJECTED = 128
# The principal axes are fitted on at most so many patches, 21 times the channels of WideResNet-50-2.
_PCA_PATCHES = 32_768
# Farthest patches that take every step of the greedy choice; the others wait for the next matrix product.
_CANDIDATES = 2048
# Rows of one matrix product, small enough for its result to stay in a CPU's cache.
_BLOCK = 4096
# Multiplications and additions of the coreset that one CPU core does in a second: 40e9 and more were measured with
# AVX-512, minima included, and not every device is as fast.
_CORE_SPEED = 25e9
_BYTES = 4


@dataclass(frozen=True)
class PatchcoreConfig:
    """Everything that decides a PatchCore model apart from its images.

    share: share of all normal patches that the bank keeps, above 0 to 1.
    max_bank: the most vectors that the bank keeps.
    memory_budget: the most megabytes (1e6 bytes) that the bank takes in the exported graph; None is no limit of its
        own beside `max_bank`.
    bank: number of vectors, whatever share and `max_bank` say; None leaves it to them, and `fit` sets the true number.
    pca: principal components of the features that distances are taken in; None keeps all channels.
    smoothing: standard deviation of the Gaussian blur of the map, in cells of the feature grid; 0 for none.
    score_top: the score is the mean of so many of the map's highest values; 1 is the maximum.
    """

    backbone: str = "wide_resnet50_2"
    layers: tuple[str, ...] = ("layer2", "layer3")
    share: float = 0.01
    max_bank: int = 10_000
    memory_budget: float | None = None
    bank: int | None = None
    pca: int | None = None
    smoothing: float = 0.5
    score_top: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_layers(self.backbone, self.layers)
        if not 0 < self.share <= 1:
            raise UsageError(f"A bank share of {self.share:g} is not possible.", "Choose above 0, up to 1.")
        smallest = self.max_bank if self.bank is None else min(self.bank, self.max_bank)
        if smallest < 1:
            raise UsageError(f"A bank of {smallest} vectors is not possible.", "Choose 1 or more.")
        if self.memory_budget is not None and self.memory_budget * 1e6 < self.vector_bytes:
            raise UsageError(
                f"A memory budget of {self.memory_budget:g} MB holds not one vector of {self.vector_bytes} bytes.",
                "Choose a larger one, or fewer channels with --pca.",
            )
        if self.bank and self.memory_budget is not None and self.bank * self.vector_bytes > self.memory_budget * 1e6:
            raise UsageError(
                f"A bank of {self.bank:,} vectors takes {self.bank * self.vector_bytes / 1e6:.1f} MB, more than the "
                f"memory budget of {self.memory_budget:g} MB.",
                "Leave out one of --bank and --memory-budget.",
            )
        if self.pca is not None and not 1 <= self.pca < self.channels:
            raise UsageError(f"--pca {self.pca} is not possible.", f"Choose 1 to {self.channels - 1}, or leave it out.")
        if self.smoothing < 0 or self.score_top < 1:
            raise UsageError(
                f"A smoothing of {self.smoothing:g} with a score of the top {self.score_top} is not possible.",
                "The smoothing must be 0 or more, the top 1 or more.",
            )

    @property
    def channels(self) -> int:
        """Number of channels of the joint features."""
        return sum(BACKBONES[self.backbone].layers[layer][0] for layer in self.layers)

    @property
    def dims(self) -> int:
        """Number of channels that distances are taken in."""
        return self.pca or self.channels

    @property
    def vector_bytes(self) -> int:
        """Bytes that one vector of the bank takes in the graph, its squared length included."""
        return _BYTES * (self.dims + 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the map for an input of this size: those of the finest layer."""
        stride = min(BACKBONES[self.backbone].layers[layer][1] for layer in self.layers)
        return -(-height // stride), -(-width // stride)

    def bank_size(self, patches: int) -> int:
        """Return how many of so many normal patches the bank keeps.

        Raises:
            UsageError: `bank` is more than there are to choose from.
        """
        return vectors_to_keep(
            patches,
            self.vector_bytes,
            bank=self.bank,
            share=self.share,
            max_bank=self.max_bank,
            memory_budget=self.memory_budget,
        )


class PatchcoreHead(nn.Module):
    """From feature maps to `score` [N] and `anomaly_map` [N, h, w], all in float.

    The squared distances to all vectors b of the bank are one 1x1 convolution with weight -2b and bias |b|^2; |a|^2 is
    the same for all b, so it joins after the minimum. Features are taken about the bank's mean: lengths are then of
    the size of distances, and the difference of two large numbers does not eat the small one.
    """

    mean: torch.Tensor
    components: torch.Tensor
    bank: torch.Tensor
    bank_squares: torch.Tensor
    chosen: torch.Tensor
    kernel: torch.Tensor

    def __init__(self, config: PatchcoreConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = grid
        self.reduces = config.pca is not None
        self.score_top = config.score_top
        if self.score_top > self.rows * self.columns:
            raise UsageError(
                f"There is no mean of the top {self.score_top} of a map of {self.rows}x{self.columns}.",
                f"Choose a score_top of 1 to {self.rows * self.columns}.",
            )
        size = config.bank or 1
        self.register_buffer("mean", torch.zeros(1, config.channels, 1, 1))
        if self.reduces:
            self.register_buffer("components", torch.zeros(config.dims, config.channels, 1, 1))
        self.register_buffer("bank", torch.zeros(size, config.dims, 1, 1))
        self.register_buffer("bank_squares", torch.zeros(size))
        self.register_buffer("chosen", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("kernel", gaussian_kernel(config.smoothing))

    def embed(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the joint features float32 [N, channels, h, w]."""
        return joint_features(features, (self.rows, self.columns))

    def judge(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score [N], mean of the smoothed map's highest values, and the map [N, h, w]."""
        a = embedding - self.mean
        if self.reduces:
            a = F.conv2d(a, self.components)
        nearest = F.conv2d(a, self.bank, self.bank_squares).amin(dim=1)
        squared = (nearest + a.square().sum(dim=1)).clamp(min=0)
        anomaly_map = blurred(torch.sqrt(squared), self.kernel)
        if self.score_top == 1:  # the same as below without a TopK, which many accelerators lack
            return anomaly_map.amax(dim=(1, 2)), anomaly_map
        return anomaly_map.flatten(1).topk(self.score_top).values.mean(dim=1), anomaly_map

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score, anomaly map, and the embedding that the bank is chosen from."""
        embedding = self.embed(features)
        score, anomaly_map = self.judge(embedding)
        return score, anomaly_map, embedding


class Patchcore(nn.Module):
    """The detector: frozen backbone, float head. Input uint8 [N, H, W, 3]."""

    def __init__(self, config: PatchcoreConfig, backbone: Backbone, height: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = PatchcoreHead(config, config.grid(height, width))
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score float32 [N], anomaly map float32 [N, h, w] and embedding float32 [N, channels, h, w]."""
        return self.head(self.backbone(image))  # type: ignore[no-any-return]


def build(config: PatchcoreConfig, height: int, width: int, *, weights: str = DEFAULT_WEIGHTS) -> Patchcore:
    """Return the detector with its backbone's weights and an empty bank of the config's size, 1 where it has none yet.

    Raises:
        UsageError: a setting does not fit the backbone or the size, or the bank is larger than memory.
        MissingRequirementError: the weights cannot be reached.
    """
    _check_memory(config, (config.bank or 1) * config.vector_bytes)
    backbone = build_backbone(config.backbone, layers=config.layers, weights=weights, seed=config.seed)
    return Patchcore(config, backbone, height, width)


def announce(config: PatchcoreConfig, height: int, width: int, images: int) -> list[str]:
    """Return what to tell the user before the fit: grid, size of the bank, memory and time that choosing it takes.

    Raises:
        UsageError: the config's bank has more vectors than the images have patches.
    """
    rows, columns = config.grid(height, width)
    patches = images * rows * columns
    pool, size = min(patches, MAX_PATCHES), config.bank_size(patches)
    seconds = 2 * pool * min(config.dims, _PROJECTED) * size / _CORE_SPEED
    reduced = f"{config.pca} principal components of " if config.pca else ""
    lines = [
        f"{rows}x{columns} places, {reduced}{config.channels} channels, bank of {size:,} of {patches:,} patches, "
        f"{size * config.vector_bytes / 1e6:.1f} MB, {size * config.dims * rows * columns / 1e9:.2f} GMAC an image",
        f"choosing the bank takes up to {fit_bytes(config, patches) / 1e9:.1f} GB of memory and, after the features, "
        f"about {max(1, round(seconds)):,} s of one CPU core",
    ]
    if patches > pool:
        lines.append(f"Note: the bank is chosen from a random {pool:,} of these patches.")
    if MIN_IMAGES <= images < ADVISED_IMAGES:
        lines.append(
            f"Warning: {images} images are few; {ADVISED_IMAGES} or more are advisable, and with few of them a larger "
            "part of their patches (--share 0.1)."
        )
    return lines


def fit_bytes(config: PatchcoreConfig, patches: int) -> int:
    """Return the memory in bytes that choosing a bank from so many patches takes at its peak."""
    pool, size = min(patches, MAX_PATCHES), config.bank_size(patches)
    projected = 2 * min(config.dims, _PROJECTED)  # before and after the mean is taken off
    reduced = config.dims if config.pca else 0
    return _BYTES * pool * (config.channels + reduced + projected) + 3 * size * config.vector_bytes


def fit(model: Patchcore, images: ImageSet, session: FitSession) -> None:
    """Choose the bank from the patches of all images, in one pass on the session's device.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES or fewer patches than the bank is to have, a feature is not
            finite, or the work does not fit into memory.
    """
    if len(images) < MIN_IMAGES:
        raise too_few_images(len(images), MIN_IMAGES, ADVISED_IMAGES)
    grid = (model.head.rows, model.head.columns)
    patches = len(images) * grid[0] * grid[1]
    _check_memory(model.config, fit_bytes(model.config, patches))
    config = replace(model.config, bank=model.config.bank_size(patches))
    embeddings = embeddings_of(model, images, resolve_device(session.device), model.head.embed)
    arrays, chosen = _fitted(config, embeddings, None)
    model.config, model.head = config, PatchcoreHead(config, grid).eval()
    for name, value in {**arrays, "chosen": chosen}.items():
        getattr(model.head, name).copy_(torch.from_numpy(value))


def refit(
    config: PatchcoreConfig, embeddings: Iterable[Rows], *, chosen: torch.Tensor | None = None
) -> dict[str, Rows]:
    """Return the head's buffers by name, from embeddings float32 [N, channels, h, w] of whichever graph made them.

    chosen: int64 [bank], the head's own, keeps the patches that `fit` has chosen from the same images; without it they
    are chosen anew. Another graph's features would lead to another choice, whose AUROC differs by chance alone.

    Raises:
        UsageError: there are fewer patches than the bank is to have, or one is not finite.
    """
    return _fitted(config, embeddings, None if chosen is None else chosen.numpy())[0]


def _fitted(
    config: PatchcoreConfig, embeddings: Iterable[Rows], chosen: npt.NDArray[np.int64] | None
) -> tuple[dict[str, Rows], npt.NDArray[np.int64]]:
    """Return the head's buffers, and which patches of the sample are in its bank."""
    patches, seen = sample_patches(embeddings, config.channels, MAX_PATCHES, config.seed)
    size = config.bank_size(seen)
    axes = None if config.pca is None else principal_axes(patches, config.pca, config.seed)
    chosen = chosen_patches(patches, size, config.seed, chosen, axes)
    vectors = patches[chosen]
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    # From here in float64, rounded once: the graph's distances are as good as float32 can be.
    centred = vectors.astype(np.float64) - mean
    bank = (centred if axes is None else centred @ axes.T.astype(np.float64)).astype(np.float32)
    arrays = {
        "mean": mean.reshape(1, -1, 1, 1),
        "bank": -2 * bank.reshape(size, -1, 1, 1),
        "bank_squares": np.square(bank, dtype=np.float64).sum(axis=1).astype(np.float32),
    }
    return (arrays if axes is None else {**arrays, "components": axes.reshape(*axes.shape, 1, 1)}), chosen


def vectors_to_keep(
    patches: int, vector_bytes: int, *, bank: int | None, share: float, max_bank: int, memory_budget: float | None
) -> int:
    """Return how many of so many normal patches the bank keeps; the settings are those of `PatchcoreConfig`.

    Raises:
        UsageError: `bank` is more than there are to choose from.
    """
    pool = min(patches, MAX_PATCHES)
    if bank is not None and bank > pool:
        raise UsageError(
            f"A bank of {bank:,} vectors cannot be chosen from {pool:,} patches.",
            f"Choose a --bank of up to {pool:,}, or give more images.",
        )
    if bank is not None:
        return bank
    budget = max_bank if memory_budget is None else int(memory_budget * 1e6 / vector_bytes)
    return max(1, min(round(share * patches), max_bank, budget, pool))


def chosen_patches(
    patches: Rows, size: int, seed: int, chosen: npt.NDArray[np.int64] | None, axes: Rows | None = None
) -> npt.NDArray[np.int64]:
    """Return which patches make the bank: `chosen`, or where it is None a coreset of them, along `axes` if given.

    Raises:
        UsageError: there are not as many patches as `chosen` needs.
    """
    if chosen is None:
        return k_centre(patches if axes is None else patches @ axes.T, size, seed)
    if chosen.max() >= len(patches):
        raise UsageError(
            f"There are {len(patches):,} patches; the bank needs number {chosen.max():,}.",
            "Give the images that the model was fitted on.",
        )
    return chosen


def sample_patches(batches: Iterable[Rows], channels: int, capacity: int, seed: int) -> tuple[Rows, int]:
    """Return all patches of embeddings [N, channels, h, w], or a random `capacity` of them, and how many there were.

    Float32 [up to capacity, channels]. Algorithm R (Vitter 1985): patch number t takes the place of a random one of
    the sample with probability capacity / t. How images are batched makes no difference.

    Raises:
        UsageError: a feature is not finite.
    """
    rng = np.random.default_rng(seed)
    sample = np.empty((capacity, channels), dtype=np.float32)  # pages that are never written take no memory
    seen = 0
    for batch in batches:
        patches = batch.transpose(0, 2, 3, 1).reshape(-1, channels)
        if not np.isfinite(patches).all():
            raise UsageError("The backbone's features are not finite.", "Check the weights file.")
        free = min(len(patches), max(0, capacity - seen))
        sample[seen : seen + free] = patches[:free]
        slots = (rng.random(len(patches) - free) * np.arange(seen + free + 1, seen + len(patches) + 1)).astype(np.int64)
        # The last of several patches for one place stays, as if they came one by one.
        taken, last = np.unique(slots[::-1], return_index=True)
        kept = taken < capacity
        sample[taken[kept]] = patches[len(patches) - 1 - last[kept]]
        seen += len(patches)
    return sample[: min(seen, capacity)], seen


def principal_axes(patches: Rows, count: int, seed: int) -> Rows:
    """Return the directions of largest variance, float32 [count, channels] with orthonormal rows; fitted in float64."""
    if len(patches) > _PCA_PATCHES:
        rows = np.random.default_rng([seed, 2]).choice(len(patches), _PCA_PATCHES, replace=False)
        patches = patches[np.sort(rows)]
    centred = patches.astype(np.float64)
    centred -= centred.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    return np.ascontiguousarray(vectors[:, : -count - 1 : -1].T, dtype=np.float32)


def k_centre(points: Rows, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return which points, float32 [n, d], make a seeded greedy k-centre coreset, int64 [size], in order of choice.

    Distances are taken after a random projection to 128 channels where there are more; the choice is exact in them.
    """
    rng = np.random.default_rng([seed, 1])
    first = int(rng.integers(len(points)))
    rows = torch.from_numpy(points)
    if points.shape[1] > _PROJECTED:
        # No factor of 1 / sqrt(128): the choice knows no scale.
        rows = rows @ torch.from_numpy(rng.standard_normal((points.shape[1], _PROJECTED), dtype=np.float32))
    return greedy_k_centre(rows - rows.mean(dim=0), size, first)


def greedy_k_centre(points: torch.Tensor, size: int, first: int) -> npt.NDArray[np.int64]:
    """Return the indices int64 [size] of `first` and, one after the other, the point farthest from those chosen.

    points: float32 [n, d], best about their mean. Nothing is approximated: distances only shrink as centres join, so
    the farthest of a few thousand candidates is the farthest of all for as long as it is no nearer than any other
    point was at the last count. Only then are all points brought up to date, by one matrix product for many centres.
    """
    squares = points.square().sum(dim=1)
    nearest = torch.full((len(points),), torch.inf)
    chosen = new = [first]
    while True:
        _bring_nearer(nearest, points, squares, new)
        # Apart from -1 nothing is below 0: no point is chosen twice, not even among equal ones.
        nearest[chosen] = -1.0
        if len(chosen) == size:
            return np.array(chosen)
        new = _farthest(nearest, points, squares, size - len(chosen))
        chosen = chosen + new


def _bring_nearer(nearest: torch.Tensor, points: torch.Tensor, squares: torch.Tensor, centres: list[int]) -> None:
    """Lower `nearest`, the squared distances [n] to the nearest centre, to what some more centres make of them."""
    weight, bias = -2 * points[centres].T, squares[centres]
    for start in range(0, len(points), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = torch.addmm(bias, points[block], weight).amin(dim=1) + squares[block]
        nearest[block] = torch.minimum(nearest[block], distances.clamp(min=0))


def _farthest(nearest: torch.Tensor, points: torch.Tensor, squares: torch.Tensor, most: int) -> list[int]:
    """Return the next centres, at least one and at most `most`, for as long as candidates alone decide."""
    top = torch.topk(nearest, min(_CANDIDATES + 1, len(nearest)))
    others = float(top.values[-1]) if len(nearest) > _CANDIDATES else -torch.inf
    candidates = top.indices[:_CANDIDATES]
    rows, lengths, left = points[candidates], squares[candidates], top.values[:_CANDIDATES].clone()
    chosen: list[int] = []
    while len(chosen) < most:
        farthest = int(left.argmax())
        if float(left[farthest]) < others:
            break
        chosen.append(int(candidates[farthest]))
        distances = lengths + lengths[farthest] - 2 * (rows @ rows[farthest])
        left = torch.minimum(left, distances.clamp(min=0))
        left[farthest] = -1.0
    return chosen


def _check_memory(config: PatchcoreConfig, needed: int) -> None:
    check_memory(
        needed,
        f"The bank needs {needed / 1e9:.1f} GB of memory with {config.dims} channels",
        "Choose a smaller --bank, --share or --memory-budget, fewer channels with --pca 128, or fewer images.",
    )


def check_memory(needed: int, need: str, advice: str) -> None:
    """Refuse work that needs more bytes than are free; `need` says how much, and begins the message."""
    free = available_bytes()
    if free is not None and needed > free:
        raise UsageError(f"{need}, and {free / 1e9:.1f} GB are free.", advice)


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> int | None:
    """Return how much memory this process may still take, in bytes; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        return min(free, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
