"""`train`: a folder of normal images becomes a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edge_anomaly_calibration.thresholds import fit_thresholds
from edge_anomaly_runtime.atomic import check_free, new_folder
from edge_anomaly_runtime.bundle import Thresholds
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import ImageError, UsageError
from edge_anomaly_runtime.images import read_images
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.progress import say, track

from .backbones import DEFAULT_WEIGHTS, RANDOM_WEIGHTS, build_backbone
from .data import open_dataset, split_holdout
from .padim import MIN_IMAGES, Padim, PadimConfig, advised_images, fit_gaussian
from .prediction import batched, predict, read_pixels, report_bad, torch_scores
from .runs import Run, package_versions, save_run


@dataclass(frozen=True)
class TrainOptions:
    """What is not part of the model: share of images held out, rates of the two thresholds, behaviour on bad files."""

    holdout: float = 0.2
    alpha_warn: float = 0.05
    alpha_fail: float = 0.01
    strict: bool = False
    force: bool = False


def train_padim(
    data: str,
    out: Path,
    *,
    config: PadimConfig,
    preprocess: Preprocess,
    weights: str = DEFAULT_WEIGHTS,
    options: TrainOptions | None = None,
) -> Run:
    """Fit PaDiM on the normal images of `data` and write a run folder to `out`.

    Raises:
        UsageError: the data, an option or the output cannot be used.
        MissingRequirementError: the backbone's weights cannot be reached.
        OutputError: the disk is full.
    """
    options = options or TrainOptions()
    check_free(out, force=options.force)
    torch.set_num_threads(usable_cpus())
    dataset = open_dataset(data, seed=config.seed)
    fit_items, holdout_items = split_holdout(dataset.train, options.holdout, config.seed)
    _announce(config, preprocess, len(fit_items), len(holdout_items), weights)
    backbone = build_backbone(config.backbone, layers=config.layers, weights=weights, seed=config.seed)
    model = Padim(config, backbone, preprocess.height, preprocess.width)
    with new_folder(out, force=options.force) as folder:
        fitted, skipped = _fit(model, [item.path for item in fit_items], preprocess, strict=options.strict)
        holdout_paths, pixels = read_pixels(
            [item.path for item in holdout_items], preprocess, strict=options.strict, what="setting thresholds"
        )
        normal = predict(torch_scores(model), pixels, what="scoring", total=len(pixels))
        thresholds = fit_thresholds(
            normal.scores, normal.map_maxima(), alpha_warn=options.alpha_warn, alpha_fail=options.alpha_fail
        )
        means = pixels.mean(axis=(1, 2, 3))
        run = Run(
            path=out,
            config=config,
            preprocess=preprocess,
            fit=tuple(path.resolve() for path in fitted),
            holdout=tuple(path.resolve() for path in holdout_paths),
            test=dataset.test,
            thresholds=thresholds,
            brightness=(float(means.min()), float(means.max())),
            data={**dataset.summary(), "fitted": len(fitted), "held_out": len(holdout_paths), "skipped": skipped},
            weights=weights if weights in (DEFAULT_WEIGHTS, RANDOM_WEIGHTS) else Path(weights).name,
            seed=config.seed,
            versions=package_versions(),
        )
        save_run(folder, run, model)
    _conclude(run, thresholds)
    return run


def _announce(config: PadimConfig, preprocess: Preprocess, fit: int, holdout: int, weights: str) -> None:
    rows, columns = config.grid(preprocess.height, preprocess.width)
    size = config.head_bytes(preprocess.height, preprocess.width)
    say(
        f"padim on {config.backbone}, {preprocess.height}x{preprocess.width}: {rows}x{columns} places, "
        f"{config.reduced} of {config.channels} channels, {config.covariance} covariance, head {size / 1e6:.1f} MB"
    )
    say(f"fitting on {fit} images, {holdout} held out for the thresholds, seed {config.seed}")
    if fit < MIN_IMAGES:
        raise UsageError(
            f"{fit} images to fit on are too few.", f"Give at least {MIN_IMAGES}, held-out ones not counted."
        )
    if fit < advised_images(config):
        say(
            f"Warning: {fit} images are few for {config.reduced} channels; {advised_images(config)} or more are "
            "advisable (or fewer channels with --dims, or --covariance tied)."
        )
    if weights == RANDOM_WEIGHTS:
        say("Warning: random weights are for timing and tests; such a model finds nothing.")


def _fit(model: Padim, paths: list[Path], spec: Preprocess, *, strict: bool) -> tuple[list[Path], int]:
    """Fit the model's Gaussian; return the images that it was fitted on and how many could not be read."""
    bad: list[ImageError] = []
    fitted: list[Path] = []
    images = _fitting_images(paths, spec, bad, fitted, strict=strict)
    model.set_gaussian(fit_gaussian(_embeddings(model, images), model.config))
    report_bad(bad, len(paths))
    return fitted, len(bad)


def _fitting_images(
    paths: list[Path], spec: Preprocess, bad: list[ImageError], fitted: list[Path], *, strict: bool
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the readable images and note which they were."""
    for path, pixels in track(read_images(paths, spec, bad=bad, strict=strict), "fitting", len(paths)):
        fitted.append(path)
        yield pixels


def _embeddings(model: Padim, images: Iterator[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.float32]]:
    for batch in batched(images):
        with torch.inference_mode():
            features = model.backbone(torch.from_numpy(batch))
            yield model.head.embed(features).numpy()


def _conclude(run: Run, thresholds: Thresholds) -> None:
    fail = thresholds.fail
    say(
        f"{run.path}: fail above {fail.value:.4g} ({fail.method}, {fail.n} held-out images, "
        f"at most {fail.upper95:.1%} false alarms with 95 % confidence)"
    )
    say(f"Next: edge-anomaly export {run.path} --target openvino --precision int8 --out part.eab")
