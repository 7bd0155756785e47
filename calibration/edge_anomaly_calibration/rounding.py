"""Weights rounded to INT8 so that each layer's output on real images changes least, not each weight.

Rounding to the nearest step is what every quantiser does. In a layer with few inputs (a stem, a depthwise convolution)
the errors do not average out: on EfficientNet-Lite0 the first depthwise layer alone then costs about as much signal as
all layers together. Here each weight's rounding error is passed on to the weights that are not rounded yet, through
the inverse of the input's second moments (GPTQ, Frantar et al. 2023, after Optimal Brain Surgeon, Hassibi 1993).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edge_anomaly_runtime.session import open_engine

from .onnx_graph import with_outputs

Array = npt.NDArray[np.float64]

# Above this fan-in nearest rounding averages out, and the matrices grow with its square.
MAX_FAN_IN = 1152

_LEVELS = 127
_DAMPING = 1e-3
_PATCHES = 96


@dataclass(frozen=True)
class _Layer:
    """One convolution: `weight` [out, in per group, kh, kw], its groups, and how it walks over its input."""

    input: str
    weight_name: str
    weight: Array
    groups: int
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]

    @property
    def fan_in(self) -> int:
        return int(np.prod(self.weight.shape[1:]))


def round_weights(
    model: onnx.ModelProto, images: Iterable[npt.NDArray[np.uint8]], *, head_prefix: str, seed: int = 0
) -> onnx.ModelProto:
    """Return a copy whose convolution weights lie on the symmetric INT8 grid of their output channel.

    A later per-channel quantisation of these weights is exact. Nodes whose name starts with `head_prefix` and layers
    with a fan-in above MAX_FAN_IN keep their weights. Memory does not grow with the number of images.
    """
    layers = [layer for layer in _layers(model, head_prefix) if layer.fan_in <= MAX_FAN_IN]
    moments = _input_moments(model, layers, images, np.random.default_rng(seed))
    rounded = {layer.weight_name: _round_layer(layer, moment) for layer, moment in zip(layers, moments, strict=True)}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.initializer:
        if value.name in rounded:
            value.CopyFrom(numpy_helper.from_array(rounded[value.name].astype(np.float32), value.name))
    return copy


def round_compensated(weight: Array, moment: Array) -> Array:
    """Round rows of weights to multiples of their largest value / 127 so that the error in `weight @ x` is small.

    `weight`: [groups, rows, k]; `moment`: [groups, k, k], the sum of x x^T over inputs x. The largest weight of each
    row keeps its value, so that the grid can be found again from the result.
    """
    k = weight.shape[-1]
    step = np.maximum(np.abs(weight).max(axis=-1), 1e-12) / _LEVELS
    largest = np.abs(weight).argmax(axis=-1)
    damping = _DAMPING * np.trace(moment, axis1=1, axis2=2) / k + 1e-9  # 1e-9: a channel that is always zero
    inverse = np.linalg.inv(moment + damping[:, np.newaxis, np.newaxis] * np.eye(k))
    upper = np.linalg.cholesky(inverse).transpose(0, 2, 1)
    rest, result = weight.copy(), np.empty_like(weight)
    for i in range(k):
        levels = np.clip(np.round(rest[..., i] / step), -_LEVELS, _LEVELS)
        levels = np.where(largest == i, np.sign(weight[..., i]) * _LEVELS, levels)
        result[..., i] = levels * step
        error = (rest[..., i] - result[..., i]) / upper[:, np.newaxis, i, i]
        rest[..., i + 1 :] -= error[..., np.newaxis] * upper[:, np.newaxis, i, i + 1 :]
    return result


def _round_layer(layer: _Layer, moment: Array) -> Array:
    rows = layer.weight.shape[0] // layer.groups
    grouped = layer.weight.reshape(layer.groups, rows, layer.fan_in)
    return round_compensated(grouped, moment).reshape(layer.weight.shape)


def _layers(model: onnx.ModelProto, head_prefix: str) -> list[_Layer]:
    weights = {value.name: value for value in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or node.name.startswith(head_prefix) or node.input[1] not in weights:
            continue
        options: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if any(dilation != 1 for dilation in options.get("dilations", [1])):
            continue
        found.append(
            _Layer(
                input=node.input[0],
                weight_name=node.input[1],
                weight=numpy_helper.to_array(weights[node.input[1]]).astype(np.float64),
                groups=options.get("group", 1),
                strides=tuple(options.get("strides", (1, 1))),
                pads=tuple(options.get("pads", (0, 0, 0, 0))),
            )
        )
    return found


def _input_moments(
    model: onnx.ModelProto,
    layers: Sequence[_Layer],
    images: Iterable[npt.NDArray[np.uint8]],
    rng: np.random.Generator,
) -> list[Array]:
    """Sum x x^T over random patches of every layer's input: one [groups, k, k] per layer."""
    session = open_engine("onnxruntime", with_outputs(model, sorted({layer.input for layer in layers})))
    moments = [np.zeros((layer.groups, layer.fan_in, layer.fan_in)) for layer in layers]
    for image in images:
        tensors = session.run(image[np.newaxis])
        for layer, moment in zip(layers, moments, strict=True):
            patches = _patches(tensors[layer.input][0], layer, rng)
            moment += patches.transpose(0, 2, 1) @ patches
    session.close()
    return moments


def _patches(tensor: npt.NDArray[np.float32], layer: _Layer, rng: np.random.Generator) -> Array:
    """Return random inputs of the layer's kernel from [C, H, W], as [groups, patches, k]."""
    top, left, bottom, right = layer.pads
    padded = np.pad(tensor, ((0, 0), (top, bottom), (left, right)))
    height, width = layer.weight.shape[2:]
    rows = rng.integers(0, (padded.shape[1] - height) // layer.strides[0] + 1, _PATCHES) * layer.strides[0]
    columns = rng.integers(0, (padded.shape[2] - width) // layer.strides[1] + 1, _PATCHES) * layer.strides[1]
    y = rows[:, np.newaxis, np.newaxis] + np.arange(height)[:, np.newaxis]
    x = columns[:, np.newaxis, np.newaxis] + np.arange(width)
    patches = padded[:, y, x].transpose(1, 0, 2, 3)  # [patches, C, kh, kw]
    return patches.reshape(_PATCHES, layer.groups, layer.fan_in).transpose(1, 0, 2).astype(np.float64)
