"""FastFlow's subnets in INT8: what they clip, what stays float, and that scores hardly change."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper

from edge_anomaly.fastflow import Fastflow, FastflowConfig, build
from edge_anomaly_calibration.onnx_graph import with_outputs
from edge_anomaly_calibration.qdq_graph import has_int8_head
from edge_anomaly_calibration.subnets import subnet_convolutions, with_int8_subnets
from edge_anomaly_export.graph import onnx_from_detector
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.engine_openvino import open_openvino, openvino_core

SIDE = 96
Images = npt.NDArray[np.uint8]
CPU_SESSIONS = [open_onnxruntime, partial(open_openvino, weights=None)]


def frames_like(seed: int, count: int) -> Images:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, 8, 8, 1), dtype=np.uint8))


@pytest.fixture(scope="module")
def images() -> Images:
    return frames_like(5, 12)


@pytest.fixture(scope="module")
def model(images: Images) -> Fastflow:
    """Return flows that do something, as trained ones do: their second convolutions are zero at the start."""
    model = build(FastflowConfig("resnet18", finetune="off"), SIDE, SIDE, weights="random")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(images))
        for layer, feature in zip(model.config.layers, features, strict=True):
            model.head.get_buffer(f"mean_{layer}").copy_(feature.mean(dim=(0, 2, 3), keepdim=True))
            deviation = feature.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-3)
            model.head.get_buffer(f"scale_{layer}").copy_(1 / deviation)
        for name, value in model.head.flows.named_parameters():
            if ".second." in name:
                value.copy_(0.03 * torch.randn(value.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def float_graph(model: Fastflow) -> onnx.ModelProto:
    return onnx_from_detector(model, SIDE, SIDE)


@pytest.fixture(scope="module")
def int8_graph(float_graph: onnx.ModelProto, images: Images) -> onnx.ModelProto:
    return with_int8_subnets(float_graph, images[:8])


@pytest.mark.parametrize("open_session", CPU_SESSIONS)
def test_scores_and_maps_hardly_change(
    float_graph: onnx.ModelProto, int8_graph: onnx.ModelProto, images: Images, open_session: Any
) -> None:
    as_float, as_int8 = (open_session(graph.SerializeToString(), threads=1) for graph in (float_graph, int8_graph))
    for image in images[8:]:
        expected, found = as_float.run(image[np.newaxis]), as_int8.run(image[np.newaxis])
        assert found["score"] == pytest.approx(expected["score"], rel=0.02)
        assert np.abs(found["anomaly_map"] - expected["anomaly_map"]).max() < 0.05 * expected["anomaly_map"].max()


def test_every_subnet_is_int8_in_openvino(float_graph: onnx.ModelProto, int8_graph: onnx.ModelProto) -> None:
    core = openvino_core()
    compiled = core.compile_model(core.read_model(int8_graph.SerializeToString()), "CPU")
    rows = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [
        str(row["primitiveType"].astype(str))
        for row in rows
        if row["layerType"].astype(str) == "Convolution" and "head/flows" in str(row["originalLayersNames"].astype(str))
    ]
    assert len(kinds) == len(subnet_convolutions(float_graph)) == 16
    assert all(kind.endswith("I8") for kind in kinds)


def test_what_the_flow_multiplies_and_adds_stays_float(int8_graph: onnx.ModelProto) -> None:
    rounded = {output for node in int8_graph.graph.node if "Dequantize" in node.op_type for output in node.output}
    for node in int8_graph.graph.node:
        if rounded.intersection(node.input):
            assert node.op_type == "Conv", node.name


def test_features_beyond_the_ranges_are_not_clipped_on_their_way(int8_graph: onnx.ModelProto, images: Images) -> None:
    """Ten times as far from normal, with the ranges as they are: the subnets clip, the score must not."""
    farther = onnx.ModelProto()
    farther.CopyFrom(int8_graph)
    for value in farther.graph.initializer:
        if value.name.startswith("head.scale_"):
            value.CopyFrom(numpy_helper.from_array(10 * numpy_helper.to_array(value), value.name))
    near, far = (
        float(open_onnxruntime(graph.SerializeToString(), threads=1).run(images[8:9])["score"][0])
        for graph in (int8_graph, farther)
    )
    assert far > 20 * near


def test_a_channel_with_a_bias_alone_keeps_it(float_graph: onnx.ModelProto, images: Images) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(float_graph)
    target = subnet_convolutions(graph)[-1]
    for value in graph.graph.initializer:
        if value.name in target.input[1:]:
            array = numpy_helper.to_array(value).copy()
            array[3] = 0.75 if array.ndim == 1 else 0.0
            value.CopyFrom(numpy_helper.from_array(array, value.name))
    rounded = with_int8_subnets(graph, images[:2])
    output = target.output[0]
    session = open_onnxruntime(with_outputs(rounded, [output]), threads=1, fuse=False)
    assert session.run(images[:1])[output][0, 3] == pytest.approx(0.75, rel=1e-5)


def test_other_graphs_stay_as_they_are(float_model: onnx.ModelProto, int8_graph: onnx.ModelProto) -> None:
    assert with_int8_subnets(float_model, []) is float_model
    assert has_int8_head(int8_graph) and not has_int8_head(float_model)
