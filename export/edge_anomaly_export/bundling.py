"""What detectors and classifiers share once their graphs are made: the gate, the manifest, and the bundle's files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_anomaly.report import bundle_report
from edge_anomaly.runs import now_utc, package_versions
from edge_anomaly_runtime.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    SCHEMA,
    Calibration,
    GoldenImage,
    InputContract,
    Manifest,
    ModelInfo,
    OutputInfo,
    ParityRow,
    Thresholds,
    digest_line,
    file_entry,
    manifest_bytes,
)
from edge_anomaly_runtime.errors import GateError
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.progress import say

from .assembling import Assembly
from .options import ExportOptions

# Largest relative difference of a score in the self-test, on the engine that made the expected values.
GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-3, "int8": 5e-2}


def gate(failures: Sequence[str], options: ExportOptions) -> None:
    """Refuse, or with `allow_drop` accept and say so, what differs too much from the trained model."""
    if not failures:
        return
    if not options.allow_drop:
        raise GateError(
            f"The exported graph does not score like the trained model. {'; '.join(failures)}.",
            "Calibrate on more images (--calibration-images, --calibration), export with --precision fp32, or accept "
            "it with --allow-drop, which the manifest records.",
        )
    say(f"Accepted with --allow-drop: {'; '.join(failures)}")


def model_info(kind: str, parameters: Mapping[str, Any], options: ExportOptions, *, images: int) -> ModelInfo:
    """Return the manifest's entry for a model that was fitted on so many images."""
    known = {**parameters, "opset": options.used_opset, "images": images}
    return ModelInfo(kind=kind, parameters={**known, "allow_drop": True} if options.allow_drop else known)


def finish_bundle(
    folder: Path,
    name: str,
    graphs: Assembly,
    *,
    model: ModelInfo,
    preprocess: Preprocess,
    brightness: tuple[float, float],
    outputs: Sequence[OutputInfo],
    thresholds: Mapping[str, Thresholds],
    parity: Sequence[ParityRow],
    calibration: Calibration | None,
    golden: Sequence[GoldenImage],
    training: Mapping[str, Any],
    seed: int,
    normal_scores: Mapping[str, npt.NDArray[np.float64]],
) -> Manifest:
    """Add the report to the files of `graphs`, write them and the manifest into `folder`, and return the manifest.

    `normal_scores`: by 'engine/precision', what has set the thresholds; the other fields are the manifest's own.
    """
    manifest = Manifest(
        schema=SCHEMA,
        name=name.removesuffix(".eab"),
        seq=int(time.time()),
        created_utc=now_utc(),
        precision=graphs.options.precision,
        model=model,
        input=InputContract(
            shape=(1, preprocess.height, preprocess.width, 3), preprocess=preprocess, brightness=brightness
        ),
        outputs=tuple(outputs),
        graphs=graphs.keys,
        thresholds=dict(thresholds),
        parity=tuple(parity),
        calibration=calibration,
        golden=tuple(golden),
        golden_tolerance=GOLDEN_TOLERANCE,
        training=dict(training),
        versions=package_versions(),
        seed=seed,
        files={},
    )
    graphs.files["report/index.html"] = bundle_report(manifest, normal_scores).encode()
    entries = {file: file_entry(data) for file, data in sorted(graphs.files.items())}
    manifest = manifest.model_copy(update={"files": entries})
    write_bundle(folder, manifest, graphs.files)
    return manifest


def write_bundle(folder: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    """Write all files, the manifest last."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    data = manifest_bytes(manifest)
    (folder / MANIFEST_DIGEST).write_bytes(digest_line(data))
    (folder / MANIFEST).write_bytes(data)


def say_written(out: Path, manifest: Manifest, options: ExportOptions) -> None:
    """Say what there is now and what to type next."""
    size = sum(entry.size for entry in manifest.files.values())
    say(f"{out}: {len(manifest.files)} files, {size / 1e6:.1f} MB")
    if options.targets == ("tensorrt",):
        say(f"Next, on the device: edge-anomaly engine build {out}; edge-anomaly score {out} IMAGES")
    else:
        say(f"Next: edge-anomaly selftest {out}; edge-anomaly score {out} IMAGES")
