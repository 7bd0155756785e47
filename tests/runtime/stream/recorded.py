"""Recordings for the tests of drift: a bundle that keeps its normal scores, and lines as `stream` and `score` write."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from edge_anomaly_runtime.bundle import MANIFEST, MANIFEST_DIGEST, digest_line
from edge_anomaly_runtime.thresholds import fit_thresholds

from .scored_items import UTC

# The normal scores of openvino/int8 and onnxruntime/fp32; the other engines' are ten times as high.
MEDIAN, SIGMA = 10.0, 2.0
NORMAL_IMAGES = 100
KEY = "openvino/int8"


def bundle_with_scores(source: Path, folder: Path) -> Path:
    """Copy a bundle; every engine and precision gets limits of its own from 100 normal scores."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    scores = MEDIAN + SIGMA * np.random.default_rng(0).standard_normal(NORMAL_IMAGES)
    for number, key in enumerate(manifest["thresholds"]):
        own = scores * (1 if key == KEY else 10 + number)
        limits = fit_thresholds(own, own, alpha_warn=0.05, alpha_fail=0.01)
        manifest["thresholds"][key] = limits.model_dump(mode="json")
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    data = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_DIGEST).write_bytes(digest_line(data))


def stream_records(
    bundle: Path, scores: Iterable[float | None], *, camera: str = "c0", key: str = KEY, start: int = 0
) -> list[dict[str, Any]]:
    """Return a record per score, 25 a second; None for a frame that was not judged."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    limits = manifest["thresholds"][key]
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:16]
    return [
        {
            "schema": "edge-anomaly.stream/1",
            "camera": camera,
            "seq": seq,
            "t_capture": _time(seq),
            "score": score,
            "threshold": limits["fail"]["value"],
            "warn": limits["warn"]["value"],
            "verdict": "INVALID" if score is None else "OK",
            "model": f"{manifest['name']}@sha256:{digest}",
        }
        for seq, score in enumerate(scores, start)
    ]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def normal_scores(n: int, *, shift: float = 0.0, seed: int = 1) -> list[float]:
    """Return independent scores like the calibration's, `shift` sigma higher."""
    rng = np.random.default_rng(seed)
    return [float(score) for score in MEDIAN + SIGMA * (rng.standard_normal(n) + shift)]


def _time(seq: int) -> str:
    at: datetime = UTC.replace(tzinfo=None, microsecond=0) + timedelta(seconds=seq / 25)
    return at.isoformat(timespec="milliseconds") + "Z"
