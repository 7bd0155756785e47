"""Images of a run as torch reads them: checked once, kept in memory while they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from edge_anomaly_runtime.errors import ImageError, UsageError
from edge_anomaly_runtime.images import load_image, read_images
from edge_anomaly_runtime.preprocess import Preprocess, preprocess
from edge_anomaly_runtime.progress import track

from .prediction import batched, report_bad

Pixels = npt.NDArray[np.uint8]

# 4 GiB hold 28,000 images of 224 px; more are read from their files again in every epoch.
MEMORY_BUDGET = 4 << 30


class ImageSet(Dataset[torch.Tensor]):
    """Model inputs, uint8 [H, W, 3] each, in the order of `paths`.

    `paths` are the files that could be read; `skipped` counts the others, which were listed for the user.
    """

    def __init__(self, paths: Sequence[Path], spec: Preprocess, *, strict: bool = False, what: str = "reading") -> None:
        """Read every file once.

        Raises:
            UsageError: not one image can be read; with `strict` also for the first bad one.
        """
        bad: list[ImageError] = []
        self.spec = spec
        self.paths: list[Path] = []
        kept: list[Pixels] = []
        room = MEMORY_BUDGET // (spec.height * spec.width * 3)
        for path, image in track(read_images(paths, spec, bad=bad, strict=strict), what, len(paths)):
            self.paths.append(path)
            if len(paths) <= room:
                kept.append(image)
        report_bad(bad, len(paths))
        if not self.paths:
            raise UsageError(f"None of the {len(paths)} images could be read; the first: {bad[0].what if bad else ''}")
        self.skipped = len(bad)
        self._pixels = np.stack(kept) if kept else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.image(index))

    def image(self, index: int) -> Pixels:
        """Return one model input, uint8 [H, W, 3]."""
        if self._pixels is not None:
            return np.asarray(self._pixels[index])
        return np.array(preprocess(load_image(self.paths[index], self.spec), self.spec))

    def batches(self, what: str) -> Iterator[Pixels]:
        """Yield all images in order as uint8 [up to 16, H, W, 3] and show the progress."""
        yield from batched(track((self.image(index) for index in range(len(self))), what, len(self)))


def too_few_images(count: int, least: int, advised: int) -> UsageError:
    """Return the error for fewer images than a detector can be fitted on."""
    return UsageError(
        f"{count} images to fit on are too few.",
        f"Give at least {least}, held-out ones not counted; {advised} or more are advisable.",
    )
