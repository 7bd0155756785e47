"""The ONNX graph of a detector: bytes in, score and map out, with names that say backbone or head."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from edge_anomaly_runtime.errors import EdgeAnomalyError

OPSET = 18
EMBEDDING = "embedding"
OUTPUTS = ("score", "anomaly_map", EMBEDDING)
# Operators whose axes became an input in opset 18, and attributes that came with it and have no effect when 0.
_REDUCTIONS = {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"}
_REDUCTIONS |= {"ReduceProd", "ReduceSumSquare"}
_SINCE_18 = ("noop_with_empty_axes", "antialias", "keep_aspect_ratio_policy")
_SCOPES = "pkg.torch.onnx.name_scopes"


def onnx_from_detector(
    model: nn.Module, height: int, width: int, *, opset: int = OPSET, outputs: Sequence[str] | None = None
) -> onnx.ModelProto:
    """Trace a detector to one self-contained ONNX graph with a static batch of 1.

    `model` maps uint8 [1, height, width, 3] to score, map and, where its head can be fitted again, embedding, unless
    `outputs` names other ones.
    BatchNorm is folded; nodes are named `backbone/...` or `head/...` after the module that they come from.
    """
    example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        outputs = outputs or OUTPUTS[: len(model(example))]
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["image"],
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # None only without dynamo
    graph = program.model_proto
    _name_nodes(graph)
    if opset < OPSET:
        _downgrade(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def without_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return a copy that no longer lists the output; nodes that feed others stay."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [output for output in copy.graph.output if output.name != name]
    del copy.graph.output[:]
    copy.graph.output.extend(kept)
    return copy


def only_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return a copy that computes one output, and nothing that this output does not need."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    needed, kept = {name}, []
    for node in reversed(copy.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    outputs = [output for output in copy.graph.output if output.name == name]
    initialisers = [value for value in copy.graph.initializer if value.name in needed]
    del copy.graph.node[:], copy.graph.output[:], copy.graph.initializer[:]
    copy.graph.node.extend(reversed(kept))
    copy.graph.output.extend(outputs)
    copy.graph.initializer.extend(initialisers)
    return copy


def with_head_arrays(model: onnx.ModelProto, arrays: Mapping[str, npt.NDArray[np.float32]]) -> onnx.ModelProto:
    """Return a copy whose initialisers `head.<name>` hold other values of the same shape: a head fitted anew."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    by_name = {value.name: value for value in copy.graph.initializer}
    for name, array in arrays.items():
        full_name = f"head.{name}"
        if full_name not in by_name or list(by_name[full_name].dims) != list(array.shape):
            raise EdgeAnomalyError(f"The graph has no initialiser {full_name} of shape {list(array.shape)}.")
        by_name[full_name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), full_name))
    return copy


def _downgrade(model: onnx.ModelProto) -> None:
    """Turn a graph of opset 18 into one of 17: reductions have their axes as an attribute, not as an input.

    (The exporter writes 18 at the least; the converters at hand lose the nodes' names.)
    """
    constants = {value.name: value for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in _REDUCTIONS and len(node.input) > 1:
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        if node.op_type in _REDUCTIONS or node.op_type == "Resize":
            kept = [attribute for attribute in node.attribute if attribute.name not in _SINCE_18]
            if any(
                attribute.i for attribute in node.attribute if attribute.name in ("antialias", "noop_with_empty_axes")
            ):
                raise EdgeAnomalyError(
                    f"{node.name} has an option that opset 17 does not know.", "Export with opset 18."
                )
            del node.attribute[:]
            node.attribute.extend(kept)
    used = {name for node in model.graph.node for name in node.input}
    kept_values = [value for value in model.graph.initializer if value.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept_values)
    next(entry for entry in model.opset_import if entry.domain == "").version = 17


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name nodes after the module they come from, and drop traces of this machine (stack traces with paths)."""
    taken: dict[str, int] = {}
    renamed = {}
    kept = {output.name for output in model.graph.output}
    for node in model.graph.node:
        module = _module_of(node)
        stem = f"{module}/{node.op_type}".lstrip("/")
        taken[stem] = taken.get(stem, 0) + 1
        node.name = stem if taken[stem] == 1 else f"{stem}_{taken[stem]}"
        node.doc_string = ""
        del node.metadata_props[:]
        for index, output in enumerate(node.output):
            if output and output not in kept:
                renamed[output] = f"{node.name}:{index}" if index else f"{node.name}:out"
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del model.graph.value_info[:], model.metadata_props[:], model.graph.metadata_props[:]
    for value in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    inferred = onnx.shape_inference.infer_shapes(model)
    model.graph.value_info.extend(inferred.graph.value_info)


def _module_of(node: onnx.NodeProto) -> str:
    """Return the module that a node comes from as a path, `backbone/stages/0` for instance."""
    scopes: Any = next((ast.literal_eval(entry.value) for entry in node.metadata_props if entry.key == _SCOPES), [])
    modules = [scope for scope in scopes[:-1] if scope]
    if not modules or modules[0] not in ("backbone", "head"):
        raise EdgeAnomalyError(
            f"The exporter made a node {node.name} ({node.op_type}) that belongs neither to backbone nor to head.",
            "Compute everything inside these two modules.",
        )
    return re.sub(r"[^A-Za-z0-9_/]", "_", str(modules[-1]).replace(".", "/"))
