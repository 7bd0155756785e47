"""A detector small enough to know by heart: a convolutional `backbone/` with two taps, a float `head/`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

_SIZE = 16
_CONVOLUTIONS = {  # name: (output channels, input channels, kernel)
    "backbone/stem/Conv": (8, 3, 3),
    "backbone/expand/Conv": (16, 8, 1),
    "backbone/project/Conv": (8, 16, 1),
    "backbone/down/Conv": (16, 8, 3),
    "backbone/last/Conv": (12, 16, 1),
}
_CHANNELS = {
    "backbone/residual/Add": 8,
    "backbone/expand/Clip": 16,
    "backbone/down/Relu": 16,
    "backbone/last/Conv": 12,
}


@pytest.fixture(scope="session")
def float_model() -> onnx.ModelProto:
    """Input `image` uint8 [1, 16, 16, 3]; outputs `score` [1], `anomaly_map` [1, 16, 16], `embedding` [1, 6, 16, 16].

    Both taps are linear, hence signed: `backbone/residual/Add` (a linear bottleneck with its skip connection), which
    the head and the next convolution read, and `backbone/last/Conv`. The head pools them over a zero-padded 3x3.
    """
    return _detector("backbone/residual/Add", "backbone/last/Conv")


@pytest.fixture(scope="session")
def activation_tap_model() -> onnx.ModelProto:
    """The same backbone, tapped where an activation ends a block, as in a ResNet: after a ReLU6 and after a ReLU."""
    return _detector("backbone/expand/Clip", "backbone/down/Relu")


def _detector(first_tap: str, second_tap: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    channels = sum(_CHANNELS[tap] for tap in (first_tap, second_tap))
    tensors = {
        "backbone.mean": np.full((1, 3, 1, 1), 127.5),
        "backbone.scale": np.full((1, 3, 1, 1), 1 / 60),
        "backbone.zero": np.array(0.0),
        "backbone.six": np.array(6.0),
        "head.projection": rng.normal(0, 0.3, (6, channels, 1, 1)),
        "head.mean": rng.normal(0, 0.3, (1, 6, 1, 1)),
    }
    for name, (outputs, inputs, kernel) in _CONVOLUTIONS.items():
        tensors[f"{name}.weight"] = rng.normal(0, (2 / (inputs * kernel**2)) ** 0.5, (outputs, inputs, kernel, kernel))
        tensors[f"{name}.bias"] = rng.normal(0, 0.5, outputs)
    nodes = [
        _node("backbone/Transpose", ["image"], perm=[0, 3, 1, 2]),
        _node("backbone/Cast", ["backbone/Transpose:out"], to=TensorProto.FLOAT),
        _node("backbone/Sub", ["backbone/Cast:out", "backbone.mean"]),
        _node("backbone/Mul", ["backbone/Sub:out", "backbone.scale"]),
        _convolution("backbone/stem/Conv", "backbone/Mul:out"),
        _node("backbone/stem/Relu", ["backbone/stem/Conv:out"]),
        _convolution("backbone/expand/Conv", "backbone/stem/Relu:out"),
        _node("backbone/expand/Clip", ["backbone/expand/Conv:out", "backbone.zero", "backbone.six"]),
        _convolution("backbone/project/Conv", "backbone/expand/Clip:out"),
        _node("backbone/residual/Add", ["backbone/stem/Relu:out", "backbone/project/Conv:out"]),
        _convolution("backbone/down/Conv", "backbone/residual/Add:out"),
        _node("backbone/down/Relu", ["backbone/down/Conv:out"]),
        _convolution("backbone/last/Conv", "backbone/down/Relu:out"),
        _pool("head/AveragePool", f"{first_tap}:out"),
        _pool("head/AveragePool_2", f"{second_tap}:out"),
        _node("head/Concat", ["head/AveragePool:out", "head/AveragePool_2:out"], axis=1),
        _node("head/Conv", ["head/Concat:out", "head.projection"], outputs=["embedding"]),
        _node("head/Sub", ["embedding", "head.mean"]),
        _node("head/ReduceL2", ["head/Sub:out"], outputs=["anomaly_map"], axes=[1], keepdims=0),
        _node("head/ReduceMax", ["anomaly_map"], outputs=["score"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, _SIZE, _SIZE, 3])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, [1, _SIZE, _SIZE]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 6, _SIZE, _SIZE]),
        ],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def frames() -> npt.NDArray[np.uint8]:
    """24 smooth random pictures, uint8 [24, 16, 16, 3]."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (24, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return np.asarray(np.clip(coarse + rng.normal(0, 10, coarse.shape), 0, 255), dtype=np.uint8)


def _node(
    name: str, inputs: list[str], *, outputs: list[str] | None = None, **attributes: int | list[int]
) -> onnx.NodeProto:
    operator = name.rpartition("/")[2].partition("_")[0]
    return helper.make_node(operator, inputs, outputs or [f"{name}:out"], name, None, None, None, **attributes)


def _convolution(name: str, tensor: str) -> onnx.NodeProto:
    kernel = _CONVOLUTIONS[name][2]
    return _node(
        name,
        [tensor, f"{name}.weight", f"{name}.bias"],
        kernel_shape=[kernel, kernel],
        pads=[kernel // 2] * 4,
    )


def _pool(name: str, tensor: str) -> onnx.NodeProto:
    return _node(name, [tensor], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
