"""Equal channel ranges: the same function in float, better use of the INT8 levels, no channel pushed into a Clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_anomaly_calibration.equalize import equalize_channels
from edge_anomaly_calibration.onnx_graph import with_outputs
from edge_anomaly_calibration.qdq_graph import HEAD_PREFIX
from edge_anomaly_calibration.quantize import emit_cpu_model, measure_ranges, prepare_float_model
from edge_anomaly_runtime.session import open_engine

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

UNEQUAL = np.geomspace(1, 50, 6)


@pytest.fixture(scope="module")
def frames() -> Frames:
    return np.random.default_rng(1).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


def chain(activation: str = "Relu", *, groups: int = 6, skip: bool = False) -> onnx.ModelProto:
    """bytes -> 1x1 convolution with channels up to 50 times apart -> activation -> 3x3 convolution -> head."""
    rng = np.random.default_rng(0)
    tensors = {
        "scale": np.array(1 / 255),
        "zero": np.array(0.0),
        "six": np.array(6.0),
        "first.weight": rng.normal(size=(6, 3, 1, 1)) / UNEQUAL.reshape(-1, 1, 1, 1) * 6,
        "first.bias": 2 / UNEQUAL,
        "second.weight": rng.normal(size=(6, 6 // groups, 3, 3)) * np.resize(UNEQUAL, (6, 1, 1, 1)),
        "second.bias": rng.normal(size=6),
    }
    middle = {"Relu": ["first"], "Clip": ["first", "zero", "six"], "": []}[activation]
    nodes = [
        helper.make_node("Transpose", ["image"], ["planes"], "backbone/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["float"], "backbone/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"], "backbone/Mul"),
        helper.make_node("Conv", ["scaled", "first.weight", "first.bias"], ["first"], "backbone/first"),
    ]
    tensor = "first"
    if middle:
        nodes.append(helper.make_node(activation, middle, ["active"], "backbone/activation"))
        tensor = "active"
    inputs = [tensor, "second.weight", "second.bias"]
    nodes.append(helper.make_node("Conv", inputs, ["second"], "backbone/second", pads=[1] * 4, group=groups))
    if skip:
        nodes.append(helper.make_node("Add", [tensor, "second"], ["sum"], "backbone/Add"))
    last = "sum" if skip else "second"
    nodes.append(helper.make_node("ReduceMean", [last], ["score"], "head/ReduceMean", axes=[1, 2, 3], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 16, 16, 3])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def run(model: onnx.ModelProto, frames: Frames, tensor: str) -> Floats:
    session = open_engine("onnxruntime", with_outputs(model, [tensor]))
    return np.concatenate([session.run(frame[np.newaxis])[tensor] for frame in frames])


def reach(model: onnx.ModelProto, frames: Frames, tensor: str) -> Floats:
    return np.asarray(np.abs(run(model, frames, tensor)).max(axis=(0, 2, 3)))


def equalized(model: onnx.ModelProto, frames: Frames) -> onnx.ModelProto:
    return equalize_channels(model, frames, head_prefix=HEAD_PREFIX)


@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
@pytest.mark.parametrize("activation", ["Relu", "Clip", ""])
def test_the_float_graph_computes_the_same(activation: str, groups: int, frames: Frames) -> None:
    model = chain(activation, groups=groups)
    expected, got = run(model, frames, "second"), run(equalized(model, frames), frames, "second")
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("activation", ["Relu", ""])
def test_every_channel_reaches_as_far_as_the_widest_one_did(activation: str, frames: Frames) -> None:
    model, tensor = chain(activation), "active" if activation else "first"
    before, after = reach(model, frames, tensor), reach(equalized(model, frames), frames, tensor)
    assert before.max() / before.min() > 10
    scaled = before * 16 >= before.max()  # no channel is scaled up by more than 16
    assert after[scaled] == pytest.approx(before.max(), rel=1e-3)


def test_no_channel_comes_near_the_clip(frames: Frames) -> None:
    model = chain("Clip")
    before, after = reach(model, frames, "active"), reach(equalized(model, frames), frames, "active")
    room = before < 4
    assert room.any() and (after[room] <= 4 + 1e-4).all()  # 6 / 1.5
    assert after[~room] == pytest.approx(before[~room])


def test_a_tensor_with_two_readers_is_left_alone(frames: Frames) -> None:
    model = chain(skip=True)
    stored = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    for value in equalized(model, frames).graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(value), stored[value.name])


def test_a_grouped_convolution_is_left_alone(frames: Frames) -> None:
    model = chain(groups=3)
    stored = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    for value in equalized(model, frames).graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(value), stored[value.name])


def test_the_given_graph_is_not_changed(frames: Frames) -> None:
    model = chain()
    before = model.SerializeToString()
    equalized(model, frames)
    assert model.SerializeToString() == before


def test_int8_loses_less_signal_afterwards(frames: Frames, tmp_path: Path) -> None:
    noise = {}
    for name, model in (("as is", chain()), ("equalized", equalized(chain(), frames))):
        onnx.save(model, tmp_path / "float.onnx")
        prepare_float_model(tmp_path / "float.onnx", tmp_path / "prepared.onnx")
        ranges = tmp_path / f"{name}.json"
        measure_ranges(tmp_path / "prepared.onnx", frames, name, ranges)
        int8 = emit_cpu_model(tmp_path / "prepared.onnx", ranges)
        expected, got = run(chain(), frames, "second"), run(int8, frames, "second")
        # Per channel, relative: the wide channels would hide the narrow ones.
        noise[name] = float((np.square(got - expected).mean((0, 2, 3)) / expected.var((0, 2, 3))).mean())
    assert noise["equalized"] < 0.5 * noise["as is"]
