"""Half precision: weights stored as FP16 for CPUs, and graphs that compute in FP16 for TensorRT from 11 on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, version_converter

from edge_anomaly_calibration.qdq_graph import HEAD_PREFIX, remove_dead_nodes
from edge_anomaly_runtime.errors import ArtefactError

# Scales of Q and DQ may be FP16 from this operator set on.
TYPED_OPSET = 19

_LARGEST = float(np.finfo(np.float16).max)
_LEAST_VALUES = 64
# A channel whose weights are nearly 0 has a smaller scale, which FP16 would make 0.
_LEAST_SCALE = 1e-6


def with_fp16_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose backbone keeps its weights as FP16 and computes in float: half the file, the same speed.

    The head stays as it is: a Gaussian's or a bank's numbers do not bear 11 bits.

    Raises:
        ArtefactError: a weight is too large for FP16.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    head = {name for node in copy.graph.node if node.name.startswith(HEAD_PREFIX) for name in node.input}
    casts = []
    for value in copy.graph.initializer:
        if value.data_type != onnx.TensorProto.FLOAT or value.name in head or np.prod(value.dims) < _LEAST_VALUES:
            continue
        name = value.name
        half = _half(numpy_helper.to_array(value), name)
        stored = f"{name}:fp16"
        value.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(
            onnx.helper.make_node("Cast", [stored], [name], f"backbone/weights/{name}", to=onnx.TensorProto.FLOAT)
        )
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    copy.graph.node.extend([*casts, *nodes])
    return copy


def strongly_typed_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose backbone computes in FP16, its Q and DQ nodes included; pixels, head and outputs stay float.

    TensorRT from 11 on takes every tensor's type from the graph. (The converters at hand make graphs of ours invalid
    where a node that stays float reads several tensors.)

    Raises:
        ArtefactError: a constant is too large for FP16.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(version_converter.convert_version(model, TYPED_OPSET) if _opset(model) < TYPED_OPSET else model)
    nodes = list(typed.graph.node)
    halved = {node.name for node in nodes if not node.name.startswith(HEAD_PREFIX)} - _pixel_nodes(typed)
    made = {output: node for node in nodes for output in node.output}
    constants = {value.name: value for value in typed.graph.initializer if value.data_type == onnx.TensorProto.FLOAT}
    added: dict[str, onnx.NodeProto] = {}
    result = []
    for node in nodes:
        for index, name in enumerate(node.input):
            wants_half = node.name in halved and not (node.op_type == "Resize" and index)  # scales of a Resize: float
            if name in constants and wants_half:
                is_scale = index == 1 and node.op_type in ("QuantizeLinear", "DequantizeLinear")
                node.input[index] = _half_constant(typed, constants[name], _LEAST_SCALE if is_scale else None)
            elif name in made and wants_half != (made[name].name in halved) and _is_float(made[name]):
                node.input[index] = f"{name}:{'fp16' if wants_half else 'fp32'}"
                if node.input[index] not in added:
                    added[node.input[index]] = cast = onnx.helper.make_node(
                        "Cast",
                        [name],
                        [node.input[index]],
                        f"{'backbone' if wants_half else 'head'}/cast/{node.input[index]}",
                        to=onnx.TensorProto.FLOAT16 if wants_half else onnx.TensorProto.FLOAT,
                    )
                    result.append(cast)
        result.append(node)
    del typed.graph.node[:], typed.graph.value_info[:]
    typed.graph.node.extend(result)
    remove_dead_nodes(typed)
    onnx.checker.check_model(typed, full_check=True)
    return typed


def _half_constant(model: onnx.ModelProto, value: onnx.TensorProto, least: float | None) -> str:
    """Return the name of a constant's copy in FP16, which is made at the first call."""
    name = f"{value.name}:fp16"
    if all(other.name != name for other in model.graph.initializer):
        array = numpy_helper.to_array(value)
        array = array if least is None else np.maximum(array, least)
        # Without bounds, Clip and masks hold the largest float; the largest FP16 means the same there.
        array = array if array.ndim else np.clip(array, -_LARGEST, _LARGEST)
        model.graph.initializer.append(numpy_helper.from_array(_half(array, value.name), name))
    return name


def _half(array: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float16]:
    if not (np.abs(array) <= _LARGEST).all():
        raise ArtefactError(f"{name} holds a number too large for FP16.", "Export with --precision fp32.")
    return np.asarray(array, dtype=np.float16)


def _is_float(node: onnx.NodeProto) -> bool:
    """Tell whether a node makes a float tensor: shapes, axes and INT8 values keep their types."""
    if node.op_type == "Constant":
        return any(value.name == "value" and value.t.data_type == onnx.TensorProto.FLOAT for value in node.attribute)
    return node.op_type not in ("QuantizeLinear", "Shape", "ArgMax", "ArgMin")


def _pixel_nodes(model: onnx.ModelProto) -> set[str]:
    """Return the nodes from the image's bytes to the first layer: mean and scale are applied as exactly as in float."""
    reached, names = {model.graph.input[0].name}, set()
    for node in model.graph.node:
        if node.op_type in ("Transpose", "Cast", "Sub", "Mul", "Div", "Add") and reached.intersection(node.input):
            reached.update(node.output)
            names.add(node.name)
    return names


def _opset(model: onnx.ModelProto) -> int:
    return int(next(entry.version for entry in model.opset_import if entry.domain == ""))
