"""The lint for TensorRT: each rule finds its bad graph at its node, and good graphs pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_anomaly_export.trt_lint import Finding, findings_text, lint
from edge_anomaly_runtime.errors import UsageError
from tests.export import bad_graphs as graphs
from tests.export.bad_graphs import BAD, GOOD, BadGraph, Net

RULES = [f"TRT{number:03}" for number in range(1, 28)]
WARNINGS = {"TRT012", "TRT013", "TRT014", "TRT020", "TRT023", "TRT026", "TRT027"}


def codes(model: onnx.ModelProto, **options: Any) -> set[str]:
    return {finding.code for finding in lint(model, **options)}


def test_every_rule_has_a_bad_graph() -> None:
    assert sorted({bad.code for bad in BAD}) == RULES


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.code}-{bad.name}")
def test_a_bad_graph_breaks_its_rule_and_no_other(bad: BadGraph) -> None:
    findings = lint(bad.build(), **bad.options)
    assert {finding.code for finding in findings} == {bad.code}
    assert {finding.severity for finding in findings} == {"W" if bad.code in WARNINGS else "E"}
    said = [finding.what for finding in findings if finding.node == bad.node]
    assert any(bad.says in what for what in said), findings
    assert all(finding.fix.endswith(".") for finding in findings)


@pytest.mark.parametrize("version", ["8.5", "8.6.1", "10.3", "11"])
@pytest.mark.parametrize("build", GOOD.values(), ids=list(GOOD))
def test_a_good_graph_passes_on_every_version(build: Callable[[], onnx.ModelProto], version: str) -> None:
    model = build()
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
    assert lint(model, minimum_version=version) == []


def test_the_graph_is_left_as_it_was() -> None:
    model = graphs.quantised_head()
    before = model.SerializeToString()
    lint(model)
    assert model.SerializeToString() == before


# Quantisation


def test_one_bad_scale_among_many_is_found() -> None:
    scales = np.full(16, 0.002, np.float32)
    scales[7] = np.inf
    findings = lint(graphs.with_constant(f"{graphs.WEIGHT}_scale", scales))
    assert [(finding.code, finding.node) for finding in findings] == [
        ("TRT005", f"{graphs.WEIGHT}_QuantizeLinear"),
        ("TRT005", f"{graphs.WEIGHT}_DequantizeLinear"),
    ]
    assert "inf" in findings[0].what


@pytest.mark.parametrize("kind", [TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT8E4M3FN])
def test_types_without_a_numpy_type_are_refused(kind: int) -> None:
    model = graphs.good_detector(opset=21)
    (zero,) = (value for value in model.graph.initializer if value.name == f"{graphs.FIRST}_zero_point")
    zero.CopyFrom(helper.make_tensor(zero.name, kind, [], [0]))
    assert codes(model, minimum_version="11.0") == {"TRT003"}


def test_a_constant_node_is_no_computed_scale() -> None:
    model = graphs.good_detector()
    name = f"{graphs.FIRST}_scale"
    (scale,) = (value for value in model.graph.initializer if value.name == name)
    model.graph.initializer.remove(scale)
    model.graph.node.insert(0, helper.make_node("Constant", [], [name], "scale/Constant", value=scale))
    assert lint(model) == []
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], [name], "scale/Constant", value_float=-1.0))
    assert codes(model) == {"TRT005"}


@pytest.mark.parametrize(
    ("layer", "right"),
    [
        ("backbone/Depthwise", 0),
        ("backbone/ConvTranspose", 1),
        ("backbone/Gemm", 1),
        ("backbone/Gemm_2", 0),
        ("backbone/MatMul", 1),
    ],
)
def test_each_layer_has_its_own_weight_axis(layer: str, right: int) -> None:
    model = graphs.good_layers()
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        graphs.node_named(model, f"{layer}.weight_{kind}").attribute[0].i = 1 - right
    findings = lint(model)
    assert {(finding.code, finding.node) for finding in findings} == {
        ("TRT011", f"{layer}.weight_QuantizeLinear"),
        ("TRT011", f"{layer}.weight_DequantizeLinear"),
    }
    assert f"its output channel is axis {right}" in findings[0].what


def test_a_quantised_bias_without_a_zero_point_is_still_only_that() -> None:
    model = graphs.quantised_bias()
    del graphs.node_named(model, "bias_DequantizeLinear").input[2]
    assert codes(model) == {"TRT004"}


def test_an_axis_may_be_counted_from_the_end() -> None:
    assert lint(graphs.weight_along(-4)) == []
    assert codes(graphs.weight_along(-1)) == {"TRT011"}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_per_weight_tensor_needs_no_axis(shape: tuple[int, ...]) -> None:
    model = graphs.weight_along(3)
    graphs.replace_constant(model, f"{graphs.WEIGHT}_scale", np.full(shape, 0.002, np.float32))
    graphs.replace_constant(model, f"{graphs.WEIGHT}_zero_point", np.zeros(shape, np.int8))
    assert lint(model) == []


def test_of_two_convolutions_the_shallower_one_is_the_skip() -> None:
    findings = lint(graphs.good_projection(quantised_skip=False))
    assert [(finding.code, finding.node) for finding in findings] == [("TRT014", "backbone/block/Add")]


def two_equal_branches(quantised: tuple[bool, bool]) -> onnx.ModelProto:
    net = graphs.byte_net()
    data = net.pair(graphs.stem(net))
    branches = [net.conv(f"backbone/Conv_{index}", data) for index in range(2)]
    inputs = [net.pair(name) if chosen else name for name, chosen in zip(branches, quantised, strict=True)]
    return net.model(*graphs.head(net, net.node("backbone/Add", "Add", *inputs)))


@pytest.mark.parametrize(
    ("quantised", "good"),
    [((True, False), True), ((False, True), True), ((True, True), False), ((False, False), False)],
)
def test_of_two_equal_branches_either_may_be_the_skip(quantised: tuple[bool, bool], good: bool) -> None:
    assert codes(two_equal_branches(quantised)) == (set() if good else {"TRT014"})


@pytest.mark.parametrize("as_node", [False, True])
def test_an_addition_of_a_constant_is_no_residual_one(as_node: bool) -> None:
    net = graphs.byte_net()
    product = net.conv("backbone/Conv", net.pair(graphs.stem(net)))
    bias = net.weight("bias", 16, 1, 1)
    if as_node:
        bias = net.node("backbone/Constant", "Constant", value=net.initialisers.pop())
    total = net.node("backbone/Add", "Add", product, bias)
    assert lint(net.model(*graphs.head(net, total))) == []


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "group", "good"),
    [
        (16, 16, (1, 1), 1, True),
        (16, 17, (1, 3), 1, True),
        (16, 12, (3, 3), 1, True),
        (12, 16, (3, 3), 1, True),
        (16, 12, (1, 3), 1, False),
        (8, 8, (3, 3), 1, False),
        (20, 12, (3, 3), 1, False),
        (16, 16, (3, 3), 16, True),
        (16, 16, (3, 1), 16, False),
        (12, 12, (3, 3), 12, False),
    ],
)
def test_which_convolutions_are_too_small(
    inputs: int, outputs: int, kernel: tuple[int, int], group: int, good: bool
) -> None:
    net = Net(("image", TensorProto.FLOAT, [1, 16, 8, 8]))
    first = net.conv("backbone/Conv", net.pair("image"), outputs=inputs)
    weight = (outputs, inputs // group, *kernel)
    last = net.layer("backbone/Conv_2", "Conv", net.pair(first), weight, 0, group=group)
    assert codes(net.model(last)) == (set() if good else {"TRT020"})


def test_the_first_convolution_may_have_few_channels() -> None:
    net = Net(("image", TensorProto.FLOAT, [1, 8, 8, 8]))
    assert lint(net.model(net.conv("backbone/Conv", net.pair("image"), inputs=8, outputs=8))) == []


def test_rows_of_a_product_are_known_through_a_reshape() -> None:
    net = Net(("image", TensorProto.FLOAT, [1, 8, 8]))
    row = net.node("backbone/Reshape", "Reshape", "image", net.constant("shape", np.array([1, 64], np.int64)))
    findings = lint(net.model(net.layer("backbone/MatMul", "MatMul", net.pair(row), (64, 32), 1)))
    assert [(finding.code, finding.what) for finding in findings] == [
        ("TRT020", "a quantised product of 1 rows, 32 columns")
    ]


def test_a_convolution_with_a_computed_weight_is_not_quantised() -> None:
    net = Net(("image", TensorProto.FLOAT, [1, 16, 8, 8]), ("kernel", TensorProto.FLOAT, [16, 16, 3, 3]))
    result = net.node("backbone/Conv", "Conv", net.pair("image"), net.pair("kernel"))
    assert [(finding.code, finding.what) for finding in lint(net.model(result))] == [
        ("TRT020", "quantised, but its weight is computed")
    ]


def test_a_pair_between_two_head_nodes_is_found_at_both() -> None:
    net = Net(("image", TensorProto.FLOAT, [1, 16]))
    first = net.node("head/Relu", "Relu", "image")
    findings = lint(net.model(net.node("head/Tanh", "Tanh", net.pair(first))))
    assert [(finding.code, finding.node) for finding in findings] == [("TRT021", "head/Relu"), ("TRT021", "head/Tanh")]


def test_the_head_is_what_its_prefix_says() -> None:
    assert codes(graphs.quantised_head(), head_prefix="bank/") == set()


# Versions


@pytest.mark.parametrize(
    ("version", "newest"),
    [("8.5.2", 17), ("8.6", 17), ("10.0", 20), ("10.8", 20), ("10.9", 22), ("10.13.3", 24), ("11", 24)],
)
def test_the_newest_opset_depends_on_the_version(version: str, newest: int) -> None:
    assert lint(graphs.resizing(newest, mode="linear"), minimum_version=version) == []
    assert codes(graphs.resizing(newest + 1, mode="linear"), minimum_version=version) == {"TRT015"}


@pytest.mark.parametrize(("opset", "version", "good"), [(19, "10.0", True), (18, "10.0", False), (17, "8.6", False)])
def test_half_scales_need_opset_19_and_version_10(opset: int, version: str, good: bool) -> None:
    assert codes(graphs.half_net(opset), minimum_version=version) == (set() if good else {"TRT016"})


def test_layer_normalisation_came_with_version_8_6() -> None:
    assert lint(graphs.layer_normalisation(), minimum_version="8.6") == []


@pytest.mark.parametrize("version", ["8.4.3", "7", "ten", "10.x"])
def test_an_unusable_version_is_a_usage_error(version: str) -> None:
    with pytest.raises(UsageError, match=version):
        lint(graphs.good_detector(), minimum_version=version)


# Inputs, sizes, FP16


def test_an_initialiser_among_the_inputs_is_no_input() -> None:
    """ONNX before IR 4 lists every initialiser as an input, shape or no shape."""
    model = graphs.good_detector()
    model.graph.input.append(helper.make_tensor_value_info(graphs.WEIGHT, TensorProto.FLOAT, None))
    assert lint(model) == []


def test_an_input_without_a_shape_is_dynamic() -> None:
    net = Net(("image", TensorProto.FLOAT, [1, 3, 8, 8]))
    model = net.model(net.node("backbone/Relu", "Relu", "image"))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert [(finding.code, finding.what) for finding in lint(model)] == [("TRT022", "the input has no shape")]


def test_a_constant_of_just_64_mb_passes() -> None:
    model = graphs.large_bank()
    graphs.replace_constant(model, "bank", np.zeros((1024, 15625), np.float32))
    assert lint(model) == []


def test_without_fp16_squares_may_be_summed_anywhere() -> None:
    assert lint(graphs.squares("Mul"), fp16=False) == []


def test_the_head_is_kept_in_fp32() -> None:
    assert lint(graphs.squares("Pow", prefix="head")) == []


def test_a_head_in_fp16_by_its_types_is_found() -> None:
    model = graphs.squares("Pow", kind=TensorProto.FLOAT16, prefix="head")
    assert codes(model, fp16=False) == {"TRT027"}


@pytest.mark.parametrize(("operator", "good"), [("Softmax", True), ("Relu", False)])
def test_squares_of_normalised_values_may_be_summed(operator: str, good: bool) -> None:
    net = Net(("image", TensorProto.FLOAT, [1, 16, 8]))
    values = net.node("backbone/Transpose", "Transpose", net.node(f"backbone/{operator}", operator, "image"))
    model = net.model(net.node("backbone/ReduceSumSquare", "ReduceSumSquare", values, keepdims=0))
    assert codes(model) == (set() if good else {"TRT027"})


# Odd graphs


def test_a_node_without_a_name_is_called_by_its_output() -> None:
    model = graphs.non_zero()
    model.graph.node[0].name = ""
    assert lint(model)[0].node == "NonZero of head/NonZero:out"


def test_a_graph_that_onnx_cannot_infer_is_still_looked_at() -> None:
    model = graphs.with_constant(f"{graphs.FIRST}_zero_point", np.array(3, np.int8))
    graphs.node_named(model, "head/Sqrt").domain = "unheard.of"
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(model)
    assert codes(model) == {"TRT001", "TRT009"}


def test_a_very_deep_graph_needs_no_recursion() -> None:
    """3,000 residual blocks, one of them with its main branch quantised."""
    blocks = 3000
    assert blocks > sys.getrecursionlimit()
    net = Net(("image", TensorProto.FLOAT, [1, 16, 4, 4]))
    weight = net.pair(net.weight("weight", 16, 16, 1, 1), np.full(16, 0.002, np.float32), axis=0)
    data = "image"
    for index in range(blocks):
        skip = net.pair(net.node(f"backbone/{index}/Relu", "Relu", data))
        main = net.node(f"backbone/{index}/Conv", "Conv", skip, weight)
        data = net.node(f"backbone/{index}/Add", "Add", net.pair(main) if index == 2000 else main, skip)
    findings = lint(net.model(data))
    assert [(finding.code, finding.node) for finding in findings] == [("TRT014", "backbone/2000/Add")]


# Text


def test_text_groups_by_rule_and_cuts_long_lists() -> None:
    findings = [Finding("TRT001", "E", f"q{index}", f"the zero point is {index}", "Fix it.") for index in range(1, 6)]
    findings.append(Finding("TRT026", "W", "bank", "a constant of 65 MB", "Less."))
    assert findings_text(findings, per_rule=2).splitlines() == [
        "TRT001 error: q1: the zero point is 1",
        "TRT001 error: q2: the zero point is 2",
        "TRT001 error: and 3 more",
        "       fix: Fix it.",
        "TRT026 warning: bank: a constant of 65 MB",
        "       fix: Less.",
    ]
    assert findings_text([]) == ""
