"""Building on the device: what is asked of TensorRT, and that nothing wrong ends up in the cache."""

from __future__ import annotations

import json
import queue
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_runtime import tensorrt_build
from edge_anomaly_runtime.atomic import locked
from edge_anomaly_runtime.engine_tensorrt import TensorrtSession
from edge_anomaly_runtime.errors import ArtefactError, GateError, MissingRequirementError, UsageError
from edge_anomaly_runtime.tensorrt_build import build_engine
from edge_anomaly_runtime.tensorrt_cache import PLAN, RECORD, RECORD_DIGEST, engine_key, list_engines, lock_path
from edge_anomaly_runtime.tensorrt_layers import EngineLayers
from edge_anomaly_runtime.tensorrt_recipe import BuildFiles
from edge_anomaly_runtime.thresholds import fit_thresholds

from .conftest import NORMAL_LEVELS, STRONG, WEAK, Gpu, MakeGpu, write_classifier_bundle, write_trt_bundle
from .fake_cuda import FakeCudart
from .fake_tensorrt import VERSIONS

WEAK_VERSIONS, STRONG_VERSIONS = VERSIONS[:3], VERSIONS[3:]


def _left(gpu: Gpu) -> list[str]:
    """Name what a failed build has left in the cache, besides kernel timings."""
    return [path.name for path in gpu.cache.iterdir() if path.suffix != ".timing"] if gpu.cache.exists() else []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_version_builds_every_precision(
    make_gpu: MakeGpu, trt_bundle: Path, version: str, precision: str
) -> None:
    gpu = make_gpu(version)
    built = build_engine(trt_bundle, precision=precision)
    assert built.new
    record = built.record
    assert (record.parts.tensorrt, record.parts.device, record.parts.sm) == (version, "Orin", "8.7")
    assert (record.parts.cuda_runtime, record.parts.precision) == ("12.6", precision)
    assert (record.parity.images, record.parity.score_difference) == (3, 0.0)
    assert sorted(record.tensors) == ["anomaly_map", "image", "score"]
    assert built.folder == gpu.cache / engine_key(record.parts)
    assert sorted(path.name for path in built.folder.iterdir()) == [RECORD, PLAN, RECORD_DIGEST]
    assert gpu.cudart.leaks() == {}


@pytest.mark.parametrize("version", WEAK_VERSIONS)
@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("fp32", []),
        ("fp16", ["FP16", "OBEY_PRECISION_CONSTRAINTS"]),
        ("int8", ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]),
    ],
)
def test_up_to_10_flags_set_the_precision_and_tf32_is_off(
    make_gpu: MakeGpu, trt_bundle: Path, version: str, precision: str, flags: list[str]
) -> None:
    gpu = make_gpu(version)
    built = build_engine(trt_bundle, precision=precision)
    assert gpu.trt._asked["flags"] == flags
    assert gpu.trt._asked["network_flags"] == 1  # EXPLICIT_BATCH
    assert built.record.parts.graph == (WEAK if precision == "int8" else "model.onnx")


def test_from_11_on_the_graph_sets_the_precision(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu("11.4.0.106")
    built = build_engine(trt_bundle, precision="int8")
    assert gpu.trt._asked["flags"] == []
    strongly = gpu.trt._classes["NetworkDefinitionCreationFlag"].STRONGLY_TYPED
    assert gpu.trt._asked["network_flags"] == 1 << int(strongly)
    assert built.record.parts.graph == STRONG


@pytest.mark.parametrize("version", WEAK_VERSIONS)
def test_the_head_is_held_in_fp32_and_the_layers_are_counted(make_gpu: MakeGpu, trt_bundle: Path, version: str) -> None:
    """Of nine layers head/map and head/max compute in FP32 (head/size is a shape), and the pool reads INT8."""
    make_gpu(version)
    built = build_engine(trt_bundle, precision="int8")
    assert built.record.layers == {"Int8": 1, "Half": 6, "Float": 2}
    assert built.notes == ()


def test_a_head_that_is_not_held_is_told(make_gpu: MakeGpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpu()
    monkeypatch.setattr("edge_anomaly_runtime.tensorrt_plan._hold_in_float", lambda trt, layer: False)
    built = build_engine(trt_bundle, precision="int8")
    assert built.notes == ("2 layers of the head do not write FP32 (head/map, head/max)",)


def test_an_int8_engine_without_int8_layers_is_told(
    make_gpu: MakeGpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gpu()
    nothing = EngineLayers({"Int8": 0, "Half": 0, "Float": 0}, (), ())
    monkeypatch.setattr("edge_anomaly_runtime.engine_tensorrt.read_layers", lambda text, prefix: nothing)
    built = build_engine(trt_bundle)
    assert built.notes == ("the engine inspector names no INT8 layer: expect the latency of FP16",)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_free_batch_axis_gets_the_bundles_batch(
    make_gpu: MakeGpu, tiny_bundle: Path, tmp_path: Path, version: str
) -> None:
    write_trt_bundle(tiny_bundle, tmp_path / "free.eab", batch=None)
    make_gpu(version)
    assert build_engine(tmp_path / "free.eab").record.parity.score_difference == 0.0


# Thresholds


def test_thresholds_are_fitted_on_the_engine_from_the_packed_images(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu()
    record = build_engine(trt_bundle).record
    scores = [float(level) for level in NORMAL_LEVELS]
    assert record.thresholds == fit_thresholds(scores, scores, alpha_warn=0.05, alpha_fail=0.03)
    assert record.threshold_images == "40 packed in the bundle"


def test_calibration_takes_a_folder_instead(make_gpu: MakeGpu, trt_bundle: Path, tmp_path: Path) -> None:
    make_gpu()
    (tmp_path / "good").mkdir()
    for level in range(60, 100, 2):
        Image.new("RGB", (40, 30), (level, 60, 60)).save(tmp_path / f"good/{level}.png")
    (tmp_path / "good/bad.png").write_bytes(b"rubbish")
    record = build_engine(trt_bundle, calibration=tmp_path / "good").record
    scores = [float(level) for level in range(60, 100, 2)]
    assert record.thresholds == fit_thresholds(scores, scores, alpha_warn=0.05, alpha_fail=0.03)
    assert record.threshold_images == f"20 of {tmp_path / 'good'}, 1 unreadable"
    with pytest.raises(UsageError, match="built already") as caught:
        build_engine(trt_bundle, calibration=tmp_path / "good")
    assert "--force" in caught.value.hint


def test_a_calibration_folder_without_images_is_told_before_the_build(
    make_gpu: MakeGpu, trt_bundle: Path, tmp_path: Path
) -> None:
    gpu = make_gpu()
    with pytest.raises(UsageError, match="no file or folder"):
        build_engine(trt_bundle, calibration=tmp_path / "nowhere")
    assert gpu.trt._asked["attempts"] == []


def test_a_calibration_folder_of_rubbish_is_told_before_the_build(
    make_gpu: MakeGpu, trt_bundle: Path, tmp_path: Path
) -> None:
    gpu = make_gpu()
    (tmp_path / "good").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "good" / name).write_bytes(b"rubbish")
    with pytest.raises(UsageError, match=r"None of the 2 images in .*good can be read: .*damaged") as caught:
        build_engine(trt_bundle, calibration=tmp_path / "good")
    assert "--calibration" in caught.value.hint
    assert gpu.trt._asked["attempts"] == []


@pytest.mark.parametrize("output", ["score", "anomaly_map"])
def test_normal_images_without_a_finite_score_are_a_failed_gate(
    make_gpu: MakeGpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    gpu = make_gpu()
    run = TensorrtSession.run

    def overflowing(self: TensorrtSession, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        outputs = run(self, images)
        if 98 <= images[0, 0, 0, 0] < 110:
            outputs[output][:] = np.nan
        return outputs

    monkeypatch.setattr(TensorrtSession, "run", overflowing)
    with pytest.raises(GateError, match="6 of 40 normal images have no finite score on the engine") as caught:
        build_engine(trt_bundle)
    assert caught.value.hint == "The engine was thrown away. Try --precision fp16 or fp32, or another engine."
    assert _left(gpu) == []


def test_a_bundle_without_normal_images_asks_for_some(make_gpu: MakeGpu, tiny_bundle: Path, tmp_path: Path) -> None:
    write_trt_bundle(tiny_bundle, tmp_path / "bare.eab", recipe={"normal_images": ()})
    make_gpu()
    with pytest.raises(UsageError, match="packs no normal images") as caught:
        build_engine(tmp_path / "bare.eab")
    assert "--calibration" in caught.value.hint


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A classifier's bundle with two classes: more red than blue, and the contrary."""
    onnx = pytest.importorskip("onnx")
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weights = np.tile(np.array([[1, -1], [0, 0], [-1, 1]], np.float32) / 256, (256, 1))
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["image"], ["float"], name="backbone/cast", to=onnx.TensorProto.FLOAT),
            node("Flatten", ["float"], ["flat"], name="backbone/flat"),
            node("MatMul", ["flat", "weights"], ["logits"], name="head/product"),
        ],
        "classes",
        [value("image", onnx.TensorProto.UINT8, [1, 16, 16, 3])],
        [value("logits", onnx.TensorProto.FLOAT, [1, 2])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    write_classifier_bundle(tmp_path / "classes.eab", model.SerializeToString())
    return tmp_path / "classes.eab"


def test_a_classifier_is_checked_by_its_logits_and_has_no_thresholds(make_gpu: MakeGpu, classifier: Path) -> None:
    gpu = make_gpu()
    record = build_engine(classifier).record
    assert (record.thresholds, record.threshold_images) == (None, "")
    assert record.parity.images == 2
    assert record.parity.score_difference < 1e-6
    with pytest.raises(UsageError, match="has no thresholds"):
        build_engine(classifier, calibration=classifier, force=True)
    for factor in (1.1, float("nan")):
        gpu.trt._score_factor = factor
        with pytest.raises(GateError, match="2 of 2 golden images"):
            build_engine(classifier, force=True)


# Refusals


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_with_other_scores_is_thrown_away(make_gpu: MakeGpu, trt_bundle: Path, version: str) -> None:
    gpu = make_gpu(version)
    gpu.trt._score_factor = 1.1
    with pytest.raises(GateError, match="3 of 3 golden images differ by more than") as caught:
        build_engine(trt_bundle)
    assert "golden/150.png: score 165, expected 150 (off by 1.0e-01" in caught.value.what
    assert _left(gpu) == []
    assert gpu.cudart.leaks() == {}


@pytest.mark.parametrize(
    ("there", "precision", "advice"),
    [
        (("fp32", "fp16", "int8"), "int8", "Try --precision fp16 or fp32, or another engine."),
        (("fp32", "int8"), "int8", "Try --precision fp32, or another engine."),
        (("fp32", "fp16", "int8"), "fp16", "Try --precision fp32, or another engine."),
        (("int8",), "int8", "Try another engine."),
        (("fp32", "fp16"), "fp32", "Try another engine."),
    ],
)
def test_after_a_failed_check_only_what_the_bundle_has_is_advised(
    make_gpu: MakeGpu, tiny_bundle: Path, tmp_path: Path, there: tuple[str, ...], precision: str, advice: str
) -> None:
    graphs = {name: BuildFiles(weak="model.onnx", strong="model.onnx") for name in there}
    write_trt_bundle(tiny_bundle, tmp_path / "some.eab", recipe={"graphs": graphs})
    make_gpu().trt._score_factor = 1.5
    with pytest.raises(GateError) as caught:
        build_engine(tmp_path / "some.eab", precision=precision)
    assert caught.value.hint == f"The engine was thrown away. {advice}"


def test_an_absent_precision_is_told_before_anything_else(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without a GPU, too; and although the recipe has no tolerance for it either."""
    graphs = {name: BuildFiles(weak="model.onnx", strong="model.onnx") for name in ("fp32", "int8")}
    recipe = {"graphs": graphs, "score_tolerance": {"fp32": 1e-4, "int8": 5e-2}}
    write_trt_bundle(tiny_bundle, tmp_path / "some.eab", recipe=recipe)
    with pytest.raises(UsageError, match="no TensorRT graph of precision fp16; it has fp32, int8"):
        build_engine(tmp_path / "some.eab", precision="fp16")


def test_a_forced_build_that_fails_removes_the_older_engine(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu()
    folder = build_engine(trt_bundle).folder
    gpu.trt._score_factor = float("nan")
    with pytest.raises(GateError, match="could not be judged"):
        build_engine(trt_bundle, force=True)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("version", "named"),
    [("8.6.1", "- node 5: Assertion failed"), ("10.3.0", "- backbone/pool (AveragePool): Assertion failed")],
)
def test_every_complaint_of_the_parser_is_passed_on(
    make_gpu: MakeGpu, trt_bundle: Path, version: str, named: str
) -> None:
    gpu = make_gpu(version)
    gpu.trt._refused_node = "backbone/p"
    with pytest.raises(ArtefactError, match=f"TensorRT {version} refuses the graph") as caught:
        build_engine(trt_bundle)
    assert named in caught.value.what
    assert caught.value.what.count("\n- ") == 2  # plane and pool
    assert _left(gpu) == []


@pytest.mark.parametrize(
    ("failing", "ladder"),
    [
        (0, [(1024, 3)]),
        (1, [(1024, 3), (512, 3)]),
        (3, [(1024, 3), (512, 3), (512, 2), (512, 1)]),
    ],
)
def test_a_failed_build_is_tried_with_less(
    make_gpu: MakeGpu, trt_bundle: Path, failing: int, ladder: list[tuple[int, int]]
) -> None:
    gpu = make_gpu("10.13.3.9")
    gpu.trt._failing_builds = failing
    record = build_engine(trt_bundle).record
    assert gpu.trt._asked["attempts"] == ladder
    assert (record.workspace_mib, record.optimization_level) == ladder[-1]


def test_a_build_that_always_fails_ends_with_tensorrts_words(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu()
    gpu.trt._failing_builds = 99
    with pytest.raises(ArtefactError, match="built no engine in 4 attempts") as caught:
        build_engine(trt_bundle)
    assert "[ERROR] Could not find any implementation for node backbone/pool" in caught.value.what
    assert "nobody needs" not in caught.value.what
    assert _left(gpu) == []


def test_ctrl_c_stops_the_build(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu()
    gpu.trt._stop_build = True
    with pytest.raises(KeyboardInterrupt):
        build_engine(trt_bundle)
    assert len(gpu.trt._asked["attempts"]) == 1
    assert _left(gpu) == []


@pytest.mark.parametrize(
    ("integrated", "free_mib", "available_mib", "workspace"),
    [
        (False, 8192, 100, 1024),
        (False, 2100, 100, 525),
        (True, 100, 3000, 750),
    ],
)
def test_the_workspace_is_a_quarter_of_what_is_free(
    make_gpu: MakeGpu,
    trt_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    integrated: bool,
    free_mib: int,
    available_mib: int,
    workspace: int,
) -> None:
    """A Jetson's GPU lives in main memory, where the kernel's MemAvailable counts."""
    monkeypatch.setattr("edge_anomaly_runtime.cuda.available_memory", lambda: available_mib << 20)
    gpu = make_gpu(cudart=FakeCudart(free_bytes=free_mib << 20, integrated=integrated))
    build_engine(trt_bundle)
    assert gpu.trt._asked["attempts"] == [(workspace, 3)]


def test_too_little_memory_is_told_with_both_numbers(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu(cudart=FakeCudart(free_bytes=400 << 20))
    with pytest.raises(MissingRequirementError, match="400 MiB are free, about 544 MiB are needed"):
        build_engine(trt_bundle)
    make_gpu(cudart=FakeCudart(free_bytes=1000 << 20))
    assert "only 1000 MiB of memory are free" in build_engine(trt_bundle).notes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int4"}, "Unknown precision 'int4'"),
        ({"workspace_mib": 0}, "--workspace-mib 0"),
    ],
)
def test_impossible_arguments(make_gpu: MakeGpu, trt_bundle: Path, arguments: dict[str, Any], message: str) -> None:
    make_gpu()
    with pytest.raises(UsageError, match=message):
        build_engine(trt_bundle, **arguments)


def test_a_bundle_that_was_not_exported_for_tensorrt(make_gpu: MakeGpu, tiny_bundle: Path) -> None:
    make_gpu()
    with pytest.raises(UsageError, match="was not exported for TensorRT") as caught:
        build_engine(tiny_bundle)
    assert "--target tensorrt" in caught.value.hint


def test_a_recipe_that_names_a_missing_file(make_gpu: MakeGpu, tiny_bundle: Path, tmp_path: Path) -> None:
    write_trt_bundle(tiny_bundle, tmp_path / "odd.eab", recipe={"normal_images": ("normal/nowhere.png",)})
    make_gpu()
    with pytest.raises(ArtefactError, match=r"names 'normal/nowhere\.png'"):
        build_engine(tmp_path / "odd.eab")


# The cache


def test_a_fitting_engine_is_kept_unless_forced(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu()
    first = build_engine(trt_bundle)
    second = build_engine(trt_bundle)
    assert (second.new, second.record) == (False, first.record)
    assert len(gpu.trt._asked["attempts"]) == 1
    assert build_engine(trt_bundle, force=True).new
    assert len(gpu.trt._asked["attempts"]) == 2


def test_a_damaged_engine_is_built_anew_without_force(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu()
    folder = build_engine(trt_bundle).folder
    (folder / PLAN).write_bytes(b"cut")
    assert build_engine(trt_bundle).new
    (folder / RECORD).write_text("{")
    assert build_engine(trt_bundle).new


@pytest.mark.parametrize(("force", "builds"), [(False, 1), (True, 2)])
def test_a_second_builder_waits_for_the_first_and_takes_its_engine(
    make_gpu: MakeGpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch, force: bool, builds: int
) -> None:
    """As two containers do that share the cache; without the lock each would remove the other's temporary folder."""
    gpu = make_gpu()
    first = build_engine(trt_bundle)
    aside = gpu.cache / "aside"
    first.folder.rename(aside)
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(tensorrt_build, "say", told.put)
    with ThreadPoolExecutor() as pool:
        with locked(lock_path(first.folder)):
            second = pool.submit(build_engine, trt_bundle, force=force)
            assert "waiting for it" in told.get(timeout=60)
            assert not second.done()
            aside.rename(first.folder)
        assert second.result(timeout=60).new is force
    assert len(gpu.trt._asked["attempts"]) == builds
    assert list(gpu.cache.glob("*.lock")) == []


def test_another_device_or_version_has_an_engine_of_its_own(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    for version, name in (("10.3.0", b"Orin"), ("10.3.0", b"Orin Nano"), ("10.13.3.9", b"Orin")):
        make_gpu(version, name=name)
        assert build_engine(trt_bundle).new
    assert len(list(list_engines())) == 3


def test_a_change_of_the_alarm_rates_is_another_engine(make_gpu: MakeGpu, tiny_bundle: Path, tmp_path: Path) -> None:
    """Its thresholds lie beside it."""
    make_gpu()
    keys = []
    for number, alpha in enumerate((0.05, 0.1)):
        folder = tmp_path / f"{number}.eab"
        write_trt_bundle(tiny_bundle, folder, recipe={"alpha_warn": alpha})
        keys.append(build_engine(folder).record.key)
    assert keys[0] != keys[1]


def test_the_timing_cache_is_used_again_and_a_damaged_one_is_not(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu()
    build_engine(trt_bundle)
    assert gpu.trt._asked["timing_cache"] == b""
    build_engine(trt_bundle, precision="fp16")
    assert gpu.trt._asked["timing_cache"] == b"measured;"
    (file,) = gpu.cache.glob("*.timing")
    file.write_bytes(file.read_bytes()[:-1])
    build_engine(trt_bundle, precision="fp32")
    assert gpu.trt._asked["timing_cache"] == b""


def test_a_cache_that_cannot_be_written_is_told_before_the_build(
    make_gpu: MakeGpu, trt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = make_gpu()
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGE_ANOMALY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="in the way"):
        build_engine(trt_bundle)
    assert gpu.trt._asked["attempts"] == []


def test_the_record_says_what_a_person_asks_later(
    make_gpu: MakeGpu, trt_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gpu()
    monkeypatch.setattr(tensorrt_build, "l4t_release", lambda: "36.4.0")
    monkeypatch.setattr(tensorrt_build, "power_mode", lambda: "MAXN")
    folder = build_engine(trt_bundle, workspace_mib=300).folder
    record = json.loads((folder / RECORD).read_text())
    assert record["schema"] == "edge-anomaly.engine/1"
    assert (record["l4t"], record["power_mode"], record["workspace_mib"]) == ("36.4.0", "MAXN", 300)
    assert record["engine_bytes"] == (folder / PLAN).stat().st_size


def test_without_a_driver_nothing_is_asked_of_tensorrt(trt_bundle: Path) -> None:
    """For real: no machine that runs these tests in CI has a GPU."""
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    with pytest.raises(MissingRequirementError, match="no NVIDIA driver"):
        build_engine(trt_bundle)


def test_float_scores_are_compared_as_numbers(make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu()
    gpu.trt._score_factor = 1.02
    record = build_engine(trt_bundle).record
    assert record.parity.score_difference == pytest.approx(0.02, rel=1e-3)
    assert record.thresholds is not None
    assert np.isclose(record.thresholds.fail.value, 1.02 * 108, rtol=1e-3)
