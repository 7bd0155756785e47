"""`export`: a finished run becomes a verified bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import nn

from edge_anomaly.runs import Run, load_model, load_run
from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_calibration.qdq_graph import cast_image_first
from edge_anomaly_runtime.atomic import check_free, new_folder
from edge_anomaly_runtime.bundle import Manifest, OutputInfo, ParityRow
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.images import file_sha256
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.session import Session

from . import trt_check
from .assembling import Assembly, stage
from .bundling import finish_bundle, gate, model_info, say_written
from .comparison import Comparison, read_comparison
from .golden import golden_from_images
from .graph import EMBEDDING, onnx_from_detector, without_output
from .matrix import TARGETS
from .options import ExportOptions, check_least_tensorrt, check_requirements
from .parity import Judged, compare_graph, parity_table
from .quantising import cache_folder, calibration_images, fit_again, open_quantiser

_SAMPLES = 8


def export_run(run_path: Path, out: Path, options: ExportOptions | None = None) -> Manifest:
    """Export a detector's run to a bundle folder `out` and return its manifest.

    Raises:
        GateError: parity or the INT8 guard failed and `allow_drop` is not set; no bundle is written.
        ArtefactError: the run is not finished or damaged, or a file has an operator that TensorRT cannot take.
        UsageError, MissingRequirementError, OutputError: see `errors`.
    """
    options = options or ExportOptions()
    check_requirements(options)
    torch.set_num_threads(usable_cpus())
    run = load_run(run_path)
    check_least_tensorrt(run.kind, options)
    with new_folder(out, force=options.force) as folder:
        manifest = _build(run, folder, out.name, options)
    say_written(out, manifest, options)
    return manifest


def export_plan(run_path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Return what `export_run` would do, in words, without doing it.

    Raises:
        UsageError, ArtefactError, MissingRequirementError: as `export_run` would, as far as that can be known before.
    """
    check_requirements(options)
    run = load_run(run_path)
    check_least_tensorrt(run.kind, options)
    check_free(out, force=options.force)
    size = run.preprocess
    lines = [f"{run_path}: {run.kind}, {size.width}x{size.height}, ONNX opset {options.used_opset}"]
    if options.precision == "int8":
        images = calibration_images(run, options.calibration, count=options.calibration_images, seed=options.seed)
        lines.append(
            f"int8: calibrated on {images.count} normal images, {len(images.synthetic)} with a synthetic anomaly; "
            f"the head fitted again on {len(run.fit)} images"
        )
    for target in options.targets:
        lines.append(f"target {target}: {TARGETS[target].note}")
    lines.append(
        f"compared on {len(run.holdout)} held-out and {len(run.test)} labelled images: {options.limits}"
        + ("; over it the bundle is written all the same (--allow-drop)" if options.allow_drop else "")
    )
    if options.tensorrt and not trt_check.is_installed():
        lines.append("NVIDIA's parser will not be tried: the extra trt-check is not installed")
    return [*lines, f"writes {out}"]


def _build(run: Run, folder: Path, name: str, options: ExportOptions) -> Manifest:
    model = load_model(run)
    comparison = read_comparison(run, alpha_warn=options.alpha_warn, alpha_fail=options.alpha_fail)
    with stage("onnx"):
        traced = onnx_from_detector(model, run.preprocess.height, run.preprocess.width, opset=options.used_opset)
        if options.tensorrt:
            cast_image_first(traced)
    reference = comparison.judge_torch(model)
    guard = _Guard(reference, comparison, options.limits)
    graphs = Assembly(options, guard)
    graphs.add_float(without_output(traced, EMBEDDING))
    calibration = None
    if options.precision == "int8":
        images = calibration_images(run, options.calibration, count=options.calibration_images, seed=options.seed)
        with stage("int8"), open_quantiser(traced, images, cache_folder(run.path), seed=options.seed) as quantiser:
            graphs.add_int8(quantiser, partial(_finished, run, model.get_submodule("head")))
            calibration = quantiser.record(graphs.float_tensors)
    rows, failures = guard.table(graphs.judged)
    say(parity_table(rows))
    gate(failures, options)
    if options.tensorrt:
        graphs.add_recipe(comparison.pixels[: comparison.holdout], comparison.pixels[:_SAMPLES])
    thresholds = {key: graphs.judged[key].thresholds for key in graphs.keys}
    sessions = {key: partial(graphs.open, key) for key in graphs.keys}
    normal_paths = comparison.paths[: comparison.holdout]
    golden, golden_files = golden_from_images(
        normal_paths, comparison.pixels, sessions, thresholds, spec=run.preprocess, seed=run.seed
    )
    graphs.files.update(golden_files)
    head = sum(value.nbytes for key, value in model.state_dict().items() if key.startswith("head."))
    return finish_bundle(
        folder,
        name,
        graphs,
        model=model_info(run.kind, {**asdict(run.config), "head_bytes": head}, options, images=len(run.fit)),
        preprocess=run.preprocess,
        brightness=run.brightness,
        outputs=_outputs(reference),
        thresholds=thresholds,
        parity=rows,
        calibration=calibration,
        golden=golden,
        training={**run.data, "images_sha256": _hash_of_files(run.fit), "weights": run.weights},
        seed=run.seed,
        normal_scores={key: value.predictions.scores[: comparison.holdout] for key, value in graphs.judged.items()},
    )


def _finished(run: Run, head: nn.Module, model: onnx.ModelProto, simulate: bool) -> onnx.ModelProto:
    return without_output(fit_again(run, head, model, simulate=simulate), EMBEDDING)


@dataclass(frozen=True)
class _Guard:
    """Compares graphs with the trained model."""

    reference: Judged
    comparison: Comparison
    limits: GuardLimits

    def judge(self, session: Session, key: str) -> Judged:
        """Return what a loaded graph says about the images, and close it."""
        return self.comparison.judge(session, key)

    def table(self, judged: Mapping[str, Judged]) -> tuple[list[ParityRow], list[str]]:
        """Return a row for each graph, and what is wrong with the bad ones."""
        rows, failures = [], []
        reference = self.comparison.of_known(self.reference)
        for key, value in judged.items():
            row, report = compare_graph(
                key, reference, self.comparison.of_known(value), self.comparison.labels, self.limits
            )
            rows.append(row)
            if not row.ok:
                is_float = key.endswith("/fp32")
                reason = f"a score differs by {row.score_difference:.1e} ({row.limit})"
                failures.append(f"{row.backend}: {reason if is_float else ', '.join(report.failures)}")
        return rows, failures


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
