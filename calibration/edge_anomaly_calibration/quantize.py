"""INT8 by explicit quantise/dequantise nodes: ranges are measured once, each target's file is emitted from them.

Only the backbone is quantised here; what of a head bears INT8 follows once it is fitted again (`bank`, `subnets`). A
head quantised as a whole clips at what normal images reach, so that every anomaly scores alike.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from edge_anomaly_runtime.atomic import replace_file
from edge_anomaly_runtime.images import file_sha256

from .qdq_graph import HEAD_PREFIX, drop_unused_domains, float_main_branches, float_taps, head_nodes

# Global MinMax: percentile and entropy clip by design, which is the wrong direction for anomalies.
METHOD = "minmax"

# Clip is ReLU6. Activations are listed so that the engine can fold them into the convolution's own requantisation.
_CPU_OPS = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "MaxPool", "GlobalAveragePool", "Relu", "Clip"]
_TRT_OPS = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Add"]
# Softmax, norms and GELU of a transformer do not bear 8 bits.
_MATRIX_OPS = ["Conv", "Gemm", "MatMul"]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds images one at a time; the base class wants a `get_next` that returns None at the end."""

    def __init__(self, images: Iterable[npt.NDArray[np.uint8]]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image[np.newaxis]}


def measure_ranges(
    float_model: Path, images: Iterable[npt.NDArray[np.uint8]], images_sha256: str, ranges: Path
) -> None:
    """Measure the range of every tensor over the images and store them as JSON, with a key beside them.

    ONNX Runtime refuses ranges of another method, but not those of another model or other images; the key does.
    Nothing is measured when `ranges` is there with the same key. Memory does not grow with the number of images.
    """
    parts = {
        "method": METHOD,
        "float_model_sha256": file_sha256(float_model),
        "images_sha256": images_sha256,
        "operations": [*_CPU_OPS, *_MATRIX_OPS],
        "onnxruntime": onnxruntime.__version__,
    }
    key = json.dumps(parts).encode()
    key_file = ranges.with_suffix(".key.json")
    if ranges.exists() and key_file.exists() and key_file.read_bytes() == key:
        return
    ranges.parent.mkdir(parents=True, exist_ok=True)
    ranges.unlink(missing_ok=True)
    key_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        options = _cpu_options(onnx.load(float_model))  # the longest list of operations: ranges for all emissions
        _quantize(float_model, Path(scratch) / "measured.onnx", ranges, _Reader(images), options)
    replace_file(key_file, key)


def emit_cpu_model(float_model: Path, ranges: Path) -> onnx.ModelProto:
    """Return the file for OpenVINO and ONNX Runtime: unsigned asymmetric activations, signed weights per channel."""
    return _emitted(float_model, ranges, _cpu_options(onnx.load(float_model)))


def emit_openvino_model(float_model: Path, ranges: Path) -> onnx.ModelProto:
    """Return a transformer for OpenVINO: symmetric activations, quantised where a matrix product reads them.

    OpenVINO runs attention in INT8 only where no zero point stands between its two products.
    """
    model = onnx.load(float_model)
    options = _symmetric_options(_MATRIX_OPS)
    return _emitted(float_model, ranges, {**options, "nodes_to_exclude": head_nodes(model)})


def emit_trt_model(float_model: Path, ranges: Path) -> onnx.ModelProto:
    """Return the file for TensorRT: every zero point 0, no quantised bias, one rounding fewer at each residual Add.

    Weights stay float with Q and DQ behind them, which the parsers of TensorRT 8.5 to 11 all read. On a CPU this file
    is slower than the float graph, and without VNNI instructions wrong: only a float simulation may judge it there.
    """
    model = _emitted(float_model, ranges, _trt_options(onnx.load(float_model)))
    float_main_branches(model)
    return model


def prepare_float_model(float_model: Path, prepared: Path) -> None:
    """Write the float graph with inferred shapes, as the quantiser wants it."""
    quant_pre_process(str(float_model), str(prepared), skip_symbolic_shape=True)


def _emitted(float_model: Path, ranges: Path, options: dict[str, Any]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "int8.onnx"
        _quantize(float_model, target, ranges, None, options)
        model = onnx.load(target)
    float_taps(model, onnx.load(float_model))
    drop_unused_domains(model)
    return model


def _quantize(float_model: Path, target: Path, ranges: Path, reader: _Reader | None, options: dict[str, Any]) -> None:
    quantize_static(
        str(float_model),
        str(target),
        reader,
        quant_format=QuantFormat.QDQ,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod.MinMax,
        calibration_cache_path=str(ranges),
        **options,
    )


def _cpu_options(model: onnx.ModelProto) -> dict[str, Any]:
    return {
        "activation_type": QuantType.QUInt8,
        "op_types_to_quantize": _MATRIX_OPS if is_transformer(model) else _CPU_OPS,
        "nodes_to_exclude": head_nodes(model),
        "extra_options": {"CalibTensorRangeSymmetric": False},
    }


def _trt_options(model: onnx.ModelProto) -> dict[str, Any]:
    options = _symmetric_options(_MATRIX_OPS if is_transformer(model) else _TRT_OPS)
    options["extra_options"] |= {"AddQDQPairToWeight": True, "DedicatedQDQPair": False}
    constants = {value.name for value in model.graph.initializer}
    # An Add of a constant is a bias or an embedding, not a residual.
    biases = [node.name for node in model.graph.node if node.op_type == "Add" and constants.intersection(node.input)]
    return {**options, "nodes_to_exclude": [*head_nodes(model), *biases, *_small_convolutions(model)]}


def _symmetric_options(operations: list[str]) -> dict[str, Any]:
    """Return options for signed activations without zero points, quantised at the inputs of these operations alone."""
    return {
        "activation_type": QuantType.QInt8,
        "op_types_to_quantize": operations,
        "extra_options": {
            "CalibTensorRangeSymmetric": False,  # as measured for the CPU file; made symmetric at emission
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": operations,
        },
    }


def is_transformer(model: onnx.ModelProto) -> bool:
    """Tell whether the backbone has attention: then only its matrix products are quantised."""
    return any(node.op_type == "Softmax" and not node.name.startswith(HEAD_PREFIX) for node in model.graph.node)


def _small_convolutions(model: onnx.ModelProto) -> list[str]:
    """Return convolutions that TensorRT runs no faster in INT8, by the rules of NVIDIA's Model Optimizer."""
    shapes = {value.name: list(value.dims) for value in model.graph.initializer}
    small, first = [], True
    for node in model.graph.node:
        if node.op_type != "Conv" or node.name.startswith(HEAD_PREFIX):
            continue
        if node.input[1] not in shapes:
            small.append(node.name)
            continue
        outputs, per_group, *kernel = shapes[node.input[1]]
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if (per_group < 16 or outputs < 16) and not (
            (
                groups == 1
                and (per_group % 8 == 0 or outputs % 8 == 0)
                and (first or per_group >= 16 or outputs >= 16)
                and len(set(kernel)) == 1
            )
            or (groups > 1 and outputs % 8 == 0 and min(kernel) >= 3)
        ):
            small.append(node.name)
        first = False
    return small
