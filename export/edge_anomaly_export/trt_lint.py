"""What TensorRT would refuse, or read wrongly without a word, in an ONNX graph: rules TRT001 to TRT027.

NVIDIA's newest parser accepts a good part of what these rules refuse (unsigned values read as signed ones, a wrong
weight axis), and the parsers on older devices refuse more than it does. So a "yes" of `trt_check` does not stand in
for this lint, nor the other way round.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_anomaly_runtime.errors import UsageError

Severity = Literal["E", "W"]
Shape = tuple[int | None, ...]

OLDEST_TENSORRT = (8, 5)
MAX_TOP_K = 3840
MAX_CONSTANT_BYTES = 64_000_000

# The newest opset that a TensorRT release reads, by the first release that does.
_OPSETS = (((8, 5), 17), ((10, 0), 20), ((10, 9), 22), ((10, 13), 24))

_DEFAULT_DOMAINS = ("", "ai.onnx")
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGER_OPS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
_DATA_DEPENDENT = ("NonZero", "NonMaxSuppression", "Unique", "Compress")
_SAME_VALUES = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_BOUNDED = (
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LpNormalization",
    "Sigmoid",
    "Softmax",
    "Tanh",
)
_INFERENCE_ELEMENTS = 1024


@dataclass(frozen=True)
class Finding:
    """One broken rule: severity E refuses the graph, W is reported.

    `node` is the node's name; where no node is at fault, that of the graph's input, output or constant.
    """

    code: str
    severity: Severity
    node: str
    what: str
    fix: str


def lint(
    model: onnx.ModelProto, *, minimum_version: str = "10.0", head_prefix: str = "head/", fp16: bool = True
) -> list[Finding]:
    """Return what is wrong with the graph for TensorRT from `minimum_version` on, rule by rule.

    `head_prefix`: nodes whose name starts so are the detector's head, which stays float. `fp16`: the engine may compute
    the rest in FP16, as an INT8 engine of TensorRT 10 does.

    Nodes inside If and Loop are not looked at: no exported detector has any.

    Raises:
        UsageError: `minimum_version` is no version, or older than 8.5.
    """
    graph = _Graph(model, _parse_version(minimum_version), head_prefix, fp16)
    return [finding for rule in _RULES for finding in rule(graph)]


def findings_text(findings: Sequence[Finding], *, per_rule: int = 3) -> str:
    """Return the findings for people, a rule at a time: up to `per_rule` nodes, how many more, and the fix."""
    groups: dict[tuple[str, Severity, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.code, finding.severity, finding.fix].append(finding)
    lines = []
    for (code, severity, fix), group in groups.items():
        kind = "error" if severity == "E" else "warning"
        lines += [f"{code} {kind}: {finding.node}: {finding.what}" for finding in group[:per_rule]]
        if len(group) > per_rule:
            lines.append(f"{code} {kind}: and {len(group) - per_rule} more")
        lines.append(f"{'':6} fix: {fix}")
    return "\n".join(lines)


class _Graph:
    """A graph with its edges, constants, element types and shapes looked up once."""

    def __init__(self, model: onnx.ModelProto, version: tuple[int, int], head_prefix: str, fp16: bool) -> None:
        self.model = model
        self.version = version
        self.head_prefix = head_prefix
        self.fp16 = fp16
        self.nodes: Sequence[onnx.NodeProto] = model.graph.node
        self.quantisers = [node for node in self.nodes if node.op_type in _QUANTISERS]
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in {name for name in node.input if name}:
                self.consumers[name].append(node)
        self.constants = {value.name: value for value in model.graph.initializer} | _constant_nodes(self.nodes)
        self.inputs = [value for value in model.graph.input if value.name not in self.constants]
        self.types, self.shapes = _types_and_shapes(model, self.constants)
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in _DEFAULT_DOMAINS), default=0)

    def array(self, name: str) -> npt.NDArray[Any] | None:
        """Return the value of a constant, or None for a tensor that is computed or absent."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def dequantiser(self, tensor: str) -> onnx.NodeProto | None:
        """Return the DequantizeLinear that makes the tensor, if one does."""
        node = self.producer.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def source(self, tensor: str) -> str:
        """Return what was quantised (and dequantised) to the tensor, or the tensor itself."""
        for kind in reversed(_QUANTISERS):
            node = self.producer.get(tensor)
            if node is not None and node.op_type == kind:
                tensor = node.input[0]
        return tensor

    def is_weight(self, quantiser: onnx.NodeProto) -> bool:
        """Tell whether the node quantises or dequantises a constant."""
        return self.source(quantiser.output[0]) in self.constants

    def users_of_quantised(self, quantiser: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that read what a QuantizeLinear writes, through its DequantizeLinear."""
        readers = [node for node in self.consumers[quantiser.output[0]] if node.op_type == "DequantizeLinear"]
        return [user for reader in readers for user in self.consumers[reader.output[0]]]

    def is_head(self, node: onnx.NodeProto | None) -> bool:
        """Tell whether the node computes something in the head; quantisers are named after tensors, not modules."""
        return node is not None and node.op_type not in _QUANTISERS and node.name.startswith(self.head_prefix)


# Quantisation: what the parser must not get


def _zero_points(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        zero = graph.array(_input(node, 2))
        if zero is not None and zero.any():
            what = f"the zero point is {zero[zero != 0].flat[0]}, and must be 0"
            yield _finding("TRT001", "E", node, what, "Quantise with ActivationSymmetric and WeightSymmetric.")


def _unsigned_values(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        if _zero_point_type(graph, node) == TensorProto.UINT8:
            what = "quantised to UINT8, which TensorRT reads as INT8"
            yield _finding("TRT002", "E", node, what, "Quantise with QInt8 for activations and weights.")


def _other_integers(graph: _Graph) -> Iterator[Finding]:
    known = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32)  # UINT8: TRT002, INT32: TRT004
    for node in graph.quantisers:
        kind = _zero_point_type(graph, node)
        if kind and kind not in known:
            what = f"quantised to {TensorProto.DataType.Name(kind)}"
            yield _finding("TRT003", "E", node, what, "Quantise with QInt8.")


def _quantised_biases(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        if _is_int32(graph, node):
            what = f"dequantises INT32 values ({node.input[0]}), a quantised bias"
            yield _finding("TRT004", "E", node, what, "Quantise with QuantizeBias=False.")


def _scales(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        scale = graph.array(_input(node, 1))
        if scale is None:
            continue
        wrong = scale[~(np.isfinite(scale) & (scale > 0))]
        if wrong.size:
            what = f"a scale is {wrong.flat[0]}; all must be finite and above 0"
            yield _finding("TRT005", "E", node, what, "Floor the scale, or calibrate with other images.")


def _missing_zero_points(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        if not _input(node, 2) and not _is_int32(graph, node):
            what = "no zero point, so ONNX means UINT8 and TensorRT INT8"
            yield _finding("TRT006", "E", node, what, "Write an INT8 zero point of 0.")


def _computed_scales(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        for name in node.input[1:]:
            if name and name not in graph.constants:
                what = f"{name} is computed, and must be an initialiser"
                yield _finding("TRT007", "E", node, what, "Fold the constants, and quantise statically.")


def _integer_operators(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS:
            what = f"TensorRT has no operator {node.op_type}"
            yield _finding("TRT008", "E", node, what, "Quantise statically with QuantFormat.QDQ.")


def _domains(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.domain not in _DEFAULT_DOMAINS:
            what = f"{node.op_type} is of domain {node.domain!r}"
            yield _finding("TRT009", "E", node, what, "Quantise with UseQDQContribOps=False.")
    for entry in graph.model.opset_import:
        if entry.domain not in _DEFAULT_DOMAINS:
            what = f"imports domain {entry.domain!r}"
            yield Finding("TRT009", "E", "opset_import", what, "Drop the opset imports of other domains.")


def _per_channel_activations(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        count = math.prod(axis or 1 for axis in graph.shapes.get(_input(node, 1)) or ())
        if count > 1 and not graph.is_weight(node):
            what = f"an activation has {count} scales, and may have one"
            yield _finding("TRT010", "E", node, what, "Quantise weights only per channel.")


def _weight_axes(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        dequantiser = graph.dequantiser(_input(node, 1)) if node.op_type in _HEAVY else None
        if dequantiser is None or not graph.is_weight(dequantiser):
            continue
        weight = graph.constants[graph.source(dequantiser.output[0])]
        expected = _output_axis(node, len(weight.dims))
        for quantiser in (dequantiser, graph.producer.get(dequantiser.input[0])):
            scales = None if quantiser is None else graph.shapes.get(_input(quantiser, 1))
            if quantiser is None or not scales or scales == (1,):
                continue
            axis = _attribute(quantiser, "axis", 1) % len(weight.dims)
            if axis != expected:
                what = f"scales along axis {axis} of a {node.op_type} weight; its output channel is axis {expected}"
                yield _finding("TRT011", "E", quantiser, what, "Leave QDQOpTypePerChannelSupportToAxis unset.")


def _integer_weights(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants and not _is_int32(graph, node):
            what = f"the weight {node.input[0]} is stored as integers; FP32 with a Q/DQ pair is what every parser takes"
            yield _finding("TRT012", "W", node, what, "Quantise with AddQDQPairToWeight=True.")


# Quantisation: where pairs belong


def _output_quantisers(graph: _Graph) -> Iterator[Finding]:
    for node in graph.quantisers:
        maker = graph.producer.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if maker is None or maker.op_type not in _HEAVY:
            continue
        users = graph.users_of_quantised(node)
        if not any(user.op_type in _HEAVY or _is_junction(graph, user) for user in users):
            readers = ", ".join(sorted({user.op_type for user in users})) or "nothing"
            what = f"quantises the output of {maker.op_type} for {readers}, which costs a conversion"
            yield _finding("TRT013", "W", node, what, "List the operator in OpTypesToExcludeOutputQuantization.")


def _residual_additions(graph: _Graph) -> Iterator[Finding]:
    depths = _depths(graph)
    for node in graph.nodes:
        branches = _main_branches(graph, node, depths) if _is_junction(graph, node) else []
        if not branches:
            continue
        quantised = [graph.dequantiser(name) is not None for name in node.input]
        # Branches of equal depth leave open which one the kernel takes as its main one.
        if sum(quantised) == 1 and not all(quantised[index] for index in branches):
            continue
        names = [name for name, is_quantised in zip(node.input, quantised, strict=True) if is_quantised]
        what = f"quantised inputs: {', '.join(names) or 'none'}; the skip, and only the skip, must be quantised"
        yield _finding("TRT014", "W", node, what, "Quantise the skip, and let the convolution feed the Add in float.")


def _small_layers(graph: _Graph) -> Iterator[Finding]:
    after_heavy: set[str] = set()
    fix = "List the node in nodes_to_exclude."
    for node in graph.nodes:
        is_first = after_heavy.isdisjoint(node.input)
        if not is_first or node.op_type in _HEAVY:
            after_heavy.update(node.output)
        if not any(graph.dequantiser(name) is not None for name in node.input[:2]):
            continue
        if node.op_type == "MatMul" and 1 in (sizes := _product_sizes(graph, node)):
            yield _finding("TRT020", "W", node, f"a quantised product of {sizes[0]} rows, {sizes[1]} columns", fix)
        elif node.op_type == "Conv" and (what := _why_too_small(graph, node, is_first)):
            yield _finding("TRT020", "W", node, what, fix)


def _quantised_heads(graph: _Graph) -> Iterator[Finding]:
    fix = "List every node of the head in nodes_to_exclude."
    for node in graph.quantisers:
        source = graph.source(node.output[0])
        maker = graph.producer.get(source)
        if node.op_type == "QuantizeLinear" and maker is not None and graph.is_head(maker):
            yield _finding("TRT021", "E", maker, f"its output {source} is quantised by {_name(node)}", fix)
        if node.op_type == "DequantizeLinear" and (source in graph.constants or graph.is_head(maker)):
            for user in filter(graph.is_head, graph.consumers[node.output[0]]):
                yield _finding("TRT021", "E", user, f"its input {source} is quantised, by {_name(node)}", fix)


def _taps(graph: _Graph) -> Iterator[Finding]:
    fix = "Let it read the float tensor that the quantiser reads."
    for node in graph.quantisers:
        source = graph.source(node.output[0])
        if node.op_type != "DequantizeLinear" or source in graph.constants or graph.is_head(graph.producer.get(source)):
            continue
        for user in filter(graph.is_head, graph.consumers[node.output[0]]):
            yield _finding("TRT023", "W", user, f"reads {source} after it was quantised, from {_name(node)}", fix)
    for output in graph.model.graph.output:
        if (reader := graph.dequantiser(output.name)) is not None:
            yield Finding("TRT023", "W", output.name, f"the graph output comes from {_name(reader)}", fix)


# Versions


def _opset(graph: _Graph) -> Iterator[Finding]:
    newest = max(opset for first, opset in _OPSETS if graph.version >= first)
    if graph.opset > newest:
        what = f"opset {graph.opset}; TensorRT {_version_text(graph)} reads up to {newest}"
        yield Finding("TRT015", "E", "opset_import", what, f"Export with opset {newest}, or ask for a newer TensorRT.")


def _half_scales(graph: _Graph) -> Iterator[Finding]:
    if graph.opset >= 19 and graph.version >= (10, 0):
        return
    for node in graph.quantisers:
        kind = graph.types.get(_input(node, 1))
        if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            what = (
                f"{TensorProto.DataType.Name(kind)} scales need opset 19 and TensorRT 10; "
                f"this is opset {graph.opset} for TensorRT {_version_text(graph)}"
            )
            yield _finding("TRT016", "E", node, what, "Quantise the FP32 graph; use FP16 scales for TensorRT 11 only.")


def _layer_normalisation(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type == "LayerNormalization" and graph.version < (8, 6):
            what = f"TensorRT {_version_text(graph)} has no LayerNormalization"
            yield _finding("TRT019", "E", node, what, "Ask for TensorRT 8.6 (JetPack 6), or export it decomposed.")


# Operators, inputs and sizes


def _top_k(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        count = graph.array(_input(node, 1)) if node.op_type == "TopK" else None
        if count is not None and count.max() > MAX_TOP_K:
            what = f"K is {count.max()}, and may be {MAX_TOP_K} at most"
            yield _finding("TRT017", "E", node, what, "Take a smaller K, or ReduceMin and ReduceMax for K = 1.")


def _resizing(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type != "Resize":
            continue
        mode = _attribute(node, "mode", b"nearest").decode()
        if mode not in ("nearest", "linear"):
            yield _finding("TRT018", "E", node, f"mode {mode}", "Resize with mode linear, half_pixel.")
        if _attribute(node, "antialias", 0):
            yield _finding("TRT018", "E", node, "antialias is on", "Resize without antialiasing.")


def _dynamic_axes(graph: _Graph) -> Iterator[Finding]:
    for value in graph.inputs:
        tensor = value.type.tensor_type
        axes = [index for index, axis in enumerate(tensor.shape.dim) if axis.dim_value < 1]
        if axes or not tensor.HasField("shape"):
            what = f"axes {axes} have no fixed size" if axes else "the input has no shape"
            yield Finding("TRT022", "E", value.name, what, "Export with a static batch: the recipe carries no profile.")


def _byte_inputs(graph: _Graph) -> Iterator[Finding]:
    for value in graph.inputs:
        if value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        for node in graph.consumers[value.name]:
            if node.op_type != "Cast":
                what = f"{node.op_type} reads the UINT8 input {value.name}"
                yield _finding("TRT024", "E", node, what, "Cast the input to float first.")


def _data_dependent_shapes(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type in _DATA_DEPENDENT:
            what = f"the shape of {node.op_type}'s output depends on the data"
            yield _finding("TRT025", "E", node, what, "Do this step on the host, after the engine.")


def _large_constants(graph: _Graph) -> Iterator[Finding]:
    for name, value in graph.constants.items():
        size = math.prod(value.dims) * helper.tensor_dtype_to_np_dtype(value.data_type).itemsize
        if size > MAX_CONSTANT_BYTES:
            what = f"a constant of {size / 1e6:.0f} MB; {MAX_CONSTANT_BYTES / 1e6:.0f} MB is much for a small board"
            yield Finding("TRT026", "W", name, what, "Keep a smaller bank, or fewer channels.")


def _sums_of_squares(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        squared = _squared(graph, node)
        if squared is None or _is_bounded(graph, squared):
            continue
        # The recipe keeps the head in FP32; a graph of mixed types says itself what it computes in FP16.
        if graph.types.get(squared) == TensorProto.FLOAT16 or (graph.fp16 and not graph.is_head(node)):
            what = f"sums the squares of {squared}, which may pass FP16's 65504"
            yield _finding("TRT027", "W", node, what, "Normalise first, or keep this node in FP32.")


_RULES = (
    _zero_points,
    _unsigned_values,
    _other_integers,
    _quantised_biases,
    _scales,
    _missing_zero_points,
    _computed_scales,
    _integer_operators,
    _domains,
    _per_channel_activations,
    _weight_axes,
    _integer_weights,
    _output_quantisers,
    _residual_additions,
    _opset,
    _half_scales,
    _top_k,
    _resizing,
    _layer_normalisation,
    _small_layers,
    _quantised_heads,
    _dynamic_axes,
    _taps,
    _byte_inputs,
    _data_dependent_shapes,
    _large_constants,
    _sums_of_squares,
)


# Residual additions


def _is_junction(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Tell whether the node adds two computed tensors."""
    if node.op_type != "Add":
        return False
    sources = [graph.source(name) for name in node.input]
    return all(source in graph.producer and source not in graph.constants for source in sources)


def _main_branches(graph: _Graph, node: onnx.NodeProto, depths: dict[str, int]) -> list[int]:
    """Return which input of an Add is its main branch: a quantised convolution or product, the deeper of two.

    Both, where they are equally deep. None, where it is no residual addition, or where the other input is made from
    this very convolution (a gated branch), so that the convolution is the skip.
    """
    sources = [graph.source(name) for name in node.input]
    makers = [graph.producer[source] for source in sources]
    candidates = [index for index, maker in enumerate(makers) if maker.op_type in _HEAVY]
    deepest = max((depths[sources[index]] for index in candidates), default=0)
    branches = [index for index in candidates if depths[sources[index]] == deepest]
    if len(branches) == 1:
        (main,) = branches
        if _is_made_from(graph, sources[1 - main], sources[main], depths):
            return []
    return [index for index in branches if graph.dequantiser(makers[index].input[0]) is not None]


def _depths(graph: _Graph) -> dict[str, int]:
    """Return the longest way to each computed tensor, in nodes."""
    depths: dict[str, int] = {}
    for node in graph.nodes:  # in topological order, as ONNX demands
        depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
        depths.update(dict.fromkeys(node.output, depth))
    return depths


def _is_made_from(graph: _Graph, tensor: str, ancestor: str, depths: dict[str, int]) -> bool:
    """Tell whether `ancestor` is on a way to `tensor`; nothing above the ancestor's depth is looked at."""
    seen, waiting = {tensor}, [tensor]
    while waiting:
        name = waiting.pop()
        if name == ancestor:
            return True
        for earlier in graph.producer[name].input if name in graph.producer else ():
            if earlier not in seen and depths.get(earlier, 0) >= depths[ancestor]:
                seen.add(earlier)
                waiting.append(earlier)
    return False


# Layers


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    """Return the axis of a weight that is the layer's output channel."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if _attribute(node, "transB", 0) else 1
    return rank - 1


def _product_sizes(graph: _Graph, node: onnx.NodeProto) -> tuple[int | None, int | None]:
    """Return rows and columns of a MatMul's result; None where the size is not known."""
    left, right = (graph.shapes.get(name) for name in node.input)
    rows = None if left is None else left[-2] if len(left) > 1 else 1
    columns = None if right is None else right[-1] if len(right) > 1 else 1
    return rows, columns


def _why_too_small(graph: _Graph, node: onnx.NodeProto, is_first: bool) -> str:
    """Return why INT8 does not pay for a convolution, or '' if it does (the rule of NVIDIA's Model Optimizer)."""
    weight = graph.source(node.input[1])
    if weight not in graph.constants:
        return "quantised, but its weight is computed"
    outputs, inputs_of_group, *kernel = graph.constants[weight].dims
    if inputs_of_group >= 16 and outputs >= 16:
        return ""
    group = _attribute(node, "group", 1)
    what = f"quantised, but small: {inputs_of_group} channels in, {outputs} out, kernel {kernel}, {group} groups"
    if group > 1:
        return "" if outputs % 8 == 0 and min(kernel) >= 3 else what
    is_aligned = inputs_of_group % 8 == 0 or outputs % 8 == 0
    is_wide = is_first or inputs_of_group >= 16 or outputs >= 16
    return "" if is_aligned and is_wide and len(set(kernel)) == 1 else what


def _squared(graph: _Graph, node: onnx.NodeProto) -> str | None:
    """Return the tensor whose squares the node sums, or None if it does not."""
    if node.op_type in ("ReduceSumSquare", "ReduceL2"):
        return str(node.input[0])
    maker = graph.producer.get(node.input[0]) if node.op_type == "ReduceSum" else None
    if maker is None:
        return None
    exponent = graph.array(maker.input[1]) if maker.op_type == "Pow" else None
    is_square = bool((exponent == 2).all()) if exponent is not None else False
    is_product = maker.op_type == "Mul" and maker.input[0] == maker.input[1]
    return str(maker.input[0]) if is_square or is_product else None


def _is_bounded(graph: _Graph, tensor: str) -> bool:
    """Tell whether the tensor was normalised, by a node for it or by a division by something computed."""
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in _SAME_VALUES:
        node = graph.producer.get(node.input[0])
    if node is None:
        return False
    return node.op_type in _BOUNDED or (node.op_type == "Div" and node.input[1] not in graph.constants)


# Reading ONNX


def _finding(code: str, severity: Severity, node: onnx.NodeProto, what: str, fix: str) -> Finding:
    return Finding(code, severity, _name(node), what, fix)


def _name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} of {', '.join(node.output)}"


def _input(node: onnx.NodeProto, index: int) -> str:
    """Return the name of an input, '' where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _zero_point_type(graph: _Graph, node: onnx.NodeProto) -> int:
    """Return the element type of a zero point, 0 where there is none or ONNX cannot tell."""
    return graph.types.get(_input(node, 2), 0)


def _is_int32(graph: _Graph, node: onnx.NodeProto) -> bool:
    return node.op_type == "DequantizeLinear" and graph.types.get(node.input[0]) == TensorProto.INT32


def _constant_nodes(nodes: Iterable[onnx.NodeProto]) -> dict[str, TensorProto]:
    """Return the tensors of the Constant nodes by output."""
    constants = {}
    for node in nodes:
        if node.op_type != "Constant":
            continue
        (attribute,) = node.attribute
        if attribute.name == "value":
            constants[node.output[0]] = attribute.t
        elif attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
            kind = np.float32 if "float" in attribute.name else np.int64
            constants[node.output[0]] = numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), kind))
    return constants


def _types_and_shapes(
    model: onnx.ModelProto, constants: dict[str, TensorProto]
) -> tuple[dict[str, int], dict[str, Shape | None]]:
    """Return element type and shape of every tensor that ONNX can tell; unknown axes are None."""
    try:
        graph = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    except onnx.shape_inference.InferenceError:  # a graph with faults: what it declares itself must do
        graph = model.graph
    types: dict[str, int] = {}
    shapes: dict[str, Shape | None] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(axis.dim_value if axis.dim_value > 0 else None for axis in tensor.shape.dim)
    for name, constant in constants.items():
        types[name], shapes[name] = constant.data_type, tuple(constant.dims)
    return types, shapes


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its larger constants as inputs: inference wants their shapes, and copies all the rest."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    skeleton.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(skeleton.graph, field).extend(getattr(model.graph, field))
    for value in model.graph.initializer:
        if math.prod(value.dims) <= _INFERENCE_ELEMENTS:
            skeleton.graph.initializer.append(value)
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(value.name, value.data_type, value.dims))
    return skeleton


def _parse_version(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\.\d+)*", text)
    if match is None:
        raise UsageError(f"{text!r} is no TensorRT version.", "Write it like 10.3.")
    version = (int(match[1]), int(match[2] or 0))
    if version < OLDEST_TENSORRT:
        raise UsageError(f"TensorRT {text} is not supported.", "8.5 (JetPack 5) is the oldest that is.")
    return version


def _version_text(graph: _Graph) -> str:
    return ".".join(map(str, graph.version))
