"""The bundle: a folder with one manifest that names every file by size and SHA-256.

Nothing in a bundle is executed or unpickled. `read_bundle` refuses the whole bundle when one byte of one file differs,
because engines load damaged weights without an error and give wrong numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ArtefactError, UsageError
from .images import file_sha256
from .preprocess import Preprocess

SCHEMA = "edge-anomaly.bundle/1"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
# Optional; made after the export, so the manifest does not name it. See signing.py.
MANIFEST_SIGNATURE = "manifest.sig"
GOLDEN_MAPS = "golden/maps.npz"

# The one kind of model without thresholds.
CLASSIFIER = "classifier"

Precision = Literal["fp32", "fp16", "int8"]

_MAX_MANIFEST_BYTES = 256 * 1024
_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Model(BaseModel):
    """Unknown fields are kept, so that an old runtime can read and copy a newer minor version's manifest."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class FileEntry(_Model):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class ModelInfo(_Model):
    """What was trained: the detector's name and its parameters."""

    kind: str
    parameters: dict[str, Any]


class InputContract(_Model):
    """What the graph takes: uint8 RGB, NHWC, static shape, made by `preprocess`."""

    name: Literal["image"] = "image"
    dtype: Literal["uint8"] = "uint8"
    layout: Literal["NHWC"] = "NHWC"
    color: Literal["RGB"] = "RGB"
    shape: tuple[int, int, int, int]
    preprocess: Preprocess
    brightness: tuple[float, float] = Field(
        description="Lowest and highest mean grey level, 0 to 255, of the normal images; tells a black frame."
    )


class OutputInfo(_Model):
    """One output of the graph."""

    name: str
    role: Literal["score", "map", "logits", "features"]
    shape: tuple[int, ...]


class Threshold(_Model):
    """An alarm limit set from held-out normal images: alarm when the score is greater than `value`.

    `alpha` is the promised false-alarm rate, `upper95` its 95 % upper bound. `conformal`: `value` is the `order`-th
    smallest of `n` scores. `pareto`: alpha is below 1 / (n + 1), so `value` comes from a generalised Pareto tail and
    rests on that model; its bound is the one of the largest of the n scores.
    """

    value: float
    alpha: float
    method: Literal["conformal", "pareto", "maximum"]
    n: int
    order: int
    upper95: float


class Thresholds(_Model):
    """The limits of one graph at one precision on one engine; they hold for nothing else."""

    warn: Threshold
    fail: Threshold
    pixel: Threshold
    scores: dict[str, float] = Field(description="Quantiles, mean and standard deviation of the n normal scores.")


class ParityRow(_Model):
    """One line of the comparison with the trained model, on real images."""

    backend: str
    images: int
    score_difference: float = Field(
        description="Largest relative difference; a tenth of the NG limit is the least unit."
    )
    map_difference: float = Field(description="99th percentile of |map - reference| / largest reference value.")
    flips: int
    auroc: float | None
    accuracy: float | None = None
    distinct: float = Field(description="Share of distinct scores.")
    limit: str
    ok: bool


class Calibration(_Model):
    """How the INT8 ranges were measured; `float_tensors`: by file, what the guard has left float."""

    method: str
    images: int
    synthetic: int
    seed: int
    images_sha256: str
    float_model_sha256: str
    float_tensors: dict[str, tuple[str, ...]] = {}


class GoldenImage(_Model):
    """One stored image and what each graph said about it; maps are in golden/maps.npz under the same key.

    `preprocessed`: the file is the model's input already, cut and resized.
    """

    file: str
    preprocessed: bool
    scores: dict[str, float]
    verdicts: dict[str, str]


class Manifest(_Model):
    """Everything that training and device must agree on."""

    schema_: str = Field(alias="schema")
    name: str
    seq: int = Field(ge=0)
    created_utc: str
    precision: Precision
    model: ModelInfo
    input: InputContract
    outputs: tuple[OutputInfo, ...]
    graphs: dict[str, str] = Field(description="'engine/precision' to the file that the engine reads.")
    thresholds: dict[str, Thresholds]
    parity: tuple[ParityRow, ...]
    calibration: Calibration | None
    golden: tuple[GoldenImage, ...]
    golden_tolerance: dict[str, float]
    training: dict[str, Any]
    versions: dict[str, str]
    seed: int
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder; `manifest_raw` are the very bytes that `manifest` was read from."""

    path: Path
    manifest: Manifest
    manifest_raw: bytes = b""

    def read(self, name: str) -> bytes:
        """Return the content of one file, checked again on the very bytes that are returned."""
        data = _read_regular(self.path, name)
        _check(self.path / name, self.manifest.files[name], len(data), hashlib.sha256(data).hexdigest())
        return data

    def graph(self, engine: str, precision: str) -> str:
        """Return the file of the graph for an engine and a precision, or raise UsageError that says what there is."""
        key = f"{engine}/{precision}"
        limits = self.manifest.thresholds
        if key not in self.manifest.graphs or (key not in limits and self.manifest.model.kind != CLASSIFIER):
            raise UsageError(
                f"Bundle {self.path} has no graph and thresholds for {key}; it has {', '.join(self.manifest.graphs)}.",
                f"Export it again with --precision {precision}, with {engine} installed.",
            )
        return self.manifest.graphs[key]

    def golden_maps(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the expected maps, float32 [n, h, w], by 'engine/precision'."""
        import io

        with np.load(io.BytesIO(self.read(GOLDEN_MAPS)), allow_pickle=False) as arrays:
            return {name.replace("-", "/"): arrays[name] for name in arrays.files}


def read_bundle(path: Path | str) -> Bundle:
    """Read and verify a bundle: the manifest's digest, its schema, then size and SHA-256 of every file.

    Raises:
        UsageError: there is no folder at `path`.
        ArtefactError: a file is missing, extra, a link, or differs in one byte; the schema is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"There is no bundle {path}.", "Make one with: edge-anomaly export RUN --out NAME.eab")
    if not path.is_dir():
        raise ArtefactError(f"{path} is not a bundle folder.", "A bundle is a folder NAME.eab with a manifest.json.")
    raw = _read_manifest_bytes(path)
    manifest = _parse_manifest(path, raw)
    _check_names(path, manifest)
    for name, entry in manifest.files.items():
        file = _regular(path, name)
        size = file.stat().st_size
        _check(file, entry, size, file_sha256(file) if size == entry.size else "")
    return Bundle(path, manifest, raw)


def read_signature(path: Path) -> bytes | None:
    """Return the content of a bundle's manifest.sig, None where there is none.

    Raises:
        ArtefactError: it is a link, a special file, or unreadable.
    """
    return _read_regular(path, MANIFEST_SIGNATURE) if os.path.lexists(path / MANIFEST_SIGNATURE) else None


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the manifest as it is written to disk, UTF-8 JSON."""
    return manifest.model_dump_json(by_alias=True, indent=1).encode() + b"\n"


def digest_line(data: bytes, name: str = MANIFEST) -> bytes:
    """Return the content of a file's digest file (manifest.sha256), in the form that `sha256sum --check` reads."""
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def file_entry(data: bytes) -> FileEntry:
    """Return the manifest's entry for a file with this content."""
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def _read_manifest_bytes(path: Path) -> bytes:
    if not (path / MANIFEST).exists():
        raise ArtefactError(f"{path} has no {MANIFEST}: it is not a bundle, or not a complete one.", _REPLACE)
    data = _read_regular(path, MANIFEST)
    if len(data) > _MAX_MANIFEST_BYTES:
        raise ArtefactError(f"{path / MANIFEST} has {len(data)} bytes, more than {_MAX_MANIFEST_BYTES}.", _REPLACE)
    if _read_regular(path, MANIFEST_DIGEST) != digest_line(data):
        raise ArtefactError(f"{path / MANIFEST} does not match {MANIFEST_DIGEST}: one of them was changed.", _REPLACE)
    return data


def _parse_manifest(path: Path, data: bytes) -> Manifest:
    try:
        raw = json.loads(
            data,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_refuse_duplicates,
        )
        schema = raw.get("schema") if isinstance(raw, dict) else None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path / MANIFEST} is not valid JSON: {error}.", _REPLACE) from None
    if schema != SCHEMA:
        raise ArtefactError(
            f"{path} has schema {schema!r}; this version of edge-anomaly reads {SCHEMA!r}.",
            "Install the edge-anomaly version that wrote the bundle, or export it again.",
        )
    try:
        return Manifest.model_validate(raw)
    except (ValidationError, UsageError) as error:
        raise ArtefactError(f"{path / MANIFEST} is not a valid manifest: {error}", _REPLACE) from None


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _refuse_constant(value: str) -> float:
    raise ValueError(f"{value} is not a number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _check_names(path: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        parts = name.split("/")
        if len(parts) > 2 or not all(_COMPONENT.fullmatch(part) for part in parts):
            raise ArtefactError(f"{path / MANIFEST} names a file {name!r}, which is not allowed.", _REPLACE)
    known = set(manifest.files) | {MANIFEST, MANIFEST_DIGEST}
    there = {entry.relative_to(path).as_posix() for entry in path.rglob("*") if not _is_plain_folder(entry)}
    if extra := sorted(there - known - {MANIFEST_SIGNATURE}):
        raise ArtefactError(f"{path} holds {extra[0]!r}, which is not in its manifest.", _REPLACE)
    if absent := sorted(known - there):
        raise ArtefactError(f"{path / absent[0]} is missing.", _REPLACE)
    for use, name in _references(manifest):
        if name not in manifest.files:
            raise ArtefactError(f"{path / MANIFEST}: {use} needs {name!r}, which is not in the bundle.", _REPLACE)


def _references(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for key, name in manifest.graphs.items():
        yield f"graph {key}", name
        if name.endswith(".xml"):
            yield f"graph {key}", name.removesuffix(".xml") + ".bin"
    for golden in manifest.golden:
        yield "the self-test", golden.file
    if manifest.golden:
        yield "the self-test", GOLDEN_MAPS


def _is_plain_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink()


def _regular(path: Path, name: str) -> Path:
    file = path / name
    try:
        mode = file.lstat().st_mode
    except OSError as error:
        raise ArtefactError(f"Cannot read {file}: {error.strerror}.", _REPLACE) from None
    if not stat.S_ISREG(mode) or (file.parent != path and file.parent.is_symlink()):
        raise ArtefactError(f"{file} is a link or a special file; bundles hold plain files only.", _REPLACE)
    return file


def _read_regular(path: Path, name: str) -> bytes:
    try:
        handle = os.open(_regular(path, name), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(handle, "rb") as file:
            return file.read()
    except OSError as error:
        raise ArtefactError(f"Cannot read {path / name}: {error.strerror}.", _REPLACE) from None


def _check(file: Path, entry: FileEntry, size: int, sha256: str) -> None:
    if size != entry.size:
        raise ArtefactError(f"{file} is damaged: it has {size} bytes, the manifest says {entry.size}.", _REPLACE)
    if sha256 != entry.sha256:
        raise ArtefactError(f"{file} is damaged: its SHA-256 is not the one in the manifest.", _REPLACE)


_REPLACE = "Copy the bundle again from where it was made, or export it again."
