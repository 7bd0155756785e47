"""A bundle whose numbers are known by heart: its score is the largest 4 x 4 mean of the red channel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_anomaly_runtime import bundle as eab
from edge_anomaly_runtime.preprocess import Preprocess

SIDE = 16
KEYS = ("openvino/fp32", "openvino/int8", "onnxruntime/fp32", "onnxruntime/int8")
# Red level to verdict: warn is 100, fail is 200.
GOLDEN = {50: "OK", 150: "WARN", 220: "NG"}


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid bundle of a few kilobytes; warn above 100, fail above 200, outlines above 60; do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny.eab"
    (folder / "golden").mkdir(parents=True)
    files = {"model.onnx": _red_channel_graph(), "golden/maps.npz": _maps()}
    files |= {f"golden/{red:03}.png": _png(red) for red in GOLDEN}
    manifest = _manifest().model_copy(update={"files": {name: eab.file_entry(data) for name, data in files.items()}})
    for name, data in files.items():
        (folder / name).write_bytes(data)
    data = eab.manifest_bytes(manifest)
    (folder / eab.MANIFEST).write_bytes(data)
    (folder / eab.MANIFEST_DIGEST).write_bytes(eab.digest_line(data))
    return folder


def _red_channel_graph() -> bytes:
    onnx = pytest.importorskip("onnx")
    node, value, numbers = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    constants = {
        "zero": [0], "one": [1], "three": [3], "planes": [1, 1, SIDE, SIDE], "grid": [1, 4, 4], "both": [1, 2],
    }  # fmt: skip
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["image"], ["float"], to=onnx.TensorProto.FLOAT),
            node("Slice", ["float", "zero", "one", "three"], ["red"]),
            node("Reshape", ["red", "planes"], ["plane"]),
            node("AveragePool", ["plane"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
            node("Reshape", ["means", "grid"], ["anomaly_map"]),
            node("ReduceMax", ["anomaly_map", "both"], ["score"], keepdims=0),
        ],
        "red",
        [value("image", onnx.TensorProto.UINT8, [1, SIDE, SIDE, 3])],
        [
            value("score", onnx.TensorProto.FLOAT, [1]),
            value("anomaly_map", onnx.TensorProto.FLOAT, [1, 4, 4]),
        ],
        [numbers(np.array(content, dtype=np.int64), name) for name, content in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (red, 60, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def _maps() -> bytes:
    maps = np.stack([np.full((4, 4), red, dtype=np.float32) for red in GOLDEN])
    buffer = io.BytesIO()
    np.savez(buffer, **{key.replace("/", "-"): maps for key in KEYS})  # type: ignore[arg-type]
    return buffer.getvalue()


def _threshold(value: float) -> eab.Threshold:
    return eab.Threshold(value=value, alpha=0.01, method="conformal", n=300, order=298, upper95=0.02)


def _manifest() -> eab.Manifest:
    limits = eab.Thresholds(warn=_threshold(100), fail=_threshold(200), pixel=_threshold(60), scores={"mean": 50.0})
    golden = [
        eab.GoldenImage(
            file=f"golden/{red:03}.png",
            preprocessed=red == 220,
            scores=dict.fromkeys(KEYS, float(red)),
            verdicts=dict.fromkeys(KEYS, verdict),
        )
        for red, verdict in GOLDEN.items()
    ]
    return eab.Manifest(
        schema=eab.SCHEMA,
        name="tiny",
        seq=1,
        created_utc="2026-01-01T00:00:00Z",
        precision="int8",
        model=eab.ModelInfo(kind="padim", parameters={"dims": 1}),
        input=eab.InputContract(shape=(1, SIDE, SIDE, 3), preprocess=Preprocess(SIDE, SIDE), brightness=(40.0, 200.0)),
        outputs=(
            eab.OutputInfo(name="score", role="score", shape=(1,)),
            eab.OutputInfo(name="anomaly_map", role="map", shape=(1, 4, 4)),
        ),
        graphs=dict.fromkeys(KEYS, "model.onnx"),
        thresholds=dict.fromkeys(KEYS, limits),
        parity=(),
        calibration=None,
        golden=tuple(golden),
        golden_tolerance={"fp32": 1e-3, "int8": 5e-2},
        training={},
        versions={},
        seed=0,
        files={},
    )
