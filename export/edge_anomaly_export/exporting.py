"""`export`: a finished run becomes a verified bundle."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from edge_anomaly.data import GOOD, UNSURE
from edge_anomaly.detectors import DETECTORS
from edge_anomaly.prediction import Pixels, predict, read_pixels, session_scores, torch_scores
from edge_anomaly.report import bundle_report
from edge_anomaly.runs import Run, load_model, load_run, now_utc, package_versions
from edge_anomaly_calibration.equalize import equalize_channels
from edge_anomaly_calibration.guard import GuardLimits, GuardReport, layer_damage
from edge_anomaly_calibration.quantize import (
    HEAD_PREFIX,
    METHOD,
    emit_cpu_model,
    measure_ranges,
    prepare_float_model,
    quantized_share,
)
from edge_anomaly_calibration.rounding import round_weights
from edge_anomaly_calibration.selection import CalibrationImages, choose_calibration_images
from edge_anomaly_runtime.atomic import new_folder
from edge_anomaly_runtime.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    SCHEMA,
    Calibration,
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
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import GateError, UsageError, did_you_mean, missing_extra
from edge_anomaly_runtime.images import file_sha256, read_images
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.session import ENGINES, PRECISIONS, is_installed, open_engine
from edge_anomaly_runtime.thresholds import check_rates, fit_thresholds

from .golden import golden_from_images
from .graph import EMBEDDING, OPSET, only_output, onnx_from_detector, with_head_arrays, without_output
from .parity import Judged, compare_graph, parity_table

TARGETS = ("onnx", "openvino")

FLOAT_MODEL = "model.onnx"
INT8_CPU_MODEL = "model.int8.cpu.onnx"
IR_XML, IR_BIN = "openvino/model.xml", "openvino/model.bin"

GOLDEN_TOLERANCE = {"fp32": 1e-3, "int8": 5e-2}

_MAX_COMPARED = 1000
_ROUNDING_IMAGES = 48


@dataclass(frozen=True)
class ExportOptions:
    """How to export: targets, precision, calibration images, limits of the guard."""

    targets: tuple[str, ...] = ("openvino",)
    precision: str = "int8"
    calibration_images: int = 128
    seed: int = 0
    alpha_warn: float = 0.05
    alpha_fail: float = 0.01
    limits: GuardLimits = field(default_factory=GuardLimits)
    allow_drop: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError("No target was given.", f"Choose from: {', '.join(TARGETS)}.")
        for target in self.targets:
            if target not in TARGETS:
                raise did_you_mean("target", target, list(TARGETS))
        if self.precision not in PRECISIONS:
            raise did_you_mean("precision", self.precision, list(PRECISIONS))
        if self.calibration_images < 1:
            raise UsageError(f"{self.calibration_images} calibration images are not possible.", "Give 1 or more.")
        check_rates(self.alpha_warn, self.alpha_fail)


@dataclass(frozen=True)
class _Comparison:
    """The images that every graph is compared on: held-out normal ones, then the labelled ones."""

    pixels: Pixels
    paths: list[Path]
    holdout: int
    known: npt.NDArray[np.bool_]  # not labelled `unsure`
    defective: npt.NDArray[np.bool_]

    @property
    def labels(self) -> npt.NDArray[np.bool_] | None:
        """Return which of the known images are defective, or None where none is."""
        chosen = self.defective[self.known]
        return chosen if chosen.any() else None


def export_run(run_path: Path, out: Path, options: ExportOptions | None = None) -> Manifest:
    """Export a run to a bundle folder `out` and return its manifest.

    Raises:
        GateError: parity or the INT8 guard failed and `allow_drop` is not set; no bundle is written.
        UsageError, ArtefactError, MissingRequirementError, OutputError: see `errors`.
    """
    options = options or ExportOptions()
    if "openvino" in options.targets and not is_installed("openvino"):
        raise missing_extra("--target openvino", *ENGINES["openvino"])
    torch.set_num_threads(usable_cpus())
    run = load_run(run_path)
    with new_folder(out, force=options.force) as folder:
        manifest, files = _build(run, out, options)
        _write(folder, manifest, files)
    size = sum(entry.size for entry in manifest.files.values())
    say(f"{out}: {len(manifest.files)} files, {size / 1e6:.1f} MB")
    say(f"Next: edge-anomaly selftest {out}; edge-anomaly score {out} IMAGES")
    return manifest


def _build(run: Run, out: Path, options: ExportOptions) -> tuple[Manifest, dict[str, bytes]]:
    model = load_model(run)
    comparison = _comparison_images(run)
    with _stage("onnx"):
        traced = onnx_from_detector(model, run.preprocess.height, run.preprocess.width)
        graphs = {"fp32": without_output(traced, EMBEDDING)}
    calibration = None
    if options.precision == "int8":
        with _stage("int8"):
            quantised, calibration = _quantise(run, traced, options)
        with _stage("fit on INT8 features"):
            graphs["int8"] = without_output(_fit_again(run, quantised), EMBEDDING)
    files, graph_files = _emit(graphs, options)
    reference = _judge_torch(run, model, comparison, options)
    judged = {
        key: _judge(key, files, name, comparison, options)
        for key, name in track(graph_files.items(), "parity", len(graph_files))
    }
    rows, reports = _parity(reference, judged, comparison, options)
    say(parity_table(rows))
    _gate(rows, reports, graphs, comparison, options)
    thresholds = {key: judged[key].thresholds for key in graph_files}
    sessions = {key: partial(_open, key, files, name) for key, name in graph_files.items()}
    normal_paths = comparison.paths[: comparison.holdout]
    golden, golden_files = golden_from_images(normal_paths, comparison.pixels, sessions, thresholds, seed=run.seed)
    files.update(golden_files)
    manifest = Manifest(
        schema=SCHEMA,
        name=out.name.removesuffix(".eab"),
        seq=int(time.time()),
        created_utc=now_utc(),
        precision=options.precision,
        model=_model_info(run, model, options),
        input=InputContract(
            shape=(1, run.preprocess.height, run.preprocess.width, 3),
            preprocess=run.preprocess,
            brightness=run.brightness,
        ),
        outputs=_outputs(reference),
        graphs=graph_files,
        thresholds=thresholds,
        parity=tuple(rows),
        calibration=calibration,
        golden=tuple(golden),
        golden_tolerance=GOLDEN_TOLERANCE,
        training={**run.data, "images_sha256": _hash_of_files(run.fit), "weights": run.weights},
        versions=package_versions(),
        seed=run.seed,
        files={},
    )
    normal = {key: value.predictions.scores[: comparison.holdout] for key, value in judged.items()}
    files["report/index.html"] = bundle_report(manifest, normal).encode()
    entries = {name: file_entry(data) for name, data in sorted(files.items())}
    return manifest.model_copy(update={"files": entries}), files


def _comparison_images(run: Run) -> _Comparison:
    """Read the held-out normal images and the labelled ones, as far as they are still there."""
    present = [item for item in run.test if item.path.exists()]
    if len(present) > _MAX_COMPARED:
        chosen = np.random.default_rng(run.seed).permutation(len(present))[:_MAX_COMPARED]
        present = [present[index] for index in sorted(chosen)]
    if len(present) < len(run.test):
        say(f"Comparing on {len(present)} of {len(run.test)} labelled images.")
    labels = {item.path: item.label for item in present}
    wanted = [*run.holdout, *labels]
    paths, pixels = read_pixels(wanted, run.preprocess, strict=False, what="reading")
    held_out = set(run.holdout)
    holdout = sum(path in held_out for path in paths)
    if not holdout:
        raise UsageError(f"The held-out images of {run.path} are gone.", "Put them back, or train again.")
    of_each = [labels.get(path, GOOD) for path in paths]
    return _Comparison(
        pixels,
        paths,
        holdout,
        known=np.array([label != UNSURE for label in of_each]),
        defective=np.array([label not in (GOOD, UNSURE) for label in of_each]),
    )


def _quantise(run: Run, traced: onnx.ModelProto, options: ExportOptions) -> tuple[onnx.ModelProto, Calibration]:
    present = [path for path in run.fit if path.exists()]
    if not present:
        raise UsageError(
            f"--precision int8 needs calibration images, and the training images of {run.path} are gone.",
            "Put them back, train again, or export with --precision fp32.",
        )
    images = choose_calibration_images(present, run.preprocess, count=options.calibration_images, seed=options.seed)
    say(f"calibrating on {len(images.paths)} normal images, {len(images.synthetic)} of them with a synthetic anomaly")
    with tempfile.TemporaryDirectory() as scratch:
        traced_file, prepared, rounded = (Path(scratch) / f"{name}.onnx" for name in ("traced", "prepared", "rounded"))
        onnx.save(traced, traced_file)
        prepare_float_model(traced_file, prepared)
        equalized = equalize_channels(onnx.load(prepared), _first(images, "equalizing"), head_prefix=HEAD_PREFIX)
        shown = _first(images, "rounding weights")
        onnx.save(round_weights(equalized, shown, head_prefix=HEAD_PREFIX, seed=options.seed), rounded)
        ranges = _ranges_file(run, scratch)
        measure_ranges(rounded, track(images, "calibrating", len(images.paths)), images.sha256(), ranges)
        quantised = emit_cpu_model(rounded, ranges)
        share = quantized_share(quantised)
        say(f"{share:.0%} of the backbone's convolutions and matrix products are INT8; the head stays float")
        return quantised, _calibration_record(images, file_sha256(rounded))


def _first(images: CalibrationImages, what: str) -> Iterator[npt.NDArray[np.uint8]]:
    return track(itertools.islice(images, _ROUNDING_IMAGES), what, min(_ROUNDING_IMAGES, len(images.paths)))


def _ranges_file(run: Run, scratch: str) -> Path:
    """Keep the ranges beside the run, so that the next target needs no images; a read-only run does without."""
    folder = run.path if os.access(run.path, os.W_OK) else Path(scratch)
    return folder / "calibration" / "ranges.json"


def _calibration_record(images: CalibrationImages, float_model_sha256: str) -> Calibration:
    return Calibration(
        method=METHOD,
        images=len(images.paths),
        synthetic=len(images.synthetic),
        seed=images.seed,
        images_sha256=images.sha256(),
        float_model_sha256=float_model_sha256,
    )


def _fit_again(run: Run, quantised: onnx.ModelProto) -> onnx.ModelProto:
    """Fit the head on the quantised graph's own features, so that systematic rounding error cancels."""
    refit = DETECTORS[run.kind].refit
    if refit is None:
        return quantised
    session = open_engine("onnxruntime", only_output(quantised, EMBEDDING).SerializeToString())
    paths = [path for path in run.fit if path.exists()]

    def embeddings() -> Iterator[npt.NDArray[np.float32]]:
        for _, image in track(read_images(paths, run.preprocess, bad=[]), "fitting", len(paths)):
            yield session.run(image[np.newaxis])[EMBEDDING]

    return with_head_arrays(quantised, refit(run.config, embeddings()))


def _emit(graphs: dict[str, onnx.ModelProto], options: ExportOptions) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the model files, and which of them each 'engine/precision' reads: every installed engine is served."""
    names = {"fp32": FLOAT_MODEL, "int8": INT8_CPU_MODEL}
    files = {names[precision]: graph.SerializeToString() for precision, graph in graphs.items()}
    graph_files = {
        f"{engine}/{precision}": names[precision] for engine in ENGINES if is_installed(engine) for precision in graphs
    }
    if "openvino" in options.targets:
        from .openvino_ir import ir_from_onnx

        with _stage("openvino"):
            files[IR_XML], files[IR_BIN] = ir_from_onnx(graphs[options.precision])
        graph_files[f"openvino/{options.precision}"] = IR_XML
    return files, graph_files


def _judge_torch(run: Run, model: nn.Module, comparison: _Comparison, options: ExportOptions) -> Judged:
    predictions = predict(torch_scores(model), comparison.pixels, what="torch", total=len(comparison.pixels))
    return Judged(predictions, _thresholds(predictions, comparison, options))


def _judge(key: str, files: dict[str, bytes], name: str, comparison: _Comparison, options: ExportOptions) -> Judged:
    session = _open(key, files, name)
    predictions = predict(session_scores(session), comparison.pixels, what=key, total=len(comparison.pixels))
    session.close()
    return Judged(predictions, _thresholds(predictions, comparison, options))


def _open(key: str, files: dict[str, bytes], name: str) -> Any:
    weights = files[IR_BIN] if name == IR_XML else None
    return open_engine(key.partition("/")[0], files[name], weights=weights)


def _thresholds(predictions: Any, comparison: _Comparison, options: ExportOptions) -> Thresholds:
    return fit_thresholds(
        predictions.scores[: comparison.holdout],
        predictions.map_maxima()[: comparison.holdout],
        alpha_warn=options.alpha_warn,
        alpha_fail=options.alpha_fail,
    )


def _parity(
    reference: Judged, judged: dict[str, Judged], comparison: _Comparison, options: ExportOptions
) -> tuple[list[ParityRow], dict[str, GuardReport]]:
    rows, reports = [], {}
    for key, value in judged.items():
        row, reports[key] = compare_graph(
            key, _known(reference, comparison), _known(value, comparison), comparison.labels, options.limits
        )
        rows.append(row)
    return rows, reports


def _known(judged: Judged, comparison: _Comparison) -> Judged:
    predictions = judged.predictions
    return Judged(
        type(predictions)(predictions.scores[comparison.known], predictions.maps[comparison.known]), judged.thresholds
    )


def _gate(
    rows: Sequence[ParityRow],
    reports: dict[str, GuardReport],
    graphs: dict[str, onnx.ModelProto],
    comparison: _Comparison,
    options: ExportOptions,
) -> None:
    failed = [row for row in rows if not row.ok]
    if not failed:
        return
    reasons = [f"{row.backend}: {_reason(row, reports)}" for row in failed]
    if any(row.backend.endswith("int8") for row in failed):
        worst = layer_damage(graphs["fp32"], graphs["int8"], comparison.pixels[:8])[:5]
        say("Layers that lose most by INT8 (signal to noise):")
        for name, ratio in worst:
            say(f"  {ratio:5.1f} dB  {name}")
    if not options.allow_drop:
        raise GateError(
            f"The exported graph does not score like the trained model. {'; '.join(reasons)}.",
            "Calibrate on more images (--calibration-images), export with --precision fp32, or accept it with "
            "--allow-drop, which the manifest records.",
        )
    say(f"Accepted with --allow-drop: {'; '.join(reasons)}")


def _reason(row: ParityRow, reports: dict[str, GuardReport]) -> str:
    if row.backend.endswith("fp32"):
        return f"a score differs by {row.score_difference:.1e} ({row.limit})"
    return ", ".join(reports[row.backend.replace(" ", "/")].failures)


def _model_info(run: Run, model: nn.Module, options: ExportOptions) -> ModelInfo:
    head = sum(value.nbytes for name, value in model.state_dict().items() if name.startswith("head."))
    parameters = {**asdict(run.config), "head_bytes": head, "opset": OPSET, "images": len(run.fit)}
    if options.allow_drop:
        parameters["allow_drop"] = True
    return ModelInfo(kind=run.kind, parameters=parameters)


def _outputs(reference: Judged) -> tuple[OutputInfo, ...]:
    rows, columns = reference.predictions.maps.shape[1:]
    return (
        OutputInfo(name="score", role="score", shape=(1,)),
        OutputInfo(name="anomaly_map", role="map", shape=(1, rows, columns)),
    )


def _hash_of_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.exists():
            digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def _write(folder: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    """Write all files, the manifest last."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    data = manifest_bytes(manifest)
    (folder / MANIFEST_DIGEST).write_bytes(digest_line(data))
    (folder / MANIFEST).write_bytes(data)


class _stage:
    """Prints one line per finished stage with its time."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            say(f"{self._name}: {time.perf_counter() - self._start:.1f} s")
