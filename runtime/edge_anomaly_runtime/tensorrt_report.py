"""What `engine info` and `engine list` show, JSON-ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bundle import read_bundle
from .cuda import open_cuda, usable_memory
from .errors import ArtefactError
from .jetson import l4t_release, power_mode
from .tensorrt_cache import (
    PLAN,
    EngineRecord,
    Machine,
    cache_folder,
    find_engine,
    list_engines,
    parts_of,
    read_plan,
    this_machine,
)
from .tensorrt_library import load_tensorrt
from .tensorrt_plan import MIB
from .tensorrt_recipe import read_recipe

SCHEMA = "edge-anomaly.engine-info/1"


def machine_here() -> Machine:
    """Return TensorRT and device, driver first.

    Raises:
        MissingRequirementError: no driver, device or TensorRT.
    """
    cuda = open_cuda()  # before TensorRT, which may crash without a driver
    return this_machine(load_tensorrt(), cuda)


def device_report() -> dict[str, Any]:
    """Describe the device and its TensorRT.

    Raises:
        MissingRequirementError: as `machine_here`.
    """
    cuda = open_cuda()
    machine = this_machine(load_tensorrt(), cuda)
    device = cuda.device()
    free, total = cuda.memory()
    return {
        "schema": SCHEMA,
        "device": machine.device,
        "sm": machine.sm,
        "tensorrt": machine.tensorrt,
        "typing": "from the graph" if machine.strong else "by builder flags",
        "cuda_runtime": machine.cuda_runtime,
        "arch": machine.arch,
        "l4t": l4t_release(),
        "power_mode": power_mode(),
        "memory_mib": total // MIB,
        "free_mib": free // MIB,
        "usable_mib": usable_memory(cuda, device) // MIB,
        "cache": str(cache_folder()),
    }


def bundle_report(path: Path) -> dict[str, Any]:
    """Describe the engine of each precision that a bundle can be built at: built, missing, or unusable and why.

    Raises:
        UsageError: the bundle was not exported for TensorRT.
        MissingRequirementError: as `machine_here`.
        ArtefactError: the bundle is refused.
    """
    bundle = read_bundle(path)
    recipe = read_recipe(bundle)
    machine = machine_here()
    rows: list[dict[str, Any]] = []
    for precision in recipe.graphs:
        row: dict[str, Any] = {"precision": precision, "record": None}
        try:
            found = find_engine(bundle, parts_of(bundle, recipe, precision, machine))
            if found is None:
                row |= {"state": "missing", "detail": f"edge-anomaly engine build {path} --precision {precision}"}
            else:
                record, folder = found
                read_plan(bundle, record, folder)
                row |= {"state": "built", "detail": described(record)}
                row["record"] = record.model_dump(mode="json", by_alias=True)
        except ArtefactError as error:
            row |= {"state": "unusable", "detail": error.what}
        rows.append(row)
    return {"schema": SCHEMA, "bundle": bundle.manifest.name, "tensorrt": machine.tensorrt, "engines": rows}


def cached_engines() -> list[dict[str, Any]]:
    """List every engine of the cache; `fault` says what is wrong with a damaged one."""
    return [_cached(folder, found) for folder, found in list_engines()]


def _cached(folder: Path, found: EngineRecord | str) -> dict[str, Any]:
    plan = folder / PLAN
    row: dict[str, Any] = {"key": folder.name, "mb": plan.stat().st_size / 1e6 if plan.exists() else 0.0}
    if isinstance(found, str):
        return {**row, "bundle": None, "precision": None, "detail": found, "fault": found}
    return {
        **row,
        "bundle": found.bundle,
        "precision": found.parts.precision,
        "detail": described(found),
        "fault": None,
    }


def described(record: EngineRecord) -> str:
    """Return one line about an engine."""
    parts = record.parts
    return f"TensorRT {parts.tensorrt}, {parts.device} (SM {parts.sm}), built {record.created_utc}"
