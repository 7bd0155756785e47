"""`train`: a folder of normal images becomes a run folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_anomaly_runtime.atomic import check_free, make_folder, new_folder
from edge_anomaly_runtime.bundle import Thresholds
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.thresholds import check_rates, fit_thresholds

from .backbones import DEFAULT_WEIGHTS, RANDOM_WEIGHTS
from .data import open_dataset, split_holdout
from .detectors import DETECTORS, kind_of
from .image_set import ImageSet
from .prediction import predict, torch_scores
from .runs import Run, package_versions, save_run
from .training import CHECKPOINT, METRICS, FitSession


@dataclass(frozen=True)
class TrainOptions:
    """What is not part of the model: share of images held out, rates of the two thresholds, how and where to compute.

    resume: go on from the last finished epoch of an interrupted training with the same settings.
    precision: auto, fp32, bf16 or fp16; device: auto, cpu or cuda.
    """

    holdout: float = 0.2
    alpha_warn: float = 0.05
    alpha_fail: float = 0.01
    strict: bool = False
    force: bool = False
    resume: bool = False
    precision: str = "auto"
    device: str = "auto"
    tensorboard: bool = False


def train_detector(
    data: str,
    out: Path,
    *,
    config: Any,
    preprocess: Preprocess,
    weights: str = DEFAULT_WEIGHTS,
    options: TrainOptions | None = None,
) -> Run:
    """Train the detector of `config` on the normal images of `data` and write a run folder to `out`.

    A detector that is trained by epochs keeps its checkpoints in `OUT.unfinished` until it has finished.

    Raises:
        UsageError: the data, an option or the output cannot be used.
        MissingRequirementError: the backbone's weights cannot be reached.
        OutputError: the disk is full.
    """
    options = options or TrainOptions()
    check_rates(options.alpha_warn, options.alpha_fail)
    check_free(out, force=options.force)
    detector = DETECTORS[kind_of(config)]
    start = time.monotonic()
    with (
        quiet_unless_first_process(),
        working_folder(out, resume=options.resume, force=options.force, by_epochs=detector.by_epochs) as working,
    ):
        torch.set_num_threads(usable_cpus())
        dataset = open_dataset(data, seed=config.seed)
        fit_items, holdout_items = split_holdout(dataset.train, options.holdout, config.seed)
        say(
            f"{kind_of(config)} at {preprocess.height}x{preprocess.width}: fitting on {len(fit_items)} images, "
            f"{len(holdout_items)} held out for the thresholds, seed {config.seed}"
        )
        for line in detector.announce(config, preprocess.height, preprocess.width, len(fit_items)):
            say(line)
        if weights == RANDOM_WEIGHTS:
            say("Warning: random weights are for timing and tests; such a model finds nothing.")
        model = detector.build(config, preprocess.height, preprocess.width, weights=weights)
        images = ImageSet([item.path for item in fit_items], preprocess, strict=options.strict)
        detector.fit(
            model,
            images,
            FitSession(working, options.resume, options.precision, options.device, options.tensorboard),
        )
        holdout = ImageSet([item.path for item in holdout_items], preprocess, strict=options.strict)
        thresholds, brightness = _limits(model, holdout, options)
        run = Run(
            path=out,
            config=model.config,
            preprocess=preprocess,
            fit=tuple(path.resolve() for path in images.paths),
            holdout=tuple(path.resolve() for path in holdout.paths),
            test=dataset.test,
            thresholds=thresholds,
            brightness=brightness,
            data={
                **dataset.summary(),
                "fitted": len(images),
                "held_out": len(holdout),
                "skipped": images.skipped + holdout.skipped,
            },
            weights=weights if weights in (DEFAULT_WEIGHTS, RANDOM_WEIGHTS) else Path(weights).name,
            seed=config.seed,
            versions=package_versions(),
            seconds=round(time.monotonic() - start, 1),
        )
        if is_first_process():
            with new_folder(out, force=options.force) as folder:
                save_run(folder, run, model)
                keep_logs(working, folder)
            _conclude(run)
    return run


def _limits(model: Any, holdout: ImageSet, options: TrainOptions) -> tuple[Thresholds, tuple[float, float]]:
    """Return the torch model's thresholds, and the darkest and the brightest mean of the held-out images."""
    pixels = [holdout.image(index) for index in range(len(holdout))]
    normal = predict(torch_scores(model), pixels, what="setting thresholds", total=len(pixels))
    thresholds = fit_thresholds(
        normal.scores, normal.map_maxima(), alpha_warn=options.alpha_warn, alpha_fail=options.alpha_fail
    )
    means = [float(image.mean()) for image in pixels]
    return thresholds, (min(means), max(means))


@contextlib.contextmanager
def working_folder(out: Path, *, resume: bool, force: bool, by_epochs: bool) -> Iterator[Path]:
    """Yield `OUT.unfinished`, which an interruption leaves behind only where there is a checkpoint to go on from."""
    folder = out.with_name(f"{out.name}.unfinished")
    if resume and not by_epochs:
        raise UsageError("--resume is for models that are trained by epochs.", "Train again: this model is quick.")
    interrupted = _has_checkpoint(folder)
    if resume and not interrupted:
        raise UsageError(f"There is no interrupted training {folder} to resume.", "Leave out --resume.")
    if interrupted and not (resume or force):
        raise UsageError(
            f"{folder} holds an interrupted training.", "Go on with --resume, or start again with --force."
        )
    if not resume and is_first_process():
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    finished = False
    try:
        yield folder
        finished = True
    finally:
        if is_first_process() and (finished or not _has_checkpoint(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.rglob(CHECKPOINT))


def keep_logs(working: Path, folder: Path) -> None:
    """Move metrics and TensorBoard files of every phase into the run; checkpoints are not kept."""
    for path in [*working.rglob(METRICS), *working.rglob("events.out.*")]:
        target = folder / path.relative_to(working)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def is_first_process() -> bool:
    """Tell whether this is the only process of a training, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def quiet_unless_first_process() -> Iterator[None]:
    """Let one of several processes speak."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        yield


def _conclude(run: Run) -> None:
    fail = run.thresholds.fail
    say(
        f"{run.path}: fail above {fail.value:.4g} ({fail.method}, {fail.n} held-out images, "
        f"at most {fail.upper95:.1%} false alarms with 95 % confidence)"
    )
    say(f"Next: edge-anomaly export {run.path} --target openvino --precision int8 --out part.eab")
