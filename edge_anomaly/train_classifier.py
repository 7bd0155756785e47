"""`train classifier`: labelled pictures become a run folder."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edge_anomaly_runtime.atomic import check_free, new_folder
from edge_anomaly_runtime.bundle import CLASSIFIER, MANIFEST
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import ArtefactError
from edge_anomaly_runtime.preprocess import WHOLE_IMAGE, Preprocess
from edge_anomaly_runtime.progress import say

from .classifier import (
    Classifier,
    ClassifierConfig,
    announce,
    build,
    classification_figures,
    fit,
    open_class_data,
    predict,
)
from .runs import RECORD, SCHEMA, load_weights, package_versions, preprocess_of, write_run
from .train import is_first_process, keep_logs, quiet_unless_first_process, working_folder
from .training import FitSession

KIND = CLASSIFIER


@dataclass(frozen=True)
class ClassifierOptions:
    """What is not part of the model; see `TrainOptions` for the fields of the same name.

    validation: share of every class that chooses the best epoch.
    """

    validation: float = 0.1
    download: bool = False
    strict: bool = False
    force: bool = False
    resume: bool = False
    precision: str = "auto"
    device: str = "auto"
    tensorboard: bool = False


@dataclass(frozen=True)
class ClassifierRun:
    """A finished classifier; `source` is the data as it was named, `figures` those of its test set, if it has one."""

    path: Path
    config: ClassifierConfig
    preprocess: Preprocess
    source: str
    validation: float
    data: dict[str, Any]
    figures: dict[str, Any] | None
    versions: dict[str, str]
    seconds: float


def train_classifier(
    data: str, out: Path, *, config: ClassifierConfig, options: ClassifierOptions | None = None
) -> ClassifierRun:
    """Train on labelled pictures, judge the test set once at the end, and write a run folder to `out`.

    Raises:
        UsageError: the data, an option or the output cannot be used, or a loss is not finite.
        MissingRequirementError: a download failed, or there is no such device.
        OutputError: the disk is full.
    """
    options = options or ClassifierOptions()
    check_free(out, force=options.force)
    start = time.monotonic()
    with (
        quiet_unless_first_process(),
        working_folder(out, resume=options.resume, force=options.force, by_epochs=True) as working,
    ):
        torch.set_num_threads(usable_cpus())
        spec = Preprocess(config.image_size, config.image_size)
        images = open_class_data(
            data,
            spec,
            validation_share=options.validation,
            seed=config.seed,
            download=options.download,
            strict=options.strict,
        )
        config = replace(config, classes=images.classes)
        for line in announce(config, config.image_size, config.image_size, len(images.train)):
            say(line)
        model = build(config, config.image_size, config.image_size)
        fit(model, images, FitSession(working, options.resume, options.precision, options.device, options.tensorboard))
        figures = None
        if images.test is not None:
            logits, _ = predict(model, images.test)
            figures = classification_figures(logits.numpy(), images.test.labels.numpy(), images.classes)
        run = ClassifierRun(
            path=out,
            config=config,
            preprocess=spec,
            source=data if data.startswith("cifar10:") else str(Path(data).resolve()),
            validation=options.validation,
            data=images.summary(),
            figures=figures,
            versions=package_versions(),
            seconds=round(time.monotonic() - start, 1),
        )
        if is_first_process():
            with new_folder(out, force=options.force) as folder:
                _save(folder, run, model)
                keep_logs(working, folder)
            _conclude(run)
    return run


def _save(folder: Path, run: ClassifierRun, model: Classifier) -> None:
    record = {
        "config": asdict(run.config),
        "preprocess": asdict(run.preprocess),
        "source": run.source,
        "validation": run.validation,
        "data": run.data,
        "figures": run.figures,
        "versions": run.versions,
        "seconds": run.seconds,
    }
    write_run(folder, KIND, record, model)


def is_classifier_run(path: Path) -> bool:
    """Tell whether a folder is a classifier's run."""
    try:
        return bool(json.loads((path / RECORD).read_text()).get("model") == KIND)
    except (OSError, ValueError):
        return False


def is_classifier_bundle(path: Path) -> bool:
    """Tell whether a folder is a classifier's bundle, without verifying it."""
    try:
        return bool(json.loads((path / MANIFEST).read_text())["model"]["kind"] == CLASSIFIER)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_classifier(path: Path) -> tuple[ClassifierRun, Classifier]:
    """Read a classifier's run back.

    Raises:
        ArtefactError: the folder is not a finished classifier run of this version, or it is damaged.
    """
    try:
        record = json.loads((path / RECORD).read_text())
        if record["schema"] != SCHEMA or record["model"] != KIND:
            raise ArtefactError(f"{path} is not a classifier's run.", "Make one with: edge-anomaly train classifier")
        config = ClassifierConfig(**{**record["config"], "classes": tuple(record["config"]["classes"])})
        kept = {name: record[name] for name in ("source", "validation", "data", "figures", "versions", "seconds")}
        # A run without it was made with the first version.
        first = {"height": config.image_size, "width": config.image_size, "roi": WHOLE_IMAGE, "version": 1}
        spec = preprocess_of(record.get("preprocess", first))
        run = ClassifierRun(path=path, config=config, preprocess=spec, **kept)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path / RECORD} is damaged: {error}.", "Train it again.") from error
    model = build(config, config.image_size, config.image_size)
    load_weights(path, model)
    return run, model.eval()


def _conclude(run: ClassifierRun) -> None:
    if run.figures is None:
        say(f"{run.path}: finished; the data has no test set")
    else:
        low, high = run.figures["accuracy_interval"]
        say(f"{run.path}: test accuracy {run.figures['accuracy']:.2%} (95 % {low:.2%} to {high:.2%})")
    say(f"Next: edge-anomaly evaluate {run.path} --report report/")
