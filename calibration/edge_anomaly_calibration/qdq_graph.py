"""Editing graphs with quantise and dequantise nodes (Q/DQ), which the quantiser puts at every tensor alike."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx

from edge_anomaly_runtime.errors import EdgeAnomalyError

HEAD_PREFIX = "head/"

# Clip is ReLU6.
_REMOVABLE = ("Relu", "Clip")
_RESTORED = ":float"
_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def head_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that stay float."""
    return [node.name for node in model.graph.node if node.name.startswith(HEAD_PREFIX)]


def has_int8_head(model: onnx.ModelProto) -> bool:
    """Tell whether a part of the head is INT8."""
    return any(node.op_type == "QuantizeLinear" and node.name.startswith(HEAD_PREFIX) for node in model.graph.node)


def quantized_share(model: onnx.ModelProto) -> float:
    """Return the share of the backbone's convolutions and matrix products whose input is dequantised INT8."""
    dequantised = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    heavy = [node for node in model.graph.node if node.op_type in _HEAVY and not node.name.startswith(HEAD_PREFIX)]
    return sum(node.input[0] in dequantised for node in heavy) / max(1, len(heavy))


def with_float_tensors(
    model: onnx.ModelProto, float_model: onnx.ModelProto, tensors: Collection[str]
) -> onnx.ModelProto:
    """Return a copy of a quantised graph in which the layers that read these tensors get them unrounded."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _bypass(copy, float_model, lambda _, tensor: tensor in tensors)
    return copy


def quantized_tensors(model: onnx.ModelProto) -> list[str]:
    """Return the names of the backbone's float tensors that are quantised for the layers after them."""
    producer = {output: node for node in model.graph.node for output in node.output}
    sources = (_float_source(name, producer) for node in model.graph.node for name in node.input if name in producer)
    constants = {value.name for value in model.graph.initializer}
    quantised = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"} - constants
    return [name for name in dict.fromkeys(sources) if name in quantised]


def float_taps(model: onnx.ModelProto, float_model: onnx.ModelProto) -> None:
    """Let the head read the backbone's float tensors, as they are before they are quantised for the next layer.

    The quantiser sends every consumer to the dequantised copy. That costs signal, and OpenVINO pads such a copy with
    quantised zeros in the head's average pooling, which are not zero when the zero point is not.
    """
    producer = {output: node for node in model.graph.node for output in node.output}
    for output in model.graph.output:
        if _float_source(output.name, producer) != output.name:
            raise EdgeAnomalyError(f"Graph output {output.name} comes from the backbone; it must come from the head.")
    _bypass(model, float_model, lambda node, _: node.name.startswith(HEAD_PREFIX))


def _bypass(
    model: onnx.ModelProto, float_model: onnx.ModelProto, wanted: Callable[[onnx.NodeProto, str], bool]
) -> None:
    """Let a node read the float tensor instead of its dequantised copy where `wanted(node, tensor)`."""
    producer = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        sources = [_float_source(name, producer) for name in node.input]
        node.input[:] = [
            source if source != name and wanted(node, source) else name
            for name, source in zip(node.input, sources, strict=True)
        ]
    _restore_activations(model, float_model)
    remove_dead_nodes(model)


def _restore_activations(model: onnx.ModelProto, float_model: onnx.ModelProto) -> None:
    """Give a float tensor its activation back: the quantiser removes ReLU and Clip where the next Q node does it."""
    producer = {output: node for node in model.graph.node for output in node.output}
    removed = {
        node.output[0]: node
        for node in float_model.graph.node
        if node.op_type in _REMOVABLE and producer[node.output[0]].op_type not in _REMOVABLE
    }
    read = {name for node in model.graph.node if not _is_restored_or_q(node) for name in node.input if name in removed}
    nodes: list[onnx.NodeProto] = []
    constants: set[str] = set()
    for node in model.graph.node:
        if not _is_restored_or_q(node):
            node.input[:] = [f"{name}{_RESTORED}" if name in read else name for name in node.input]
        nodes.append(node)
        for name in read.intersection(node.output):
            if f"{name}{_RESTORED}" not in producer:
                activation = onnx.NodeProto()
                activation.CopyFrom(removed[name])
                activation.input[0], activation.output[0] = name, f"{name}{_RESTORED}"
                constants.update(activation.input[1:])
                nodes.append(activation)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    constants -= {value.name for value in model.graph.initializer}
    model.graph.initializer.extend(value for value in float_model.graph.initializer if value.name in constants)


def _is_restored_or_q(node: onnx.NodeProto) -> bool:
    return node.op_type == "QuantizeLinear" or node.output[0].endswith(_RESTORED)


def _float_source(tensor: str, producer: dict[str, onnx.NodeProto]) -> str:
    """Return the tensor that was quantised and dequantised to `tensor`, or `tensor` itself."""
    dequantise = producer.get(tensor)
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return tensor
    quantise = producer.get(dequantise.input[0])
    return tensor if quantise is None or quantise.op_type != "QuantizeLinear" else str(quantise.input[0])


def remove_dead_nodes(model: onnx.ModelProto) -> None:
    needed = {output.name for output in model.graph.output}
    alive = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            alive.append(node)
    initialisers = [value for value in model.graph.initializer if value.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(alive))
    model.graph.initializer.extend(initialisers)


def float_main_branches(model: onnx.ModelProto) -> None:
    """Let every residual Add read its main branch unrounded, so that TensorRT fuses convolution, Add and activation.

    Of an Add's two quantised inputs, the main branch is the one that a convolution or matrix product has just made; of
    two such, the one with the longer way from the input. It stays as it is where the other input is computed from it
    (a gate, for instance): then it is the skip. The placement is that of NVIDIA's Model Optimizer.
    """
    producer = {output: node for node in model.graph.node for output in node.output}
    depths = _depths(model)
    for node in model.graph.node:
        if node.op_type != "Add" or node.name.startswith(HEAD_PREFIX):
            continue
        sources = [_float_source(name, producer) for name in node.input]
        if any(source == name or source not in producer for source, name in zip(sources, node.input, strict=True)):
            continue
        branches = [index for index in (0, 1) if producer[sources[index]].op_type in _HEAVY]
        if not branches:
            continue
        main = max(branches, key=lambda index: depths[sources[index]])
        if not _is_ancestor(producer[sources[main]], sources[1 - main], producer):
            node.input[main] = sources[main]
    remove_dead_nodes(model)


def _depths(model: onnx.ModelProto) -> dict[str, int]:
    """Return the longest way of every tensor from a graph input or initialiser; nodes are in topological order."""
    depths: dict[str, int] = {}
    for node in model.graph.node:
        depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
        depths.update(dict.fromkeys(node.output, depth))
    return depths


def _is_ancestor(node: onnx.NodeProto, tensor: str, producer: dict[str, onnx.NodeProto]) -> bool:
    """Tell whether `tensor` is computed from an output of `node`."""
    wanted, seen, waiting = set(node.output), set(), [tensor]
    while waiting:
        name = waiting.pop()
        if name in wanted:
            return True
        if name not in seen and name in producer:
            seen.add(name)
            waiting.extend(producer[name].input)
    return False


def drop_unused_domains(model: onnx.ModelProto) -> None:
    """Keep only the operator sets that a node uses: the quantiser imports eight more, which other parsers refuse."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def cast_image_first(model: onnx.ModelProto) -> None:
    """Let the image become numbers before it is transposed: TensorRT takes bytes into nothing but a Cast.

    (The other order, as traced, moves a quarter of the memory.)
    """
    image = model.graph.input[0].name
    nodes = list(model.graph.node)
    for transpose in nodes:
        if transpose.op_type != "Transpose" or transpose.input[0] != image:
            continue
        readers = [node for node in nodes if transpose.output[0] in node.input]
        for cast in readers if len(readers) == 1 and readers[0].op_type == "Cast" else ():
            transposed, numbers = transpose.output[0], cast.output[0]
            cast.input[0], cast.output[0] = image, f"{image}:numbers"
            transpose.input[0], transpose.output[0] = cast.output[0], numbers
            order = [node for node in nodes if node is not cast]
            order.insert(order.index(transpose), cast)
            del model.graph.node[:]
            model.graph.node.extend(order)
            kept = [value for value in model.graph.value_info if value.name != transposed]
            del model.graph.value_info[:]
            model.graph.value_info.extend(kept)
            return
