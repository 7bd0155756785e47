"""The recipe that a bundle brings: read whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.errors import ArtefactError, UsageError
from edge_anomaly_runtime.tensorrt_recipe import (
    RECIPE,
    build_files,
    parse_recipe,
    read_recipe,
    recipe_bytes,
    score_tolerance,
)

from .conftest import STRONG, WEAK


def test_a_recipe_comes_back_as_it_was_written(trt_bundle: Path) -> None:
    recipe = read_recipe(read_bundle(trt_bundle))
    assert parse_recipe(recipe_bytes(recipe)) == recipe
    assert (recipe.float_prefix, recipe.workspace_mib, recipe.device) == ("head/", 1024, "gpu")
    files = build_files(recipe, "int8")
    assert (files.weak, files.strong) == (WEAK, STRONG)
    assert score_tolerance(recipe, "fp16") == 1e-3


def test_what_it_lacks_is_named(trt_bundle: Path) -> None:
    recipe = read_recipe(read_bundle(trt_bundle))
    with pytest.raises(UsageError, match="no TensorRT graph of precision bf16; it has fp32, fp16, int8"):
        build_files(recipe, "bf16")
    with pytest.raises(ArtefactError, match="no score_tolerance for bf16"):
        score_tolerance(recipe, "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "edge-anomaly.tensorrt/2"}, "this version of edge-anomaly reads"),
        ({"alpha_warn": "often"}, "is not valid"),
        ({"workspace_mib": 0}, "is not valid"),
        ({"device": "dla"}, "is not valid"),
        ({"graphs": {"int8": {"weak": "a.onnx"}}}, "is not valid"),
    ],
)
def test_odd_recipes_are_refused(trt_bundle: Path, change: dict[str, object], message: str) -> None:
    raw = json.loads((trt_bundle / RECIPE).read_text())
    with pytest.raises(ArtefactError, match=message):
        parse_recipe(json.dumps({**raw, **change}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_recipe_is_refused(data: bytes) -> None:
    with pytest.raises(ArtefactError):
        parse_recipe(data)
