"""What a stream is told to do: flags, and a TOML file whose mistakes are named with their line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.preprocess import WHOLE_IMAGE, Roi

from .policy import parse_confirm, parse_policy
from .sources import Decoder
from .uri import redact

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Names of the lists of tables in the file, and the fields that they fill.
_TABLES = {"camera": "cameras", "sink": "sinks"}
_RELATIVE = ("bundle", "store")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CameraSettings(_Settings):
    """One camera. What is None is the stream's own.

    source: a URI as in `parse_source`. roi: (left, top, right, bottom) as shares of the picture; only that part is
    scored and shown. bundle: a model of its own.
    """

    source: str = Field(min_length=1)
    name: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    bundle: Path | None = None
    roi: Roi = WHOLE_IMAGE
    frames: str | None = None
    confirm: str | None = None
    hysteresis: float | None = Field(None, ge=0, le=1)
    decoder: Decoder | None = None


class SinkSettings(_Settings):
    """One sink, `to` as in `sink_from_spec`; a required one makes scoring wait for it instead of losing records."""

    to: str = Field(min_length=1)
    required: bool = False


class StreamSettings(_Settings):
    """All of a stream.

    bundle or store: the model. frames, confirm, hysteresis: see `policy`. max_age: seconds after which a camera's frame
    is too old to be scored; max_lag: the same when every frame is to be scored. timeout: seconds for a camera to
    answer. hang: seconds without progress of the scoring loop after which the process ends with code 70. probation:
    frames that a new version of a store has to score. selftest_hours: how often the golden images are scored again.
    metrics, page: addresses. stop_after: end after so many scored frames (0: never).
    """

    bundle: Path | None = None
    store: Path | None = None
    cameras: tuple[CameraSettings, ...] = ()
    sinks: tuple[SinkSettings, ...] = ()
    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = Field(None, ge=1)
    frames: str | None = None
    confirm: str = "1/1"
    hysteresis: float = Field(0.0, ge=0, le=1)
    decoder: Decoder = "cpu"
    max_age: float = Field(0.5, gt=0, le=3600)
    max_lag: float | None = Field(None, gt=0, le=3600)
    timeout: float = Field(5.0, ge=0.5, le=120)
    hang: float = Field(10.0, ge=1, le=3600)
    probation: int = Field(100, ge=1)
    selftest_hours: float = Field(24.0, gt=0)
    metrics: str | None = None
    page: str | None = None
    fail_fast: bool = False
    stop_after: int = Field(0, ge=0)


def settings_from(file: Path | None, flags: Mapping[str, Any]) -> StreamSettings:
    """Merge a TOML file with flags; a flag that is not None wins, cameras or sinks given as flags replace the file's.

    Paths in the file are relative to it.

    Raises:
        UsageError: the file cannot be read, a value is not possible (with its line), or model or cameras are missing.
    """
    text = "" if file is None else _read(file)
    values = {} if file is None else _parsed(file, text)
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        settings = StreamSettings.model_validate(values)
    except ValidationError as error:
        raise _refused(file, text, error) from None
    _check(settings, file, text)
    return settings


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not a UTF-8 text file.", "Give a TOML file, or flags.") from None
    except OSError as error:
        raise UsageError(f"Cannot read {file}: {error.strerror}.", "Give a TOML file, or flags.") from None


def _parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # Its text repeats nothing of the file, which may hold secrets, but the place.
        raise UsageError(f"{file} is not TOML: {error}.", "Mend it there.") from None
    for table, field in _TABLES.items():
        if field in values:
            line = _line(text, (field,))
            raise UsageError(f"{file}:{line}: unknown key {field}.", f"Write [[{table}]] once for each.")
        if table in values:
            values[field] = values.pop(table)
    cameras = values.get("cameras")
    for holder in (values, *(cameras if isinstance(cameras, list) else ())):
        for name in _RELATIVE:
            if isinstance(holder, dict) and isinstance(holder.get(name), str):
                holder[name] = file.parent / holder[name]
    return values


def _refused(file: Path | None, text: str, error: ValidationError) -> UsageError:
    """Return the first mistake in the user's words; values that may be a secret are redacted."""
    first = error.errors(include_url=False)[0]
    place: tuple[int | str, ...] = first["loc"]
    name = ".".join(str(part) for part in place)
    value = first["input"]
    shown = redact(repr(value)) if isinstance(value, (str, int, float, bool)) else type(value).__name__
    where = f"{file}:{_line(text, place)}: " if file is not None else ""
    if first["type"] == "extra_forbidden":
        known = _known(place)
        return UsageError(f"{where}unknown key {place[-1]}.", f"Known here: {', '.join(known)}.")
    return UsageError(f"{where}{name} = {shown}: {first['msg'].lower()}.", "Correct the value.")


def _known(place: Sequence[int | str]) -> list[str]:
    inner: dict[str, type[_Settings]] = {"cameras": CameraSettings, "sinks": SinkSettings}
    model = StreamSettings if len(place) == 1 else inner[str(place[0])]
    names = {field: table for table, field in _TABLES.items()}
    return sorted(names.get(name, name) for name in model.model_fields)


def _check(settings: StreamSettings, file: Path | None, text: str) -> None:
    if (settings.bundle is None) == (settings.store is None):
        raise UsageError(
            "The stream needs a model: a bundle or a store, one of the two.",
            "Give a BUNDLE, or --store DIR with an active one.",
        )
    if not settings.cameras:
        raise UsageError("The stream has no camera.", "Give --source URI, or [[camera]] in the configuration.")
    for value, parse, place in _texts(settings):
        try:
            parse(value)
        except UsageError as error:
            where = f"{file}:{_line(text, place)}: " if file is not None and _has(text, place) else ""
            raise UsageError(where + error.what, error.hint) from None
    for index, camera in enumerate(settings.cameras):
        left, top, right, bottom = camera.roi
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            line = _line(text, ("cameras", index, "roi"))
            where = f"{file}:{line}: " if file is not None else ""
            raise UsageError(
                f"{where}the region {camera.roi} is not inside the picture.",
                "Give left, top, right, bottom as shares from 0 to 1, such as [0.1, 0.1, 0.9, 0.9].",
            )


def _texts(settings: StreamSettings) -> list[tuple[str, Any, tuple[int | str, ...]]]:
    found: list[tuple[str | None, Any, tuple[int | str, ...]]] = [
        (settings.frames, parse_policy, ("frames",)),
        (settings.confirm, parse_confirm, ("confirm",)),
    ]
    for index, camera in enumerate(settings.cameras):
        found.append((camera.frames, parse_policy, ("cameras", index, "frames")))
        found.append((camera.confirm, parse_confirm, ("cameras", index, "confirm")))
    return [(value, parse, place) for value, parse, place in found if value is not None]


def _has(text: str, place: Sequence[int | str]) -> bool:
    return re.search(rf"^\s*{re.escape(str(place[-1]))}\s*=", text, re.MULTILINE) is not None


def _line(text: str, place: Sequence[int | str]) -> int:
    """Return the line of a key in the file, 1 for the first: the parser keeps no positions.

    Of [[camera]] number i, the key is looked for between its header and the next one.
    """
    tables = {field: table for table, field in _TABLES.items()}
    lines = text.splitlines()
    start, end = 0, len(lines)
    if len(place) >= 2 and isinstance(place[1], int):
        header = re.compile(rf"^\s*\[\[\s*{tables.get(str(place[0]), place[0])}\s*\]\]")
        heads = [number for number, line in enumerate(lines) if header.match(line)]
        if place[1] < len(heads):
            start = heads[place[1]]
            later = (n for n in range(start + 1, len(lines)) if re.match(r"^\s*\[", lines[n]))
            end = next(later, len(lines))
    names = [str(part) for part in place if not isinstance(part, int)]
    for name in reversed([tables.get(part, part) for part in names]):
        for number in range(start, end):
            if re.match(rf"^\s*(\[\[?\s*)?[\"']?{re.escape(name)}[\"']?\s*(=|\]|\.)", lines[number]):
                return number + 1
    return start + 1
