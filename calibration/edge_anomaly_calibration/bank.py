"""PatchCore's search in INT8: one matrix product of rounded vectors, and distances that are exact between these.

What ruins an INT8 search is mixing: lengths of the true vectors with products of the rounded ones, whose difference is
then off by more than the distance to the nearest neighbour. Here both sides are rounded first, and |a|^2 + |b|^2 - 2ab
is taken of the rounded vectors throughout: every distance is a true one, between points moved by half a step at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_graph import replace_nodes

_BANK = "head.bank"
_SQUARES = "head.bank_squares"
_VECTORS_AXIS = "head.vectors_axis"
_ROUNDED = "head/bank/DequantizeLinear:out"
_LEVELS = 127
# Features of an anomaly reach beyond those of normal patches, of which the bank has the outermost; more only clips.
_HEADROOM = 2.0


def bank_search(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """Return PatchCore's convolution with its bank, if the graph has one and it is float."""
    return next((node for node in model.graph.node if node.op_type == "Conv" and node.input[1] == _BANK), None)


def with_int8_bank(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that searches PatchCore's bank in INT8; another detector's graph as it is.

    Takes the place of the convolution with `head.bank` float32 [vectors, channels, 1, 1], which holds -2b: patches are
    clipped and rounded with one symmetric scale, twice the bank's reach, vectors with a scale each. A matrix product,
    not a convolution: ONNX Runtime has no INT8 convolution with a float result.
    """
    convolution = bank_search(model)
    if convolution is None:
        return model
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    bank = -0.5 * next(numpy_helper.to_array(v)[:, :, 0, 0] for v in model.graph.initializer if v.name == _BANK)
    reach = np.float32(max(_HEADROOM * np.abs(bank).max(initial=0), np.finfo(np.float32).tiny * _LEVELS))
    steps = np.maximum(np.abs(bank).max(axis=1) / _LEVELS, np.finfo(np.float32).tiny).astype(np.float32)
    rounded = np.rint(bank / steps[:, np.newaxis]).astype(np.int8)
    lengths = np.square(rounded * steps[:, np.newaxis].astype(np.float64)).sum(axis=1)
    constants = {
        "head.reach_low": -reach,
        "head.reach_high": reach,
        "head.step": np.float32(reach / _LEVELS),
        "head.zero": np.int8(0),
        _BANK: np.ascontiguousarray(rounded.T),
        "head.bank_steps": -2 * steps,
        "head.bank_zeros": np.zeros(len(bank), dtype=np.int8),
        _SQUARES: lengths.astype(np.float32),
        _VECTORS_AXIS: np.array([3], dtype=np.int64),
    }
    patches = convolution.input[0]
    minimum = next(node for node in graph.graph.node if convolution.output[0] in node.input)
    step = ["head.step", "head.zero"]
    search = [
        # A step narrower than INT8, so that no optimiser takes it for nothing. It holds the rounding at this place:
        # OpenVINO 2026.4 moves one through Concat into Resize, before a convolution at least, and gets it wrong there.
        _node("Clip", [patches, "head.reach_low", "head.reach_high"], "head/bank/Clip"),
        _node("QuantizeLinear", ["head/bank/Clip:out", *step], "head/bank/QuantizeLinear"),
        _node("DequantizeLinear", ["head/bank/QuantizeLinear:out", *step], "head/bank/DequantizeLinear"),
        _node("Transpose", [_ROUNDED], "head/bank/Transpose", perm=[0, 2, 3, 1]),
        _node("DequantizeLinear", [_BANK, "head.bank_steps", "head.bank_zeros"], "head/bank/vectors", axis=1),
        _node("MatMul", ["head/bank/Transpose:out", "head/bank/vectors:out"], "head/bank/MatMul"),
        _node("Add", ["head/bank/MatMul:out", _SQUARES], "head/bank/Add"),
        _minimum_over_vectors(graph, "head/bank/Add:out", minimum.output[0]),
    ]
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if search and patches in node.input:  # the first reader
            nodes += search
            search = []
        if node.name not in (convolution.name, minimum.name):
            # The patches' own lengths: of the rounded ones, too.
            node.input[:] = [_ROUNDED if name == patches else name for name in node.input]
            nodes.append(node)
    replace_nodes(graph, nodes, constants)
    return graph


def _node(kind: str, inputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [f"{name}:out"], name=name, **attributes)


def _minimum_over_vectors(model: onnx.ModelProto, tensor: str, output: str) -> onnx.NodeProto:
    """Return the minimum over axis 3, which was an attribute before opset 18."""
    is_input = next(entry.version for entry in model.opset_import if entry.domain == "") >= 18
    axes: dict[str, Any] = {} if is_input else {"axes": [3]}
    inputs = [tensor, _VECTORS_AXIS] if is_input else [tensor]
    return helper.make_node("ReduceMin", inputs, [output], name="head/bank/ReduceMin", keepdims=0, **axes)
