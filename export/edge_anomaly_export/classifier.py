"""`export` of a classifier: logits in place of scores, accuracy in place of AUROC, no thresholds."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from PIL import Image

from edge_anomaly.classifier import ClassData, Classifier, LabeledImages, open_class_data, predict
from edge_anomaly.prediction import Pixels
from edge_anomaly.report import bundle_report
from edge_anomaly.resnet import VARIANTS
from edge_anomaly.runs import now_utc, package_versions
from edge_anomaly.train_classifier import KIND, ClassifierRun, load_classifier
from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_calibration.qdq_graph import cast_image_first
from edge_anomaly_calibration.selection import CalibrationImages, StratifiedImages, choose_calibration_images
from edge_anomaly_runtime.atomic import new_folder
from edge_anomaly_runtime.bundle import (
    GOLDEN_MAPS,
    SCHEMA,
    GoldenImage,
    InputContract,
    Manifest,
    ModelInfo,
    OutputInfo,
    ParityRow,
    file_entry,
)
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import GateError, UsageError
from edge_anomaly_runtime.images import list_images
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.session import Session

from .assembling import Assembly, stage
from .exporting import GOLDEN_TOLERANCE, gate, say_written, write_bundle
from .graph import onnx_from_detector
from .options import ExportOptions, check_requirements
from .parity import FLOAT_LIMIT
from .quantising import cache_folder, open_quantiser

Logits = npt.NDArray[np.float64]

_MAX_COMPARED = 2000
_GOLDEN = 8
OUTPUTS = ("logits", "features")


@dataclass(frozen=True)
class ClassifierJudge:
    """Compares graphs with the trained model on labelled pictures, `pixels` uint8 [n, h, w, 3], `labels` int [n]."""

    pixels: Pixels
    labels: npt.NDArray[np.int64]
    reference: Logits
    limits: GuardLimits

    def judge(self, session: Session, key: str) -> Logits:
        """Return a loaded graph's logits [n, K], and close it."""
        rows = [session.run(image[np.newaxis])["logits"] for image in track(self.pixels, key, len(self.pixels))]
        session.close()
        return np.concatenate(rows).astype(np.float64)

    def table(self, judged: Mapping[str, Logits]) -> tuple[list[ParityRow], list[str]]:
        """Return a row for each graph, and what is wrong with the bad ones."""
        rows, failures = [], []
        for key, logits in judged.items():
            if not np.isfinite(logits).all():
                raise GateError(f"The graph {key} gives logits that are not finite.", "Export with --precision fp32.")
            row, reasons = self._row(key, logits)
            rows.append(row)
            if reasons:
                failures.append(f"{row.backend}: {', '.join(reasons)}")
        return rows, failures

    def _row(self, key: str, logits: Logits) -> tuple[ParityRow, list[str]]:
        scale = float(np.abs(self.reference).max())
        difference = float(np.abs(logits - self.reference).max()) / scale
        flips = int((logits.argmax(axis=1) != self.reference.argmax(axis=1)).sum())
        accuracy, before = (float((values.argmax(axis=1) == self.labels).mean()) for values in (logits, self.reference))
        images, reasons = len(self.labels), []
        if key.endswith("/fp32"):
            limit = f"logit {FLOAT_LIMIT:g}"
            if difference > FLOAT_LIMIT:
                reasons.append(f"a logit differs by {difference:.1e} of the largest ({limit})")
        else:
            # A single picture proves nothing.
            if (before - accuracy) * images > max(1.0, self.limits.accuracy_drop * images):
                reasons.append(f"accuracy falls by {before - accuracy:.2%} (limit {self.limits.accuracy_drop:.1%})")
            if flips > max(1.0, self.limits.flips * images):
                reasons.append(f"{flips} of {images} classes change (limit {self.limits.flips:.1%})")
        limit = f"logit {FLOAT_LIMIT:g}" if key.endswith("/fp32") else self.limits.for_classes()
        row = ParityRow(
            backend=key.replace("/", " ") + (" simulated" if key.startswith("tensorrt/") else ""),
            images=images,
            score_difference=difference,
            map_difference=0.0,
            flips=flips,
            auroc=None,
            accuracy=accuracy,
            distinct=float(len(np.unique(logits, axis=0)) / images),
            limit=limit,
            ok=not reasons,
        )
        return row, reasons


def export_classifier(run_path: Path, out: Path, options: ExportOptions | None = None) -> Manifest:
    """Export a classifier's run to a bundle folder `out` and return its manifest.

    Raises:
        GateError: parity or the INT8 guard failed and `allow_drop` is not set; no bundle is written.
        ArtefactError: the run is not finished or damaged, or a file has an operator that TensorRT cannot take.
        UsageError, MissingRequirementError, OutputError: see `errors`.
    """
    options = options or ExportOptions()
    check_requirements(options)
    torch.set_num_threads(usable_cpus())
    run, model = load_classifier(run_path)
    with new_folder(out, force=options.force) as folder:
        manifest, files = _build(run, model, out, options)
        write_bundle(folder, manifest, files)
    say_written(out, manifest, options)
    return manifest


def classifier_plan(run_path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Return what `export_classifier` would do, in words, without doing it."""
    from edge_anomaly_runtime.atomic import check_free

    check_requirements(options)
    run, _ = load_classifier(run_path)
    check_free(out, force=options.force)
    calibrated = f"calibrated on {options.calibration_images} pictures of {options.calibration or run.source}"
    return [
        f"{run_path}: ResNet-{run.config.depth} classifier, {len(run.config.classes)} classes, ONNX opset "
        f"{options.used_opset}",
        *([f"int8: {calibrated}"] if options.precision == "int8" else []),
        f"targets {', '.join(options.targets)}; compared on up to {_MAX_COMPARED} pictures: "
        f"{options.limits.for_classes()}",
        f"writes {out}",
    ]


def _build(
    run: ClassifierRun, model: Classifier, out: Path, options: ExportOptions
) -> tuple[Manifest, dict[str, bytes]]:
    data = open_class_data(run.source, run.preprocess, validation_share=run.validation, seed=run.config.seed)
    if data.classes != run.config.classes:
        raise UsageError(f"{run.source} has other classes than the model.", "Put the data back, or train again.")
    compared = _some(data.test or data.validation, options.seed)
    logits, _ = predict(model, compared)
    reference = logits.numpy().astype(np.float64)
    judge = ClassifierJudge(compared.pixels.numpy(), compared.labels.numpy(), reference, options.limits)
    size = run.config.image_size
    with stage("onnx"):
        names = OUTPUTS if run.config.features else OUTPUTS[:1]
        traced = onnx_from_detector(model, size, size, opset=options.used_opset, outputs=names)
        if options.tensorrt:
            cast_image_first(traced)
    graphs = Assembly(options, judge)
    graphs.add_float(traced)
    calibration = None
    if options.precision == "int8":
        images = _calibration_images(run, data, options)
        with stage("int8"), open_quantiser(traced, images, cache_folder(run.path), seed=options.seed) as quantiser:
            graphs.add_int8(quantiser, _unchanged)
            calibration = quantiser.record(graphs.float_tensors)
    rows, failures = judge.table(graphs.judged)
    say(classification_table(rows))
    gate(failures, options)
    if options.tensorrt:
        graphs.add_recipe(np.empty((0, size, size, 3), dtype=np.uint8), judge.pixels[:_GOLDEN])
    golden, golden_files = _golden(judge, run.config.classes, {key: partial(graphs.open, key) for key in graphs.keys})
    graphs.files.update(golden_files)
    grey = [float(picture.mean()) for picture in data.train.pixels.numpy()]
    parameters: dict[str, Any] = {**asdict(run.config), "opset": options.used_opset, "images": len(data.train)}
    if options.allow_drop:
        parameters["allow_drop"] = True
    kinds = len(run.config.classes)
    outputs = [OutputInfo(name="logits", role="logits", shape=(1, kinds))]
    if run.config.features:
        outputs.append(OutputInfo(name="features", role="features", shape=(1, VARIANTS[run.config.depth].features)))
    manifest = Manifest(
        schema=SCHEMA,
        name=out.name.removesuffix(".eab"),
        seq=int(time.time()),
        created_utc=now_utc(),
        precision=options.precision,
        model=ModelInfo(kind=KIND, parameters=parameters),
        input=InputContract(shape=(1, size, size, 3), preprocess=run.preprocess, brightness=(min(grey), max(grey))),
        outputs=tuple(outputs),
        graphs=graphs.keys,
        thresholds={},
        parity=tuple(rows),
        calibration=calibration,
        golden=tuple(golden),
        golden_tolerance=GOLDEN_TOLERANCE,
        training=run.data,
        versions=package_versions(),
        seed=run.config.seed,
        files={},
    )
    graphs.files["report/index.html"] = bundle_report(manifest, {}).encode()
    entries = {name: file_entry(content) for name, content in sorted(graphs.files.items())}
    return manifest.model_copy(update={"files": entries}), graphs.files


def classification_table(rows: Sequence[ParityRow]) -> str:
    """Return the table that the export prints."""
    lines = [f"{'parity':8}{'backend':25}{'max|Δlogit|':>12}{'classes change':>16}{'accuracy':>10}  limit"]
    for row in rows:
        lines.append(
            f"{'':8}{row.backend:25}{row.score_difference:12.1e}{f'{row.flips}/{row.images}':>16}"
            f"{row.accuracy or 0:10.2%}  {row.limit:32} {'ok' if row.ok else 'FAIL'}"
        )
    return "\n".join(lines)


def _unchanged(model: onnx.ModelProto, _: bool) -> onnx.ModelProto:
    """A classifier's head is trained, not fitted."""
    return model


def _some(images: LabeledImages, seed: int) -> LabeledImages:
    if len(images) <= _MAX_COMPARED:
        return images
    return images.chosen(np.sort(np.random.default_rng(seed).permutation(len(images))[:_MAX_COMPARED]))


def _calibration_images(
    run: ClassifierRun, data: ClassData, options: ExportOptions
) -> CalibrationImages | StratifiedImages:
    """Choose training pictures, as many of each class, or pictures of a folder; nothing is made anomalous."""
    if options.calibration is not None:
        paths = list_images([str(options.calibration)])
        return choose_calibration_images(
            paths, run.preprocess, count=options.calibration_images, synthetic_share=0.0, seed=options.seed
        )
    return StratifiedImages.choose(
        data.train.pixels.numpy(), data.train.labels.numpy(), count=options.calibration_images, seed=options.seed
    )


def _golden(
    judge: ClassifierJudge, classes: Sequence[str], sessions: Mapping[str, Callable[[], Session]]
) -> tuple[list[GoldenImage], dict[str, bytes]]:
    """Store pictures of different classes with what each graph said; the arrays in golden/maps.npz are logits."""
    _, first = np.unique(judge.labels, return_index=True)
    chosen = np.concatenate([first, np.setdiff1d(np.arange(len(judge.labels)), first)])[:_GOLDEN]
    logits: dict[str, npt.NDArray[np.float32]] = {}
    for key, open_session in sessions.items():
        session = open_session()
        rows = [session.run(judge.pixels[index][np.newaxis])["logits"][0] for index in chosen]
        session.close()
        logits[key] = np.stack(rows)
    files: dict[str, bytes] = {}
    entries = []
    for number, index in enumerate(chosen):
        buffer = io.BytesIO()
        Image.fromarray(judge.pixels[index]).save(buffer, "PNG")
        name = f"golden/{number:03}.png"
        files[name] = buffer.getvalue()
        entries.append(
            GoldenImage(
                file=name,
                preprocessed=True,
                scores={key: float(values[number].max()) for key, values in logits.items()},
                verdicts={key: classes[int(values[number].argmax())] for key, values in logits.items()},
            )
        )
    buffer = io.BytesIO()
    arrays = {key.replace("/", "-"): values for key, values in logits.items()}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return entries, {**files, GOLDEN_MAPS: buffer.getvalue()}
