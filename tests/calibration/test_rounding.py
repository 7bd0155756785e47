"""Rounding of weights: on the grid of the quantiser, with less error on real inputs than the nearest step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_anomaly_calibration.quantize import emit_cpu_model, measure_ranges, prepare_float_model
from edge_anomaly_calibration.rounding import MAX_FAN_IN, _Layer, _patches, round_compensated, round_weights

Array = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]


def nearest(weight: Array) -> Array:
    step = np.abs(weight).max(axis=-1, keepdims=True) / 127
    return np.asarray(np.round(weight / step) * step)


def moment_of(inputs: Array) -> Array:
    return np.asarray(inputs.transpose(0, 2, 1) @ inputs)


def output_error(weight: Array, rounded: Array, inputs: Array) -> float:
    return float(np.square((weight - rounded) @ inputs.transpose(0, 2, 1)).sum())


def stored(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.float32]]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


# One layer


@pytest.mark.parametrize("seed", range(5))
def test_rounded_weights_lie_on_the_grid_of_their_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(3, 4, 9)) * rng.uniform(0.1, 10, (3, 4, 1))
    rounded = round_compensated(weight, moment_of(rng.normal(size=(3, 50, 9)) + 3))
    levels = rounded / (np.abs(weight).max(axis=-1, keepdims=True) / 127)
    assert np.abs(levels - np.round(levels)).max() < 1e-9
    assert np.abs(levels).max(axis=-1) == pytest.approx(127)
    assert (np.abs(rounded).argmax(axis=-1) == np.abs(weight).argmax(axis=-1)).mean() > 0.9


def test_the_largest_weight_of_each_row_keeps_its_value() -> None:
    weight = np.array([[[0.30, -1.27, 0.004], [2.54, 0.11, -0.5]]])
    rounded = round_compensated(weight, moment_of(np.random.default_rng(0).normal(size=(1, 20, 3)) + 1))
    assert rounded[0, 0, 1] == pytest.approx(-1.27)
    assert rounded[0, 1, 0] == pytest.approx(2.54)


def test_independent_inputs_are_rounded_to_the_nearest_step() -> None:
    weight = np.random.default_rng(1).normal(size=(2, 3, 8))
    moment = np.eye(8) * np.array([1.0, 7.0]).reshape(2, 1, 1)
    assert round_compensated(weight, moment) == pytest.approx(nearest(weight))


@pytest.mark.parametrize("k", [9, 32])
def test_correlated_inputs_lose_less_than_with_nearest_rounding(k: int) -> None:
    """Inputs after a ReLU have a common mean, along which rounding errors add up."""
    compensated, plain = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(4, 1, k))
        inputs = rng.normal(size=(4, 200, k)) * 0.3 + rng.normal(size=(4, 200, 1)) + 2
        rounded = round_compensated(weight, moment_of(inputs))
        compensated.append(output_error(weight, rounded, inputs))
        plain.append(output_error(weight, nearest(weight), inputs))
    assert sum(compensated) < 0.3 * sum(plain)
    assert sum(after < before for after, before in zip(compensated, plain, strict=True)) >= 9


def test_channels_that_are_always_zero_do_no_harm() -> None:
    weight = np.random.default_rng(2).normal(size=(1, 2, 4))
    inputs = np.random.default_rng(3).normal(size=(1, 50, 4))
    inputs[..., 1] = 0
    assert np.isfinite(round_compensated(weight, moment_of(inputs))).all()
    assert round_compensated(weight, np.zeros((1, 4, 4))) == pytest.approx(nearest(weight))
    assert not round_compensated(np.zeros((1, 2, 4)), moment_of(inputs)).any()


# A graph


@pytest.fixture(scope="module")
def rounded(float_model: onnx.ModelProto, frames: Frames) -> onnx.ModelProto:
    return round_weights(float_model, frames[:8], head_prefix="head/")


def test_only_the_convolutions_of_the_backbone_change(float_model: onnx.ModelProto, rounded: onnx.ModelProto) -> None:
    before, after = stored(float_model), stored(rounded)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"backbone/{name}/Conv.weight" for name in ("stem", "expand", "project", "down", "last")}
    for name in changed:
        step = np.abs(before[name]).max(axis=(1, 2, 3)).max() / 127
        assert 0 < np.abs(before[name] - after[name]).max() < 3 * step, name
    assert [node.name for node in rounded.graph.node] == [node.name for node in float_model.graph.node]


def test_rounding_is_repeatable_and_leaves_its_input_alone(float_model: onnx.ModelProto, frames: Frames) -> None:
    before = float_model.SerializeToString()
    first, second = (round_weights(float_model, iter(frames[:4]), head_prefix="head/", seed=3) for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()
    assert float_model.SerializeToString() == before


def test_the_quantiser_adds_no_error_of_its_own(rounded: onnx.ModelProto, frames: Frames, tmp_path: Path) -> None:
    onnx.save(rounded, tmp_path / "rounded.onnx")
    prepare_float_model(tmp_path / "rounded.onnx", tmp_path / "prepared.onnx")
    measure_ranges(tmp_path / "prepared.onnx", frames[:2], "frames", tmp_path / "ranges.json")
    int8, expected = stored(emit_cpu_model(tmp_path / "prepared.onnx", tmp_path / "ranges.json")), stored(rounded)
    for name in ("stem", "expand", "project", "down", "last"):
        weight = f"backbone/{name}/Conv.weight"
        scale = int8[f"backbone/{name}/Conv.weight_scale"].reshape(-1, 1, 1, 1)
        assert int8[f"{weight}_quantized"] * scale == pytest.approx(expected[weight], abs=1e-6), name


def test_patches_are_the_windows_that_the_convolution_sees() -> None:
    """Every one of them, and no other: groups, strides and padding on four sides are followed."""
    tensor = np.arange(1, 4 * 9 * 11 + 1, dtype=np.float32).reshape(4, 9, 11)
    layer = _Layer("x", "w", np.zeros((6, 2, 3, 2)), groups=2, strides=(2, 3), pads=(1, 0, 1, 2))
    padded = np.pad(tensor, ((0, 0), (1, 1), (0, 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), axis=(1, 2))[:, ::2, ::3]
    for group in range(2):
        channels = windows[2 * group : 2 * group + 2].transpose(1, 2, 0, 3, 4).reshape(-1, 12)
        expected = set(map(tuple, channels.tolist()))
        assert len(expected) == 5 * 4
        rng = np.random.default_rng(0)
        drawn = [tuple(row) for _ in range(5) for row in _patches(tensor, layer, rng)[group].tolist()]
        assert set(drawn) == expected


def test_a_large_fan_in_keeps_its_weights() -> None:
    channels = MAX_FAN_IN // 9 + 1
    weight = np.random.default_rng(5).normal(size=(2, channels, 3, 3)).astype(np.float32)
    expand = np.ones((channels, 3, 1, 1), np.float32)
    model = one_convolution(weight, expand)
    frames = np.random.default_rng(6).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(stored(round_weights(model, frames, head_prefix="head/"))["w"], weight)


def one_convolution(weight: npt.NDArray[np.float32], before: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """Bytes, a 1x1 convolution `before`, then the convolution under test and a head."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["t"], "backbone/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["x"], "backbone/Cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "before"], ["y"], "backbone/before"),
        helper.make_node("Conv", ["y", "w"], ["z"], "backbone/Conv"),
        helper.make_node("ReduceMax", ["z"], ["score"], "head/ReduceMax", keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 16, 16, 3])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(before, "before"), numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
