"""A bundle whose numbers are known by heart: its score is the largest 4 x 4 mean of the red channel."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_anomaly_runtime import bundle as eab
from edge_anomaly_runtime import cli, cuda
from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.tensorrt_library import forget_log
from edge_anomaly_runtime.tensorrt_recipe import RECIPE, BuildFiles, TensorrtRecipe, recipe_bytes

from .fake_cuda import FakeCudart, FakeDriver
from .fake_tensorrt import FakeTensorrt

SIDE = 16
KEYS = ("openvino/fp32", "openvino/int8", "onnxruntime/fp32", "onnxruntime/int8")
# Red level to verdict: warn is 100, fail is 200.
GOLDEN = {50: "OK", 150: "WARN", 220: "NG"}


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid bundle of a few kilobytes; warn above 100, fail above 200, outlines above 60; do not change it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny.eab")


def write_tiny_bundle(
    folder: Path, *, seq: int = 1, name: str = "tiny", gain: float = 1.0, normal: dict[str, float] | None = None
) -> Path:
    """Write the tiny bundle; all its scores and limits are `gain` times those of the usual one.

    normal: what is known of the normal scores, by default their mean.
    """
    files = {"model.onnx": _red_channel_graph(gain), "golden/maps.npz": _maps(gain)}
    files |= {f"golden/{red:03}.png": _png(red) for red in GOLDEN}
    manifest = _manifest(gain, normal or {"mean": gain * 50.0})
    _write_files(folder, manifest.model_copy(update={"seq": seq, "name": name}), files)
    return folder


MakeBundle = Callable[..., Path]


@pytest.fixture
def make_bundle(tiny_bundle: Path, tmp_path: Path) -> MakeBundle:
    """Write a variant of the tiny bundle: another seq or name, other golden scores."""

    def make(seq: int, *, name: str = "part", golden: float | None = None) -> Path:
        folder = Path(shutil.copytree(tiny_bundle, tmp_path / f"source-{seq}-{golden}.eab", dirs_exist_ok=True))
        manifest = json.loads((folder / eab.MANIFEST).read_text()) | {"seq": seq, "name": name}
        if golden is not None:
            manifest["golden"][0]["scores"] = dict.fromkeys(manifest["golden"][0]["scores"], golden)
        data = json.dumps(manifest).encode()
        (folder / eab.MANIFEST).write_bytes(data)
        (folder / eab.MANIFEST_DIGEST).write_bytes(eab.digest_line(data))
        return folder

    return make


def _red_channel_graph(gain: float) -> bytes:
    onnx = pytest.importorskip("onnx")
    node, value, numbers = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    constants = {
        "zero": [0], "one": [1], "three": [3], "planes": [1, 1, SIDE, SIDE], "grid": [1, 4, 4], "both": [1, 2],
    }  # fmt: skip
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["image"], ["float"], to=onnx.TensorProto.FLOAT),
            node("Slice", ["float", "zero", "one", "three"], ["red"]),
            node("Mul", ["red", "gain"], ["raised"]),
            node("Reshape", ["raised", "planes"], ["plane"]),
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
        [
            numbers(np.float32(gain), "gain"),
            *(numbers(np.array(content, dtype=np.int64), name) for name, content in constants.items()),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (red, 60, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def _maps(gain: float) -> bytes:
    maps = np.stack([np.full((4, 4), gain * red, dtype=np.float32) for red in GOLDEN])
    buffer = io.BytesIO()
    np.savez(buffer, **{key.replace("/", "-"): maps for key in KEYS})  # type: ignore[arg-type]
    return buffer.getvalue()


def _threshold(value: float) -> eab.Threshold:
    return eab.Threshold(value=value, alpha=0.01, method="conformal", n=300, order=298, upper95=0.02)


def _manifest(gain: float, normal: dict[str, float]) -> eab.Manifest:
    warn, fail, pixel = (_threshold(gain * value) for value in (100, 200, 60))
    limits = eab.Thresholds(warn=warn, fail=fail, pixel=pixel, scores=normal)
    golden = [
        eab.GoldenImage(
            file=f"golden/{red:03}.png",
            preprocessed=red == 220,
            scores=dict.fromkeys(KEYS, gain * red),
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


# Commands

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command in this process; return exit code, standard output and standard error."""
    for name in [name for name in os.environ if name.startswith("EDGE_ANOMALY_")]:
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge-anomaly", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.run(cli.app)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


# TensorRT

NORMAL_LEVELS = range(30, 110, 2)
WEAK, STRONG = "model.int8.trt.onnx", "model.int8.trt.fp16.onnx"


@dataclass
class Gpu:
    """A machine with a fake GPU, a fake TensorRT and an empty cache."""

    trt: FakeTensorrt
    driver: FakeDriver
    cudart: FakeCudart
    cache: Path


MakeGpu = Callable[..., Gpu]


@pytest.fixture
def make_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeGpu:
    """Give the machine a GPU; a second call with another version or device is an update or another board."""

    def make(version: str = "10.3.0", *, name: bytes = b"Orin", cudart: FakeCudart | None = None) -> Gpu:
        driver, library = FakeDriver(name=name), cudart or FakeCudart()
        trt = FakeTensorrt(version, library)
        libraries: dict[str, Any] = {"libcuda.so.1": driver, "libcudart.so.12": library}
        monkeypatch.setattr(cuda, "_load", libraries.get)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setenv("EDGE_ANOMALY_CACHE", str(tmp_path / "cache"))
        forget_log()
        return Gpu(trt, driver, library, tmp_path / "cache/engines")

    return make


@pytest.fixture(scope="session")
def trt_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, exported for TensorRT at all precisions, with 40 normal images of red 30 to 108."""
    folder = tmp_path_factory.mktemp("tensorrt") / "part.eab"
    write_trt_bundle(tiny_bundle, folder)
    return folder


def write_trt_bundle(
    source: Path, folder: Path, *, recipe: dict[str, Any] | None = None, batch: int | None = 1, mark: str = ""
) -> None:
    """Write the bundle of `trt_bundle`; `recipe` replaces fields, `batch` None leaves the batch axis free.

    `mark` makes other graphs with the same scores, as another training would.
    """
    tiny = eab.read_bundle(source)
    keys = ["tensorrt/fp32", "tensorrt/fp16", "tensorrt/int8"]
    maps = {**tiny.golden_maps(), **dict.fromkeys(keys, tiny.golden_maps()["onnxruntime/int8"])}
    buffer = io.BytesIO()
    np.savez(buffer, **{key.replace("/", "-"): value for key, value in maps.items()})  # type: ignore[arg-type]
    normal = {f"normal/{level:03}.png": _png(level) for level in NORMAL_LEVELS}
    fields = {
        "opset": 17,
        "graphs": {
            "fp32": BuildFiles(weak="model.onnx", strong="model.onnx"),
            "fp16": BuildFiles(weak="model.onnx", strong=STRONG),
            "int8": BuildFiles(weak=WEAK, strong=STRONG),
        },
        "score_tolerance": {"fp32": 1e-4, "fp16": 1e-3, "int8": 5e-2},
        "normal_images": tuple(normal),
        "alpha_warn": 0.05,
        "alpha_fail": 0.03,
        **(recipe or {}),
    }
    files = {name: tiny.read(name) for name in tiny.manifest.files}
    files |= {"golden/maps.npz": buffer.getvalue(), RECIPE: recipe_bytes(TensorrtRecipe(**fields)), **normal}
    files |= {WEAK: quantised_graph(batch, f"weak {mark}"), STRONG: quantised_graph(batch, f"strong {mark}")}
    simulated = tiny.manifest.thresholds["onnxruntime/int8"]
    golden = tuple(
        image.model_copy(
            update={
                "scores": {**image.scores, **dict.fromkeys(keys, image.scores["onnxruntime/int8"])},
                "verdicts": {**image.verdicts, **dict.fromkeys(keys, image.verdicts["onnxruntime/int8"])},
            }
        )
        for image in tiny.manifest.golden
    )
    manifest = tiny.manifest.model_copy(
        update={
            "graphs": {
                **tiny.manifest.graphs,
                "tensorrt/fp32": "model.onnx",
                "tensorrt/fp16": "model.onnx",
                keys[2]: WEAK,
            },
            "thresholds": {**tiny.manifest.thresholds, **dict.fromkeys(keys, simulated)},
            "golden": golden,
        }
    )
    _write_files(folder, manifest, files)


def _write_files(folder: Path, manifest: eab.Manifest, files: dict[str, bytes]) -> None:
    whole = manifest.model_copy(update={"files": {name: eab.file_entry(data) for name, data in files.items()}})
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / eab.MANIFEST).write_bytes(eab.manifest_bytes(whole))
    (folder / eab.MANIFEST_DIGEST).write_bytes(eab.digest_line(eab.manifest_bytes(whole)))


def quantised_graph(batch: int | None = 1, mark: str = "") -> bytes:
    """The largest 4 x 4 mean of the red channel in steps of 2: backbone/ with Q and DQ, head/ in float."""
    onnx = pytest.importorskip("onnx")
    node, value, numbers = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    size: Any = "N" if batch is None else batch
    constants = {
        "zero": np.array([0]), "one": np.array([1]), "three": np.array([3]),
        "planes": np.array([0, 1, SIDE, SIDE]), "grid": np.array([0, 4, 4]),
        "step": np.float32(2), "point": np.int8(0),
    }  # fmt: skip
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["image"], ["float"], name="backbone/cast", to=onnx.TensorProto.FLOAT),
            node("Slice", ["float", "zero", "one", "three"], ["red"], name="backbone/red"),
            node("Reshape", ["red", "planes"], ["plane"], name="backbone/plane"),
            node("QuantizeLinear", ["plane", "step", "point"], ["q"], name="backbone/q"),
            node("DequantizeLinear", ["q", "step", "point"], ["dq"], name="backbone/dq"),
            node("AveragePool", ["dq"], ["means"], name="backbone/pool", kernel_shape=[4, 4], strides=[4, 4]),
            node("Shape", ["means"], ["size"], name="head/size"),
            node("Reshape", ["means", "grid"], ["anomaly_map"], name="head/map"),
            node("ReduceMax", ["anomaly_map"], ["score"], name="head/max", axes=[1, 2], keepdims=0),
        ],
        "red",
        [value("image", onnx.TensorProto.UINT8, [size, SIDE, SIDE, 3])],
        [value("score", onnx.TensorProto.FLOAT, [size]), value("anomaly_map", onnx.TensorProto.FLOAT, [size, 4, 4])],
        [numbers(np.asarray(content), name) for name, content in constants.items()],
        doc_string=mark,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def write_classifier_bundle(folder: Path, graph: bytes) -> None:
    """Write a classifier's bundle for TensorRT in fp32: golden pictures red and blue, logits (100, -100) and back."""
    key = "tensorrt/fp32"
    buffer = io.BytesIO()
    np.savez(buffer, **{"tensorrt-fp32": np.array([[100, -100], [-100, 100]], np.float32)})  # type: ignore[arg-type]
    recipe = TensorrtRecipe(
        opset=17,
        graphs={"fp32": BuildFiles(weak="model.onnx", strong="model.onnx")},
        score_tolerance={"fp32": 1e-3},
        normal_images=(),
        alpha_warn=0.05,
        alpha_fail=0.03,
    )
    files = {"model.onnx": graph, "golden/maps.npz": buffer.getvalue(), RECIPE: recipe_bytes(recipe)}
    golden = []
    for name, pixel in (("red", (160, 60, 60)), ("blue", (60, 60, 160))):
        picture = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), pixel).save(picture, "PNG")
        files[f"golden/{name}.png"] = picture.getvalue()
        golden.append(
            eab.GoldenImage(file=f"golden/{name}.png", preprocessed=True, scores={key: 100.0}, verdicts={key: name})
        )
    manifest = _manifest(1.0, {}).model_copy(
        update={
            "precision": "fp32",
            "model": eab.ModelInfo(kind=eab.CLASSIFIER, parameters={"classes": ["red", "blue"]}),
            "outputs": (eab.OutputInfo(name="logits", role="logits", shape=(1, 2)),),
            "graphs": {key: "model.onnx"},
            "thresholds": {},
            "golden": tuple(golden),
        }
    )
    _write_files(folder, manifest, files)
