"""Which engine and precision are chosen and why, and that both engines say the same."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_anomaly_runtime.bundle import Bundle, read_bundle
from edge_anomaly_runtime.errors import ArtefactError, MissingRequirementError, UsageError
from edge_anomaly_runtime.images import list_images, read_images
from edge_anomaly_runtime.session import CPU_ENGINES, Session, is_installed, open_engine, open_session

KEYS = [(engine, precision) for engine in CPU_ENGINES for precision in ("fp32", "int8")]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


@pytest.fixture
def vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with INT8 dot products, whatever this machine has."""
    monkeypatch.setattr("edge_anomaly_runtime.session.int8_instructions", lambda: ["avx512_vnni"])


def _absent(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # neither found nor importable


def _red(level: int) -> npt.NDArray[np.uint8]:
    image = np.full((1, 16, 16, 3), 60, dtype=np.uint8)
    image[..., 0] = level
    return image


def _with_graphs(bundle: Bundle, *keys: str, precision: str = "int8") -> Bundle:
    graphs = {key: "model.onnx" for key in keys}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": graphs, "precision": precision}))


# The choice


@pytest.mark.usefixtures("vnni")
def test_auto_takes_openvino_and_the_precision_of_the_bundle_and_says_why(tiny: Bundle) -> None:
    session, engine, precision, reasons = open_session(tiny)
    assert (engine, precision) == ("openvino", "int8")
    assert session.info.engine == "openvino"
    assert reasons == (
        "not tensorrt: the bundle was not exported for it",
        "engine openvino: first usable of tensorrt, openvino, onnxruntime",
        "precision int8: the bundle's own",
    )


@pytest.mark.usefixtures("vnni")
def test_auto_passes_over_a_missing_package_and_gives_the_line_to_type(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _absent(monkeypatch, "openvino")
    session, engine, _, reasons = open_session(tiny)
    assert engine == session.info.engine == "onnxruntime"
    assert reasons[1] == 'not openvino: package openvino is missing (pip install "edge-anomaly[openvino]")'
    assert reasons[2] == "engine onnxruntime: first usable of tensorrt, openvino, onnxruntime"


@pytest.mark.usefixtures("vnni")
def test_auto_passes_over_an_engine_that_the_bundle_was_not_exported_for(tiny: Bundle) -> None:
    bundle = _with_graphs(tiny, "onnxruntime/int8", "onnxruntime/fp32")
    _, engine, _, reasons = open_session(bundle)
    assert engine == "onnxruntime"
    assert reasons[1] == "not openvino: the bundle was not exported for it"


def test_without_any_engine_every_reason_is_given(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _absent(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(MissingRequirementError, match="No engine can run this bundle") as caught:
        open_session(tiny)
    for extra in ("openvino", "onnxruntime"):
        assert f'pip install "edge-anomaly[{extra}]"' in caught.value.what


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_a_named_engine_whose_package_is_missing_gives_the_line_to_type(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    assert is_installed(engine)
    _absent(monkeypatch, engine)
    assert not is_installed(engine)
    with pytest.raises(MissingRequirementError, match=f"--engine {engine} needs the package {engine}") as caught:
        open_session(tiny, engine=engine)
    assert caught.value.hint == f'Run: pip install "edge-anomaly[{engine}]"'


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"engine": "openvno"}, "Unknown engine 'openvno'", "Did you mean 'openvino'?"),
        ({"engine": "onnx"}, "Unknown engine 'onnx'", "Did you mean 'onnxruntime'?"),
        ({"engine": "tensort"}, "Unknown engine 'tensort'", "Did you mean 'tensorrt'? Choose one of: auto, tensorrt, "),
        ({"precision": "int4"}, "Unknown precision 'int4'", "Did you mean 'int8'?"),
        ({"precision": "INT8"}, "Unknown precision 'INT8'", "Choose one of: auto, fp32, fp16, int8."),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(
    tiny: Bundle, arguments: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_session(tiny, engine=arguments.get("engine", "auto"), precision=arguments.get("precision", "auto"))
    assert hint in caught.value.hint


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_thread_counts_are_refused(tiny: Bundle, threads: int) -> None:
    with pytest.raises(UsageError, match=f"--threads {threads}"):
        open_session(tiny, threads=threads)


def test_auto_falls_back_to_fp32_on_a_cpu_without_int8_instructions(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_anomaly_runtime.session.int8_instructions", list)
    _, _, precision, reasons = open_session(tiny)
    assert precision == "fp32"
    assert "this CPU has no INT8 dot-product instructions" in reasons[-1]
    with pytest.raises(MissingRequirementError, match="INT8 kernels saturate here and give wrong scores") as caught:
        open_session(tiny, precision="int8")
    assert "--precision fp32" in caught.value.hint


@pytest.mark.usefixtures("vnni")
def test_auto_keeps_to_fp32_for_a_float_bundle(tiny: Bundle) -> None:
    bundle = _with_graphs(tiny, "openvino/fp32", "onnxruntime/fp32", precision="fp32")
    _, _, precision, reasons = open_session(bundle)
    assert (precision, reasons[-1]) == ("fp32", "precision fp32: the bundle's own")
    with pytest.raises(UsageError, match="no graph and thresholds for openvino/int8"):
        open_session(bundle, precision="int8")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_handed_to_the_engine(tiny: Bundle, threads: int) -> None:
    """Asked of the engines themselves, behind the session's back."""
    session: Any = open_session(tiny, engine="openvino", threads=threads)[0]
    assert session.info.threads == session._compiled.get_property("INFERENCE_NUM_THREADS") == threads
    session = open_session(tiny, engine="onnxruntime", threads=threads)[0]
    assert session.info.threads == session._session.get_session_options().intra_op_num_threads == threads


# What engines do


@pytest.mark.parametrize(("engine", "precision"), KEYS)
def test_the_graph_gives_the_numbers_that_it_should(tiny: Bundle, engine: str, precision: str) -> None:
    session, *_ = open_session(tiny, engine=engine, precision=precision)
    image = _red(10)
    image[0, 4:8, 12:16, 0] = 42  # cell (1, 3)
    outputs = session.run(image)
    expected = np.full((1, 4, 4), 10.0)
    expected[0, 1, 3] = 42.0
    assert sorted(outputs) == ["anomaly_map", "score"]
    assert outputs["anomaly_map"].tolist() == expected.tolist()
    assert outputs["score"].tolist() == [42.0]
    assert outputs["score"].dtype == outputs["anomaly_map"].dtype == np.float32
    session.close()


@pytest.mark.parametrize(("engine", "precision"), KEYS)
def test_outputs_belong_to_the_caller(bundle_folder: Path, engine: str, precision: str) -> None:
    session, *_ = open_session(read_bundle(bundle_folder), engine=engine, precision=precision)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 1, 128, 128, 3), dtype=np.uint8)
    kept = session.run(first)
    before = {name: value.copy() for name, value in kept.items()}
    later = session.run(second)
    for name, value in kept.items():
        assert np.array_equal(value, before[name]), "changed by the next run"
        assert not np.array_equal(value, later[name])
        value[:] = 0  # writable
    again = session.run(first)
    assert all(np.array_equal(again[name], before[name]) for name in before), "a run does not depend on the one before"


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("model", [b"", b"garbage" * 100, bytes(1000)], ids=["empty", "text", "zeros"])
def test_bytes_that_are_no_graph_are_refused(engine: str, model: bytes) -> None:
    name = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}[engine]
    with pytest.raises(ArtefactError, match=rf"{name} \d+\.\d+\S* refuses the graph") as caught:
        open_engine(engine, model)
    assert caught.value.hint


def test_openvino_refuses_an_ir_without_its_weights(bundle_folder: Path) -> None:
    bundle = read_bundle(bundle_folder)
    name = bundle.graph("openvino", "int8")
    assert name.endswith(".xml")
    with pytest.raises(ArtefactError):
        open_engine("openvino", bundle.read(name), weights=b"")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_reports_f32_for_what_is_not_quantised(bundle_folder: Path, precision: str) -> None:
    """On a CPU with bf16 OpenVINO would run these nodes in bf16 if it was not told otherwise."""
    session, *_ = open_session(read_bundle(bundle_folder), engine="openvino", precision=precision, threads=2)
    info = session.info
    assert (info.engine, info.device, info.float_precision, info.threads) == ("openvino", "CPU", "f32", 2)
    assert re.fullmatch(r"20\d\d\.\d+\.\d+", info.version)


def test_onnxruntime_reports_the_provider_that_really_runs(bundle_folder: Path) -> None:
    info = open_session(read_bundle(bundle_folder), engine="onnxruntime", threads=2)[0].info
    assert (info.engine, info.device, info.float_precision, info.threads) == (
        "onnxruntime",
        "CPUExecutionProvider",
        "f32",
        2,
    )


def _images(bundle: Bundle, sample_folder: Path) -> list[npt.NDArray[np.uint8]]:
    paths = list_images([sample_folder / "test"])[::4]
    return [pixels[np.newaxis] for _, pixels in read_images(paths, bundle.manifest.input.preprocess, bad=[])]


def _outputs(session: Session, images: list[npt.NDArray[np.uint8]]) -> dict[str, npt.NDArray[np.float32]]:
    runs = [session.run(image) for image in images]
    session.close()
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


def test_both_engines_agree_on_the_float_graph(bundle_folder: Path, sample_folder: Path) -> None:
    bundle = read_bundle(bundle_folder)
    images = _images(bundle, sample_folder)
    assert len(images) == 8
    first, second = (
        _outputs(open_session(bundle, engine=engine, precision="fp32")[0], images)
        for engine in ("openvino", "onnxruntime")
    )
    assert np.abs(first["score"] / second["score"] - 1).max() < 1e-3
    difference = np.abs(first["anomaly_map"] - second["anomaly_map"])
    assert (difference / second["anomaly_map"].max(axis=(1, 2), keepdims=True)).max() < 1e-3


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_the_int8_graph_is_another_graph_that_ranks_like_the_float_one(
    bundle_folder: Path, sample_folder: Path, engine: str
) -> None:
    bundle = read_bundle(bundle_folder)
    images = _images(bundle, sample_folder)
    scores = {
        precision: _outputs(open_session(bundle, engine=engine, precision=precision)[0], images)["score"]
        for precision in ("fp32", "int8")
    }
    assert not np.allclose(scores["int8"], scores["fp32"], rtol=1e-5), "the same graph twice"
    assert np.corrcoef(scores["int8"], scores["fp32"])[0, 1] > 0.8


def test_a_signal_after_engines_were_exchanged_reaches_its_handler(tiny_bundle: Path) -> None:
    """A Core per session left the thread with an unmapped signal stack: the next SIGTERM was a SIGSEGV."""
    code = """
import signal, sys
from pathlib import Path
from edge_anomaly_runtime.scoring import open_scorer

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
first = open_scorer(Path(sys.argv[1]), engine="openvino", precision="fp32")
second = open_scorer(Path(sys.argv[1]), engine="openvino", precision="fp32")
first.close()
second.close()
signal.raise_signal(signal.SIGTERM)
assert heard == [signal.SIGTERM]
"""
    subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], timeout=60, check=True)


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (2, 8, 8, 3), (8, 8, 3)])
def test_openvino_refuses_images_of_another_shape(tiny: Bundle, shape: tuple[int, ...]) -> None:
    session, *_ = open_session(tiny, engine="openvino")
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        session.run(np.zeros(shape, np.uint8))
    session.close()


def test_the_backbone_really_runs_in_int8(bundle_folder: Path) -> None:
    from edge_anomaly_runtime.engine_openvino import OpenVinoSession

    onnx = pytest.importorskip("onnx")
    bundle = read_bundle(bundle_folder)
    graph = onnx.load_from_string(bundle.read("model.onnx")).graph
    heavy = [node.name for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    backbone = sum(name.startswith("backbone/") for name in heavy)
    head = sum(name.startswith("head/") for name in heavy)
    assert backbone + head == len(heavy)
    assert backbone > 30

    counts = {}
    for precision in ("fp32", "int8"):
        session, *_ = open_session(bundle, engine="openvino", precision=precision)
        assert isinstance(session, OpenVinoSession)
        counts[precision] = session.executed_precisions()
    assert counts["fp32"] == {"f32": backbone + head}
    quantised = sum(counts["int8"].get(name, 0) for name in ("u8", "i8"))
    assert 0.95 * backbone <= quantised <= backbone
    assert counts["int8"]["f32"] >= head, "the head stays float"


def test_the_chosen_graph_is_hashed_before_the_engine_sees_it(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "copy.eab"))
    bundle = read_bundle(folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    for engine in CPU_ENGINES:
        with pytest.raises(ArtefactError, match=r"model\.onnx is damaged"):
            open_session(bundle, engine=engine)


def test_choosing_an_engine_does_not_import_the_others(tiny_bundle: Path) -> None:
    code = (
        "import sys; from edge_anomaly_runtime import open_scorer\n"
        f"open_scorer({str(tiny_bundle)!r}, engine='onnxruntime').close()\n"
        "print([name for name in ('openvino', 'torch', 'onnx', 'cv2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_openvino_comes_without_its_converter_which_can_still_be_had() -> None:
    code = """
import sys
import edge_anomaly_runtime.engine_openvino
print(sorted(name for name in sys.modules if "telemetry" in name or name.startswith("openvino.tools")))
from openvino.tools.ovc import convert_model
print(callable(convert_model))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[]", "True"]
