"""Scores and maps of many images, from a torch model or from an engine, through the same preprocessing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edge_anomaly_runtime.errors import ImageError, UsageError
from edge_anomaly_runtime.images import read_images
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.session import Session

Pixels = npt.NDArray[np.uint8]
# uint8 [N, H, W, 3] to score float32 [N] and map float32 [N, h, w].
ScoreFunction = Callable[[Pixels], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]

_BATCH = 16


@dataclass(frozen=True)
class Predictions:
    """Scores float64 [n] and maps float32 [n, h, w] of n images, in order."""

    scores: npt.NDArray[np.float64]
    maps: npt.NDArray[np.float32]

    def map_maxima(self) -> npt.NDArray[np.float64]:
        """Return the largest value of each map, float64 [n]."""
        return np.asarray(self.maps.max(axis=(1, 2)), dtype=np.float64)


def read_pixels(paths: Sequence[Path], spec: Preprocess, *, strict: bool, what: str) -> tuple[list[Path], Pixels]:
    """Read the images that can be read, uint8 [n, height, width, 3], and say which could not.

    Raises:
        UsageError: not one image could be read; with `strict` also for the first bad one.
    """
    bad: list[ImageError] = []
    pairs = list(track(read_images(paths, spec, bad=bad, strict=strict), what, len(paths)))
    report_bad(bad, len(paths))
    if not pairs:
        raise UsageError(f"None of the {len(paths)} images could be read; the first: {bad[0].what if bad else ''}")
    return [path for path, _ in pairs], np.stack([pixels for _, pixels in pairs])


def report_bad(bad: Sequence[ImageError], total: int) -> None:
    """Count and list the files that were skipped."""
    if bad:
        say(f"Skipped {len(bad)} of {total} images that cannot be used:")
        for error in bad:
            say(f"  {error.path}: {error.reason}")


def predict(score_function: ScoreFunction, images: Iterable[Pixels], *, what: str, total: int) -> Predictions:
    """Score images, uint8 [H, W, 3] each, in batches."""
    scores, maps = [], []
    for batch in batched(track(images, what, total)):
        batch_scores, batch_maps = score_function(batch)
        scores.append(batch_scores.astype(np.float64))
        maps.append(batch_maps)
    return Predictions(np.concatenate(scores), np.concatenate(maps))


def batched(images: Iterable[Pixels], size: int = _BATCH) -> Iterator[Pixels]:
    """Stack images into uint8 [up to size, H, W, 3]."""
    iterator = iter(images)
    while chunk := list(itertools.islice(iterator, size)):
        yield np.stack(chunk)


def torch_scores(model: nn.Module) -> ScoreFunction:
    """Return the score function of a torch detector."""

    def score(images: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        with torch.inference_mode():
            outputs = model(torch.from_numpy(images))
        return outputs[0].numpy(), outputs[1].numpy()

    return score


def session_scores(session: Session) -> ScoreFunction:
    """Return the score function of a loaded graph with batch 1."""

    def score(images: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        outputs = [session.run(image[np.newaxis]) for image in images]
        return (
            np.concatenate([output["score"] for output in outputs]),
            np.concatenate([output["anomaly_map"] for output in outputs]),
        )

    return score
