"""INT8 graphs: what is quantised and what is not, ranges that are measured once, engines that agree."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_anomaly_calibration import quantize
from edge_anomaly_calibration.qdq_graph import head_nodes, quantized_share
from edge_anomaly_calibration.quantize import emit_cpu_model, measure_ranges, prepare_float_model
from edge_anomaly_runtime.cpu import int8_instructions
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.engine_openvino import open_openvino
from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.session import open_engine

Frames = npt.NDArray[np.uint8]
Q, DQ = "QuantizeLinear", "DequantizeLinear"

# INT8 kernels for CPUs without dot products saturate, which costs signal; `reference` runs every node as written.
DOT_PRODUCTS = bool(int8_instructions()) and "ONEDNN_MAX_CPU_ISA" not in os.environ
LEAST_DECIBELS = 25 if DOT_PRODUCTS else 15
ENGINES = ["reference", "openvino", "onnxruntime"]


def quantised(model: onnx.ModelProto, frames: Frames, folder: Path) -> onnx.ModelProto:
    onnx.save(model, folder / "float.onnx")
    prepare_float_model(folder / "float.onnx", folder / "prepared.onnx")
    measure_ranges(folder / "prepared.onnx", frames, "frames", folder / "ranges.json")
    return emit_cpu_model(folder / "prepared.onnx", folder / "ranges.json")


@pytest.fixture(scope="module")
def folder(float_model: onnx.ModelProto, frames: Frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds float.onnx, prepared.onnx, ranges.json and its key."""
    path = tmp_path_factory.mktemp("quantised")
    quantised(float_model, frames, path)
    return path


@pytest.fixture(scope="module")
def int8_model(folder: Path) -> onnx.ModelProto:
    return emit_cpu_model(folder / "prepared.onnx", folder / "ranges.json")


@pytest.fixture(scope="module")
def int8_activation_tap_model(
    activation_tap_model: onnx.ModelProto, frames: Frames, tmp_path_factory: pytest.TempPathFactory
) -> onnx.ModelProto:
    return quantised(activation_tap_model, frames, tmp_path_factory.mktemp("activation"))


def exploding() -> Iterator[Frames]:
    raise AssertionError("the images were read")
    yield


def values(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.generic]]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def head_inputs(model: onnx.ModelProto) -> dict[str, list[str]]:
    return {node.name: list(node.input) for node in model.graph.node if node.name.startswith("head/")}


def run(model: onnx.ModelProto, engine: str, frames: Frames, output: str) -> npt.NDArray[np.float64]:
    data = model.SerializeToString()
    session = open_onnxruntime(data, threads=1, fuse=False) if engine == "reference" else open_engine(engine, data)
    return np.concatenate([session.run(frame[np.newaxis])[output] for frame in frames]).astype(np.float64)


def decibels(expected: npt.NDArray[np.float64], got: npt.NDArray[np.float64]) -> float:
    return float(10 * np.log10(np.square(expected).sum() / max(np.square(expected - got).sum(), 1e-30)))


# What is quantised


def test_the_head_stays_float_and_reads_float_taps(float_model: onnx.ModelProto, int8_model: onnx.ModelProto) -> None:
    """The very tensors of the float graph: also the tap that is quantised for the next convolution."""
    assert head_inputs(int8_model) == head_inputs(float_model)
    assert head_nodes(int8_model) == [
        "head/AveragePool",
        "head/AveragePool_2",
        "head/Concat",
        "head/Conv",
        "head/Sub",
        "head/ReduceL2",
        "head/ReduceMax",
    ]
    producer = {output: node.name for node in int8_model.graph.node for output in node.output}
    assert producer["backbone/residual/Add:out"] == "backbone/residual/Add"
    assert producer["backbone/last/Conv:out"] == "backbone/last/Conv"


def test_no_quantise_node_stands_before_inside_or_behind_the_head(int8_model: onnx.ModelProto) -> None:
    consumers: dict[str, list[str]] = {}
    for node in int8_model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node.name)
    quantising = [node for node in int8_model.graph.node if node.op_type in (Q, DQ)]
    assert len(quantising) > 10
    assert {name.partition("/")[0] for node in quantising for name in [*node.input, *node.output]} == {"backbone"}
    readers = {reader for node in quantising for output in node.output for reader in consumers[output]}
    assert not [name for name in readers if name.startswith("head/")]
    assert values(int8_model)["head.projection"].dtype == np.float32


def test_activations_are_unsigned_and_weights_signed_per_channel(int8_model: onnx.ModelProto) -> None:
    stored = values(int8_model)
    quantisers = [node for node in int8_model.graph.node if node.op_type == Q]
    # Input, stem, expand, project, residual, down; the last convolution is read by the head alone.
    assert len(quantisers) == 6
    assert {stored[node.input[2]].dtype for node in quantisers} == {np.dtype(np.uint8)}
    convolutions = {node.name: node for node in int8_model.graph.node if node.op_type == "Conv"}
    dequantisers = {node.output[0]: node for node in int8_model.graph.node if node.op_type == DQ}
    for name, channels in {"stem": 8, "expand": 16, "project": 8, "down": 16, "last": 12}.items():
        convolution = convolutions[f"backbone/{name}/Conv"]
        weight = dequantisers[convolution.input[1]]
        assert stored[weight.input[0]].dtype == np.int8
        assert stored[weight.input[1]].shape == (channels,)
        assert not stored[weight.input[2]].any(), "weights are symmetric"
        assert helper.get_node_attr_value(weight, "axis") == 0
        assert stored[dequantisers[convolution.input[2]].input[0]].dtype == np.int32


def test_ranges_after_an_activation_start_at_zero(int8_model: onnx.ModelProto) -> None:
    """So that the engine folds the activation into the convolution; signed tensors keep both signs."""
    stored = values(int8_model)
    zero_points = {
        node.input[0]: int(stored[node.input[2]].item()) for node in int8_model.graph.node if node.op_type == Q
    }
    assert {name: zero_points[f"backbone/{name}:out"] for name in ("stem/Relu", "expand/Clip", "down/Relu")} == {
        "stem/Relu": 0,
        "expand/Clip": 0,
        "down/Relu": 0,
    }
    assert 50 < zero_points["backbone/project/Conv:out"] < 200
    assert 0 < zero_points["backbone/residual/Add:out"] < 200


def test_share_of_quantised_operations(float_model: onnx.ModelProto, int8_model: onnx.ModelProto) -> None:
    assert quantized_share(int8_model) == 1.0
    assert quantized_share(float_model) == 0.0
    partly = onnx.ModelProto()
    partly.CopyFrom(int8_model)
    last = next(node for node in partly.graph.node if node.name == "backbone/last/Conv")
    last.input[0] = "backbone/down/Relu:out"
    assert quantized_share(partly) == 0.8


def test_the_graph_is_self_contained_and_has_no_leftovers(int8_model: onnx.ModelProto) -> None:
    assert [(entry.domain, entry.version) for entry in int8_model.opset_import] == [("", 17)]
    onnx.checker.check_model(int8_model, full_check=True)
    read = {name for node in int8_model.graph.node for name in node.input}
    written = {output.name for output in int8_model.graph.output}
    assert all(set(node.output) & (read | written) for node in int8_model.graph.node)
    assert set(values(int8_model)) <= read
    assert not [value.name for value in int8_model.graph.initializer if value.external_data]
    assert [output.name for output in int8_model.graph.output] == ["score", "anomaly_map", "embedding"]


def test_an_output_that_is_computed_by_the_backbone_is_refused(frames: Frames, tmp_path: Path) -> None:
    """It would be a dequantised copy."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["t"], "backbone/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["c"], "backbone/Cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["c", "w"], ["embedding"], "backbone/Conv"),
        helper.make_node("ReduceMax", ["embedding"], ["score"], "head/ReduceMax", keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 16, 16, 3])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 4, 16, 16]),
        ],
        [numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    with pytest.raises(EdgeAnomalyError, match="Graph output embedding comes from the backbone"):
        quantised(model, frames, tmp_path)


# What comes out


@pytest.mark.parametrize("engine", ENGINES)
def test_int8_features_are_near_the_float_ones(
    float_model: onnx.ModelProto, int8_model: onnx.ModelProto, frames: Frames, engine: str
) -> None:
    expected = run(float_model, "reference", frames, "embedding")
    assert LEAST_DECIBELS < decibels(expected, run(int8_model, engine, frames, "embedding")) < 60


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_engines_agree_on_signed_taps_under_a_padded_pooling(
    int8_model: onnx.ModelProto, frames: Frames, engine: str
) -> None:
    """A tap behind Q/DQ made OpenVINO pad with quantised zeros, which stand for the lowest value: -1 dB."""
    for output in ("embedding", "anomaly_map", "score"):
        expected = run(int8_model, "reference", frames, output)
        assert decibels(expected, run(int8_model, engine, frames, output)) > LEAST_DECIBELS, output


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tap_behind_an_activation_keeps_its_activation(
    activation_tap_model: onnx.ModelProto, int8_activation_tap_model: onnx.ModelProto, frames: Frames, engine: str
) -> None:
    """The quantiser removes a ReLU or Clip and leaves its work to the next Q node, which a float tap goes round.

    Every ResNet layer ends in a ReLU.
    """
    expected = run(activation_tap_model, "reference", frames, "embedding")
    assert decibels(expected, run(int8_activation_tap_model, engine, frames, "embedding")) > LEAST_DECIBELS


def test_a_tap_behind_an_activation_is_float_too(int8_activation_tap_model: onnx.ModelProto) -> None:
    onnx.checker.check_model(int8_activation_tap_model, full_check=True)
    assert quantized_share(int8_activation_tap_model) == 1.0
    dequantised = {name for node in int8_activation_tap_model.graph.node if node.op_type == DQ for name in node.output}
    pools = [node for node in int8_activation_tap_model.graph.node if node.op_type == "AveragePool"]
    assert len(pools) == 2
    assert not [node.name for node in pools if node.input[0] in dequantised]


def test_every_backbone_convolution_runs_in_int8(int8_model: onnx.ModelProto) -> None:
    session = open_openvino(int8_model.SerializeToString(), weights=None, threads=1)
    assert session.executed_precisions() == {"u8": 5, "f32": 1}  # f32: the head's projection


# Ranges are measured once


def test_the_same_ranges_give_the_same_bytes(folder: Path, int8_model: onnx.ModelProto) -> None:
    again = emit_cpu_model(folder / "prepared.onnx", folder / "ranges.json")
    assert again.SerializeToString() == int8_model.SerializeToString()


def test_measuring_again_gives_the_same_ranges(folder: Path, frames: Frames, tmp_path: Path) -> None:
    again = tmp_path / "new" / "ranges.json"
    measure_ranges(folder / "prepared.onnx", iter(frames), "frames", again)
    assert json.loads(again.read_text()) == json.loads((folder / "ranges.json").read_text())


def test_ranges_hold_the_extremes_of_all_images(folder: Path, frames: Frames) -> None:
    """Minimum and maximum, not a percentile: what few images reach is what an anomaly looks like."""
    tensor = "backbone/Mul:out"
    entry = json.loads((folder / "ranges.json").read_text())["data"][tensor]
    lowest, highest = entry["lowest"]["data"][0], entry["highest"]["data"][0]
    assert lowest == pytest.approx((float(frames.min()) - 127.5) / 60, rel=1e-6)
    assert highest == pytest.approx((float(frames.max()) - 127.5) / 60, rel=1e-6)


def test_emission_needs_no_images(folder: Path, tmp_path: Path, int8_model: onnx.ModelProto) -> None:
    for name in ("prepared.onnx", "ranges.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    emitted = emit_cpu_model(tmp_path / "prepared.onnx", tmp_path / "ranges.json")
    assert emitted.SerializeToString() == int8_model.SerializeToString()


def test_nothing_is_measured_when_model_and_images_are_the_same(folder: Path) -> None:
    before = (folder / "ranges.json").stat().st_mtime_ns
    measure_ranges(folder / "prepared.onnx", exploding(), "frames", folder / "ranges.json")
    assert (folder / "ranges.json").stat().st_mtime_ns == before


@pytest.fixture
def measured(folder: Path, frames: Frames, tmp_path: Path) -> Path:
    """A folder of its own with prepared.onnx, measured on the first image with the hash `one`."""
    (tmp_path / "prepared.onnx").write_bytes((folder / "prepared.onnx").read_bytes())
    measure_ranges(tmp_path / "prepared.onnx", frames[:1], "one", tmp_path / "ranges.json")
    return tmp_path


def test_other_images_are_measured_again(folder: Path, measured: Path, frames: Frames) -> None:
    with pytest.raises(AssertionError, match="the images were read"):
        measure_ranges(measured / "prepared.onnx", exploding(), "all", measured / "ranges.json")
    measure_ranges(measured / "prepared.onnx", frames, "all", measured / "ranges.json")
    assert json.loads((measured / "ranges.json").read_text()) == json.loads((folder / "ranges.json").read_text())


def test_another_model_is_measured_again(measured: Path, frames: Frames) -> None:
    model = onnx.load(measured / "prepared.onnx")
    bias = next(value for value in model.graph.initializer if value.name == "backbone/stem/Conv.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(100), bias.name))
    onnx.save(model, measured / "prepared.onnx")
    measure_ranges(measured / "prepared.onnx", frames[:1], "one", measured / "ranges.json")
    entry = json.loads((measured / "ranges.json").read_text())["data"]["backbone/stem/Relu:out"]
    assert entry["highest"]["data"][0] > 100


@pytest.mark.parametrize("lost", ["ranges.json", "ranges.key.json"])
def test_half_a_cache_is_measured_again(measured: Path, lost: str) -> None:
    (measured / lost).unlink()
    with pytest.raises(AssertionError, match="the images were read"):
        measure_ranges(measured / "prepared.onnx", exploding(), "one", measured / "ranges.json")


@pytest.mark.parametrize("key", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_key_is_measured_again(measured: Path, frames: Frames, key: bytes) -> None:
    (measured / "ranges.key.json").write_bytes(key)
    measure_ranges(measured / "prepared.onnx", frames[:1], "one", measured / "ranges.json")
    assert json.loads((measured / "ranges.key.json").read_text())["images_sha256"] == "one"


def test_a_measurement_that_breaks_off_leaves_no_key(measured: Path, frames: Frames) -> None:
    def breaking() -> Iterator[Frames]:
        yield frames[0]
        raise OSError("the camera folder is gone")

    with pytest.raises(OSError, match="the camera folder is gone"):
        measure_ranges(measured / "prepared.onnx", breaking(), "all", measured / "ranges.json")
    for images_sha256 in ("one", "all"):
        with pytest.raises(AssertionError, match="the images were read"):
            measure_ranges(measured / "prepared.onnx", exploding(), images_sha256, measured / "ranges.json")


def test_ranges_without_their_new_key_are_measured_again(
    measured: Path, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the two files: the old key must not vouch for the new ranges."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            measure_ranges(measured / "prepared.onnx", frames, "all", measured / "ranges.json")
    with pytest.raises(AssertionError, match="the images were read"):
        measure_ranges(measured / "prepared.onnx", exploding(), "one", measured / "ranges.json")


# The float graph before it is quantised


def test_preparing_changes_no_number_and_keeps_one_file(
    float_model: onnx.ModelProto, folder: Path, frames: Frames
) -> None:
    prepared = onnx.load(folder / "prepared.onnx", load_external_data=False)
    assert not [value.name for value in prepared.graph.initializer if value.external_data]
    for output in ("score", "anomaly_map"):
        expected = run(float_model, "reference", frames[:4], output)
        assert run(prepared, "onnxruntime", frames[:4], output) == pytest.approx(expected, rel=1e-5)
    assert head_nodes(prepared) == head_nodes(float_model)
