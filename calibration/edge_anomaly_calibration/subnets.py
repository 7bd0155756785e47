"""FastFlow's subnets in INT8: what they make of one half of the channels; the flow itself stays float.

A coupling multiplies and shifts the other half by what its subnet says. The subnet clips at what normal images and
their synthetic anomalies reach; the features of an anomaly still go through the flow unclipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime

from .onnx_graph import replace_nodes, with_outputs

_FLOWS = "head/flows/"
_SMALLEST = float(np.finfo(np.float32).tiny)


def subnet_convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the convolutions of FastFlow's subnets; none in the graph of another detector."""
    return [node for node in model.graph.node if node.op_type == "Conv" and node.name.startswith(_FLOWS)]


def with_int8_subnets(model: onnx.ModelProto, images: Iterable[npt.NDArray[np.uint8]]) -> onnx.ModelProto:
    """Return a copy whose subnets are INT8, with ranges measured on the images; a graph without subnets as it is.

    Inputs unsigned and asymmetric, weights signed and per channel, biases in 32 bits. Results stay float, but for those
    that the next convolution of the subnet reads.
    """
    convolutions = subnet_convolutions(model)
    if not convolutions:
        return model
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    ranges = _ranges(model, sorted({node.input[0] for node in convolutions}), images)
    constants = {value.name: numpy_helper.to_array(value) for value in graph.graph.initializer}
    names = {node.name for node in convolutions}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, npt.NDArray[np.generic]] = {}
    scales: dict[str, np.float32] = {}
    for node in graph.graph.node:
        if node.name in names:
            source, weight, bias = node.input
            if source not in scales:
                scales[source], zero = _step_and_zero(*ranges[source])
                added |= {f"{source}:step": np.asarray(scales[source]), f"{source}:zero": np.asarray(zero)}
                step = [f"{source}:step", f"{source}:zero"]
                nodes.append(_node("QuantizeLinear", [source, *step], f"{source}:int8"))
                nodes.append(_node("DequantizeLinear", [f"{source}:int8", *step], f"{source}:rounded"))
            steps = _steps(constants[weight], constants[bias], scales[source])
            grid = np.rint(constants[weight] / steps.reshape(-1, 1, 1, 1)).astype(np.int8)
            bias_steps = steps * scales[source]
            whole_bias = np.rint(constants[bias].astype(np.float64) / bias_steps).astype(np.int32)
            for name, values, their_steps in ((weight, grid, steps), (bias, whole_bias, bias_steps)):
                zeros = np.zeros(len(values), dtype=values.dtype)
                added |= {f"{name}:int": values, f"{name}:steps": their_steps, f"{name}:zeros": zeros}
                inputs = [f"{name}:int", f"{name}:steps", f"{name}:zeros"]
                nodes.append(_node("DequantizeLinear", inputs, f"{name}:rounded", axis=0))
            node.input[:] = [f"{source}:rounded", f"{weight}:rounded", f"{bias}:rounded"]
        nodes.append(node)
    replace_nodes(graph, nodes, added)
    return graph


def _ranges(
    model: onnx.ModelProto, tensors: list[str], images: Iterable[npt.NDArray[np.uint8]]
) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of tensors over images, 0 included."""
    session = open_onnxruntime(with_outputs(model, tensors), threads=usable_cpus())
    ranges = dict.fromkeys(tensors, (0.0, 0.0))
    for image in images:
        for name, value in session.run(image[np.newaxis]).items():
            low, high = ranges[name]
            ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    session.close()
    return ranges


def _step_and_zero(low: float, high: float) -> tuple[np.float32, np.uint8]:
    step = max((high - low) / 255, _SMALLEST)
    return np.float32(step), np.uint8(round(-low / step))


def _steps(
    weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], input_step: np.float32
) -> npt.NDArray[np.float32]:
    """Return the step of each output channel's weights, float32 [out]; its bias is a 32-bit number of these steps."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    # A channel without weights may have a bias all the same.
    steps = np.maximum(largest / 127, np.abs(bias) / (2**30 * float(input_step)))
    rounded: npt.NDArray[np.float32] = np.maximum(steps, _SMALLEST / min(1.0, float(input_step))).astype(np.float32)
    return rounded


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{_FLOWS}{kind}/{output}", **attributes)
