"""What the engine inspector says, in the words of each version."""

from __future__ import annotations

import json

import pytest

from edge_anomaly_runtime.tensorrt_layers import EngineLayers, count_precisions, read_layers, reduced_layers


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Row major linear FP32", "Float"),
        ("Float", "Float"),
        ("Row major linear FP16 format", "Half"),
        ("Two wide channel vectorized row major FP16 format", "Half"),
        ("Half", "Half"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "Int8"),
        ("Int8", "Int8"),
        ("Row major INT32", None),
        ("Row major linear UINT8", None),
        ("N/A due to dynamic shapes", None),
    ],
)
def test_words_for_a_type(words: str, kind: str | None) -> None:
    counts = count_precisions([{"Inputs": [{"Format/Datatype": words}]}])
    assert counts == {"Int8": 0, "Half": 0, "Float": 0} | ({kind: 1} if kind else {})


def test_a_layer_counts_by_what_it_reads() -> None:
    layer = {"Inputs": [{"Format/Datatype": "Int8"}], "Outputs": [{"Format/Datatype": "Half"}]}
    assert count_precisions([layer, {"Outputs": [{"Datatype": "Half"}]}, {}]) == {"Int8": 1, "Half": 1, "Float": 0}


@pytest.mark.parametrize(
    "tensors", [{"Bindings": ["image", "score"]}, {"I/O Tensors": [{"Name": "image"}, {"Name": "score"}]}]
)
def test_inputs_and_outputs_have_another_key_from_11_on(tensors: dict[str, object]) -> None:
    read = read_layers(json.dumps({"Layers": ["a name only"], **tensors}), "head/")
    assert read == EngineLayers({"Int8": 0, "Half": 0, "Float": 0}, ("image", "score"), ())


def test_text_that_is_no_json_gives_nothing() -> None:
    assert read_layers("oops", "head/") == EngineLayers({"Int8": 0, "Half": 0, "Float": 0}, (), ())


def test_head_layers_that_write_less_than_fp32_are_named() -> None:
    half = {"Outputs": [{"Format/Datatype": "Half"}]}
    layers = [
        {"Name": "head/distance + head/sum", "LayerType": "gemm", **half},
        {"Name": "backbone/conv", "LayerType": "CaskConvolution", **half},
        {"Name": "head/cast", "LayerType": "Cast", **half},
        {"Name": "head/max", "LayerType": "Reduce", "Outputs": [{"Format/Datatype": "Float"}]},
    ]
    assert reduced_layers(layers, "head/") == ["head/distance + head/sum"]


@pytest.mark.parametrize(
    ("name", "is_head"),
    [
        ("PWN(head/Mul, head/Sub)", True),
        ("PWN(PWN(head/Mul), head/Sub)", True),
        ("{ForeignNode[head/Conv...head/ReduceMax]}", True),
        ("{ForeignNode[backbone/Conv...head/ReduceMax]}", True),
        ("backbone/relu + head/mean", True),
        ("PWN(backbone/Mul, backbone/Sub)", False),
        ("backbone/head/conv", False),
        ("arrowhead/conv", False),
        ("my-head/conv", False),
        ("model.head/conv", False),
    ],
)
def test_the_head_is_found_in_the_names_of_fused_layers(name: str, is_head: bool) -> None:
    layer = {"Name": name, "LayerType": "PointWiseV2", "Outputs": [{"Format/Datatype": "Half"}]}
    assert reduced_layers([layer], "head/") == ([name] if is_head else [])
