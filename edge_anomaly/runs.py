"""A run folder: what was trained, on which images, with which settings; written whole or not at all."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from edge_anomaly_runtime.bundle import Thresholds
from edge_anomaly_runtime.errors import ArtefactError, UsageError
from edge_anomaly_runtime.preprocess import Preprocess

from .backbones import RANDOM_WEIGHTS
from .data import Item
from .detectors import DETECTORS, config_from_record, kind_of

SCHEMA = "edge-anomaly.run/1"
RECORD = "run.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Run:
    """A finished training run of a detector; `config` is its detector's.

    `fit` are the images that the model was fitted on, `holdout` the normal ones that set the thresholds, `test` the
    labelled ones. `thresholds` hold for the torch model only.
    """

    path: Path
    config: Any
    preprocess: Preprocess
    fit: tuple[Path, ...]
    holdout: tuple[Path, ...]
    test: tuple[Item, ...]
    thresholds: Thresholds
    brightness: tuple[float, float]
    data: dict[str, Any]
    weights: str
    seed: int
    versions: dict[str, str]
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """Name of the detector."""
        return kind_of(self.config)


def save_run(folder: Path, run: Run, model: nn.Module) -> None:
    """Write the record and the weights of a run into an empty folder."""
    record = {
        "config": asdict(run.config),
        "preprocess": asdict(run.preprocess),
        "fit": [str(path) for path in run.fit],
        "holdout": [str(path) for path in run.holdout],
        "test": [{"path": _text(item.path), "label": item.label, "mask": _text(item.mask)} for item in run.test],
        "thresholds": run.thresholds.model_dump(),
        "brightness": run.brightness,
        "data": run.data,
        "weights": run.weights,
        "seed": run.seed,
        "versions": run.versions,
        "seconds": run.seconds,
    }
    write_run(folder, run.kind, record, model)


def write_run(folder: Path, kind: str, record: Mapping[str, Any], model: nn.Module) -> None:
    """Write a record, which gets schema, model and time, and the weights of `model` into an empty folder."""
    record = {"schema": SCHEMA, "model": kind, "created_utc": now_utc(), **record}
    # Through Python's own write, so that a full disk is an OSError like any other.
    (folder / WEIGHTS).write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def load_run(path: Path) -> Run:
    """Read the record of a run.

    Raises:
        UsageError: there is no such folder.
        ArtefactError: the folder is not a finished run of this version.
    """
    if not path.is_dir():
        raise UsageError(f"There is no run {path}.", "Make one with: edge-anomaly train padim --data DIR --out RUN")
    try:
        record = json.loads((path / RECORD).read_text())
        if record.get("schema") != SCHEMA:
            raise ArtefactError(f"{path} has schema {record.get('schema')!r}, not {SCHEMA!r}.", "Train it again.")
        return Run(
            path=path,
            config=config_from_record(record["model"], record["config"]),
            preprocess=preprocess_of(record["preprocess"]),
            fit=tuple(map(Path, record["fit"])),
            holdout=tuple(map(Path, record["holdout"])),
            test=tuple(Item(Path(row["path"]), row["label"], _path(row["mask"])) for row in record["test"]),
            thresholds=Thresholds.model_validate(record["thresholds"]),
            brightness=tuple(record["brightness"]),
            data=record["data"],
            weights=record["weights"],
            seed=record["seed"],
            versions=record["versions"],
            seconds=record["seconds"],
        )
    except FileNotFoundError:
        raise ArtefactError(f"{path} is not a finished run: it has no {RECORD}.", "Train it again.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path / RECORD} is damaged: {error}.", "Train it again.") from error


def preprocess_of(record: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing that a run's JSON holds.

    Raises:
        KeyError, TypeError, UsageError: the record is damaged, or of a later version.
    """
    return Preprocess(**{**record, "roi": tuple(record["roi"])})


def load_model(run: Run) -> nn.Module:
    """Build the run's model with its stored weights; nothing is downloaded.

    Raises:
        ArtefactError: the weights are missing, damaged or of another architecture.
    """
    build = DETECTORS[run.kind].build
    model = build(run.config, run.preprocess.height, run.preprocess.width, weights=RANDOM_WEIGHTS)
    load_weights(run.path, model)
    return model.eval()


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the weights of a run into its model.

    Raises:
        ArtefactError: they are missing, damaged or of another architecture.
    """
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:  # safetensors, OS and shape errors share no base
        raise ArtefactError(f"{folder / WEIGHTS} does not fit the run: {error}", "Train it again.") from error


def newest_run(folder: Path = Path("runs")) -> Path:
    """Return the finished run that was written last below `folder`."""
    records = sorted(folder.glob(f"*/{RECORD}"), key=lambda record: record.stat().st_mtime)
    if not records:
        raise UsageError(f"There is no finished run in {folder}.", "Name a run, or train one: edge-anomaly train padim")
    return records[-1].parent


def package_versions() -> dict[str, str]:
    """Return the versions that results may depend on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for name in (
        "edge-anomaly",
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "numpy",
        "pillow",
        "onnx",
        "onnxruntime",
        "openvino",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now_utc() -> str:
    """Return the wall-clock time as ISO 8601, whole seconds."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(path: Path | None) -> str | None:
    """Return a path that holds from any working folder."""
    return None if path is None else str(path.resolve())


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
