"""`edge-anomaly engine`: what scripts see, on machines with and without a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edge_anomaly_runtime.atomic import locked
from edge_anomaly_runtime.tensorrt_cache import PLAN, onnxruntime_folder

from .conftest import MakeGpu, Run
from .fake_tensorrt import VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_build_then_score_selftest_and_bench(run: Run, make_gpu: MakeGpu, trt_bundle: Path, version: str) -> None:
    gpu = make_gpu(version)
    code, out, err = run("engine", "build", trt_bundle)
    assert code == 0
    assert out.splitlines()[0] == f"tiny  int8  TensorRT {version}  Orin (SM 8.7)"
    assert "parity  3 golden images, score 0.0e+00" in out
    assert "limit   fail > 108: about 30 of 1000 good parts" in out
    assert err.splitlines()[-1].startswith(f"built {gpu.cache}")
    code, out, _ = run("score", trt_bundle, trt_bundle / "golden/150.png")
    row = json.loads(out)
    assert (code, row["verdict"], row["threshold"]) == (0, "NG", 108.0)
    assert run("selftest", trt_bundle, "--engine", "tensorrt")[0] == 0
    code, out, _ = run("bench", trt_bundle, "--engine", "tensorrt", "--runs", 3, "--no-warm-up", "--json")
    assert json.loads(out)["environment"]["device"] == "Orin (SM 8.7)"
    assert gpu.cudart.leaks() == {}


def test_build_as_json(run: Run, make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu()
    code, out, _ = run("engine", "build", trt_bundle, "--precision", "fp16", "--workspace-mib", 256, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["schema"], report["new"], report["workspace_mib"]) == ("edge-anomaly.engine/1", True, 256)
    assert report["parts"]["precision"] == "fp16"
    assert Path(report["folder"], PLAN).exists()
    assert json.loads(run("engine", "build", trt_bundle, "--precision", "fp16", "--json")[1])["new"] is False


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("_score_factor", 1, "Error: 3 of 3 golden images differ"),
        ("_refused_node", 4, "Error: TensorRT 10.3.0 refuses the graph:"),
        ("_failing_builds", 4, "Error: TensorRT 10.3.0 built no engine in 4 attempts."),
    ],
)
def test_build_ends_with_the_code_of_what_went_wrong(
    run: Run, make_gpu: MakeGpu, trt_bundle: Path, change: str, code: int, words: str
) -> None:
    gpu = make_gpu()
    setattr(gpu.trt, change, {"_score_factor": 1.5, "_refused_node": "backbone/", "_failing_builds": 9}[change])
    found, out, err = run("engine", "build", trt_bundle)
    assert (found, out) == (code, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    [
        ["engine", "build"],
        ["engine", "info"],
        ["score", "--engine", "tensorrt", "x.png"],
        ["selftest", "--engine", "tensorrt"],
    ],
)
def test_without_a_driver_the_code_is_3(run: Run, trt_bundle: Path, command: list[str], tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    picture = tmp_path / "x.png"
    shutil.copy(trt_bundle / "golden/150.png", picture)
    words = [str(picture) if word == "x.png" else word for word in command]
    position = 2 if words[0] == "engine" else 1
    code, out, err = run(*words[:position], trt_bundle, *words[position:])
    assert (code, out) == (3, "")
    assert "Error: There is no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded)." in err


def test_clean_without_a_driver_needs_all(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    monkeypatch.setenv("EDGE_ANOMALY_CACHE", str(tmp_path))
    assert run("engine", "clean")[0] == 3
    assert run("engine", "clean", "--all") == (0, "", "0 removed\n")


def test_info_shows_the_device_and_the_bundles_engines(run: Run, make_gpu: MakeGpu, trt_bundle: Path) -> None:
    make_gpu("11.4.0.106")
    report = json.loads(run("engine", "info", "--json")[1])
    assert (report["device"], report["tensorrt"], report["typing"]) == ("Orin", "11.4.0.106", "from the graph")
    run("engine", "build", trt_bundle)
    report = json.loads(run("engine", "info", trt_bundle, "--json")[1])
    assert {row["precision"]: row["state"] for row in report["engines"]} == {
        "fp32": "missing",
        "fp16": "missing",
        "int8": "built",
    }
    make_gpu("10.3.0")
    code, out, _ = run("engine", "info", trt_bundle)
    assert code == 0
    assert "unusable" in out
    assert "TensorRT 11.4.0.106" in out


def test_list_and_clean(run: Run, make_gpu: MakeGpu, trt_bundle: Path) -> None:
    gpu = make_gpu("10.3.0")
    run("engine", "build", trt_bundle)
    run("engine", "build", trt_bundle, "--precision", "fp32")
    make_gpu("10.13.3.9")
    run("engine", "build", trt_bundle)
    rows = json.loads(run("engine", "list", "--json")[1])["engines"]
    assert sorted(row["precision"] for row in rows) == ["fp32", "int8", "int8"]
    _, out, err = run("engine", "list")
    assert len(out.splitlines()) == 3
    assert err == f"3 engines in {gpu.cache}\n"
    assert run("engine", "clean")[2].endswith("2 removed\n")  # those of 10.3.0
    (row,) = json.loads(run("engine", "list", "--json")[1])["engines"]
    (gpu.cache / row["key"] / "engine.json").write_text("{")
    assert "does not match engine.sha256" in run("engine", "list")[1]
    assert run("engine", "clean")[2].endswith("1 removed\n")
    assert len(json.loads(run("engine", "clean", "--all", "--json")[1])["removed"]) == 2  # timing caches
    assert list(gpu.cache.iterdir()) == []


def test_clean_all_takes_leftovers_and_the_engines_of_onnxruntime_along(
    run: Run, make_gpu: MakeGpu, trt_bundle: Path
) -> None:
    gpu = make_gpu()
    key = json.loads(run("engine", "build", trt_bundle, "--json")[1])["key"]
    (gpu.cache / f".tmp-{key}-1-0123abcd").mkdir()
    running = gpu.cache / ".tmp-other-1-0123abcd"
    running.mkdir()
    onnxruntime_folder().mkdir()
    with locked(gpu.cache / "other.lock"):
        removed = json.loads(run("engine", "clean", "--all", "--json")[1])["removed"]
        assert sorted(path.name for path in gpu.cache.iterdir()) == [running.name, "other.lock"]
    assert {key, f".tmp-{key}-1-0123abcd", "onnxruntime"} < set(removed)
    assert not onnxruntime_folder().exists()
    run("engine", "clean", "--all")
    assert list(gpu.cache.iterdir()) == []


def test_doctor_prints_driver_and_package(run: Run) -> None:
    out = run("doctor")[1]
    assert "nvidia driver" in out
    assert "tensorrt package" in out
