"""Looking into an ONNX graph, and giving it other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> bytes:
    """Return the serialised graph with other outputs: any of its float tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
    return bytes(copy.SerializeToString())


def replace_nodes(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Give the graph other nodes and more constants, or others of the same names; drop those that no node reads."""
    read = {name for node in nodes for name in node.input}
    kept = [value for value in model.graph.initializer if value.name in read - constants.keys()]
    added = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, *added])
    onnx.checker.check_model(model, full_check=True)
