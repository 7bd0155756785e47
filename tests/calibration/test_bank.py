"""PatchCore's search in INT8: distances between rounded vectors, exactly, on every engine."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper

from edge_anomaly.patchcore import PatchcoreConfig, build, refit
from edge_anomaly_calibration.bank import bank_search, with_int8_bank
from edge_anomaly_calibration.onnx_graph import with_outputs
from edge_anomaly_calibration.qdq_graph import has_int8_head
from edge_anomaly_export.graph import onnx_from_detector
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.engine_openvino import open_openvino, openvino_core

SIDE = 96
Images = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def images() -> Images:
    coarse = np.random.default_rng(5).integers(0, 256, (12, 1, SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, 1, 8, 8, 1), dtype=np.uint8))


@pytest.fixture(scope="module", params=[(18, None), (17, 60)], ids=["opset 18", "opset 17, components"])
def float_graph(request: pytest.FixtureRequest, images: Images) -> onnx.ModelProto:
    """Return a graph with pooling, resizing and joining before the search, its bank chosen from eight images."""
    opset, components = request.param
    config = PatchcoreConfig("resnet18", bank=300, pca=components)
    model = build(config, SIDE, SIDE, weights="random")
    with torch.no_grad():
        arrays = refit(config, [model(torch.from_numpy(image))[2].numpy() for image in images[:8]])
    for name, array in arrays.items():
        getattr(model.head, name).copy_(torch.from_numpy(array))
    return onnx_from_detector(model, SIDE, SIDE, opset=opset)


def constant(model: onnx.ModelProto, name: str) -> npt.NDArray[np.float64]:
    return next(numpy_helper.to_array(v) for v in model.graph.initializer if v.name == name).astype(np.float64)


def expected_distances(model: onnx.ModelProto, image: Images) -> npt.NDArray[np.float64]:
    """Return the map before its blur in float64: both sides rounded, the distance of every pair written out."""
    search = bank_search(model)
    assert search is not None
    session = open_onnxruntime(with_outputs(model, [search.input[0]]), threads=1)
    patches = next(iter(session.run(image).values()))[0]
    bank = -0.5 * constant(model, "head.bank")[:, :, 0, 0]
    step = 2 * np.abs(bank).max() / 127
    patches = np.clip(np.rint(patches / step), -127, 127) * step
    steps = np.abs(bank).max(axis=1, keepdims=True) / 127
    bank = np.rint(bank / steps) * steps
    flat = patches.reshape(len(patches), -1).T
    distances: npt.NDArray[np.float64] = np.linalg.norm(flat[:, np.newaxis] - bank, axis=2).min(axis=1)
    return distances.reshape(patches.shape[1:])


def before_blur(model: onnx.ModelProto) -> bytes:
    root = next(node.output[0] for node in model.graph.node if node.op_type == "Sqrt")
    return with_outputs(model, [root])


@pytest.mark.parametrize("open_session", [open_onnxruntime, partial(open_openvino, weights=None)])
def test_distances_are_those_of_rounded_vectors(
    float_graph: onnx.ModelProto, images: Images, open_session: Any
) -> None:
    session = open_session(before_blur(with_int8_bank(float_graph)), threads=1)
    for image in images[8:]:
        found = next(iter(session.run(image).values()))[0]
        expected = expected_distances(float_graph, image)
        # A patch at the edge of a step may be rounded the other way.
        assert np.abs(found - expected).max() < 0.01 * expected.max()
        assert np.median(np.abs(found - expected)) < 1e-3 * expected.max()


def test_scores_hardly_change(float_graph: onnx.ModelProto, images: Images) -> None:
    as_float, as_int8 = (
        open_onnxruntime(model.SerializeToString(), threads=1) for model in (float_graph, with_int8_bank(float_graph))
    )
    for image in images[8:]:
        assert as_int8.run(image)["score"] == pytest.approx(as_float.run(image)["score"], rel=0.05)


def test_openvino_multiplies_in_int8(float_graph: onnx.ModelProto) -> None:
    assert "i8" in product_precision(with_int8_bank(float_graph))
    with pytest.raises(StopIteration):
        product_precision(float_graph)


def product_precision(model: onnx.ModelProto) -> str:
    core = openvino_core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    rows = (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    product = next(row for row in rows if row["layerType"].astype(str) in ("FullyConnected", "MatMul"))
    return str(product["primitiveType"].astype(str)).lower()


def test_the_bank_is_stored_in_a_quarter(float_graph: onnx.ModelProto) -> None:
    graph = with_int8_bank(float_graph)
    assert has_int8_head(graph) and not has_int8_head(float_graph)
    assert bank_search(graph) is None
    saved = len(float_graph.SerializeToString()) - len(graph.SerializeToString())
    assert saved > 0.6 * constant(float_graph, "head.bank").size * 4


def test_a_graph_without_a_bank_stays_as_it_is(float_model: onnx.ModelProto) -> None:
    assert with_int8_bank(float_model) is float_model
