"""`export` of a classifier: logits in place of scores, accuracy in place of AUROC, no thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from PIL import Image

from edge_anomaly.classifier import ClassData, Classifier, LabeledImages, open_class_data, predict
from edge_anomaly.prediction import Pixels
from edge_anomaly.resnet import VARIANTS
from edge_anomaly.train_classifier import KIND, ClassifierRun, load_classifier
from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_calibration.qdq_graph import cast_image_first
from edge_anomaly_calibration.selection import CalibrationImages, StratifiedImages, choose_calibration_images
from edge_anomaly_runtime.atomic import check_free, new_folder
from edge_anomaly_runtime.bundle import GoldenImage, Manifest, OutputInfo, ParityRow
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import GateError, UsageError
from edge_anomaly_runtime.images import list_images
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.session import Session

from .assembling import Assembly, stage
from .bundling import finish_bundle, gate, model_info, say_written
from .golden import store_golden
from .graph import onnx_from_detector
from .options import ExportOptions, check_requirements
from .parity import FLOAT_LIMIT, backend_name
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
        is_float = key.endswith("/fp32")
        limit = f"logit {FLOAT_LIMIT:g}" if is_float else self.limits.for_classes()
        if is_float:
            if difference > FLOAT_LIMIT:
                reasons.append(f"a logit differs by {difference:.1e} of the largest ({limit})")
        else:
            # A single picture proves nothing.
            if (before - accuracy) * images > max(1.0, self.limits.accuracy_drop * images):
                reasons.append(f"accuracy falls by {before - accuracy:.2%} (limit {self.limits.accuracy_drop:.1%})")
            if flips > max(1.0, self.limits.flips * images):
                reasons.append(f"{flips} of {images} classes change (limit {self.limits.flips:.1%})")
        row = ParityRow(
            backend=backend_name(key),
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
        GateError, ArtefactError, UsageError, MissingRequirementError, OutputError: as `exporting.export_run` does.
    """
    options = options or ExportOptions()
    check_requirements(options)
    torch.set_num_threads(usable_cpus())
    run, model = load_classifier(run_path)
    with new_folder(out, force=options.force) as folder:
        manifest = _build(run, model, folder, out.name, options)
    say_written(out, manifest, options)
    return manifest


def classifier_plan(run_path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Return what `export_classifier` would do, in words, without doing it."""
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


def _build(run: ClassifierRun, model: Classifier, folder: Path, name: str, options: ExportOptions) -> Manifest:
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
    kinds = len(run.config.classes)
    outputs = [OutputInfo(name="logits", role="logits", shape=(1, kinds))]
    if run.config.features:
        outputs.append(OutputInfo(name="features", role="features", shape=(1, VARIANTS[run.config.depth].features)))
    return finish_bundle(
        folder,
        name,
        graphs,
        model=model_info(KIND, asdict(run.config), options, images=len(data.train)),
        preprocess=run.preprocess,
        brightness=(min(grey), max(grey)),
        outputs=outputs,
        thresholds={},
        parity=rows,
        calibration=calibration,
        golden=golden,
        training=run.data,
        seed=run.config.seed,
        normal_scores={},
    )


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
    return store_golden(
        [(Image.fromarray(judge.pixels[index]), True) for index in chosen],
        scores={key: values.max(axis=1).tolist() for key, values in logits.items()},
        verdicts={key: [classes[index] for index in values.argmax(axis=1)] for key, values in logits.items()},
        arrays=logits,
    )
