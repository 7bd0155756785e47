"""FP16: half the file for CPUs, a typed graph for TensorRT from 11 on; pixels, head and outputs stay float."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_anomaly_export.fp16 import strongly_typed_fp16, with_fp16_weights
from edge_anomaly_export.graph import EMBEDDING, without_output
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.errors import ArtefactError
from tests.export.conftest import HEIGHT, WIDTH, Trace


@pytest.fixture(scope="module")
def model(trace: Trace) -> onnx.ModelProto:
    return without_output(trace("location", "semi-orthogonal", 0.5)[1], EMBEDDING)


def outputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return open_onnxruntime(model.SerializeToString(), threads=1, fuse=False).run(image)


def types(model: onnx.ModelProto) -> dict[str, int]:
    return {value.name: value.data_type for value in model.graph.initializer}


def test_weights_are_stored_in_half_and_used_in_float(model: onnx.ModelProto) -> None:
    half = with_fp16_weights(model)
    onnx.checker.check_model(half, full_check=True)
    stored = types(half)
    assert stored["head.mean"] == onnx.TensorProto.FLOAT
    assert sum(kind == onnx.TensorProto.FLOAT16 for kind in stored.values()) >= 10
    assert len(half.SerializeToString()) < 0.6 * len(model.SerializeToString())
    for name, value in outputs(model).items():
        np.testing.assert_allclose(outputs(half)[name], value, rtol=2e-2)


def test_the_typed_graph_computes_in_half_up_to_the_head(model: onnx.ModelProto) -> None:
    typed = strongly_typed_fp16(model)
    onnx.checker.check_model(typed, full_check=True)
    assert next(entry.version for entry in typed.opset_import if entry.domain == "") == 19
    inferred = onnx.shape_inference.infer_shapes(typed)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for node in typed.graph.node:
        if node.op_type == "Conv" and node.name.startswith("backbone/"):
            assert kinds[node.output[0]] == onnx.TensorProto.FLOAT16, node.name
        if (
            node.name.startswith("head/")
            and node.output[0] in kinds
            and node.op_type in ("Conv", "Sub", "Mul", "MatMul")
        ):
            assert kinds[node.output[0]] == onnx.TensorProto.FLOAT, node.name
    assert [output.type.tensor_type.elem_type for output in typed.graph.output] == [onnx.TensorProto.FLOAT] * 2
    for name, value in outputs(model).items():
        np.testing.assert_allclose(outputs(typed)[name], value, rtol=3e-2)


def test_neither_changes_the_graph_it_gets(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    with_fp16_weights(model)
    strongly_typed_fp16(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("convert", [with_fp16_weights, strongly_typed_fp16])
def test_a_weight_too_large_for_half_is_refused(model: onnx.ModelProto, convert: object) -> None:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    weights = {
        name for node in wrong.graph.node if node.op_type == "Conv" and "backbone" in node.name for name in node.input
    }
    value = next(value for value in wrong.graph.initializer if value.name in weights and len(value.dims) == 4)
    value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) * np.float32(1e6), value.name))
    with pytest.raises(ArtefactError, match=r"too large for FP16"):
        convert(wrong)  # type: ignore[operator]
