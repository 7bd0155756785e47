"""Graphs that TensorRT refuses or misreads, a rule at a time, and good ones that differ from them as little as can be.

Every bad graph breaks one rule only. What NVIDIA's parser (TensorRT for RTX 1.7.1) says about it is written beside it:
where that is "builds", the lint is the only guard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Verdict = Literal["parser refuses", "builder refuses", "builds"]


@dataclass(frozen=True)
class BadGraph:
    """A graph that breaks the rule `code` at `node`, and what the lint must say about it."""

    code: str
    name: str
    build: Callable[[], onnx.ModelProto]
    node: str
    says: str
    nvidia: Verdict
    options: dict[str, Any] = field(default_factory=dict)


class Net:
    """A graph under construction; every method that adds a node returns the name of its output."""

    def __init__(self, *inputs: tuple[str, int, list[int | str]]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[TensorProto] = []
        self.inputs = [helper.make_tensor_value_info(*value) for value in inputs]
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: Array) -> str:
        self.initialisers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.normal(0, 0.1, shape).astype(np.float32))

    def node(self, name: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output, which is called like the node with `:out` behind."""
        self.nodes.append(helper.make_node(operator, inputs, [f"{name}:out"], name, **attributes))
        return f"{name}:out"

    def pair(self, tensor: str, scales: Array | None = None, zero: Array | None = None, **attributes: Any) -> str:
        """Quantise and dequantise a tensor, named as ONNX Runtime names it."""
        scales = np.array(0.05, np.float32) if scales is None else scales
        scale = self.constant(f"{tensor}_scale", scales)
        zero_point = self.constant(f"{tensor}_zero_point", np.zeros(scales.shape, np.int8) if zero is None else zero)
        quantised = self.node(f"{tensor}_QuantizeLinear", "QuantizeLinear", tensor, scale, zero_point, **attributes)
        return self.node(f"{tensor}_DequantizeLinear", "DequantizeLinear", quantised, scale, zero_point, **attributes)

    def layer(self, name: str, operator: str, data: str, shape: tuple[int, ...], axis: int, **attributes: Any) -> str:
        """Add a layer whose weight is quantised per output channel; `data` is quantised already."""
        weight = self.weight(f"{name}.weight", *shape)
        scales = np.full(shape[axis], 0.002, np.float32)
        return self.node(name, operator, data, self.pair(weight, scales, axis=axis), **attributes)

    def conv(self, name: str, data: str, outputs: int = 16, inputs: int = 16, kernel: int = 3, group: int = 1) -> str:
        shape = (outputs, inputs // group, kernel, kernel)
        return self.layer(name, "Conv", data, shape, 0, pads=[kernel // 2] * 4, group=group)

    def model(self, *outputs: str, opset: int = 17, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, values, self.initialisers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


# Good graphs


def stem(net: Net) -> str:
    """Add what every exported graph starts with, and a quantised first convolution: float [1, 16, 16, 16]."""
    pixels = net.node("backbone/Cast", "Cast", "image", to=TensorProto.FLOAT)
    planes = net.node("backbone/Transpose", "Transpose", pixels, perm=[0, 3, 1, 2])
    scaled = net.node("backbone/Mul", "Mul", planes, net.constant("backbone.scale", np.array(1 / 255, np.float32)))
    return net.node("backbone/stem/Relu", "Relu", net.conv("backbone/stem/Conv", net.pair(scaled), inputs=3))


def byte_net() -> Net:
    return Net(("image", TensorProto.UINT8, [1, 16, 16, 3]))


def head(net: Net, features: str) -> list[str]:
    """Add a distance to a mean: anomaly_map [1, 16, 16] and score [1]."""
    mean = net.weight("head.mean", 1, 16, 16, 16)
    difference = net.node("head/Sub", "Sub", features, mean)
    square = net.node("head/Mul", "Mul", difference, difference)
    axis = net.constant("head.axis", np.array([1], np.int64))
    distance = net.node("head/ReduceSum", "ReduceSum", square, axis, keepdims=0)
    anomaly_map = net.node("head/Sqrt", "Sqrt", distance)
    return [net.node("head/ReduceMax", "ReduceMax", anomaly_map, axes=[1, 2], keepdims=0), anomaly_map]


def good_detector(quantised_skip: bool = True, quantised_main: bool = False, opset: int = 17) -> onnx.ModelProto:
    """A residual backbone in INT8 and a float head that reads the backbone's float tensor."""
    net = byte_net()
    first = stem(net)
    skip = net.pair(first)
    inner = net.node("backbone/block/Relu", "Relu", net.conv("backbone/block/Conv", skip))
    main = net.conv("backbone/block/Conv_2", net.pair(inner))
    total = net.node(
        "backbone/block/Add", "Add", net.pair(main) if quantised_main else main, skip if quantised_skip else first
    )
    block = net.node("backbone/block/Relu_2", "Relu", total)
    last = net.node("backbone/last/Relu", "Relu", net.conv("backbone/last/Conv", net.pair(block)))
    return net.model(*head(net, last), opset=opset)


def good_projection(quantised_skip: bool = True) -> onnx.ModelProto:
    """A residual block whose skip is a convolution too, the shallower of the two, and quantised."""
    net = byte_net()
    first = net.pair(stem(net))
    skip = net.conv("backbone/block/Projection", first, kernel=1)
    inner = net.node("backbone/block/Relu", "Relu", net.conv("backbone/block/Conv", first))
    main = net.conv("backbone/block/Conv_2", net.pair(inner))
    inputs = (net.pair(skip), main) if quantised_skip else (skip, net.pair(main))
    return net.model(*head(net, net.node("backbone/block/Add", "Add", *inputs)))


def good_gate() -> onnx.ModelProto:
    """A convolution plus a gated branch of itself: the convolution is the skip, both inputs stay quantised."""
    net = byte_net()
    main = net.pair(net.conv("backbone/gate/Conv", net.pair(stem(net))))
    gate = net.node("backbone/gate/Sigmoid", "Sigmoid", net.conv("backbone/gate/Conv_2", main, kernel=1))
    return net.model(*head(net, net.node("backbone/gate/Add", "Add", main, net.pair(gate))))


def good_layers() -> onnx.ModelProto:
    """Every kind of quantised layer with the right weight axis, a depthwise convolution among them."""
    net = byte_net()
    depthwise = net.conv("backbone/Depthwise", net.pair(stem(net)), group=16)
    wider = net.node("backbone/Relu", "Relu", depthwise)
    up = net.layer("backbone/ConvTranspose", "ConvTranspose", net.pair(wider), (16, 24, 2, 2), 1, strides=[2, 2])
    flat = net.node("backbone/Flatten", "Flatten", net.node("backbone/Pool", "GlobalAveragePool", up))
    first = net.layer("backbone/Gemm", "Gemm", net.pair(flat), (24, 32), 1)
    second = net.layer("backbone/Gemm_2", "Gemm", net.pair(first), (48, 32), 0, transB=1)
    shape = net.constant("backbone.shape", np.array([4, 12], np.int64))
    rows = net.node("backbone/Reshape", "Reshape", second, shape)
    product = net.layer("backbone/MatMul", "MatMul", net.pair(rows), (12, 8), 1)
    return net.model(net.node("head/ReduceMean", "ReduceMean", product, keepdims=0))


def good_float() -> onnx.ModelProto:
    """No quantisation at all, and the operators at the edge of what is allowed."""
    net = Net(("image", TensorProto.FLOAT, [1, 4, 32, 32]))
    linear = resized(net, mode="linear", coordinate_transformation_mode="half_pixel")
    flat = net.node("head/Flatten", "Flatten", linear)
    lengths = net.node("head/ReduceL2", "ReduceL2", flat, axes=[1], keepdims=1)
    unit = net.node("head/Div", "Div", flat, lengths)
    squares = net.node("backbone/ReduceSumSquare", "ReduceSumSquare", unit, axes=[1], keepdims=0)
    return net.model(top_values(net, flat, 3840), squares)


GOOD: dict[str, Callable[[], onnx.ModelProto]] = {
    "detector": good_detector,
    "projection": good_projection,
    "gate": good_gate,
    "layers": good_layers,
    "float": good_float,
}


# Bad graphs: a good detector with one thing changed


def node_named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: dict[str, onnx.NodeProto] = {node.name: node for node in model.graph.node}
    return found[name]


def replace_constant(model: onnx.ModelProto, name: str, value: Array) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def with_constant(name: str, value: Array, opset: int = 17) -> onnx.ModelProto:
    model = good_detector(opset=opset)
    replace_constant(model, name, value)
    return model


FIRST = "backbone/Mul:out"
FIRST_PAIR = (f"{FIRST}_QuantizeLinear", f"{FIRST}_DequantizeLinear")
WEIGHT = "backbone/block/Conv.weight"


def without_zero_point() -> onnx.ModelProto:
    model = good_detector()
    for name in FIRST_PAIR:
        del node_named(model, name).input[2]
    return model


def computed_scale() -> onnx.ModelProto:
    model = good_detector()
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    model.graph.initializer.append(one)
    model.graph.node.insert(0, helper.make_node("Mul", [f"{FIRST}_scale", "one"], ["computed"], "scale/Mul"))
    for name in FIRST_PAIR:
        node_named(model, name).input[1] = "computed"
    return model


def quantised_bias() -> onnx.ModelProto:
    model = good_detector()
    bias = numpy_helper.from_array(np.arange(16, dtype=np.int32), "bias_quantized")
    zero = numpy_helper.from_array(np.zeros(16, np.int32), "bias_zero_point")
    model.graph.initializer.extend([bias, zero])
    inputs = ["bias_quantized", f"{WEIGHT}_scale", "bias_zero_point"]
    reader = helper.make_node("DequantizeLinear", inputs, ["bias"], "bias_DequantizeLinear", axis=0)
    model.graph.node.insert(0, reader)
    node_named(model, "backbone/block/Conv").input.append("bias")
    return model


def integer_weight() -> onnx.ModelProto:
    model = good_detector()
    writer = node_named(model, f"{WEIGHT}_QuantizeLinear")
    replace_constant(model, WEIGHT, np.full((16, 16, 3, 3), 5, np.int8))
    node_named(model, f"{WEIGHT}_DequantizeLinear").input[0] = WEIGHT
    model.graph.node.remove(writer)
    return model


def weight_along(axis: int) -> onnx.ModelProto:
    model = good_detector()
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        node_named(model, f"{WEIGHT}_{kind}").attribute[0].i = axis
    return model


def per_channel_activation() -> onnx.ModelProto:
    model = with_constant(f"{FIRST}_scale", np.full(3, 0.05, np.float32))
    replace_constant(model, f"{FIRST}_zero_point", np.zeros(3, np.int8))
    return model


def microsoft_pair() -> onnx.ModelProto:
    model = with_import("com.microsoft")
    for name in FIRST_PAIR:
        node_named(model, name).domain = "com.microsoft"
    return model


def with_import(domain: str) -> onnx.ModelProto:
    model = good_detector()
    model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def half_net(opset: int) -> onnx.ModelProto:
    """A quantised convolution in FP16 throughout."""
    net = Net(("image", TensorProto.FLOAT16, [1, 16, 8, 8]))
    weight = net.constant("weight", net.random.normal(0, 0.1, (16, 16, 3, 3)).astype(np.float16))
    data = net.pair("image", np.array(0.05, np.float16))
    net.node("backbone/Conv", "Conv", data, net.pair(weight, np.full(16, 0.002, np.float16), axis=0))
    return net.model("backbone/Conv:out", opset=opset, kind=TensorProto.FLOAT16)


# Bad graphs: other operators


def operator_instead(operator: str) -> onnx.ModelProto:
    """Integer arithmetic that is no Q/DQ pair."""
    net = Net(("image", TensorProto.FLOAT, [1, 16, 8, 8]))
    scale = net.constant("scale", np.array(0.05, np.float32))
    zero = net.constant("zero", np.array(0, np.int8))
    if operator == "DynamicQuantizeLinear":
        outputs = ["quantised", "scale_of_image", "zero_of_image"]
        net.nodes.append(helper.make_node(operator, ["image"], outputs, "backbone/DynamicQuantizeLinear"))
        return net.model("scale_of_image")
    data = net.node("image_QuantizeLinear", "QuantizeLinear", "image", scale, zero)
    weight = net.constant("weight", np.ones((16, 16, 3, 3), np.int8))
    if operator == "ConvInteger":
        sums = net.node("backbone/ConvInteger", "ConvInteger", data, weight)
        return net.model(net.node("backbone/Cast", "Cast", sums, to=TensorProto.FLOAT))
    product = net.node("backbone/QLinearConv", "QLinearConv", data, scale, zero, weight, scale, zero, scale, zero)
    number = net.node("image_DequantizeLinear", "DequantizeLinear", product, scale, zero)
    return net.model(net.node("backbone/Relu", "Relu", number))


def resized(net: Net, **attributes: Any) -> str:
    scales = net.constant("head.scales", np.array([1, 1, 2, 2], np.float32))
    return net.node("head/Resize", "Resize", "image", "", scales, **attributes)


def resizing(opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, [1, 4, 8, 8]))
    return net.model(resized(net, **attributes), opset=opset)


def top_values(net: Net, data: str, count: int) -> str:
    k = net.constant("head.k", np.array([count], np.int64))
    outputs = ["head/TopK:out", "head/TopK:1"]
    net.nodes.append(helper.make_node("TopK", [data, k], outputs, "head/TopK", axis=1))
    return outputs[0]


def large_top_k() -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, [1, 4096]))
    return net.model(top_values(net, "image", 3841))


def layer_normalisation() -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, [1, 4, 16]))
    scale = net.constant("backbone.weight", np.ones(16, np.float32))
    return net.model(net.node("backbone/LayerNormalization", "LayerNormalization", "image", scale))


def narrow_product() -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, [1, 4, 32]))
    return net.model(net.layer("backbone/MatMul", "MatMul", net.pair("image"), (32, 1), 1))


def small_conv() -> onnx.ModelProto:
    """Not aligned to 8 channels either way, and not the first layer."""
    net = Net(("image", TensorProto.FLOAT, [1, 16, 8, 8]))
    first = net.conv("backbone/Conv", net.pair("image"), outputs=12)
    return net.model(net.conv("backbone/Conv_2", net.pair(first), outputs=12, inputs=12))


def small_depthwise() -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, [1, 16, 8, 8]))
    return net.model(net.conv("backbone/Conv", net.pair("image"), kernel=1, group=16))


def needless_output_pair() -> onnx.ModelProto:
    """Quantised between a convolution and an activation that is not quantised."""
    net = byte_net()
    quantised = net.pair(net.conv("backbone/Conv", net.pair(stem(net))))
    return net.model(*head(net, net.node("backbone/Sigmoid", "Sigmoid", quantised)))


def quantised_head() -> onnx.ModelProto:
    """A bank of patches in INT8."""
    net = byte_net()
    flat = net.node("head/Flatten", "Flatten", stem(net), axis=2)
    return net.model(net.layer("head/MatMul", "MatMul", net.pair(flat), (256, 32), 1))


def quantised_tap() -> onnx.ModelProto:
    net = byte_net()
    tap = net.pair(stem(net))
    net.conv("backbone/next/Conv", tap)
    return net.model(*head(net, tap))


def quantised_output() -> onnx.ModelProto:
    net = byte_net()
    return net.model(net.pair(stem(net)))


def dynamic(*axes: int | str) -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, list(axes)))
    return net.model(net.node("backbone/Relu", "Relu", "image"))


def uncast_bytes() -> onnx.ModelProto:
    net = Net(("image", TensorProto.UINT8, [1, 8, 8, 3]))
    planes = net.node("backbone/Transpose", "Transpose", "image", perm=[0, 3, 1, 2])
    return net.model(net.node("backbone/Cast", "Cast", planes, to=TensorProto.FLOAT))


def non_zero() -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, [4, 4]))
    return net.model(net.node("head/NonZero", "NonZero", "image"), kind=TensorProto.INT64)


def suppression() -> onnx.ModelProto:
    net = Net(("boxes", TensorProto.FLOAT, [1, 8, 4]), ("scores", TensorProto.FLOAT, [1, 1, 8]))
    kept = net.node("head/NonMaxSuppression", "NonMaxSuppression", "boxes", "scores")
    return net.model(kept, kind=TensorProto.INT64)


def large_bank() -> onnx.ModelProto:
    net = Net(("image", TensorProto.FLOAT, [1, 1024]))
    bank = net.constant("bank", np.ones((1024, 15626), np.float32))
    return net.model(net.node("head/MatMul", "MatMul", "image", bank))


def squares(how: str, kind: int = TensorProto.FLOAT, prefix: str = "backbone") -> onnx.ModelProto:
    net = Net(("image", kind, [1, 1024]))
    axis = net.constant("axis", np.array([1], np.int64))
    if how == "ReduceL2":
        return net.model(net.node(f"{prefix}/ReduceL2", "ReduceL2", "image", axes=[1], keepdims=0), kind=kind)
    two = net.constant("two", np.array(2, helper.tensor_dtype_to_np_dtype(kind)))
    inputs = ("image", two) if how == "Pow" else ("image", "image")
    square = net.node(f"{prefix}/{how}", how, *inputs)
    return net.model(net.node(f"{prefix}/ReduceSum", "ReduceSum", square, axis, keepdims=0), kind=kind)


def _scale_of(value: float) -> Callable[[], onnx.ModelProto]:
    return partial(with_constant, f"{FIRST}_scale", np.array(value, np.float32))


def _zero_point_of(value: Array, opset: int = 17) -> Callable[[], onnx.ModelProto]:
    return partial(with_constant, f"{FIRST}_zero_point", value, opset)


_QUANTISER = FIRST_PAIR[0]
_OLD = {"minimum_version": "8.5"}

BAD = [
    BadGraph("TRT001", "zero point", _zero_point_of(np.array(3, np.int8)), _QUANTISER, "is 3", "parser refuses"),
    BadGraph("TRT002", "unsigned", _zero_point_of(np.array(0, np.uint8)), _QUANTISER, "UINT8", "builds"),
    BadGraph("TRT003", "int16", _zero_point_of(np.array(0, np.int16), 20), _QUANTISER, "INT16", "parser refuses"),
    BadGraph("TRT003", "uint16", _zero_point_of(np.array(0, np.uint16), 20), _QUANTISER, "UINT16", "parser refuses"),
    BadGraph("TRT004", "bias", quantised_bias, "bias_DequantizeLinear", "INT32", "parser refuses"),
    BadGraph("TRT005", "zero scale", _scale_of(0), _QUANTISER, "is 0.0", "parser refuses"),
    BadGraph("TRT005", "negative scale", _scale_of(-0.5), _QUANTISER, "is -0.5", "parser refuses"),
    BadGraph("TRT005", "NaN scale", _scale_of(np.nan), _QUANTISER, "is nan", "parser refuses"),
    BadGraph("TRT006", "no zero point", without_zero_point, _QUANTISER, "no zero point", "builds"),
    BadGraph("TRT007", "computed scale", computed_scale, _QUANTISER, "computed is computed", "builds"),
    *(
        BadGraph(
            "TRT008", name, partial(operator_instead, name), f"backbone/{name}", f"operator {name}", "parser refuses"
        )
        for name in ("QLinearConv", "ConvInteger", "DynamicQuantizeLinear")
    ),
    BadGraph("TRT009", "import", partial(with_import, "ai.onnx.ml"), "opset_import", "'ai.onnx.ml'", "builds"),
    BadGraph("TRT009", "domain", microsoft_pair, _QUANTISER, "'com.microsoft'", "builds"),
    BadGraph("TRT010", "activation", per_channel_activation, _QUANTISER, "has 3 scales", "builds"),
    BadGraph("TRT011", "Conv", partial(weight_along, 1), f"{WEIGHT}_QuantizeLinear", "axis 1 of a Conv", "builds"),
    BadGraph("TRT012", "int8 weight", integer_weight, f"{WEIGHT}_DequantizeLinear", WEIGHT, "builds"),
    BadGraph("TRT013", "after Conv", needless_output_pair, "backbone/Conv:out_QuantizeLinear", "for Sigmoid", "builds"),
    BadGraph(
        "TRT014",
        "both inputs",
        partial(good_detector, quantised_main=True),
        "backbone/block/Add",
        "quantised inputs: backbone/block/Conv_2:out_DequantizeLinear:out, backbone/stem",
        "builds",
    ),
    BadGraph(
        "TRT014", "no input", partial(good_detector, quantised_skip=False), "backbone/block/Add", "s: none", "builds"
    ),
    BadGraph(
        "TRT014",
        "main only",
        partial(good_detector, quantised_skip=False, quantised_main=True),
        "backbone/block/Add",
        "inputs: backbone/block/Conv_2:out_DequantizeLinear:out;",
        "builds",
    ),
    BadGraph(
        "TRT015",
        "opset 21",
        partial(resizing, 21, mode="linear"),
        "opset_import",
        "opset 21; TensorRT 10.0 reads up to 20",
        "builds",
    ),
    BadGraph("TRT016", "opset 17", partial(half_net, 17), "image_QuantizeLinear", "this is opset 17", "builds"),
    BadGraph("TRT017", "K 3841", large_top_k, "head/TopK", "K is 3841", "builder refuses"),
    BadGraph("TRT018", "cubic", partial(resizing, mode="cubic"), "head/Resize", "cubic", "builds"),
    BadGraph(
        "TRT018", "antialias", partial(resizing, 18, mode="linear", antialias=1), "head/Resize", "on", "parser refuses"
    ),
    BadGraph(
        "TRT019", "TensorRT 8.5", layer_normalisation, "backbone/LayerNormalization", "TensorRT 8.5", "builds", _OLD
    ),
    BadGraph("TRT020", "MatMul", narrow_product, "backbone/MatMul", "4 rows, 1 columns", "builds"),
    BadGraph("TRT020", "Conv", small_conv, "backbone/Conv_2", "12 channels in, 12 out", "builds"),
    BadGraph("TRT020", "depthwise", small_depthwise, "backbone/Conv", "16 groups", "builds"),
    BadGraph("TRT021", "bank", quantised_head, "head/MatMul", "head/MatMul.weight is quantised", "builds"),
    BadGraph("TRT022", "batch", partial(dynamic, "n", 3, 8, 8), "image", "axes [0]", "builder refuses"),
    BadGraph("TRT022", "height, width", partial(dynamic, 1, 3, "h", "w"), "image", "axes [2, 3]", "builder refuses"),
    BadGraph("TRT023", "tap", quantised_tap, "head/Sub", "backbone/stem/Relu:out after", "builds"),
    BadGraph(
        "TRT023",
        "output",
        quantised_output,
        "backbone/stem/Relu:out_DequantizeLinear:out",
        "comes from backbone/stem/Relu:out_DequantizeLinear",
        "builds",
    ),
    BadGraph("TRT024", "Transpose", uncast_bytes, "backbone/Transpose", "Transpose reads", "parser refuses"),
    BadGraph("TRT025", "NonZero", non_zero, "head/NonZero", "NonZero", "parser refuses"),
    BadGraph("TRT025", "NMS", suppression, "head/NonMaxSuppression", "NonMaxSuppression", "builder refuses"),
    BadGraph("TRT026", "bank", large_bank, "bank", "64 MB", "builds"),
    *(
        BadGraph("TRT027", how, partial(squares, how), f"backbone/{node}", "squares of image", "builds")
        for how, node in (("Mul", "ReduceSum"), ("Pow", "ReduceSum"), ("ReduceL2", "ReduceL2"))
    ),
]
