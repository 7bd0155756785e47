"""OpenVINO IR: the same numbers as the ONNX graph, full-precision weights, nothing that names this machine."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from edge_anomaly_export.openvino_ir import ir_from_onnx
from edge_anomaly_runtime.engine_openvino import open_openvino, openvino_core
from tests.export.conftest import Trace

Ir = tuple[bytes, bytes]


@pytest.fixture(scope="module")
def graph(trace: Trace) -> onnx.ModelProto:
    return trace("location", "semi-orthogonal", 0.5)[1]


@pytest.fixture(scope="module")
def ir(graph: onnx.ModelProto) -> Ir:
    return ir_from_onnx(graph)


@pytest.fixture
def image() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(2).integers(0, 256, (1, 50, 64, 3), dtype=np.uint8)


def test_ir_and_onnx_give_the_same_numbers(graph: onnx.ModelProto, ir: Ir, image: npt.NDArray[np.uint8]) -> None:
    expected = open_openvino(graph.SerializeToString(), weights=None, threads=1).run(image)
    got = open_openvino(ir[0], weights=ir[1], threads=1).run(image)
    assert list(got) == ["score", "anomaly_map", "embedding"]
    for name, values in expected.items():
        assert got[name].shape == values.shape
        assert np.abs(got[name] - values).max() <= 1e-6 * np.abs(values).max(), name


def test_weights_keep_their_precision(graph: onnx.ModelProto, ir: Ir) -> None:
    constants = [layer for layer in ElementTree.fromstring(ir[0]).iter("layer") if layer.get("type") == "Const"]
    kinds = {data.get("element_type") for layer in constants for data in layer.iter("data")}
    assert "f32" in kinds
    assert not kinds & {"f16", "bf16"}
    weights = sum(len(value.raw_data) for value in graph.graph.initializer if value.raw_data)
    assert len(ir[1]) > 0.9 * weights


def test_the_ir_is_simplified(graph: onnx.ModelProto, ir: Ir) -> None:
    layers = [layer.get("type") for layer in ElementTree.fromstring(ir[0]).iter("layer")]
    plain = openvino_core().read_model(graph.SerializeToString())
    assert "ShapeOf" not in layers
    assert len(layers) < len(plain.get_ops())


def test_the_same_graph_gives_the_same_ir(graph: onnx.ModelProto, ir: Ir) -> None:
    """OpenVINO numbers the nodes that it adds itself through the whole process, the rest is the same."""
    again = ir_from_onnx(graph)
    first, second = (re.sub(r'_\d+"', '"', part.decode()) for part in (ir[0], again[0]))
    assert hashlib.sha256(first.encode()).digest() == hashlib.sha256(second.encode()).digest()
    assert hashlib.sha256(ir[1]).digest() == hashlib.sha256(again[1]).digest()


def test_node_names_survive_and_no_path_gets_in(ir: Ir, tmp_path: Path) -> None:
    text = ir[0].decode()
    assert 'name="backbone/stem/1/Conv' in text
    assert 'name="head/ReduceMax' in text or 'names="score"' in text
    assert "/tmp" not in text
    assert str(tmp_path.parent) not in text
    assert ".py" not in text


def test_input_and_outputs_keep_shape_and_type(ir: Ir) -> None:
    layers = list(ElementTree.fromstring(ir[0]).iter("layer"))
    (parameter,) = [layer for layer in layers if layer.get("type") == "Parameter"]
    data = parameter.find("data")
    assert data is not None
    assert (parameter.get("name"), data.get("element_type"), data.get("shape")) == ("image", "u8", "1,50,64,3")
    assert sum(layer.get("type") == "Result" for layer in layers) == 3
