"""`edge-anomaly engine build`: from a bundle's graph to an engine that is known to be right on this device.

A built engine counts for nothing before it has given the golden images their stored scores (a classifier: logits),
through the very session that will run it. A detector's thresholds are then set from normal images on the engine itself:
on the workstation they could only be simulated.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .atomic import disk_errors, is_free, locked, new_folder
from .bundle import CLASSIFIER, Bundle, Thresholds, read_bundle
from .cuda import Cuda, open_cuda, usable_memory
from .engine_tensorrt import TensorrtSession
from .errors import ArtefactError, GateError, ImageError, MissingRequirementError, UsageError
from .images import list_images, read_images
from .jetson import l4t_release, power_mode
from .progress import say, track
from .scoring import Scorer
from .selftest import GoldenCheck, run_selftest
from .session import PRECISIONS
from .tensorrt_cache import (
    PLAN,
    EngineParity,
    EngineParts,
    EngineRecord,
    Machine,
    cache_folder,
    engine_key,
    find_engine,
    lock_path,
    parts_of,
    read_plan,
    this_machine,
    write_record,
)
from .tensorrt_layers import EngineLayers
from .tensorrt_library import load_tensorrt
from .tensorrt_plan import MIB, Plan, PlanOptions, build_plan
from .tensorrt_recipe import TensorrtRecipe, build_files, read_recipe, score_tolerance
from .thresholds import fit_thresholds

# Rules of thumb: what CUDA, TensorRT and its kernels take besides the graph, and how often a build holds the weights.
_BASE_MIB, _COPIES = 512, 4
_COMFORTABLE_MIB = 2048
_LEAST_WORKSPACE_MIB = 32
_WORKSPACE_SHARE = 0.25


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in the cache. `new` is False where it was there already; `notes` are what a person should know."""

    record: EngineRecord
    folder: Path
    new: bool
    notes: tuple[str, ...] = ()


def build_engine(
    path: Path | str,
    *,
    precision: str = "auto",
    calibration: Path | None = None,
    workspace_mib: int | None = None,
    force: bool = False,
) -> BuiltEngine:
    """Build the engine of a bundle for this device, check it, set its thresholds, and put it into the cache.

    `precision` auto is the bundle's own. The thresholds come from the normal images packed in the bundle, or from the
    folder `calibration` instead. `workspace_mib` replaces the recipe's limit. An engine that is there and fits is
    kept, unless `force`.

    Raises:
        MissingRequirementError: no driver, device or TensorRT, or too little memory.
        UsageError: the bundle lacks the precision, or `calibration` has no readable image; before the build.
        ArtefactError: bundle, recipe or graph is refused, or no engine comes out.
        GateError: the engine does not give the golden images their scores, or normal ones none; it is thrown away.
    """
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(f"Unknown precision {precision!r}.", f"Choose one of: auto, {', '.join(PRECISIONS)}.")
    if workspace_mib is not None and workspace_mib < 1:
        raise UsageError(f"--workspace-mib {workspace_mib} is not possible.", "Give 1 or more.")
    bundle = read_bundle(path)
    recipe = read_recipe(bundle)
    precision = bundle.manifest.precision if precision == "auto" else precision
    build_files(recipe, precision)  # first: an absent precision is the user's matter, whatever the device lacks
    tolerance = score_tolerance(recipe, precision)
    cuda = open_cuda()
    trt = load_tensorrt()
    machine = this_machine(trt, cuda)
    parts = parts_of(bundle, recipe, precision, machine)
    folder = cache_folder() / engine_key(parts)
    if not force and (record := _present(bundle, parts, calibration)):
        return BuiltEngine(record, folder, new=False)
    normal = _normal_images(bundle, recipe, calibration)  # before the long part, so that a wrong folder is told at once
    if not is_free(lock_path(folder)):
        say("another process builds this engine; waiting for it")
    with locked(lock_path(folder)):
        if not force and (record := _present(bundle, parts, calibration)):  # the other one was quicker
            return BuiltEngine(record, folder, new=False)
        with _replaced_folder(folder) as temporary:
            graph = bundle.read(parts.graph)
            workspace, notes = _workspace(cuda, len(graph), recipe, workspace_mib)
            say(f"building for {machine.device} with TensorRT {machine.tensorrt}; this may take minutes")
            options = _options(machine, precision, recipe, bundle, workspace)
            plan = build_plan(trt, graph, options, _timing_cache(machine))
            record, more = _checked_record(cuda, trt, bundle, recipe, parts, plan, tolerance, normal)
            (temporary / PLAN).write_bytes(plan.data)
            write_record(temporary, record)
    return BuiltEngine(record, folder, new=True, notes=(*notes, *more))


@contextlib.contextmanager
def _replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder`; a failed gate leaves nothing there, not even an older engine."""
    try:
        with new_folder(folder, force=True) as temporary, disk_errors(folder):
            yield temporary
    except GateError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _present(bundle: Bundle, parts: EngineParts, calibration: Path | None) -> EngineRecord | None:
    """Return the record of an engine that fits and is whole; one that is not will be built anew.

    Raises:
        UsageError: `calibration` would be of no use.
    """
    try:
        found = find_engine(bundle, parts)
        if found is None:
            return None
        read_plan(bundle, *found)
    except ArtefactError as error:
        say(f"building anew: {error.what}")
        return None
    if calibration is not None:
        raise UsageError(
            "The engine is built already, with its thresholds.", "Pass --force to build it with --calibration."
        )
    return found[0]


def _options(
    machine: Machine, precision: str, recipe: TensorrtRecipe, bundle: Bundle, workspace_mib: int
) -> PlanOptions:
    return PlanOptions(
        strong=machine.strong,
        precision=precision,
        float_prefix=recipe.float_prefix,
        shape=bundle.manifest.input.shape,
        workspace_mib=workspace_mib,
        optimization_level=recipe.optimization_level,
    )


def _workspace(
    cuda: Cuda, graph_bytes: int, recipe: TensorrtRecipe, asked_mib: int | None
) -> tuple[int, tuple[str, ...]]:
    """Return the builder's scratch memory in MiB, and a note where memory is scarce."""
    free_mib = usable_memory(cuda, cuda.device()) // MIB
    needed_mib = _BASE_MIB + _COPIES * graph_bytes // MIB + (asked_mib or _LEAST_WORKSPACE_MIB)
    if free_mib < needed_mib:
        raise MissingRequirementError(
            f"Too little memory to build: {free_mib} MiB are free, about {needed_mib} MiB are needed.",
            "Close other programs and log out of the desktop; swap does not help the GPU.",
        )
    notes = (f"only {free_mib} MiB of memory are free: the build may skip fast kernels",)
    scarce = notes if free_mib < _COMFORTABLE_MIB else ()
    if asked_mib:
        return asked_mib, scarce
    return max(_LEAST_WORKSPACE_MIB, min(recipe.workspace_mib, int(free_mib * _WORKSPACE_SHARE))), scarce


def _timing_cache(machine: Machine) -> Path:
    """Return the file of kernel timings, which all models share on one device and version."""
    name = f"{machine.tensorrt} {machine.sm} {machine.device}"
    return cache_folder() / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.timing"


def _checked_record(
    cuda: Cuda,
    trt: Any,
    bundle: Bundle,
    recipe: TensorrtRecipe,
    parts: EngineParts,
    plan: Plan,
    tolerance: float,
    normal: _NormalImages | None,
) -> tuple[EngineRecord, tuple[str, ...]]:
    """Run the engine on golden and normal images and return its record, with what a person should know."""
    session = TensorrtSession(cuda, trt, plan.data)
    try:
        layers = session.layers(recipe.float_prefix)
        parity = _parity(bundle, recipe, session, parts.precision, tolerance)
        thresholds = None if normal is None else _thresholds(session, recipe, normal, parts.precision)
    finally:
        session.close()
    record = EngineRecord(
        key=engine_key(parts),
        parts=parts,
        bundle=bundle.manifest.name,
        engine_sha256=hashlib.sha256(plan.data).hexdigest(),
        engine_bytes=len(plan.data),
        created_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        build_seconds=plan.seconds,
        workspace_mib=plan.workspace_mib,
        optimization_level=plan.optimization_level,
        l4t=l4t_release(),
        power_mode=power_mode(),
        layers=layers.counts,
        tensors=layers.tensors,
        parity=parity,
        thresholds=thresholds,
        threshold_images="" if normal is None else normal.described(),
    )
    return record, _layer_notes(layers, parts.precision)


def _layer_notes(layers: EngineLayers, precision: str) -> tuple[str, ...]:
    notes = []
    if precision == "int8" and layers.counts["Int8"] == 0:
        notes.append("the engine inspector names no INT8 layer: expect the latency of FP16")
    if layers.reduced:
        shown = ", ".join(layers.reduced[:3])
        notes.append(f"{len(layers.reduced)} layers of the head do not write FP32 ({shown})")
    return tuple(notes)


def _parity(
    bundle: Bundle, recipe: TensorrtRecipe, session: TensorrtSession, precision: str, tolerance: float
) -> EngineParity:
    scorer = Scorer(bundle, session, engine="tensorrt", precision=precision)
    checks = run_selftest(scorer, tolerance=tolerance)
    if not checks:
        raise ArtefactError(f"Bundle {bundle.path} has no golden images: nothing shows that the engine is right.")
    bad = [check for check in checks if not check.ok]
    if bad:
        lines = "\n".join(f"- {_described(check)}" for check in bad)
        raise GateError(
            f"{len(bad)} of {len(checks)} golden images differ by more than {tolerance:g} on the engine:\n{lines}",
            _what_else(recipe, precision),
        )
    return EngineParity(
        images=len(checks),
        score_difference=max(check.score_difference or 0.0 for check in checks),
        map_difference=max(check.map_difference or 0.0 for check in checks),
        tolerance=tolerance,
    )


def _what_else(recipe: TensorrtRecipe, precision: str) -> str:
    """Return the next step after a failed check: the precisions with more bits that the bundle has."""
    finer = [other for other in PRECISIONS[: PRECISIONS.index(precision)] if other in recipe.graphs]
    tried = f"--precision {' or '.join(reversed(finer))}, or another engine" if finer else "another engine"
    return f"The engine was thrown away. Try {tried}."


def _described(check: GoldenCheck) -> str:
    if check.score is None:
        return f"{check.file}: could not be judged, expected {check.expected:.6g}"
    return (
        f"{check.file}: score {check.score:.6g}, expected {check.expected:.6g} "
        f"(off by {check.score_difference:.1e}, map by {check.map_difference:.1e})"
    )


def _thresholds(session: TensorrtSession, recipe: TensorrtRecipe, normal: _NormalImages, precision: str) -> Thresholds:
    scores, maxima = [], []
    for pixels in track(normal, "setting thresholds", len(normal)):
        outputs = session.run(pixels[np.newaxis])
        scores.append(float(outputs["score"][0]))
        maxima.append(float(outputs["anomaly_map"].max()))
    bad = int((~np.isfinite([scores, maxima])).any(axis=0).sum())
    if bad:
        raise GateError(
            f"{bad} of {len(scores)} normal images have no finite score on the engine.", _what_else(recipe, precision)
        )
    return fit_thresholds(scores, maxima, alpha_warn=recipe.alpha_warn, alpha_fail=recipe.alpha_fail)


def _normal_images(bundle: Bundle, recipe: TensorrtRecipe, folder: Path | None) -> _NormalImages | None:
    """Return what thresholds are set from; None for a classifier, which has none."""
    if bundle.manifest.model.kind != CLASSIFIER:
        return _NormalImages(bundle, recipe, folder)
    if folder is not None:
        raise UsageError("A classifier has no thresholds: --calibration is of no use.", "Leave it out.")
    return None


def _model_input(bundle: Bundle, name: str) -> npt.NDArray[np.uint8]:
    """Read a picture of the bundle that is a model input already, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(bundle.read(name)), formats=("PNG",)) as file:
        pixels = np.array(file.convert("RGB"))
    if pixels.shape != bundle.manifest.input.shape[1:]:
        raise ArtefactError(
            f"{bundle.path / name} is {pixels.shape[1]}x{pixels.shape[0]}, not the model's input size.",
            "Export the bundle again with --target tensorrt.",
        )
    return pixels


class _NormalImages:
    """Model inputs, uint8 [H, W, 3], of normal images: the bundle's own, or those of a folder."""

    def __init__(self, bundle: Bundle, recipe: TensorrtRecipe, folder: Path | None) -> None:
        self._bundle, self._folder = bundle, folder
        self._packed = recipe.normal_images
        self._paths = [] if folder is None else list_images([folder])
        self._bad: list[ImageError] = []
        if len(self) == 0:
            raise UsageError(
                f"Bundle {bundle.path} packs no normal images to set thresholds from.", "Give some: --calibration DIR"
            )
        if next(iter(self), None) is None:
            raise UsageError(
                f"None of the {len(self)} images in {folder} can be read: {self._bad[0].reason} ({self._bad[0].path}).",
                "Give --calibration a folder with readable pictures of good parts.",
            )

    def __len__(self) -> int:
        return len(self._packed) if self._folder is None else len(self._paths)

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        if self._folder is None:
            yield from (_model_input(self._bundle, name) for name in self._packed)
            return
        self._bad = []
        for _, pixels in read_images(self._paths, self._bundle.manifest.input.preprocess, bad=self._bad):
            yield pixels

    def described(self) -> str:
        """Say whose images they are, how many, and how many could not be read."""
        if self._folder is None:
            return f"{len(self._packed)} packed in the bundle"
        unread = f", {len(self._bad)} unreadable" if self._bad else ""
        return f"{len(self._paths) - len(self._bad)} of {self._folder}{unread}"
