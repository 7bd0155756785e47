"""INT8 by explicit quantise/dequantise nodes: ranges are measured once, each target's file is emitted from them.

Only the backbone is quantised. A quantised head clips at what normal images reach, so that every image scores alike.
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
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from edge_anomaly_runtime.atomic import replace_file
from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.images import file_sha256

HEAD_PREFIX = "head/"

# Global MinMax: percentile and entropy clip by design, which is the wrong direction for anomalies.
METHOD = "minmax"

# Clip is ReLU6. Activations are listed so that the engine can fold them into the convolution's own requantisation.
_CPU_OPS = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "GlobalAveragePool", "Relu", "Clip"]
_REMOVABLE = ("Relu", "Clip")


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
    parts = {"method": METHOD, "float_model_sha256": file_sha256(float_model), "images_sha256": images_sha256}
    key = json.dumps(parts).encode()
    key_file = ranges.with_suffix(".key.json")
    if ranges.exists() and key_file.exists() and key_file.read_bytes() == key:
        return
    ranges.parent.mkdir(parents=True, exist_ok=True)
    ranges.unlink(missing_ok=True)
    key_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _emit(float_model, Path(scratch) / "measured.onnx", ranges, _Reader(images))
    replace_file(key_file, key)


def emit_cpu_model(float_model: Path, ranges: Path) -> onnx.ModelProto:
    """Return the file for OpenVINO and ONNX Runtime: unsigned asymmetric activations, signed weights per channel."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "int8.onnx"
        _emit(float_model, target, ranges, None)
        model = onnx.load(target)
    _float_taps(model, onnx.load(float_model))
    # The quantiser imports eight domains that no node uses; other parsers refuse them.
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def prepare_float_model(float_model: Path, prepared: Path) -> None:
    """Write the float graph with inferred shapes, as the quantiser wants it."""
    quant_pre_process(str(float_model), str(prepared), skip_symbolic_shape=True)


def head_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that stay float."""
    return [node.name for node in model.graph.node if node.name.startswith(HEAD_PREFIX)]


def quantized_share(model: onnx.ModelProto) -> float:
    """Return the share of the backbone's convolutions and matrix products whose input is dequantised INT8."""
    dequantised = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    heavy = [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and not node.name.startswith(HEAD_PREFIX)
    ]
    return sum(node.input[0] in dequantised for node in heavy) / max(1, len(heavy))


def _float_taps(model: onnx.ModelProto, float_model: onnx.ModelProto) -> None:
    """Let the head read the backbone's float tensors, as they are before they are quantised for the next layer.

    The quantiser sends every consumer to the dequantised copy. That costs signal, and OpenVINO pads such a copy with
    quantised zeros in the head's average pooling, which are not zero when the zero point is not.
    """
    producer = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name.startswith(HEAD_PREFIX):
            node.input[:] = [_float_source(name, producer) for name in node.input]
    for output in model.graph.output:
        if _float_source(output.name, producer) != output.name:
            raise EdgeAnomalyError(f"Graph output {output.name} comes from the backbone; it must come from the head.")
    _restore_activations(model, float_model)
    _remove_dead_nodes(model)


def _restore_activations(model: onnx.ModelProto, float_model: onnx.ModelProto) -> None:
    """Give a tap its activation back: the quantiser removes each ReLU and Clip whose work the next Q node does."""
    kept = {node.name for node in model.graph.node}
    removed = {
        node.output[0]: node for node in float_model.graph.node if node.op_type in _REMOVABLE and node.name not in kept
    }
    nodes: list[onnx.NodeProto] = []
    restored: dict[str, str] = {}
    constants: set[str] = set()
    for node in model.graph.node:
        if node.name.startswith(HEAD_PREFIX):
            for tap in [name for name in node.input if name in removed and name not in restored]:
                restored[tap] = f"{tap}:tap"
                activation = onnx.NodeProto()
                activation.CopyFrom(removed[tap])
                activation.input[0], activation.output[0] = tap, restored[tap]
                constants.update(activation.input[1:])
                nodes.append(activation)
            node.input[:] = [restored.get(name, name) for name in node.input]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    constants -= {value.name for value in model.graph.initializer}
    model.graph.initializer.extend(value for value in float_model.graph.initializer if value.name in constants)


def _float_source(tensor: str, producer: dict[str, onnx.NodeProto]) -> str:
    """Return the tensor that was quantised and dequantised to `tensor`, or `tensor` itself."""
    dequantise = producer.get(tensor)
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return tensor
    quantise = producer.get(dequantise.input[0])
    return tensor if quantise is None or quantise.op_type != "QuantizeLinear" else str(quantise.input[0])


def _remove_dead_nodes(model: onnx.ModelProto) -> None:
    needed = {output.name for output in model.graph.output}
    alive = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            alive.append(node)
    initialisers = [value for value in model.graph.initializer if value.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(alive))
    model.graph.initializer.extend(initialisers)


def _emit(float_model: Path, target: Path, ranges: Path, reader: _Reader | None) -> None:
    options: dict[str, Any] = {"CalibTensorRangeSymmetric": False}
    quantize_static(
        str(float_model),
        str(target),
        reader,
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=_CPU_OPS,
        nodes_to_exclude=head_nodes(onnx.load(float_model)),
        calibration_cache_path=str(ranges),
        extra_options=options,
    )
