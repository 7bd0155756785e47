"""The files for a device: refused where a rule is broken, said plainly where nothing could be checked."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edge_anomaly_export import tensorrt_target, trt_check
from edge_anomaly_export.tensorrt_target import check_tensorrt, say_unverified, tensorrt_files
from edge_anomaly_export.trt_check import CheckResult, ParserError
from edge_anomaly_runtime.errors import ArtefactError, GateError
from edge_anomaly_runtime.tensorrt_recipe import RECIPE, parse_recipe


def doubled(*, transpose_first: bool = False) -> onnx.ModelProto:
    """Bytes in, twice the numbers out; with `transpose_first` in the order that TensorRT refuses."""
    steps = ["Transpose", "Cast"] if transpose_first else ["Cast", "Transpose"]
    options: dict[str, dict[str, Any]] = {"Transpose": {"perm": [0, 3, 1, 2]}, "Cast": {"to": TensorProto.FLOAT}}
    graph = helper.make_graph(
        [
            helper.make_node(steps[0], ["image"], ["a"], f"backbone/{steps[0]}", **options[steps[0]]),
            helper.make_node(steps[1], ["a"], ["b"], f"backbone/{steps[1]}", **options[steps[1]]),
            helper.make_node("Mul", ["b", "two"], ["c"], "backbone/Mul"),
            helper.make_node("ReduceMax", ["c"], ["score"], "head/ReduceMax", axes=[1, 2, 3], keepdims=0),
        ],
        "doubled",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 4, 4, 3])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.asarray(2, dtype=np.float32), "two")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.fixture
def without_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_check, "is_installed", lambda: False)


def test_a_broken_rule_is_named_with_its_node_and_cure(without_nvidia: None) -> None:
    with pytest.raises(
        ArtefactError, match=r"model\.onnx breaks the rules .* 1 times; first TRT024 at backbone/Transpose"
    ) as raised:
        check_tensorrt("model.onnx", doubled(transpose_first=True), "10.0")
    assert "Cast" in raised.value.hint


def test_what_nvidia_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = CheckResult("1.7", errors=(ParserError("head/ReduceMax", "ReduceMax", "no such thing"),))
    monkeypatch.setattr(trt_check, "is_installed", lambda: True)
    monkeypatch.setattr(trt_check, "check_with_nvidia", lambda model: refusal)
    with pytest.raises(ArtefactError, match=r"(?s)refuses model\.onnx: .*no such thing"):
        check_tensorrt("model.onnx", doubled(), "10.0")


def test_without_nvidias_parser_the_line_says_so(without_nvidia: None, capsys: pytest.CaptureFixture[str]) -> None:
    check_tensorrt("model.onnx", doubled(), "10.0")
    line = capsys.readouterr().err
    assert "our rules for TensorRT 10.0 met" in line and "NVIDIA's parser not tried (extra trt-check)" in line


def test_the_recipe_packs_normal_images_up_to_a_limit(without_nvidia: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_target, "_MAX_NORMAL", 3)
    normal = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    files = tensorrt_files(
        {"fp32": ("model.onnx", doubled()), "fp16": ("model.onnx", doubled())},
        normal,
        normal[:2],
        version="8.6",
        opset=17,
        alpha_warn=0.05,
        alpha_fail=0.01,
    )
    recipe = parse_recipe(files[RECIPE])
    assert recipe.normal_images == tuple(f"tensorrt/normal-{index:03}.png" for index in range(3))
    for name, expected in zip(recipe.normal_images, normal, strict=False):
        with Image.open(io.BytesIO(files[name])) as picture:
            assert np.array_equal(np.asarray(picture), expected), "lossless"
    assert recipe.graphs["fp32"].weak == recipe.graphs["fp32"].strong == "model.onnx"
    assert recipe.graphs["fp16"].strong == "tensorrt/model.fp16.onnx" in files
    assert (recipe.opset, recipe.alpha_warn, recipe.alpha_fail, recipe.float_prefix) == (17, 0.05, 0.01, "head/")
    assert set(recipe.score_tolerance) == {"fp32", "fp16"}


def test_what_could_not_be_verified_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    say_unverified()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Not verified here, and where it will be:"
    assert len(lines) == 1 + len(tensorrt_target.UNVERIFIED)


def test_a_graph_that_computes_something_else_in_half_is_refused_unless_that_is_accepted(
    without_nvidia: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = doubled()
    next(value for value in wrong.graph.initializer if value.name == "two").CopyFrom(
        numpy_helper.from_array(np.asarray(3, dtype=np.float32), "two")
    )
    monkeypatch.setattr(tensorrt_target, "strongly_typed_fp16", lambda model: wrong)
    images = np.full((2, 4, 4, 3), 100, dtype=np.uint8)
    given: dict[str, Any] = {"version": "10.0", "opset": 17, "alpha_warn": 0.05, "alpha_fail": 0.01}
    with pytest.raises(GateError, match=r"tensorrt/model\.fp16\.onnx computes something else .* off by 50%"):
        tensorrt_files({"fp16": ("model.onnx", doubled())}, images, images, **given)
    assert tensorrt_files({"fp16": ("model.onnx", doubled())}, images, images, **given, allow_drop=True)
    assert "Accepted with --allow-drop: tensorrt/model.fp16.onnx" in capsys.readouterr().err


def test_a_check_that_was_stopped_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trt_check, "is_installed", lambda: True)
    monkeypatch.setattr(trt_check, "check_with_nvidia", lambda model: CheckResult(crash="was stopped after 120 s"))
    check_tensorrt("model.onnx", doubled(), "10.0")
    assert "NVIDIA's builder was stopped before it had ended" in capsys.readouterr().err
