"""Running an engine: right numbers, clean memory, and no engine that was built for something else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from edge_anomaly_runtime.bundle import digest_line, read_bundle
from edge_anomaly_runtime.cuda import CudaError
from edge_anomaly_runtime.engine_tensorrt import TensorrtSession, open_tensorrt, why_not
from edge_anomaly_runtime.errors import ArtefactError, MissingRequirementError, UsageError
from edge_anomaly_runtime.scoring import open_scorer
from edge_anomaly_runtime.selftest import golden_tolerance, run_selftest
from edge_anomaly_runtime.session import open_session
from edge_anomaly_runtime.tensorrt_build import build_engine
from edge_anomaly_runtime.tensorrt_cache import (
    PLAN,
    RECORD,
    RECORD_DIGEST,
    engine_key,
    list_engines,
    onnxruntime_folder,
)

from .conftest import Gpu, MakeGpu, write_trt_bundle
from .fake_cuda import ILLEGAL_ADDRESS, FakeCudart
from .fake_tensorrt import VERSIONS


def _red(level: int, batch: int = 1) -> npt.NDArray[np.uint8]:
    image = np.full((batch, 16, 16, 3), 60, dtype=np.uint8)
    image[..., 0] = level
    return image


def _session(path: Path, precision: str = "int8") -> TensorrtSession:
    return open_tensorrt(read_bundle(path), precision)


@pytest.fixture
def gpu(make_gpu: MakeGpu, trt_bundle: Path) -> Gpu:
    """A TensorRT 10.3 with the bundle's int8 engine in its cache."""
    gpu = make_gpu("10.3.0")
    build_engine(trt_bundle)
    return gpu


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_right_numbers_and_all_memory_back(
    make_gpu: MakeGpu, trt_bundle: Path, version: str
) -> None:
    gpu = make_gpu(version)
    build_engine(trt_bundle)
    session = _session(trt_bundle)
    image = _red(10)
    image[0, 4:8, 12:16, 0] = 42  # cell (1, 3)
    outputs = session.run(image)
    expected = np.full((1, 4, 4), 10.0)
    expected[0, 1, 3] = 42.0
    assert outputs["anomaly_map"].tolist() == expected.tolist()
    assert outputs["score"].tolist() == [42.0]
    assert outputs["score"].dtype == outputs["anomaly_map"].dtype == np.float32
    assert session.info.version == version
    assert session.info.device == "Orin (SM 8.7)"
    session.close()
    session.close()
    assert gpu.cudart.leaks() == {}
    with pytest.raises(UsageError, match="closed"):
        session.run(image)


def test_outputs_belong_to_the_caller_and_runs_do_not_mix(gpu: Gpu, trt_bundle: Path) -> None:
    session = _session(trt_bundle)
    kept = session.run(_red(50))
    assert session.run(_red(90))["score"].tolist() == [90.0]
    assert kept["score"].tolist() == [50.0]
    kept["anomaly_map"][:] = 0
    assert session.run(_red(50)[:, ::-1])["score"].tolist() == [50.0]


def test_info_says_what_the_engine_computes_in(gpu: Gpu, trt_bundle: Path) -> None:
    session = _session(trt_bundle)
    assert session.info.float_precision == "f16+f32"
    assert session.layers().counts == {"Int8": 1, "Half": 6, "Float": 2}
    build_engine(trt_bundle, precision="fp32")
    assert _session(trt_bundle, "fp32").info.float_precision == "f32"


def test_close_waits_for_what_a_failed_run_has_queued(gpu: Gpu, trt_bundle: Path) -> None:
    """The input's copy is on the stream when TensorRT refuses; the fake frees nothing while work is queued."""
    session = _session(trt_bundle)
    session.cuda_graph = "switched off"
    session.run(_red(50))
    gpu.trt._enqueue_works = False
    with pytest.raises(ArtefactError, match="cannot run the engine"):
        session.run(_red(50))
    session.close()
    assert gpu.cudart.leaks() == {}


def test_close_tries_to_free_everything_once(gpu: Gpu, trt_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = _session(trt_bundle)
    session.run(_red(50))
    gpu.cudart.freed.clear()
    gpu.cudart.broken = ILLEGAL_ADDRESS
    session.close()
    session.close()
    assert gpu.cudart.freed == ["recording", *["device", "host"] * 3, "stream"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "not all of the engine was freed: cudaStreamSynchronize failed: an illegal memory access" in line


def test_a_broken_device_does_not_hide_what_broke_it(gpu: Gpu, trt_bundle: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_scorer(trt_bundle, engine="tensorrt") as scorer:
        scorer.score_pixels(_red(50)[0])
        gpu.cudart.broken = ILLEGAL_ADDRESS
        raise ZeroDivisionError


def test_too_little_memory_is_told_although_nothing_can_be_freed(gpu: Gpu, make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu(cudart=FakeCudart(malloc_limit=1, broken=ILLEGAL_ADDRESS))
    with pytest.raises(CudaError, match="out of memory"):
        _session(trt_bundle)


def test_a_failed_recording_leaves_no_error_behind(gpu: Gpu, trt_bundle: Path) -> None:
    gpu.cudart.capture_works = False
    session = _session(trt_bundle)
    session.run(_red(50))
    assert gpu.cudart.last_error == 0


def test_the_engine_is_freed_before_its_memory(gpu: Gpu, trt_bundle: Path) -> None:
    session = _session(trt_bundle)
    session.run(_red(50))
    gpu.trt._asked["destroyed"].clear()
    gpu.cudart.freed.clear()
    session.close()
    assert gpu.trt._asked["destroyed"] == ["context", "engine", "runtime"]
    assert gpu.cudart.freed == ["recording", *["device", "host"] * 3, "stream"]


@pytest.mark.parametrize(
    "image",
    [_red(1, batch=2), _red(1).astype(np.float32), _red(1)[:, :8], _red(1)[0]],
    ids=["batch", "type", "height", "dimensions"],
)
def test_other_inputs_are_refused(gpu: Gpu, trt_bundle: Path, image: npt.NDArray[Any]) -> None:
    with pytest.raises(UsageError, match=r"takes uint8 \[1, 16, 16, 3\], not "):
        _session(trt_bundle).run(image)


def test_a_free_batch_axis_takes_up_to_the_bundles_batch(make_gpu: MakeGpu, tiny_bundle: Path, tmp_path: Path) -> None:
    gpu = make_gpu()
    write_trt_bundle(tiny_bundle, tmp_path / "free.eab", batch=None)
    build_engine(tmp_path / "free.eab")
    session = _session(tmp_path / "free.eab")
    assert session.run(_red(70))["score"].tolist() == [70.0]
    with pytest.raises(UsageError, match="takes uint8"):
        session.run(_red(70, batch=2))
    session.close()
    assert gpu.cudart.leaks() == {}


# CUDA graphs


def test_runs_are_recorded_once_and_replayed(gpu: Gpu, trt_bundle: Path) -> None:
    session = _session(trt_bundle)
    gpu.cudart.launches = 0
    assert [session.run(_red(level))["score"][0] for level in (50, 60, 70)] == [50, 60, 70]
    assert (gpu.cudart.launches, session.cuda_graph) == (3, "on")


def test_an_engine_that_cannot_be_recorded_runs_without_and_says_so(gpu: Gpu, trt_bundle: Path) -> None:
    gpu.cudart.capture_works = False
    session = _session(trt_bundle)
    assert session.run(_red(50))["score"].tolist() == [50.0]
    assert session.cuda_graph.startswith("not possible: cudaStreamBeginCapture failed: operation not permitted")
    session.close()
    assert gpu.cudart.leaks() == {}


def test_a_run_that_fails_while_it_is_recorded_does_not_lock_the_stream(gpu: Gpu, trt_bundle: Path) -> None:
    gpu.cudart.on_capture = lambda: setattr(gpu.trt, "_enqueue_works", False)
    session = _session(trt_bundle)
    with pytest.raises(ArtefactError, match="cannot run the engine"):
        session.run(_red(50))
    assert session.cuda_graph.startswith("not possible: TensorRT cannot run the engine")
    gpu.trt._enqueue_works = True
    assert session.run(_red(50))["score"].tolist() == [50.0]
    session.close()
    assert gpu.cudart.leaks() == {}


def test_the_environment_switches_recording_off(gpu: Gpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_ANOMALY_CUDA_GRAPH", "0")
    session = _session(trt_bundle)
    gpu.cudart.launches = 0
    assert session.run(_red(50))["score"].tolist() == [50.0]
    assert (gpu.cudart.launches, session.cuda_graph) == (0, "switched off")


# Engines that may not be used


def test_without_an_engine_the_command_to_type(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu()
    with pytest.raises(MissingRequirementError, match="No int8 engine of") as caught:
        _session(trt_bundle)
    assert caught.value.hint == f"Run: edge-anomaly engine build {trt_bundle} --precision int8"
    assert why_not(read_bundle(trt_bundle), "int8") == (
        f"no engine was built on this device (edge-anomaly engine build {trt_bundle} --precision int8)"
    )


@pytest.mark.parametrize(
    ("version", "name", "built", "here"),
    [
        ("10.13.3.9", b"Orin", "TensorRT 10.3.0", "TensorRT 10.13.3.9"),
        ("10.3.0", b"Orin Nano", "device Orin", "device Orin Nano"),
        ("11.4.0.106", b"Orin", "TensorRT 10.3.0", "TensorRT 11.4.0.106"),
    ],
)
def test_an_engine_of_another_version_or_device_names_both_sides(
    gpu: Gpu, make_gpu: MakeGpu, trt_bundle: Path, version: str, name: bytes, built: str, here: str
) -> None:
    make_gpu(version, name=name)
    with pytest.raises(ArtefactError) as caught:
        _session(trt_bundle)
    before, _, after = caught.value.what.partition("; here it is ")
    assert built in before
    assert here in after
    assert "edge-anomaly engine build" in caught.value.hint


def test_a_record_that_was_edited_is_refused_before_tensorrt_sees_the_engine(gpu: Gpu, trt_bundle: Path) -> None:
    (folder,) = (folder for folder, _ in list_engines())
    record = json.loads((folder / RECORD).read_text())
    record["parts"]["sm"] = "7.2"
    _write_record(folder, record)
    with pytest.raises(ArtefactError, match=r"built for SM 7\.2; here it is SM 8\.7"):
        _session(trt_bundle)
    record["parts"]["sm"], record["key"] = "8.7", "0" * 64
    _write_record(folder, record)
    with pytest.raises(ArtefactError, match="says key 0000"):
        _session(trt_bundle)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    data = json.dumps(record).encode()
    (folder / RECORD).write_bytes(data)
    (folder / RECORD_DIGEST).write_bytes(digest_line(data, RECORD))


def test_alarm_limits_that_were_edited_are_refused(gpu: Gpu, trt_bundle: Path) -> None:
    (folder,) = (folder for folder, _ in list_engines())
    record = json.loads((folder / RECORD).read_text())
    record["thresholds"]["fail"]["value"] = 1e9
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ArtefactError, match=r"engine\.json does not match engine\.sha256") as caught:
        _session(trt_bundle)
    assert "engine build" in caught.value.hint


def test_an_engine_of_an_earlier_training_is_none_of_this_bundles(
    gpu: Gpu, tiny_bundle: Path, tmp_path: Path, make_gpu: MakeGpu
) -> None:
    """Same recipe, same pictures, other weights."""
    write_trt_bundle(tiny_bundle, tmp_path / "again.eab", mark="retrained")
    for version in ("10.3.0", "10.13.3.9"):
        make_gpu(version)
        with pytest.raises(MissingRequirementError, match="No int8 engine of"):
            _session(tmp_path / "again.eab")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no record", "no digest", "odd record"])
def test_a_damaged_engine_is_refused(gpu: Gpu, trt_bundle: Path, damage: str) -> None:
    (folder,) = (folder for folder, _ in list_engines())
    plan = (folder / PLAN).read_bytes()
    if damage == "cut":
        (folder / PLAN).write_bytes(plan[:-10])
    elif damage == "flipped":
        (folder / PLAN).write_bytes(plan[:-10] + bytes([plan[-10] ^ 1]) + plan[-9:])
    elif damage == "missing":
        (folder / PLAN).unlink()
    elif damage == "no record":
        (folder / RECORD).unlink()
    elif damage == "no digest":
        (folder / RECORD_DIGEST).unlink()
    else:
        _write_record(folder, {"schema": "edge-anomaly.engine/2"})
    gpu.trt._asked["destroyed"].clear()
    with pytest.raises(ArtefactError) as caught:
        _session(trt_bundle)
    assert "engine build" in caught.value.hint
    assert gpu.trt._asked["destroyed"] == [], "TensorRT was asked"


def test_an_engine_that_tensorrt_refuses_ends_with_its_words(make_gpu: MakeGpu) -> None:
    from edge_anomaly_runtime.cuda import open_cuda

    gpu = make_gpu()
    with pytest.raises(ArtefactError, match="refuses the engine") as caught:
        TensorrtSession(open_cuda(), gpu.trt, b"rubbish")
    assert "[ERROR] Serialization assertion magicTagRead" in caught.value.what
    assert gpu.cudart.leaks() == {}


@pytest.mark.parametrize("gives_none", [False, True])
def test_a_driver_that_tensorrt_cannot_use_is_a_missing_requirement(
    gpu: Gpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch, gives_none: bool
) -> None:
    def refuse(logger: Any) -> None:
        gpu.trt._log(logger, "ERROR", "CUDA initialization failure with error: 35")
        if not gives_none:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(gpu.trt, "Runtime", refuse)
    monkeypatch.setattr(gpu.trt, "Builder", refuse)
    with pytest.raises(MissingRequirementError, match="CUDA initialization failure with error: 35"):
        _session(trt_bundle)
    with pytest.raises(MissingRequirementError, match="CUDA initialization failure with error: 35"):
        build_engine(trt_bundle, force=True)
    monkeypatch.setattr(gpu.trt, "Runtime", lambda: None)
    with pytest.raises(TypeError, match="positional argument"):  # a mistake of ours stays one
        _session(trt_bundle)


def test_too_little_memory_for_the_buffers_frees_the_rest(gpu: Gpu, make_gpu: MakeGpu, trt_bundle: Path) -> None:
    scarce = make_gpu(cudart=FakeCudart(malloc_limit=1))
    with pytest.raises(CudaError, match="out of memory"):
        _session(trt_bundle)
    assert scarce.cudart.leaks() == {}


def test_the_logger_is_one_and_keeps_the_last_lines(make_gpu: MakeGpu) -> None:
    from edge_anomaly_runtime.tensorrt_library import log_tail, shared_logger

    gpu = make_gpu()
    logger = shared_logger(gpu.trt)
    assert shared_logger(gpu.trt) is logger
    for number in range(60):
        gpu.trt._log(logger, "INFO", f"line {number}")
    assert log_tail().splitlines()[-1] == "[INFO] line 59"
    gpu.trt._log(logger, "ERROR", "it broke")
    gpu.trt._log(logger, "INFO", "goodbye")
    assert log_tail() == "[ERROR] it broke"


# Through the session seam


def test_auto_takes_a_built_engine_and_asks_no_cpu(gpu: Gpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_anomaly_runtime.session.int8_instructions", list)
    session, engine, precision, reasons = open_session(read_bundle(trt_bundle))
    assert (engine, precision, session.info.engine) == ("tensorrt", "int8", "tensorrt")
    assert reasons == (
        "engine tensorrt: first usable of tensorrt, openvino, onnxruntime",
        "precision int8: the bundle's own",
    )


def test_auto_passes_over_tensorrt_where_no_engine_was_built(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu()
    _, engine, _, reasons = open_session(read_bundle(trt_bundle))
    assert engine == "openvino"
    assert reasons[0].startswith("not tensorrt: no engine was built on this device (edge-anomaly engine build ")


def test_auto_looks_for_the_precision_that_was_asked_for(gpu: Gpu, trt_bundle: Path) -> None:
    assert open_session(read_bundle(trt_bundle), precision="fp32")[1] == "openvino"
    build_engine(trt_bundle, precision="fp32")
    assert open_session(read_bundle(trt_bundle), precision="fp32")[1] == "tensorrt"


def test_the_engines_own_thresholds_judge(gpu: Gpu, trt_bundle: Path) -> None:
    """Fitted to normal images of red 30 to 108; the simulated limits are 100 and 200."""
    with open_scorer(trt_bundle, engine="tensorrt") as scorer:
        assert scorer.thresholds.fail.value == 108.0
        assert scorer.score_pixels(_red(150)[0]).verdict == "NG"
    with open_scorer(trt_bundle, engine="onnxruntime", precision="int8") as scorer:
        assert scorer.score_pixels(_red(150)[0]).verdict == "WARN"


def test_the_selftest_takes_the_recipes_tolerance_and_the_engines_limits(gpu: Gpu, trt_bundle: Path) -> None:
    with open_scorer(trt_bundle, engine="tensorrt") as scorer:
        assert golden_tolerance(scorer) == 5e-2
        checks = run_selftest(scorer)
    assert [check.expected_verdict for check in checks] == ["OK", "NG", "NG"]
    assert all(check.ok for check in checks)
    gpu.trt._score_factor = 1.2
    with open_scorer(trt_bundle, engine="tensorrt") as scorer:
        assert not any(check.ok for check in run_selftest(scorer))


@pytest.mark.parametrize(("factor", "ok"), [(1.1, True), (1.2, False)])
def test_single_cells_of_a_map_may_stray_three_times_as_far(
    gpu: Gpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch, factor: float, ok: bool
) -> None:
    run = TensorrtSession.run

    def strayed(self: TensorrtSession, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        outputs = run(self, images)
        outputs["anomaly_map"][0, 2, 2] *= np.float32(factor)
        return outputs

    monkeypatch.setattr(TensorrtSession, "run", strayed)
    with open_scorer(trt_bundle, engine="tensorrt") as scorer:
        assert all(check.ok is ok for check in run_selftest(scorer))


def test_a_precision_that_was_not_exported(gpu: Gpu, tiny_bundle: Path, tmp_path: Path) -> None:
    from edge_anomaly_runtime.tensorrt_recipe import BuildFiles

    only = {"int8": BuildFiles(weak="model.onnx", strong="model.onnx")}
    write_trt_bundle(tiny_bundle, tmp_path / "one.eab", recipe={"graphs": only})
    with pytest.raises(UsageError, match="no TensorRT graph of precision fp16; it has int8"):
        open_session(read_bundle(tmp_path / "one.eab"), engine="tensorrt", precision="fp16")


def test_the_folder_is_named_by_the_key(gpu: Gpu) -> None:
    ((folder, record),) = list_engines()
    assert not isinstance(record, str)
    assert folder.name == record.key == engine_key(record.parts)


# ONNX Runtime's provider


def test_onnxruntime_without_the_provider_says_so(gpu: Gpu, trt_bundle: Path) -> None:
    with pytest.raises(MissingRequirementError, match="has no TensorrtExecutionProvider") as caught:
        open_session(read_bundle(trt_bundle), engine="onnxruntime-tensorrt")
    assert caught.value.exit_code == 3


class CpuAfterAll:
    """ONNX Runtime as it is without TensorRT's libraries: the provider is listed, the CPU runs."""

    def __init__(self, model: bytes, options: object, providers: list[Any]) -> None:
        self.asked = providers

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_onnxruntime_may_not_fall_back_to_the_cpu(gpu: Gpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", CpuAfterAll)
    with pytest.raises(MissingRequirementError, match="took CPUExecutionProvider instead of Tensorrt"):
        open_session(read_bundle(trt_bundle), engine="onnxruntime-tensorrt")


class Remembering:
    """ONNX Runtime with a provider that runs everything, and remembers its options."""

    asked: ClassVar[list[dict[str, str]]] = []

    def __init__(self, model: bytes, options: object, providers: list[Any]) -> None:
        self.asked.append(providers[0][1])

    def get_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider"]

    def disable_fallback(self) -> None: ...

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="image")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="score")]

    def get_session_options(self) -> Any:
        return SimpleNamespace(intra_op_num_threads=1)


def test_onnxruntimes_engines_have_a_folder_per_graph_and_precision(
    gpu: Gpu, tiny_bundle: Path, trt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would take the engine of the first graph for the second: it looks at names only."""
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Remembering)
    Remembering.asked.clear()
    write_trt_bundle(tiny_bundle, tmp_path / "again.eab", mark="retrained")
    for path, precision in ((trt_bundle, "int8"), (tmp_path / "again.eab", "int8"), (trt_bundle, "fp32")):
        open_session(read_bundle(path), engine="onnxruntime-tensorrt", precision=precision)
    folders = [Path(asked["trt_engine_cache_path"]) for asked in Remembering.asked]
    assert len({folder.name for folder in folders}) == 3
    assert [folder.name.split("-")[1] for folder in folders] == ["int8", "int8", "fp32"]
    assert all(folder.is_dir() and folder.parent == onnxruntime_folder() for folder in folders)
    assert {asked["trt_fp16_enable"] for asked in Remembering.asked} == {"False"}


def test_onnxruntime_refuses_fp16_which_would_take_the_head_along(gpu: Gpu, trt_bundle: Path) -> None:
    with pytest.raises(UsageError, match="cannot run fp16") as caught:
        open_session(read_bundle(trt_bundle), engine="onnxruntime-tensorrt", precision="fp16")
    assert "--engine tensorrt" in caught.value.hint


def test_onnxruntime_needs_a_driver_too(trt_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("edge_anomaly_runtime.cuda._load", lambda name: None)
    with pytest.raises(MissingRequirementError, match="no NVIDIA driver"):
        open_session(read_bundle(trt_bundle), engine="onnxruntime-tensorrt")
