"""The exported graph: bytes in, score and map out, the same numbers as torch, names that say backbone or head."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edge_anomaly.padim import CovarianceKind, Padim, ReductionKind
from edge_anomaly.stpm import StpmConfig
from edge_anomaly.stpm import build as build_stpm
from edge_anomaly_export.graph import only_output, onnx_from_detector, with_head_arrays, without_output
from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.session import open_engine
from tests.export.conftest import Trace

Traced = tuple[Padim, onnx.ModelProto]

# Every pair of settings at least once.
CASES: list[tuple[CovarianceKind, ReductionKind, float]] = [
    ("location", "semi-orthogonal", 0.5),
    ("location", "random", 0.0),
    ("tied", "random", 0.5),
    ("tied", "semi-orthogonal", 0.0),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def traced(trace: Trace, request: pytest.FixtureRequest) -> Traced:
    return trace(*request.param)


@pytest.fixture(scope="module")
def graph(trace: Trace) -> onnx.ModelProto:
    return trace(*CASES[0])[1]


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.uint8]:
    """Noise, black, white and two tones, uint8 [6, 50, 64, 3]."""
    result = np.random.default_rng(1).integers(0, 256, (6, 50, 64, 3), dtype=np.uint8)
    result[2:5] = np.array([0, 255, 100]).reshape(3, 1, 1, 1)
    result[4, :, 32:] = (255, 0, 0)
    return result


def shape(value: onnx.ValueInfoProto) -> tuple[int, list[int]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [dimension.dim_value for dimension in tensor.shape.dim]


def run(model: onnx.ModelProto, image: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    return open_engine("onnxruntime", model.SerializeToString(), threads=1).run(image[np.newaxis])


# Numbers


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engine_and_torch_give_the_same_numbers(traced: Traced, images: npt.NDArray[np.uint8], engine: str) -> None:
    model, graph = traced
    session = open_engine(engine, graph.SerializeToString(), threads=1)
    for image in images:
        with torch.inference_mode():
            expected = [output.numpy() for output in model(torch.from_numpy(image[np.newaxis]))]
        got = session.run(image[np.newaxis])
        for name, values in zip(("score", "anomaly_map", "embedding"), expected, strict=True):
            assert np.abs(got[name] - values).max() <= 1e-4 * np.abs(values).max(), name
    session.close()


def test_a_place_without_any_feature_is_a_number_in_the_graph_too(images: npt.NDArray[np.uint8]) -> None:
    model = build_stpm(StpmConfig("resnet18"), 64, 64, weights="random")
    last: Any = model.backbone.student.stages[2]
    last[1].bn2.bias.data.fill_(-1000.0)  # ReLU leaves nothing of the student's last layer
    image = np.resize(images[0], (64, 64, 3))
    with torch.no_grad():
        score, anomaly_map = model(torch.from_numpy(image[np.newaxis]))
    found = run(onnx_from_detector(model, 64, 64), image)
    np.testing.assert_allclose(found["score"], score.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found["anomaly_map"], anomaly_map.numpy(), rtol=1e-3, atol=1e-6)


def test_the_score_is_the_largest_value_of_the_map(traced: Traced, images: npt.NDArray[np.uint8]) -> None:
    results = run(traced[1], images[0])
    assert results["score"][0] == results["anomaly_map"].max()
    assert results["anomaly_map"].min() > 0


# Contract


def test_input_and_outputs(traced: Traced) -> None:
    graph = traced[1].graph
    assert {value.name: shape(value) for value in graph.input} == {"image": (onnx.TensorProto.UINT8, [1, 50, 64, 3])}
    assert {value.name: shape(value) for value in graph.output} == {
        "score": (onnx.TensorProto.FLOAT, [1]),
        "anomaly_map": (onnx.TensorProto.FLOAT, [1, 13, 16]),
        "embedding": (onnx.TensorProto.FLOAT, [1, 8, 13, 16]),
    }


def test_every_node_says_whether_it_belongs_to_the_backbone_or_to_the_head(traced: Traced) -> None:
    names = [node.name for node in traced[1].graph.node]
    assert len(set(names)) == len(names)
    assert {name.partition("/")[0] for name in names} == {"backbone", "head"}
    heads = [name.startswith("head/") for name in names]
    assert heads == sorted(heads), "the backbone comes first"
    for node in traced[1].graph.node:
        assert node.name.rpartition("/")[2].partition("_")[0] == node.op_type
    assert sum(node.op_type == "Conv" and node.name.startswith("backbone/") for node in traced[1].graph.node) == 10


def test_the_backbone_never_reads_from_the_head(traced: Traced) -> None:
    for node in traced[1].graph.node:
        if node.name.startswith("backbone/"):
            assert not [name for name in node.input if name.startswith("head")]


def test_batchnorm_is_folded_and_nothing_but_the_standard_opset_is_used(traced: Traced) -> None:
    model = traced[1]
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert len(model.functions) == 0
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"BatchNormalization", "Identity", "Constant", "If", "Loop", "Shape", "Dropout"}
    assert {node.domain for node in model.graph.node} == {""}


def test_every_tensor_has_a_static_shape(traced: Traced) -> None:
    graph = traced[1].graph
    known = {value.name: shape(value)[1] for value in (*graph.value_info, *graph.output)}
    produced = {output for node in graph.node for output in node.output}
    assert produced == set(known)
    assert all(min(dimensions) > 0 for dimensions in known.values())


def test_one_file_without_traces_of_this_machine(traced: Traced) -> None:
    model = traced[1]
    tensors = model.graph.initializer
    assert not [value.name for value in tensors if value.external_data or value.data_location]
    for part in (model, model.graph, *model.graph.node, *tensors, *model.graph.value_info):
        assert (part.doc_string, len(part.metadata_props)) == ("", 0), part.name if part is not model else "model"
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    for tensor in stripped.graph.initializer:
        tensor.raw_data = b""
    text = stripped.SerializeToString()
    for trace in (b".py", b"site-packages", b"/tmp", str(Path.home()).encode() + b"/", platform.node().encode()):
        assert trace not in text, trace
    assert f"/{getpass.getuser()}/".encode() not in text


class Loose(nn.Module):
    """A detector that computes something outside its two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(3, 4, 3)
        self.head = nn.Flatten()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.backbone(image.permute(0, 3, 1, 2).float())
        flat = self.head(features)
        return flat.amax(dim=1), features, flat


def test_a_node_of_neither_part_is_refused() -> None:
    with pytest.raises(EdgeAnomalyError, match="belongs neither to backbone nor to head"):
        onnx_from_detector(Loose(), 16, 16)


def test_a_second_trace_gives_the_same_bytes(trace: Trace) -> None:
    model, graph = trace(*CASES[3])
    assert onnx_from_detector(model, 50, 64).SerializeToString() == graph.SerializeToString()


# Editing


def test_without_output_drops_the_output_but_computes_the_rest(
    graph: onnx.ModelProto, images: npt.NDArray[np.uint8]
) -> None:
    before = graph.SerializeToString()
    shorter = without_output(graph, "embedding")
    assert [output.name for output in shorter.graph.output] == ["score", "anomaly_map"]
    assert len(shorter.graph.node) == len(graph.graph.node)
    expected, got = run(graph, images[0]), run(shorter, images[0])
    assert set(got) == {"score", "anomaly_map"}
    assert got["score"][0] == pytest.approx(expected["score"][0], rel=1e-6)
    assert graph.SerializeToString() == before


def test_only_output_prunes_what_is_not_needed(graph: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> None:
    before = graph.SerializeToString()
    pruned = only_output(graph, "embedding")
    onnx.checker.check_model(pruned, full_check=True)
    assert [output.name for output in pruned.graph.output] == ["embedding"]
    assert [node.name for node in pruned.graph.node if node.op_type == "Sqrt"] == []
    assert pruned.graph.node[-1].output[0] == "embedding"
    stored = {value.name for value in pruned.graph.initializer}
    assert any(name.startswith("head.projection_") for name in stored)
    assert not stored & {"head.mean", "head.whitening_top", "head.whitening_bottom", "head.kernel"}
    assert np.array_equal(run(pruned, images[0])["embedding"], run(graph, images[0])["embedding"])
    assert graph.SerializeToString() == before


def test_only_output_of_a_later_output_keeps_its_inputs(graph: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> None:
    pruned = only_output(graph, "score")
    assert run(pruned, images[0])["score"] == pytest.approx(run(graph, images[0])["score"], rel=1e-6)
    assert len(pruned.graph.node) == len(graph.graph.node)


def test_new_head_arrays_change_the_score_as_they_should(graph: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> None:
    """Twice the whitening is twice the distance; a mean at the embedding itself is no distance at all."""
    stored = {value.name: numpy_helper.to_array(value) for value in graph.graph.initializer}
    before, expected = graph.SerializeToString(), run(graph, images[0])
    doubled = with_head_arrays(
        graph, {name: 2 * stored[f"head.{name}"] for name in ("whitening_top", "whitening_bottom")}
    )
    assert run(doubled, images[0])["score"] == pytest.approx(2 * expected["score"], rel=1e-5)
    centred = with_head_arrays(graph, {"mean": expected["embedding"]})
    assert run(centred, images[0])["score"][0] < 1e-3 * expected["score"][0]
    assert graph.SerializeToString() == before
    onnx.checker.check_model(doubled, full_check=True)


def test_new_head_arrays_need_not_be_contiguous(graph: onnx.ModelProto) -> None:
    mean = np.random.default_rng(0).normal(size=(16, 13, 8, 1)).astype(np.float32).T
    replaced = with_head_arrays(graph, {"mean": mean})
    stored = next(value for value in replaced.graph.initializer if value.name == "head.mean")
    assert np.array_equal(numpy_helper.to_array(stored), mean)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mean", np.zeros((1, 8, 16, 13), np.float32)),
        ("mean", np.zeros((8, 13, 16), np.float32)),
        ("whitening", np.zeros((1, 8, 13, 16), np.float32)),
    ],
)
def test_head_arrays_that_do_not_fit_are_refused(
    graph: onnx.ModelProto, name: str, wrong: npt.NDArray[np.float32]
) -> None:
    with pytest.raises(EdgeAnomalyError, match=rf"no initialiser head\.{name} of shape"):
        with_head_arrays(graph, {name: wrong})
