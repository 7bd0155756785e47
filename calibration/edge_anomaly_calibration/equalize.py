"""Channels of unequal range made equal before they share one INT8 step (cross-layer equalization, Nagel et al. 2019).

An activation tensor has one scale. Where one of its channels reaches 6 and another 0.3, the second is left with 13 of
256 levels. Scaling a channel up in the convolution that makes it and down in the convolution that reads it changes
nothing in float: both directly after each other, and with a ReLU between. A Clip at 6 is crossed only as far as
the channel stays below it with room to spare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edge_anomaly_runtime.session import open_engine

from .onnx_graph import with_outputs

Floats = npt.NDArray[np.float64]

# An anomaly may reach further than any calibration image; below a Clip the channel keeps this much room.
_HEADROOM = 1.5
_MAX_SCALE = 16.0


@dataclass(frozen=True)
class _Pair:
    """A convolution, the tensor after its activation, and the only convolution that reads it."""

    first: onnx.NodeProto
    tensor: str
    second: onnx.NodeProto
    clip: float | None


def equalize_channels(
    model: onnx.ModelProto, images: Iterable[npt.NDArray[np.uint8]], *, head_prefix: str
) -> onnx.ModelProto:
    """Return a float graph that computes the same with channels of similar range; `images` uint8 [h, w, 3]."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {value.name: value for value in copy.graph.initializer}
    pairs = _pairs(copy, weights, head_prefix)
    reach = _channel_reach(model, sorted({pair.tensor for pair in pairs}), images)
    for pair in pairs:
        scale = _scale(reach[pair.tensor], pair.clip)
        for name in pair.first.input[1:]:
            values = numpy_helper.to_array(weights[name]).astype(np.float64)
            _replace(weights[name], values * scale.reshape(-1, *[1] * (values.ndim - 1)))
        name = pair.second.input[1]
        values = numpy_helper.to_array(weights[name]).astype(np.float64)
        # A depthwise convolution has its channels first, [channels, 1, kh, kw]; a dense one second.
        _replace(weights[name], values / scale.reshape(*((-1, 1) if values.shape[1] == 1 else (1, -1)), 1, 1))
    return copy


def _scale(reach: Floats, clip: float | None) -> Floats:
    """Return the factor of each channel, 1 or more: up to the widest channel, or as far as the Clip allows."""
    limit = float(reach.max()) if clip is None else clip / _HEADROOM
    return np.clip(limit / np.maximum(reach, 1e-12), 1.0, _MAX_SCALE)


def _pairs(model: onnx.ModelProto, weights: dict[str, onnx.TensorProto], head_prefix: str) -> list[_Pair]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    uses = {name: len(found) for name, found in readers.items()}
    pairs = []
    for first in model.graph.node:
        if not _is_plain(first, weights, uses) or first.name.startswith(head_prefix):
            continue
        tensor, clip = first.output[0], None
        after = readers.get(tensor, [])
        if len(after) == 1 and after[0].op_type in ("Relu", "Clip"):
            clip = None if after[0].op_type == "Relu" else float(numpy_helper.to_array(weights[after[0].input[2]]))
            tensor = after[0].output[0]
            after = readers.get(tensor, [])
        if len(after) != 1 or after[0].name.startswith(head_prefix) or not _is_plain(after[0], weights, uses):
            continue
        pairs.append(_Pair(first, tensor, after[0], clip))
    return pairs


def _is_plain(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], readers: dict[str, int]) -> bool:
    """Return whether the node is a dense or depthwise convolution whose weights nobody else reads."""
    if node.op_type != "Conv" or any(name not in weights or readers[name] != 1 for name in node.input[1:]):
        return False
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    outputs, inputs_per_group = weights[node.input[1]].dims[:2]
    return groups == 1 or (groups == outputs and inputs_per_group == 1)


def _channel_reach(
    model: onnx.ModelProto, tensors: list[str], images: Iterable[npt.NDArray[np.uint8]]
) -> dict[str, Floats]:
    """Return the largest absolute value of every channel over the images."""
    if not tensors:
        return {}
    session = open_engine("onnxruntime", with_outputs(model, tensors))
    reach: dict[str, Floats] = {}
    for image in images:
        for name, value in session.run(image[np.newaxis]).items():
            largest = np.abs(value[0]).max(axis=(1, 2)).astype(np.float64)
            reach[name] = np.maximum(reach.get(name, 0.0), largest)
    session.close()
    return reach


def _replace(value: onnx.TensorProto, array: Floats) -> None:
    value.CopyFrom(numpy_helper.from_array(array.astype(np.float32), value.name))
