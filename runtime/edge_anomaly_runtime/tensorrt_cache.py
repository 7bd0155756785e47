"""Where built engines lie, what each was built from and for, and whether it may be used here.

An engine runs on the very TensorRT version and GPU model that it was built with. Each lies in a folder of its own,
named by a hash over all that. Before TensorRT sees an engine, its record is read and its bytes are hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .atomic import is_free, leftover_name
from .bundle import Bundle, Thresholds, digest_line
from .cuda import Cuda
from .errors import ArtefactError, MissingRequirementError
from .tensorrt_library import STRONG_FROM, version_of
from .tensorrt_recipe import RECIPE, TensorrtRecipe, build_files

RECORD_SCHEMA = "edge-anomaly.engine/1"
RECORD, RECORD_DIGEST, PLAN = "engine.json", "engine.sha256", "engine.plan"

# Grows whenever this package would build another engine from the same files.
BUILD_REVISION = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Machine:
    """What an engine is tied to besides its graph. `strong`: this TensorRT takes every type from the graph."""

    tensorrt: str
    device: str
    sm: str
    cuda_runtime: str
    arch: str
    strong: bool


class EngineParts(_Model):
    """All that an engine depends on; one differing part makes another engine.

    `images_sha256` covers the golden and the packed normal images, on which parity and thresholds rest.
    """

    precision: str
    graph: str
    graph_sha256: str
    recipe_sha256: str
    images_sha256: str
    build_revision: int
    tensorrt: str
    device: str
    sm: str
    cuda_runtime: str
    arch: str
    dla: bool = False


class EngineParity(_Model):
    """The golden images on the engine: largest relative differences from what was stored."""

    images: int
    score_difference: float
    map_difference: float
    tolerance: float


class EngineRecord(_Model):
    """The engine's sidecar.

    `layers` counts the engine's layers by the type they read: Int8, Half, Float. `tensors` are its inputs and outputs.
    `thresholds` (None for a classifier) hold for this engine only; `threshold_images` says whose scores they rest on.
    `workspace_mib` and `optimization_level` (None where TensorRT has none) are those of the attempt that succeeded.
    """

    schema_: Literal["edge-anomaly.engine/1"] = Field(alias="schema", default="edge-anomaly.engine/1")
    key: str
    parts: EngineParts
    bundle: str
    engine_sha256: str
    engine_bytes: int
    created_utc: str
    build_seconds: float
    workspace_mib: int
    optimization_level: int | None
    l4t: str | None
    power_mode: str | None
    layers: dict[str, int]
    tensors: tuple[str, ...]
    parity: EngineParity
    thresholds: Thresholds | None
    threshold_images: str


def cache_folder() -> Path:
    """Return the folder of engines and timing caches: EDGE_ANOMALY_CACHE, or edge-anomaly in the user's cache."""
    if own := os.environ.get("EDGE_ANOMALY_CACHE"):
        return Path(own) / "engines"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "edge-anomaly" / "engines"
    except RuntimeError:  # a service without a home
        raise MissingRequirementError(
            "There is no folder for engines: the process has no home folder.", "Set EDGE_ANOMALY_CACHE to a folder."
        ) from None


def onnxruntime_folder() -> Path:
    """Return the folder of the engines that ONNX Runtime's provider builds; this package does not read them."""
    return cache_folder().parent / "onnxruntime"


def lock_path(folder: Path) -> Path:
    """Return the file that is locked while an engine's folder is written."""
    return folder.with_name(f"{folder.name}.lock")


def this_machine(trt: Any, cuda: Cuda) -> Machine:
    """Describe TensorRT and the GPU here."""
    device = cuda.device()
    strong = version_of(trt)[0] >= STRONG_FROM
    return Machine(str(trt.__version__), device.name, device.sm, cuda.runtime_version(), platform.machine(), strong)


def parts_of(bundle: Bundle, recipe: TensorrtRecipe, precision: str, machine: Machine) -> EngineParts:
    """Return what the engine of this bundle and precision depends on, on this machine.

    Raises:
        UsageError: the bundle has no TensorRT graph of this precision.
    """
    files = build_files(recipe, precision)
    graph = files.strong if machine.strong else files.weak
    entries = bundle.manifest.files
    images = [*recipe.normal_images, *(golden.file for golden in bundle.manifest.golden)]
    return EngineParts(
        precision=precision,
        graph=graph,
        graph_sha256=entries[graph].sha256,
        recipe_sha256=entries[RECIPE].sha256,
        images_sha256=hashlib.sha256("".join(entries[name].sha256 for name in images).encode()).hexdigest(),
        build_revision=BUILD_REVISION,
        tensorrt=machine.tensorrt,
        device=machine.device,
        sm=machine.sm,
        cuda_runtime=machine.cuda_runtime,
        arch=machine.arch,
    )


def engine_key(parts: EngineParts) -> str:
    """Return the name of the engine's folder: a SHA-256 over its parts."""
    text = json.dumps(parts.model_dump(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def find_engine(bundle: Bundle, parts: EngineParts) -> tuple[EngineRecord, Path] | None:
    """Return the record and folder of the engine with exactly these parts; None where none was ever built.

    Engines of an earlier export of the same model are passed over.

    Raises:
        ArtefactError: its record cannot be read, or contradicts its place; or there is one of the same bundle and
            precision, built for another TensorRT or device: both sides are named.
    """
    folder = cache_folder() / engine_key(parts)
    if folder.is_dir():
        record = read_record(folder)
        _check_parts(bundle, record, parts)
        return record, folder
    for _, other in list_engines():
        if isinstance(other, EngineRecord) and _is_same_export(bundle, other.parts, parts):
            _check_parts(bundle, other, parts)
    return None


def read_plan(bundle: Bundle, record: EngineRecord, folder: Path) -> bytes:
    """Return the engine's bytes, compared with the record.

    Raises:
        ArtefactError: they are missing, cut or changed.
    """
    try:
        data = (folder / PLAN).read_bytes()
    except OSError as error:
        raise ArtefactError(f"Cannot read {folder / PLAN}: {error.strerror}.", rebuild(bundle, record)) from None
    if len(data) != record.engine_bytes:
        raise ArtefactError(
            f"{folder / PLAN} is damaged: it has {len(data)} bytes, its record says {record.engine_bytes}.",
            rebuild(bundle, record),
        )
    if hashlib.sha256(data).hexdigest() != record.engine_sha256:
        raise ArtefactError(
            f"{folder / PLAN} is damaged: its SHA-256 is not the one in its record.", rebuild(bundle, record)
        )
    return data


def read_record(folder: Path) -> EngineRecord:
    """Read the sidecar in an engine's folder.

    Raises:
        ArtefactError: it or its digest is missing, it was changed (it holds the alarm limits), is no JSON, or of
            another schema.
    """
    try:
        data, digest = (folder / RECORD).read_bytes(), (folder / RECORD_DIGEST).read_bytes()
    except OSError as error:
        raise ArtefactError(f"Cannot read {error.filename}: {error.strerror}.", _AGAIN) from None
    if digest != digest_line(data, RECORD):
        raise ArtefactError(f"{folder / RECORD} does not match {RECORD_DIGEST}: one of them was changed.", _AGAIN)
    try:
        return EngineRecord.model_validate_json(data)
    except ValidationError as error:
        raise ArtefactError(f"{folder / RECORD} is not valid: {error}", _AGAIN) from None


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write the sidecar, UTF-8 JSON, and its digest."""
    data = record.model_dump_json(by_alias=True, indent=1).encode() + b"\n"
    (folder / RECORD).write_bytes(data)
    (folder / RECORD_DIGEST).write_bytes(digest_line(data, RECORD))


def list_engines() -> Iterator[tuple[Path, EngineRecord | str]]:
    """Yield every engine folder of the cache with its record, or with what is wrong with it."""
    root = cache_folder()
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        try:
            record = read_record(folder)
        except ArtefactError as error:
            yield folder, error.what
            continue
        yield folder, record if engine_key(record.parts) == folder.name else "its record describes another engine"


def fits(record: EngineRecord, machine: Machine) -> bool:
    """Tell whether an engine was built with this TensorRT for this device, by this package's way of building."""
    there = record.parts
    return (there.tensorrt, there.device, there.sm, there.cuda_runtime, there.arch, there.build_revision) == (
        machine.tensorrt,
        machine.device,
        machine.sm,
        machine.cuda_runtime,
        machine.arch,
        BUILD_REVISION,
    )


def clean_engines(machine: Machine | None) -> list[Path]:
    """Remove the engines that are damaged or do not fit `machine`, and return their folders.

    With None everything goes: timing caches, what killed builds have left, and ONNX Runtime's engines, too.
    """
    removed = []
    for folder, record in list_engines():
        if machine is None or isinstance(record, str) or not fits(record, machine):
            shutil.rmtree(folder)
            removed.append(folder)
    if machine is None:
        removed += _clean_the_rest()
    return removed


def _clean_the_rest() -> list[Path]:
    """Remove all that is no engine, except the temporary folders of builds that run."""
    root = cache_folder()
    timings = sorted(root.glob("*.timing"))
    for path in timings:
        path.unlink()
    folders = [path for path in sorted(root.glob(".tmp-*")) if path.is_dir() and _is_left(path)]
    if onnxruntime_folder().is_dir():
        folders.append(onnxruntime_folder())
    for path in folders:
        shutil.rmtree(path)
    return [*timings, *folders]


def _is_left(temporary: Path) -> bool:
    """Tell whether nobody writes a temporary folder; process numbers say nothing between containers, locks do."""
    final = leftover_name(temporary)
    return final is not None and is_free(lock_path(temporary.with_name(final)))


def build_command(bundle: Bundle, precision: str) -> str:
    """Return the line that builds an engine."""
    return f"edge-anomaly engine build {bundle.path} --precision {precision}"


def rebuild(bundle: Bundle, record: EngineRecord) -> str:
    """Return the next step for an engine that cannot be used."""
    return f"Run: {build_command(bundle, record.parts.precision)}"


def _is_same_export(bundle: Bundle, there: EngineParts, here: EngineParts) -> bool:
    """Tell whether an engine was built from the files of this bundle; another TensorRT may have taken another graph."""
    entry = bundle.manifest.files.get(there.graph)
    return (
        entry is not None
        and there.graph_sha256 == entry.sha256
        and (there.recipe_sha256, there.images_sha256, there.precision)
        == (here.recipe_sha256, here.images_sha256, here.precision)
    )


def _check_parts(bundle: Bundle, record: EngineRecord, wanted: EngineParts) -> None:
    there, here = record.parts.model_dump(), wanted.model_dump()
    differing = [name for name in here if there.get(name) != here[name]]
    if any(name not in _GRAPH_PARTS for name in differing):  # another TensorRT may take another graph: old news then
        differing = [name for name in differing if name not in _GRAPH_PARTS]
    if differing:
        built = ", ".join(f"{_LABELS.get(name, name)} {there.get(name)}" for name in differing)
        now = ", ".join(f"{_LABELS.get(name, name)} {here[name]}" for name in differing)
        raise ArtefactError(
            f"The {record.parts.precision} engine of {bundle.path} was built for {built}; here it is {now}.",
            rebuild(bundle, record),
        )
    if record.key != engine_key(wanted):
        raise ArtefactError(
            f"The record of the engine says key {record.key}; its parts give {engine_key(wanted)}.",
            rebuild(bundle, record),
        )


_GRAPH_PARTS = ("graph", "graph_sha256")
_LABELS = {
    "tensorrt": "TensorRT",
    "sm": "SM",
    "cuda_runtime": "CUDA",
    "arch": "architecture",
    "build_revision": "build revision",
    "graph_sha256": "graph hash",
}
_AGAIN = "Build it again with `edge-anomaly engine build BUNDLE`, or remove it with `edge-anomaly engine clean`."
