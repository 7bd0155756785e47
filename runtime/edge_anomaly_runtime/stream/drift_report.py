"""Drift in recorded scores: the JSON lines of `stream` and `score`, compared with the calibration in a bundle."""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from edge_anomaly_runtime.bundle import CLASSIFIER, Bundle, Thresholds
from edge_anomaly_runtime.errors import ArtefactError, UsageError, did_you_mean
from edge_anomaly_runtime.session import ENGINES, PRECISIONS, SIDE_ENGINES, graph_key
from edge_anomaly_runtime.tensorrt_cache import EngineRecord, list_engines

from .drift import MIN_WINDOW, DriftMonitor, DriftReport, Figures, State, figures_of, reference_of
from .record import SCHEMA as STREAM_SCHEMA

SCHEMA = "edge-anomaly.drift/1"
SCORE_SCHEMA = "edge-anomaly.score/1"
# The camera of records that name none, those of `score`.
IMAGES = "images"
DEFAULT_WINDOW = 1000

# Why a record or line was left out; the words are for people.
_CUT, _NOT_JSON, _NOT_JUDGED = "cut off at the end of a file", "not JSON", "without a score"
_OTHER_MODEL, _OTHER_LIMITS, _OTHER_CAMERA = "of another model", "of another engine or precision", "of other cameras"

_FULL_FILE = re.compile(r"(.+)\.([0-9]{6,})")


@dataclass(frozen=True)
class Calibration:
    """The limits that scores were judged by, and the 'engine/precision' that they hold for."""

    key: str
    thresholds: Thresholds


@dataclass(frozen=True)
class Series:
    """The scores of one camera, in the order of the recording.

    times: in seconds since 1970, NaN where the record has none.
    """

    camera: str
    calibration: Calibration
    scores: array[float] = field(default_factory=lambda: array("d"))
    times: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class Recording:
    """What was read: a series per camera and calibration, and how many lines were left out, by reason."""

    series: tuple[Series, ...]
    left_out: dict[str, int]


@dataclass(frozen=True)
class DriftWindow:
    """One part of a series; `first` and `last` count its scores from 1 on, `start` and `end` are UTC.

    state: 'drifting' if an episode was on at any time in it.
    """

    first: int
    last: int
    start: str | None
    end: str | None
    figures: Figures
    state: State


@dataclass(frozen=True)
class CameraDrift:
    """The drift of one camera; `latest` is the state at the end of the recording.

    key: the 'engine/precision' that the scores are from. calibration_images: how many normal scores they were compared
    with. window: in scores.
    """

    camera: str
    key: str
    scores: int
    calibration_images: int
    window: int
    windows: tuple[DriftWindow, ...]
    latest: DriftReport

    @property
    def has_drifted(self) -> bool:
        return any(window.state == "drifting" for window in self.windows)


def recorded_drift(
    paths: Sequence[Path],
    bundle: Bundle,
    *,
    engine: str = "auto",
    precision: str = "auto",
    camera: str | None = None,
    window: int | None = None,
) -> tuple[tuple[CameraDrift, ...], dict[str, int]]:
    """Return the drift of every camera in recorded files, and how many lines were left out, by reason.

    Raises:
        UsageError, ArtefactError: as `calibrations`, `read_recording` and `watch`.
    """
    known = calibrations(bundle, engine=engine, precision=precision)
    recording = read_recording(paths, bundle, known, camera=camera)
    return tuple(watch(series, window=window) for series in recording.series), recording.left_out


def calibrations(bundle: Bundle, *, engine: str = "auto", precision: str = "auto") -> list[Calibration]:
    """Return what a recording may have been scored with.

    The limits of TensorRT engines that were built on this device come before those that the bundle has for TensorRT.

    Raises:
        UsageError: the bundle is a classifier's, or has nothing for this engine and precision.
    """
    manifest = bundle.manifest
    if manifest.model.kind == CLASSIFIER:
        raise UsageError(
            f"{bundle.path} is a classifier: it has no normal scores to compare with.", "Give a detector's bundle."
        )
    engines, precisions = ["auto", *ENGINES, *SIDE_ENGINES], ["auto", *PRECISIONS]
    if engine not in engines:
        raise did_you_mean("engine", engine, engines)
    if precision not in precisions:
        raise did_you_mean("precision", precision, precisions)
    wanted = [
        graph_key(one, other)
        for one in (ENGINES if engine == "auto" else [engine])
        for other in (PRECISIONS if precision == "auto" else [precision])
    ]
    found = []
    for key, limits in manifest.thresholds.items():
        if key in wanted:
            found += [*_built_here(bundle, key), Calibration(key, limits)]
    if not found:
        raise UsageError(
            f"Bundle {bundle.path} has no thresholds for --engine {engine} --precision {precision}; it has "
            f"{', '.join(manifest.thresholds)}.",
            "Give the engine and precision that the scores were made with, or leave both out.",
        )
    return found


def read_recording(
    paths: Sequence[Path], bundle: Bundle, known: Sequence[Calibration], *, camera: str | None = None
) -> Recording:
    """Read recorded scores that this bundle has made; files that a sink has rotated are read oldest first.

    A record belongs to the calibration whose limits it carries. Where all of `known` is for one engine and precision,
    the stream's records belong to that whatever their limits.

    Raises:
        UsageError: a file cannot be read or holds no JSON lines, no record can be compared, or there is no such camera.
        ArtefactError: a record has another schema.
    """
    found: dict[tuple[str, int], Series] = {}
    left_out: Counter[str] = Counter()
    cameras: set[str] = set()
    digest = hashlib.sha256(bundle.manifest_raw).hexdigest()
    for path in oldest_first(paths):
        for row in _rows(path, left_out):
            name = _camera_of(row)
            score = _number(row.get("score"))
            if not _is_of(row, bundle.manifest.name, digest):
                left_out[_OTHER_MODEL] += 1
                continue
            cameras.add(name)
            place = _calibration_of(row, known)
            if camera not in (None, name):
                left_out[_OTHER_CAMERA] += 1
            elif score is None:
                left_out[_NOT_JUDGED] += 1
            elif place is None:
                left_out[_OTHER_LIMITS] += 1
            else:
                series = found.setdefault((name, place), Series(name, known[place]))
                series.scores.append(score)
                series.times.append(_seconds(row.get("t_capture")))
    if camera is not None and cameras and camera not in cameras:
        raise did_you_mean("camera", camera, sorted(map(_shown, cameras)))
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there is none"
        raise UsageError(
            f"No record can be compared with {bundle.path}: {reasons}.",
            "Give a recording of `stream` or `score` that this very bundle has made.",
        )
    return Recording(tuple(found.values()), dict(left_out))


def watch(series: Series, *, window: int | None = None) -> CameraDrift:
    """Run a `DriftMonitor` over a series, as the stream would have done, and describe every window.

    window: by default 1000 scores, less for a short series, so that there are two windows at least.

    Raises:
        UsageError: the window is too short, or the bundle does not keep the distribution of its normal scores.
    """
    reference = reference_of(series.calibration.thresholds)
    total = len(series.scores)
    size = window if window is not None else min(DEFAULT_WINDOW, max(MIN_WINDOW, total // 2))
    monitor = DriftMonitor(reference, window=size)
    windows = tuple(_window(series, first, min(first + size, total), monitor) for first in range(0, total, size))
    return CameraDrift(
        series.camera, series.calibration.key, total, reference.n, size, windows, latest=monitor.report()
    )


def drift_json(bundle: Bundle, cameras: Sequence[CameraDrift], left_out: dict[str, int]) -> dict[str, Any]:
    """Return the report as JSON types."""
    rows = []
    for one in cameras:
        windows = [{**asdict(window), **asdict(window.figures)} for window in one.windows]
        for window in windows:
            del window["figures"]
        rows.append({**asdict(one), "has_drifted": one.has_drifted, "windows": windows})
    return {
        "schema": SCHEMA,
        "bundle": bundle.manifest.name,
        "ok": not any(one.has_drifted for one in cameras),
        "left_out": left_out,
        "cameras": rows,
    }


def drift_table(one: CameraDrift) -> str:
    """Return a table with one line per window, and the advice below it."""
    name = _shown(one.camera)
    lines = [
        f"{name}: {one.scores} scores, compared with {one.calibration_images} normal images of {one.key}",
        f"{'scores':>19}  {'from (UTC)':19}  {'to (UTC)':19}  {'shift':>6}  {'spread':>6}  {'ks':>5}  state",
    ]
    for window in one.windows:
        seen = window.figures
        lines.append(
            f"{f'{window.first}-{window.last}':>19}  {window.start or '-':19}  {window.end or '-':19}  "
            f"{seen.shift_sigma:+6.2f}  {seen.spread:6.2f}  {seen.ks:5.2f}  {window.state}"
        )
    if one.latest.state == "drifting":
        lines.append(f"{name}: drifting. {one.latest.advice}")
    elif one.has_drifted:
        lines.append(f"{name}: drifted for a time, ok at the end. Look at what was different then.")
    else:
        lines.append(f"{name}: {one.latest.state}. {one.latest.advice}".rstrip(" "))
    return "\n".join(lines)


def oldest_first(paths: Sequence[Path]) -> list[Path]:
    """Return the files as they were given, but full files of one recording in order and before the one in use.

    >>> [str(path) for path in oldest_first([Path("b.jsonl"), Path("a.jsonl"), Path("b.000010.jsonl")])]
    ['b.000010.jsonl', 'b.jsonl', 'a.jsonl']
    """
    recordings: dict[Path, int] = {}
    keys: dict[Path, tuple[int, float]] = {}
    for path in paths:
        full = _FULL_FILE.fullmatch(path.stem)
        base = path.with_name(full[1] + path.suffix) if full else path
        keys[path] = (recordings.setdefault(base, len(recordings)), int(full[2]) if full else math.inf)
    return sorted(keys, key=keys.__getitem__)


def _built_here(bundle: Bundle, key: str) -> Iterator[Calibration]:
    """Yield the limits of this device's own TensorRT engines, which are set when an engine is built."""
    engine, _, precision = key.partition("/")
    for _, record in list_engines() if engine == "tensorrt" else ():
        if isinstance(record, EngineRecord) and record.thresholds is not None:
            graph = bundle.manifest.files.get(record.parts.graph)
            if record.parts.precision == precision and graph and graph.sha256 == record.parts.graph_sha256:
                yield Calibration(key, record.thresholds)


def _rows(path: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; count lines that are not JSON, as a crash leaves them."""
    parsed = unread = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    left_out[_NOT_JSON if line.endswith(b"\n") else _CUT] += 1
                    unread += 1
                    continue
                parsed += 1
                yield _checked(row, path, number)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.", "Give files of JSON lines.") from None
    if unread and not parsed:
        raise UsageError(f"{path} holds no JSON lines.", "Give a recording of `stream` or `score`.")


def _checked(row: object, path: Path, number: int) -> dict[str, Any]:
    schema = row.get("schema") if isinstance(row, dict) else None
    if not isinstance(row, dict) or schema not in (STREAM_SCHEMA, SCORE_SCHEMA):
        raise ArtefactError(
            f"{path}, line {number} has schema {schema!r}; drift reads {STREAM_SCHEMA!r} and {SCORE_SCHEMA!r}.",
            "Give a recording of `stream` or `score`, made by this version of edge-anomaly.",
        )
    return row


def _is_of(row: dict[str, Any], name: str, digest: str) -> bool:
    """Tell whether a record's model, 'name@sha256:digits', is the one with this name and manifest digest.

    Records of `score` name no model; their limits have to tell.
    """
    if row["schema"] == SCORE_SCHEMA:
        return True
    model = row.get("model")
    made_by, _, digits = model.rpartition("@sha256:") if isinstance(model, str) else ("", "", "")
    return made_by == name and bool(digits) and digest.startswith(digits)


def _calibration_of(row: dict[str, Any], known: Sequence[Calibration]) -> int | None:
    """Return the place in `known` of what a record was scored with, None if it is not among them."""
    carried = (row.get("threshold"), row.get("warn"))
    for place, one in enumerate(known):
        if carried == (one.thresholds.fail.value, one.thresholds.warn.value):
            return place
    is_clear = row["schema"] == STREAM_SCHEMA and len({one.key for one in known}) == 1
    return 0 if is_clear else None


def _camera_of(row: dict[str, Any]) -> str:
    camera = row.get("camera")
    return camera if isinstance(camera, str) else IMAGES


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of 400 digits
        return None
    return number if math.isfinite(number) else None


def _seconds(text: object) -> float:
    """Return the seconds since 1970 of the record's UTC time, NaN if it has none."""
    try:
        return datetime.fromisoformat(str(text).removesuffix("Z")).replace(tzinfo=timezone.utc).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def _window(series: Series, first: int, end: int, monitor: DriftMonitor) -> DriftWindow:
    was_drifting = False
    for score in series.scores[first:end]:
        monitor.update(score)
        was_drifting = was_drifting or monitor.is_drifting
    reference = reference_of(series.calibration.thresholds)
    return DriftWindow(
        first=first + 1,
        last=end,
        start=_utc(series.times[first]),
        end=_utc(series.times[end - 1]),
        figures=figures_of(np.array(series.scores[first:end]), reference),
        state="drifting" if was_drifting else monitor.report().state,
    )


def _utc(seconds: float) -> str | None:
    if math.isnan(seconds):
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _shown(name: str) -> str:
    """Return a name without characters that a terminal would obey; a file may hold any."""
    return json.dumps(name)[1:-1]
