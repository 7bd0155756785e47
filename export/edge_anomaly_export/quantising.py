"""A traced detector becomes its INT8 files: ranges measured once, a graph per target, its head fitted anew."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from torch import nn

from edge_anomaly.detectors import DETECTORS
from edge_anomaly.runs import RECORD, Run, load_run
from edge_anomaly_calibration.bank import with_int8_bank
from edge_anomaly_calibration.equalize import equalize_channels
from edge_anomaly_calibration.qdq_graph import HEAD_PREFIX, quantized_share, with_float_tensors
from edge_anomaly_calibration.quantize import (
    METHOD,
    emit_cpu_model,
    emit_openvino_model,
    emit_trt_model,
    measure_ranges,
    prepare_float_model,
)
from edge_anomaly_calibration.rounding import round_weights
from edge_anomaly_calibration.selection import CalibrationImages, StratifiedImages, choose_calibration_images
from edge_anomaly_calibration.sensitivity import tensor_gains
from edge_anomaly_calibration.subnets import with_int8_subnets
from edge_anomaly_runtime.bundle import Calibration
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.images import file_sha256, list_images, read_images
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.session import Session

from .graph import EMBEDDING, only_output, with_head_arrays

_ROUNDING_IMAGES = 48
_RANKING_IMAGES = 6
# What brings less than this is not worth an INT8 layer.
_LEAST_GAIN_DB = 0.1

CPU, OPENVINO, TENSORRT = "cpu", "openvino", "tensorrt"
_EMITTERS = {CPU: emit_cpu_model, OPENVINO: emit_openvino_model, TENSORRT: emit_trt_model}


@dataclass
class Quantiser:
    """The float graph with channels equalized and weights on the INT8 grid, and the ranges of its tensors."""

    float_model: onnx.ModelProto
    float_file: Path
    ranges: Path
    images: CalibrationImages | StratifiedImages
    _emitted: dict[str, onnx.ModelProto] = field(default_factory=dict)
    _ranked: dict[str, list[str]] = field(default_factory=dict)

    def emit(self, family: str, float_tensors: Sequence[str] = ()) -> onnx.ModelProto:
        """Return the INT8 graph of a family, its head not yet fitted; some tensors may stay float."""
        if family not in self._emitted:
            self._emitted[family] = _EMITTERS[family](self.float_file, self.ranges)
        return with_float_tensors(self._emitted[family], self.float_model, float_tensors)

    def with_int8_head(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a fitted graph for CPUs with what of its head bears INT8: the search of a bank, the subnets of flows.

        Everything else in a head stays float: it clips at what normal images reach, so that every anomaly scores alike.
        """
        return with_int8_subnets(with_int8_bank(model), track(self.images, "subnets", self.images.count))

    def most_damaging(self, family: str) -> list[str]:
        """Return the tensors of an INT8 graph whose rounding costs signal, worst first."""
        if family not in self._ranked:
            shown = list(itertools.islice(self.images, _RANKING_IMAGES))
            gains = tensor_gains(self.emit(family), self.float_model, shown)
            say("Tensors that lose most by INT8 (signal to noise gained at the head if one stays float):")
            for name, gain in gains[:5]:
                say(f"  {gain:5.2f} dB  {name}")
            self._ranked[family] = [name for name, gain in gains if gain >= _LEAST_GAIN_DB]
        return self._ranked[family]

    def record(self, float_tensors: dict[str, tuple[str, ...]]) -> Calibration:
        """Return the manifest's entry."""
        return Calibration(
            method=METHOD,
            images=self.images.count,
            synthetic=len(self.images.synthetic),
            seed=self.images.seed,
            images_sha256=self.images.sha256(),
            float_model_sha256=file_sha256(self.float_file),
            float_tensors=float_tensors,
        )


@contextmanager
def open_quantiser(
    traced: onnx.ModelProto, images: CalibrationImages | StratifiedImages, cache: Path | None, *, seed: int
) -> Iterator[Quantiser]:
    """Prepare a traced graph for INT8; ranges are kept in the folder `cache`, so that the next export needs no images.

    Memory does not grow with the number of images: they are read one at a time.
    """
    damaged = f", {len(images.synthetic)} of them with a synthetic anomaly" if images.synthetic else ""
    say(f"calibrating on {images.count} images{damaged}")
    with tempfile.TemporaryDirectory() as scratch:
        traced_file, prepared, rounded = (Path(scratch) / f"{name}.onnx" for name in ("traced", "prepared", "rounded"))
        onnx.save(traced, traced_file)
        prepare_float_model(traced_file, prepared)
        equalized = equalize_channels(onnx.load(prepared), _first(images, "equalizing"), head_prefix=HEAD_PREFIX)
        shown = _first(images, "rounding weights")
        model = round_weights(equalized, shown, head_prefix=HEAD_PREFIX, seed=seed)
        onnx.save(model, rounded)
        kept = (cache or Path(scratch) / "calibration") / "ranges.json"
        measure_ranges(rounded, track(images, "calibrating", images.count), images.sha256(), kept)
        # A copy: another export of this run may measure on other images meanwhile.
        ranges = Path(shutil.copy(kept, Path(scratch) / "ranges.json"))
        quantiser = Quantiser(model, rounded, ranges, images)
        share = quantized_share(quantiser.emit(CPU))
        say(f"{share:.0%} of the backbone's convolutions and matrix products are INT8")
        yield quantiser


def calibration_images(run: Run, source: Path | None, *, count: int, seed: int) -> CalibrationImages:
    """Choose normal images to calibrate on: from another run or folder `source`, else those the run was fitted on.

    Raises:
        UsageError: there are none.
    """
    if source is None:
        present = [path for path in run.fit if path.exists()]
    elif (source / RECORD).exists():
        present = [path for path in load_run(source).fit if path.exists()]
    else:
        present = list_images([str(source)])
    if not present:
        raise UsageError(
            f"--precision int8 needs calibration images, and the training images of {source or run.path} are gone.",
            "Put them back, train again, or export with --precision fp32.",
        )
    return choose_calibration_images(present, run.preprocess, count=count, seed=seed)


def cache_folder(path: Path) -> Path | None:
    """Return where a run keeps its ranges; a read-only run does without."""
    return path / "calibration" if os.access(path, os.W_OK) else None


def fit_again(run: Run, head: nn.Module, graph: onnx.ModelProto, *, simulate: bool) -> onnx.ModelProto:
    """Fit the head on the graph's own features, so that systematic rounding error cancels; `head` is the trained one.

    With `simulate` the features come from the graph run as it is written, without the CPU's INT8 kernels: the file for
    TensorRT has the same numbers on any CPU that way.
    """
    detector = DETECTORS[run.kind]
    if detector.refit is None:
        return graph
    model = only_output(graph, EMBEDDING).SerializeToString()
    session = open_onnxruntime(model, threads=usable_cpus(), fuse=not simulate)
    paths = [path for path in run.fit if path.exists()]
    if len(paths) < len(run.fit):
        raise UsageError(
            f"{len(run.fit) - len(paths)} of the {len(run.fit)} images that {run.path} was fitted on are gone; INT8 "
            "needs all of them to fit the head again.",
            "Put them back, train again, or export with --precision fp32.",
        )
    kept = {name: getattr(head, name) for name in detector.keeps}
    arrays = detector.refit(run.config, _embeddings(session, paths, run.preprocess), **kept)
    session.close()
    return with_head_arrays(graph, arrays)


def _embeddings(session: Session, paths: Sequence[Path], spec: Preprocess) -> Iterator[npt.NDArray[np.float32]]:
    for _, image in track(read_images(paths, spec, bad=[], strict=True), "fitting", len(paths)):
        yield session.run(image[np.newaxis])[EMBEDDING]


def _first(images: CalibrationImages | StratifiedImages, what: str) -> Iterator[npt.NDArray[np.uint8]]:
    return track(itertools.islice(images, _ROUNDING_IMAGES), what, min(_ROUNDING_IMAGES, images.count))
