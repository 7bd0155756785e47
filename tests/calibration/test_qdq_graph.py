"""Edits of quantised graphs: the file for TensorRT, residual branches, the order of the image's first nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_anomaly_calibration.qdq_graph import cast_image_first, float_main_branches, quantized_share
from edge_anomaly_calibration.quantize import emit_cpu_model, emit_trt_model, measure_ranges, prepare_float_model
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime

Frames = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def folder(float_model: onnx.ModelProto, frames: Frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trt")
    onnx.save(float_model, path / "float.onnx")
    prepare_float_model(path / "float.onnx", path / "prepared.onnx")
    measure_ranges(path / "prepared.onnx", frames, "frames", path / "ranges.json")
    return path


@pytest.fixture(scope="module")
def trt_model(folder: Path) -> onnx.ModelProto:
    return emit_trt_model(folder / "prepared.onnx", folder / "ranges.json")


def run(model: onnx.ModelProto, frames: Frames, output: str = "embedding") -> npt.NDArray[np.float32]:
    session = open_onnxruntime(model.SerializeToString(), threads=1, fuse=False)
    return np.concatenate([session.run(frame[np.newaxis])[output] for frame in frames])


def test_the_file_for_tensorrt_is_symmetric_and_has_no_quantised_bias(trt_model: onnx.ModelProto) -> None:
    stored = {value.name: numpy_helper.to_array(value) for value in trt_model.graph.initializer}
    pairs = [node for node in trt_model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 10
    assert all(stored[node.input[2]].dtype == np.int8 and not stored[node.input[2]].any() for node in pairs)
    weights = [node for node in trt_model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in stored]
    assert len(weights) == 5
    assert all(stored[node.input[0]].dtype == np.float32 for node in weights)
    biases = [node.input[2] for node in trt_model.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    assert all(stored[name].dtype == np.float32 for name in biases if name in stored)
    assert quantized_share(trt_model) == 1.0
    assert [(entry.domain, entry.version) for entry in trt_model.opset_import] == [("", 17)]
    onnx.checker.check_model(trt_model, full_check=True)


def test_the_main_branch_of_a_residual_add_is_float_and_the_skip_is_not(trt_model: onnx.ModelProto) -> None:
    add = next(node for node in trt_model.graph.node if node.op_type == "Add")
    producer = {output: node.op_type for node in trt_model.graph.node for output in node.output}
    assert [producer[name] for name in add.input] == ["DequantizeLinear", "Conv"]


def test_both_files_are_near_the_float_graph_and_each_other(
    float_model: onnx.ModelProto, trt_model: onnx.ModelProto, folder: Path, frames: Frames
) -> None:
    cpu_model = emit_cpu_model(folder / "prepared.onnx", folder / "ranges.json")
    expected = run(float_model, frames[:8])
    ratios = [
        10 * np.log10(np.square(expected).sum() / np.square(expected - run(model, frames[:8])).sum())
        for model in (cpu_model, trt_model)
    ]
    assert min(ratios) > 25
    assert abs(ratios[0] - ratios[1]) < 3


def test_the_second_file_needs_no_images_and_is_the_same_each_time(folder: Path, trt_model: onnx.ModelProto) -> None:
    again = emit_trt_model(folder / "prepared.onnx", folder / "ranges.json")
    assert again.SerializeToString() == trt_model.SerializeToString()


def quantised_add(*, gate: bool = False) -> onnx.ModelProto:
    """x -> A -> B -> Add(B, A's skip) or, as a gate, Add(B, Relu(B)); every input of the Add through Q and DQ."""
    names = iter("abcdefgh")
    constants = {"scale": np.float32(0.1), "zero": np.int8(0), "weight": np.ones((4, 4, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["A"], "backbone/A"),
        helper.make_node("Conv", ["A", "weight"], ["B"], "backbone/B"),
        helper.make_node("Relu", ["B"], ["R"], "backbone/R"),
    ]

    def rounded(tensor: str) -> str:
        name = next(names)
        nodes.append(helper.make_node("QuantizeLinear", [tensor, "scale", "zero"], [f"{name}q"], f"backbone/{name}q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}q", "scale", "zero"], [name], f"backbone/{name}"))
        return name

    other = rounded("R" if gate else "A")
    nodes.append(helper.make_node("Add", [rounded("B"), other], ["sum"], "backbone/Add"))
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    shape = [1, 4, 2, 2]
    graph = helper.make_graph(
        nodes,
        "add",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, shape)],
        values,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_of_two_convolutions_the_later_one_is_the_main_branch() -> None:
    model = quantised_add()
    float_main_branches(model)
    add = next(node for node in model.graph.node if node.op_type == "Add")
    assert list(add.input) == ["B", "a"]
    onnx.checker.check_model(model, full_check=True)


def test_a_convolution_that_the_other_input_is_computed_from_is_the_skip() -> None:
    model = quantised_add(gate=True)
    before = model.SerializeToString()
    float_main_branches(model)
    assert model.SerializeToString() == before


def test_the_image_is_cast_before_it_is_transposed(float_model: onnx.ModelProto, frames: Frames) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(float_model)
    cast_image_first(model)
    onnx.checker.check_model(model, full_check=True)
    first, second = model.graph.node[:2]
    assert (first.op_type, first.input[0], second.op_type) == ("Cast", "image", "Transpose")
    for output in ("score", "anomaly_map", "embedding"):
        assert np.array_equal(run(model, frames[:2], output), run(float_model, frames[:2], output))
