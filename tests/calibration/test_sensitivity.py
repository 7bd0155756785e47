"""The ranking of tensors by what their rounding costs, and graphs in which some of them stay float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from edge_anomaly_calibration.qdq_graph import quantized_tensors, with_float_tensors
from edge_anomaly_calibration.quantize import emit_cpu_model, emit_trt_model, measure_ranges, prepare_float_model
from edge_anomaly_calibration.sensitivity import tensor_gains
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime

Frames = npt.NDArray[np.uint8]
READ_BY_CONVOLUTIONS = [
    "backbone/Mul:out",
    "backbone/stem/Relu:out",
    "backbone/expand/Clip:out",
    "backbone/residual/Add:out",
    "backbone/down/Relu:out",
]


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def int8_model(
    request: pytest.FixtureRequest,
    float_model: onnx.ModelProto,
    frames: Frames,
    tmp_path_factory: pytest.TempPathFactory,
) -> onnx.ModelProto:
    folder = tmp_path_factory.mktemp("sensitivity")
    onnx.save(float_model, folder / "float.onnx")
    prepare_float_model(folder / "float.onnx", folder / "prepared.onnx")
    measure_ranges(folder / "prepared.onnx", frames, "frames", folder / "ranges.json")
    emit = emit_cpu_model if request.param == "cpu" else emit_trt_model
    return emit(folder / "prepared.onnx", folder / "ranges.json")


def embedding(model: onnx.ModelProto, frames: Frames) -> npt.NDArray[np.float32]:
    session = open_onnxruntime(model.SerializeToString(), threads=1, fuse=False)
    return np.concatenate([session.run(frame[np.newaxis])["embedding"] for frame in frames])


def coarser(model: onnx.ModelProto, tensor: str, factor: float) -> onnx.ModelProto:
    """Return a copy that rounds one tensor to steps so many times larger."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    scales = {node.input[1] for node in copy.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == tensor}
    for value in copy.graph.initializer:
        if value.name in scales:
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) * np.float32(factor), value.name))
    return copy


def test_every_quantised_tensor_is_ranked(
    float_model: onnx.ModelProto, int8_model: onnx.ModelProto, frames: Frames
) -> None:
    ranking = tensor_gains(int8_model, float_model, list(frames[:4]))
    assert [name for name, _ in ranking] == sorted((name for name, _ in ranking), key=lambda name: -dict(ranking)[name])
    assert set(READ_BY_CONVOLUTIONS) <= {name for name, _ in ranking} == set(quantized_tensors(int8_model))


@pytest.mark.parametrize("tensor", READ_BY_CONVOLUTIONS)
def test_the_tensor_that_was_damaged_comes_first(
    float_model: onnx.ModelProto, int8_model: onnx.ModelProto, frames: Frames, tensor: str
) -> None:
    damaged = coarser(int8_model, tensor, 20)
    name, gain = tensor_gains(damaged, float_model, list(frames[:4]))[0]
    assert name == tensor
    assert gain > 3


def test_all_tensors_float_leave_at_most_the_rounding_of_weights(
    float_model: onnx.ModelProto, int8_model: onnx.ModelProto, frames: Frames
) -> None:
    expected = embedding(float_model, frames[:4])
    all_float = with_float_tensors(int8_model, float_model, quantized_tensors(int8_model))
    onnx.checker.check_model(all_float, full_check=True)
    noise, before = (
        float(np.square(embedding(model, frames[:4]) - expected).mean()) for model in (all_float, int8_model)
    )
    assert noise < 0.7 * before
    assert quantized_tensors(all_float) == []


def test_no_tensor_float_is_the_same_graph(float_model: onnx.ModelProto, int8_model: onnx.ModelProto) -> None:
    assert with_float_tensors(int8_model, float_model, []).SerializeToString() == int8_model.SerializeToString()


def test_ranking_changes_neither_graph(
    float_model: onnx.ModelProto, int8_model: onnx.ModelProto, frames: Frames, tmp_path: Path
) -> None:
    before = float_model.SerializeToString(), int8_model.SerializeToString()
    tensor_gains(int8_model, float_model, list(frames[:2]))
    assert (float_model.SerializeToString(), int8_model.SerializeToString()) == before


def test_the_order_of_the_heads_nodes_does_not_matter(
    float_model: onnx.ModelProto, int8_model: onnx.ModelProto, frames: Frames
) -> None:
    """Quantising sorts the nodes anew: with taps of different shapes the wrong ones would be compared."""
    reordered = onnx.ModelProto()
    reordered.CopyFrom(float_model)
    nodes = list(reordered.graph.node)
    first, second = (
        index
        for index, node in enumerate(nodes)
        if node.name.startswith("head/") and any(name.startswith("backbone/") for name in node.input)
    )
    nodes.insert(second, nodes.pop(first))
    del reordered.graph.node[:]
    reordered.graph.node.extend(nodes)
    onnx.checker.check_model(reordered)
    assert tensor_gains(int8_model, reordered, list(frames[:2])) == tensor_gains(
        int8_model, float_model, list(frames[:2])
    )
