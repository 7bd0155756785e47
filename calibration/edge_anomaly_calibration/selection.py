"""Which images the INT8 ranges are measured on: normal training images, some of them damaged on purpose.

Ranges measured on normal images alone clip what an anomaly looks like, and a clipped anomaly is a missed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_anomaly_runtime.errors import ImageError, UsageError
from edge_anomaly_runtime.images import file_sha256, read_images
from edge_anomaly_runtime.preprocess import Preprocess

Image = npt.NDArray[np.uint8]

_NOISE_STD = 40


@dataclass(frozen=True)
class CalibrationImages:
    """The chosen files in order; every image whose index is in `synthetic` is shown with a synthetic anomaly."""

    paths: tuple[Path, ...]
    synthetic: frozenset[int]
    seed: int
    spec: Preprocess

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.paths)

    def sha256(self) -> str:
        """Return one hash over the content of all files, what is damaged, how, and the preprocessing."""
        digest = hashlib.sha256(f"{sorted(self.synthetic)} {self.seed} {self.spec}".encode())
        for path in self.paths:
            digest.update(file_sha256(path).encode())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Image]:
        """Yield model inputs, uint8 [height, width, 3], one at a time; the same ones on every pass."""
        bad: list[ImageError] = []
        for index, (_, image) in enumerate(read_images(self.paths, self.spec, bad=bad, strict=True)):
            if index in self.synthetic:
                image = synthetic_anomaly(image, np.random.default_rng([self.seed, index]))
            yield image


@dataclass(frozen=True)
class StratifiedImages:
    """Labelled pictures in memory, uint8 [n, height, width, 3], as many of each class as there are; none is damaged."""

    pixels: Image
    seed: int

    @classmethod
    def choose(cls, pixels: Image, labels: npt.NDArray[np.int64], *, count: int, seed: int = 0) -> StratifiedImages:
        """Choose `count` pictures by seed, dealing out the classes of `labels` [n] in turn.

        Raises:
            UsageError: there is no picture, or count is out of range.
        """
        if not len(pixels) or count < 1:
            raise UsageError(f"{count} calibration images of {len(pixels)} pictures are not possible.")
        rng = np.random.default_rng(seed)
        of_class = [rng.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)]
        longest = max(map(len, of_class))
        dealt = [rows[turn] for turn in range(longest) for rows in of_class if turn < len(rows)]
        return cls(pixels[dealt[:count]], seed)

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.pixels)

    @property
    def synthetic(self) -> frozenset[int]:
        """Pictures with a synthetic anomaly: none."""
        return frozenset()

    def sha256(self) -> str:
        """Return a hash over the pictures."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def __iter__(self) -> Iterator[Image]:
        """Yield model inputs, uint8 [height, width, 3]."""
        return iter(self.pixels)


def choose_calibration_images(
    paths: Sequence[Path], spec: Preprocess, *, count: int = 128, synthetic_share: float = 0.5, seed: int = 0
) -> CalibrationImages:
    """Choose `count` of the normal images by seed, spread evenly over their folders.

    Raises:
        UsageError: there is no image, or count or share are out of range.
    """
    if not paths:
        raise UsageError("INT8 needs calibration images, and there are none.", "Train on a folder with normal images.")
    if count < 1 or not 0 <= synthetic_share <= 1:
        raise UsageError(f"{count} calibration images with a synthetic share of {synthetic_share} are not possible.")
    rng = np.random.default_rng(seed)
    chosen = _spread_over_folders(paths, min(count, len(paths)), rng)
    damaged = rng.permutation(len(chosen))[: round(synthetic_share * len(chosen))]
    return CalibrationImages(tuple(chosen), frozenset(map(int, damaged)), seed, spec)


def _spread_over_folders(paths: Sequence[Path], count: int, rng: np.random.Generator) -> list[Path]:
    """Deal the folders out in turn, each in random order, until `count` files are drawn."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted(paths):
        folders.setdefault(path.parent, []).append(path)
    shuffled = [[files[index] for index in rng.permutation(len(files))] for files in folders.values()]
    longest = max(map(len, shuffled))
    dealt = [files[turn] for turn in range(longest) for files in shuffled if turn < len(files)]
    return dealt[:count]


def synthetic_anomaly(image: Image, rng: np.random.Generator) -> Image:
    """Return a copy with a rectangle cut from elsewhere and pasted (CutPaste, Li et al. 2021) or covered with noise.

    `image`: uint8 [h, w, 3]. The rectangle covers 2 to 15 % of the image; the pasted one has its brightness and
    contrast changed by up to 40 %.
    """
    height, width = image.shape[:2]
    area, ratio = rng.uniform(0.02, 0.15) * height * width, np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
    patch_height = int(np.clip(np.sqrt(area * ratio), 1, height))
    patch_width = int(np.clip(np.sqrt(area / ratio), 1, width))
    top, left = rng.integers(0, height - patch_height + 1), rng.integers(0, width - patch_width + 1)
    result = image.copy()
    target = result[top : top + patch_height, left : left + patch_width]
    if rng.random() < 0.5:
        # A grey camera shows no coloured noise: it would only widen ranges that no picture of it ever uses.
        grey = bool((image == image[..., :1]).all())
        noise = rng.normal(0, _NOISE_STD, (patch_height, patch_width, 1 if grey else 3))
        target[...] = np.clip(target + noise, 0, 255).astype(np.uint8)
        return result
    from_top, from_left = rng.integers(0, height - patch_height + 1), rng.integers(0, width - patch_width + 1)
    patch = image[from_top : from_top + patch_height, from_left : from_left + patch_width].astype(np.float64)
    jittered = (patch - patch.mean()) * rng.uniform(0.6, 1.4) + patch.mean() * rng.uniform(0.6, 1.4)
    target[...] = np.clip(jittered, 0, 255).astype(np.uint8)
    return result
