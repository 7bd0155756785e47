"""The six detectors by name: where to find what a run, an export or a command needs of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from edge_anomaly_runtime.errors import ArtefactError

from . import autoencoder, fastflow, padim, patchcore, stpm, vit_knn


@dataclass(frozen=True)
class Detector:
    """One kind of detector; every function is the one of that name in the detector's file.

    refit: fits the head on embeddings, None where the head has nothing to fit.
    by_epochs: trained by gradient, hence resumable.
    keeps: attributes of the head that `refit` gets by name, so that it fits the same thing on other features.
    best: the metric that chooses the epoch to keep; None keeps the last, or there are no epochs.
    """

    config: type[Any]
    build: Callable[..., nn.Module]
    announce: Callable[..., list[str]]
    fit: Callable[..., None]
    refit: Callable[..., dict[str, Any]] | None
    by_epochs: bool
    best: str | None = None
    keeps: tuple[str, ...] = ()


DETECTORS: dict[str, Detector] = {
    "padim": Detector(padim.PadimConfig, padim.build, padim.announce, padim.fit, padim.refit, False),
    "patchcore": Detector(
        patchcore.PatchcoreConfig,
        patchcore.build,
        patchcore.announce,
        patchcore.fit,
        patchcore.refit,
        False,
        keeps=("chosen",),
    ),
    "vit-knn": Detector(
        vit_knn.VitKnnConfig,
        vit_knn.build,
        vit_knn.announce,
        vit_knn.fit,
        vit_knn.refit,
        False,
        keeps=("chosen",),
    ),
    "fastflow": Detector(
        fastflow.FastflowConfig,
        fastflow.build,
        fastflow.announce,
        fastflow.fit,
        fastflow.refit,
        True,
        fastflow.BEST,
        keeps=("flows", "grid"),
    ),
    "stpm": Detector(stpm.StpmConfig, stpm.build, stpm.announce, stpm.fit, None, True),
    "autoencoder": Detector(
        autoencoder.AutoencoderConfig,
        autoencoder.build,
        autoencoder.announce,
        autoencoder.fit,
        autoencoder.refit,
        True,
    ),
}


# What a run was trained with that is older than a setting, where the setting's default is another by now.
_BEFORE: dict[str, dict[str, Any]] = {"stpm": {"shared_layer": None, "student_blocks": None}}


def kind_of(config: Any) -> str:
    """Return the name of the detector that a config belongs to."""
    return next(kind for kind, detector in DETECTORS.items() if isinstance(config, detector.config))


def config_from_record(kind: str, record: dict[str, Any]) -> Any:
    """Return the config that `dataclasses.asdict` and JSON made into `record`.

    Raises:
        ArtefactError: this version has no such detector.
        TypeError, UsageError: the record does not fit the config.
    """
    if kind not in DETECTORS:
        raise ArtefactError(f"There is no detector {kind!r} in this version.", "Use the version that trained it.")
    settings = {**_BEFORE.get(kind, {}), **record}
    return DETECTORS[kind].config(**{name: _tuples(value) for name, value in settings.items()})


def _tuples(value: Any) -> Any:
    """JSON knows no tuples: lists in a config were tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
