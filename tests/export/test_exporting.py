"""From a run to a bundle: what is in it, when it is refused, and that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from edge_anomaly.data import GOOD, UNSURE
from edge_anomaly.padim import Padim, fit_gaussian, head_arrays
from edge_anomaly.prediction import read_pixels
from edge_anomaly.runs import Run, load_run
from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_calibration.qdq_graph import quantized_share
from edge_anomaly_calibration.rounding import round_weights
from edge_anomaly_calibration.selection import choose_calibration_images
from edge_anomaly_export import assembling, exporting, quantising
from edge_anomaly_export import comparison as comparison_module
from edge_anomaly_export.bundling import write_bundle
from edge_anomaly_export.comparison import read_comparison
from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.graph import onnx_from_detector, with_head_arrays
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_runtime.atomic import new_folder
from edge_anomaly_runtime.bundle import Bundle, Manifest, file_entry, manifest_bytes, read_bundle
from edge_anomaly_runtime.engine_openvino import open_openvino
from edge_anomaly_runtime.errors import ArtefactError, GateError, MissingRequirementError, UsageError
from edge_anomaly_runtime.session import open_engine, open_session
from edge_anomaly_runtime.thresholds import fit_thresholds

Pixels = npt.NDArray[np.uint8]
KEYS = ["openvino/fp32", "openvino/int8", "onnxruntime/fp32", "onnxruntime/int8"]
RATES = {"alpha_warn": 0.05, "alpha_fail": 0.01}
ANYTHING_GOES = GuardLimits(auroc_drop=1.0, flips=1.0, distinct=0.0)


@pytest.fixture
def run_copy(run_folder: Path, tmp_path: Path) -> Path:
    """A run of the test's own: export stores the INT8 ranges in it."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the shared run's model and round its weights once for this module: seconds, with the same result."""

    def copy_of(name: str, make: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
        if name not in _PREPARED:
            _PREPARED[name] = make()
        copy = onnx.ModelProto()
        copy.CopyFrom(_PREPARED[name])
        return copy

    def trace(model: Padim, height: int, width: int, *, opset: int) -> onnx.ModelProto:
        return copy_of(f"traced {opset}", lambda: onnx_from_detector(model, height, width, opset=opset))

    def rounded(model: onnx.ModelProto, images: Iterable[Pixels], **options: Any) -> onnx.ModelProto:
        return copy_of("rounded", lambda: round_weights(model, images, **options))

    monkeypatch.setattr(exporting, "onnx_from_detector", trace)
    monkeypatch.setattr(quantising, "round_weights", rounded)


_PREPARED: dict[str, onnx.ModelProto] = {}


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> Bundle:
    return read_bundle(bundle_folder)


@pytest.fixture(scope="module")
def run(run_folder: Path) -> Run:
    return load_run(run_folder)


@pytest.fixture(scope="module")
def holdout(run: Run) -> Pixels:
    return read_pixels(run.holdout, run.preprocess, strict=True, what="")[1]


def rewrite(run_folder: Path, **changes: object) -> None:
    record = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**record, **changes}))


def scores(model: onnx.ModelProto, pixels: Pixels) -> npt.NDArray[np.float64]:
    session = open_engine("onnxruntime", model.SerializeToString(), threads=1)
    return np.array([float(session.run(image[np.newaxis])["score"][0]) for image in pixels])


def graph(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load_from_string(bundle.read(name))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


# What is in a bundle


def test_every_file_is_listed_and_every_listed_file_is_there(bundle: Bundle) -> None:
    golden = {f"golden/{index:03}.png" for index in range(8)} | {"golden/maps.npz"}
    models = {"model.onnx", "model.int8.cpu.onnx", "openvino/model.xml", "openvino/model.bin"}
    assert set(bundle.manifest.files) == golden | models | {"report/index.html"}
    assert files_below(bundle.path) == set(bundle.manifest.files) | {"manifest.json", "manifest.sha256"}
    for name, entry in bundle.manifest.files.items():
        data = (bundle.path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256), name


def test_every_engine_and_precision_has_a_graph_and_its_own_thresholds(bundle: Bundle) -> None:
    assert bundle.manifest.graphs == {
        "openvino/fp32": "model.onnx",
        "openvino/int8": "openvino/model.xml",
        "onnxruntime/fp32": "model.onnx",
        "onnxruntime/int8": "model.int8.cpu.onnx",
    }
    assert set(bundle.manifest.thresholds) == set(KEYS)
    limits = {key: value.fail.value for key, value in bundle.manifest.thresholds.items()}
    assert limits["openvino/fp32"] == pytest.approx(limits["onnxruntime/fp32"], rel=1e-4)
    assert len(set(limits.values())) == 4


@pytest.mark.parametrize("key", KEYS)
def test_thresholds_come_from_the_held_out_images_on_that_very_graph(bundle: Bundle, holdout: Pixels, key: str) -> None:
    engine, precision = key.split("/")
    session = open_session(bundle, engine=engine, precision=precision)[0]
    results = [session.run(image[np.newaxis]) for image in holdout]
    session.close()
    expected = fit_thresholds(
        [float(result["score"][0]) for result in results],
        [float(result["anomaly_map"].max()) for result in results],
        alpha_warn=0.05,
        alpha_fail=0.01,
    )
    got = bundle.manifest.thresholds[key]
    for name in ("warn", "fail", "pixel"):
        assert getattr(got, name).value == pytest.approx(getattr(expected, name).value, rel=1e-4), name
        assert getattr(got, name).n == len(holdout) == 12
    assert got.scores == pytest.approx(expected.scores, rel=1e-4)


def test_manifest_describes_model_input_and_outputs(bundle: Bundle, run: Run) -> None:
    manifest = bundle.manifest
    assert (manifest.schema_, manifest.name, manifest.precision) == ("edge-anomaly.bundle/1", "parts", "int8")
    assert manifest.model.kind == "padim"
    parameters = manifest.model.parameters
    assert (parameters["backbone"], parameters["dims"], parameters["opset"]) == ("efficientnet_lite0", 32, 18)
    assert parameters["images"] == 48
    assert (manifest.input.shape, manifest.input.preprocess) == ((1, 128, 128, 3), run.preprocess)
    assert manifest.input.brightness == run.brightness
    assert [(output.name, output.role, output.shape) for output in manifest.outputs] == [
        ("score", "score", (1,)),
        ("anomaly_map", "map", (1, 16, 16)),
    ]
    assert manifest.golden_tolerance == {"fp32": 1e-3, "fp16": 1e-3, "int8": 5e-2}
    assert manifest.seed == run.seed
    assert abs(manifest.seq - time.time()) < 3600
    assert {"onnx", "onnxruntime", "openvino", "torch"} <= set(manifest.versions)


def test_manifest_describes_calibration_and_training(bundle: Bundle, run: Run) -> None:
    calibration = bundle.manifest.calibration
    assert calibration is not None
    assert (calibration.method, calibration.images, calibration.synthetic, calibration.seed) == ("minmax", 32, 16, 0)
    chosen = choose_calibration_images(run.fit, run.preprocess, count=32, seed=0)
    assert calibration.images_sha256 == chosen.sha256()
    key = json.loads((run.path / "calibration" / "ranges.key.json").read_text())
    assert key["images_sha256"] == calibration.images_sha256
    assert key["float_model_sha256"] == calibration.float_model_sha256
    training = bundle.manifest.training
    assert (training["train"], training["fitted"], training["held_out"], training["skipped"]) == (60, 48, 12, 0)
    assert training["weights"] == "default"
    hashes = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in run.fit)
    assert training["images_sha256"] == hashlib.sha256(hashes.encode()).hexdigest()


def test_parity_compares_every_graph_on_held_out_and_labelled_images(bundle: Bundle) -> None:
    rows = {row.backend.replace(" ", "/"): row for row in bundle.manifest.parity}
    assert set(rows) == set(KEYS)
    assert {row.images for row in rows.values()} == {12 + 32}
    for key in ("openvino/fp32", "onnxruntime/fp32"):
        assert rows[key].ok
        assert rows[key].score_difference < 1e-4
        assert rows[key].flips == 0
    for key in KEYS:
        auroc = rows[key].auroc
        assert auroc is not None
        assert auroc > 0.7


def test_report_is_a_page_about_this_bundle(bundle: Bundle) -> None:
    page = bundle.read("report/index.html").decode()
    assert "parts" in page
    assert "<html" in page.lower()


# The graphs in it


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.cpu.onnx"])
def test_graphs_are_self_contained(bundle: Bundle, name: str) -> None:
    model = graph(bundle, name)
    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == ["score", "anomaly_map"]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    named = [node.name for node in model.graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert {name.partition("/")[0] for name in named} == {"backbone", "head"}
    assert not {node.op_type for node in model.graph.node} & {"BatchNormalization", "Identity"}
    assert b"/tmp/" not in bundle.read(name)


def test_the_backbone_is_int8_and_the_head_float(bundle: Bundle) -> None:
    model = graph(bundle, "model.int8.cpu.onnx")
    assert quantized_share(model) == 1.0
    assert quantized_share(graph(bundle, "model.onnx")) == 0.0
    backbone = sum(node.op_type == "Conv" and node.name.startswith("backbone/") for node in model.graph.node)
    head = sum(node.op_type == "Conv" and node.name.startswith("head/") for node in model.graph.node)
    dequantised = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in model.graph.node:
        if node.name.startswith("head/"):
            assert not dequantised & set(node.input), node.name
    session = open_openvino(bundle.read("openvino/model.xml"), weights=bundle.read("openvino/model.bin"), threads=1)
    assert session.executed_precisions() == {"u8": backbone, "f32": head}


def head_of(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.float32]]:
    stored = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    return {name: stored[f"head.{name}"] for name in ("mean", "whitening_top", "whitening_bottom")}


def test_the_gaussian_is_fitted_on_the_features_of_the_int8_graph(bundle: Bundle, run: Run) -> None:
    int8_graph = graph(bundle, "model.int8.cpu.onnx")
    fitted, float_head = head_of(int8_graph), head_of(graph(bundle, "model.onnx"))
    del int8_graph.graph.output[:]
    embedding = onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, None)
    int8_graph.graph.output.append(embedding)
    session = open_engine("onnxruntime", int8_graph.SerializeToString())
    pixels = read_pixels(run.fit, run.preprocess, strict=True, what="")[1]
    gaussian = fit_gaussian((session.run(image[np.newaxis])["embedding"] for image in pixels), run.config)
    for name, expected in head_arrays(run.config, gaussian, (16, 16)).items():
        largest = np.abs(expected).max()
        assert np.abs(fitted[name] - expected).max() < 1e-3 * largest, name
        assert np.abs(float_head[name] - expected).max() > 1e-2 * largest, f"{name}: the features hardly differ"


def test_float_statistics_would_make_int8_features_look_anomalous(bundle: Bundle, run: Run, holdout: Pixels) -> None:
    """And every threshold would be off."""
    float_graph, int8_graph = graph(bundle, "model.onnx"), graph(bundle, "model.int8.cpu.onnx")
    assert scores(int8_graph, holdout).mean() == pytest.approx(scores(float_graph, holdout).mean(), rel=0.1)
    seen = read_pixels(run.fit, run.preprocess, strict=True, what="")[1]
    expected, refitted = scores(float_graph, seen).mean(), scores(int8_graph, seen).mean()
    mixed = scores(with_head_arrays(int8_graph, head_of(float_graph)), seen).mean()
    assert refitted == pytest.approx(expected, rel=0.02)
    assert mixed > 1.1 * expected


# Other exports


def test_float_export_needs_no_training_images(prepared_once: None, run_copy: Path, tmp_path: Path) -> None:
    rewrite(run_copy, fit=["/nowhere/1.png", "/nowhere/2.png"])
    out = tmp_path / "float.eab"
    manifest = export_run(run_copy, out, ExportOptions(("openvino",), "fp32"))
    assert (out / "manifest.json").read_bytes() == manifest_bytes(manifest)
    read_bundle(out)
    assert (manifest.precision, manifest.calibration) == ("fp32", None)
    assert manifest.graphs == {"openvino/fp32": "openvino/model.xml", "onnxruntime/fp32": "model.onnx"}
    assert set(manifest.thresholds) == set(manifest.graphs)
    assert not [name for name in manifest.files if "int8" in name]
    assert [row.ok for row in manifest.parity] == [True, True]
    assert "allow_drop" not in manifest.model.parameters
    assert leftovers(tmp_path) == []


def test_int8_export_without_training_images_is_refused(prepared_once: None, run_copy: Path, tmp_path: Path) -> None:
    rewrite(run_copy, fit=["/nowhere/1.png"])
    with pytest.raises(UsageError, match=r"needs calibration images, and the training images of .* are gone") as raised:
        export_run(run_copy, tmp_path / "a.eab", ExportOptions(("onnx",), "int8"))
    assert "--precision fp32" in raised.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_export_without_held_out_images_is_refused(prepared_once: None, run_copy: Path, tmp_path: Path) -> None:
    rewrite(run_copy, holdout=["/nowhere/1.png"])
    with pytest.raises(UsageError, match=r"held-out images of .* are gone"):
        export_run(run_copy, tmp_path / "a.eab", ExportOptions(("onnx",), "fp32"))
    assert leftovers(tmp_path) == []


def test_graphs_are_compared_on_held_out_and_labelled_images_that_are_still_there(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = [item if item.label == GOOD else replace(item, path=Path("/nowhere") / item.path.name) for item in run.test]
    comparison = read_comparison(replace(run, test=tuple(gone)), **RATES)
    assert "Comparing on 16 of 32 labelled images." in capsys.readouterr().err
    assert comparison.paths == [*run.holdout, *(item.path for item in run.test if item.label == GOOD)]
    assert comparison.holdout == 12
    assert comparison.labels is None, "without a defect there is no AUROC"
    assert len(comparison.pixels) == 28


def test_of_very_many_labelled_images_a_random_part_is_compared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first ones, which may all be of one kind."""
    monkeypatch.setattr(comparison_module, "_MAX_COMPARED", 20)
    comparison = read_comparison(run, **RATES)
    assert comparison.paths == read_comparison(run, **RATES).paths
    assert len(comparison.paths) == 12 + 20
    kinds = {path.parent.name for path in comparison.paths[12:]}
    assert kinds == {item.label for item in run.test}


def test_unsure_images_are_part_of_no_figure(run: Run) -> None:
    kinds = sorted({item.label for item in run.test} - {GOOD})
    test = [replace(item, label=UNSURE) if item.label == kinds[0] else item for item in run.test]
    comparison = read_comparison(replace(run, test=tuple(test)), **RATES)
    assert comparison.known.tolist() == [True] * 12 + [item.label != UNSURE for item in test]
    assert comparison.labels is not None
    assert (comparison.labels.size, int(comparison.labels.sum())) == (44 - 4, 12)


def test_second_int8_export_reuses_the_ranges(
    prepared_once: None, run_copy: Path, tmp_path: Path, bundle: Bundle
) -> None:
    """The very same INT8 graph, byte for byte; ranges of other calibration images are not used for it."""
    before = (run_copy / "calibration" / "ranges.json").stat().st_mtime_ns
    options = ExportOptions(("onnx",), "int8", calibration_images=32, limits=ANYTHING_GOES)
    manifest = export_run(run_copy, tmp_path / "again.eab", options)
    assert (run_copy / "calibration" / "ranges.json").stat().st_mtime_ns == before
    assert manifest.calibration == bundle.manifest.calibration
    assert manifest.files["model.int8.cpu.onnx"] == bundle.manifest.files["model.int8.cpu.onnx"]
    assert manifest.graphs["openvino/int8"] == "model.int8.cpu.onnx"
    assert not [name for name in manifest.files if name.startswith("openvino/")]


# Other CPUs


def test_int8_is_refused_without_dot_product_instructions_and_the_self_test_says_why(bundle: Bundle) -> None:
    """OpenVINO is told to use AVX2 only; there its INT8 kernels saturate and scores are several times too high."""
    code = """if True:
        import sys
        import edge_anomaly_runtime.session as session
        from edge_anomaly_runtime.scoring import open_scorer
        from edge_anomaly_runtime.selftest import run_selftest
        if sys.argv[2] == "anyway":
            session.int8_instructions = lambda: ["pretended"]
        with open_scorer(sys.argv[1], engine="openvino", precision=sys.argv[3]) as scorer:
            print(scorer.precision, sum(check.ok for check in run_selftest(scorer)))
    """

    def run(how: str, precision: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", code, str(bundle.path), how, precision]
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
        return subprocess.run(arguments, env=environment, capture_output=True, text=True)

    assert run("", "auto").stdout.split() == ["fp32", "8"]
    refused = run("", "int8")
    assert refused.returncode != 0 and "no INT8 dot-product instructions" in refused.stderr
    precision, passed = run("anyway", "int8").stdout.split()
    assert precision == "int8" and int(passed) < 8, "if it passes, INT8 need not be refused any more"


# The gate


def test_a_failed_gate_tries_tensors_in_float_names_them_and_leaves_nothing(
    prepared_once: None, run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = GuardLimits(auroc_drop=-1)
    with pytest.raises(GateError) as raised:
        export_run(run_copy, tmp_path / "a.eab", ExportOptions(("onnx",), "int8", calibration_images=32, limits=limits))
    assert "onnxruntime int8: image AUROC falls by" in raised.value.what
    assert "fp32" not in raised.value.what
    assert "--allow-drop" in raised.value.hint
    lines = capsys.readouterr().err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Tensors that lose most by INT8"))
    named = [line.split() for line in lines[start + 1 : start + 6]]
    assert [row[1] for row in named] == ["dB"] * 5
    assert all(row[2].startswith("backbone/") for row in named)
    gains = [float(row[0]) for row in named]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0.1
    tried = [line for line in lines if "; trying with " in line]
    assert [re.findall(r"trying with (\d) float: (\S+)", line)[0] for line in tried][:2] == [
        ("1", named[0][2]),
        ("2", named[1][2]),
    ]
    assert f"over the limit with {len(tried)} tensors left float, too; giving up" in "\n".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_allow_drop_writes_the_bundle_and_records_it_and_force_replaces(
    prepared_once: None, run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.eab"
    out.mkdir()
    (out / "old.txt").write_text("old")
    options = ExportOptions(
        ("onnx",), "int8", calibration_images=32, limits=GuardLimits(auroc_drop=-1), allow_drop=True, force=True
    )
    manifest = export_run(run_copy, out, options)
    assert (out / "manifest.json").read_bytes() == manifest_bytes(manifest)
    read_bundle(out)
    assert not (out / "old.txt").exists()
    assert manifest.model.parameters["allow_drop"] is True
    assert [row.ok for row in manifest.parity if row.backend.endswith("int8")] == [False, False]
    assert "Accepted with --allow-drop: " in capsys.readouterr().err
    assert leftovers(tmp_path) == []


def test_a_float_graph_that_scores_differently_fails_the_gate(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    float_graph = graph(bundle, "model.onnx")
    mean = next(value for value in float_graph.graph.initializer if value.name == "head.mean")
    wrong = with_head_arrays(float_graph, {"mean": numpy_helper.to_array(mean) + np.float32(0.5)})
    monkeypatch.setattr(exporting, "onnx_from_detector", lambda model, height, width, opset: wrong)
    with pytest.raises(GateError, match=r"onnxruntime fp32: a score differs by .* \(score 0\.001\)"):
        export_run(run_copy, tmp_path / "a.eab", ExportOptions(("onnx",), "fp32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# Refusals before any work


def explode(*_: object) -> onnx.ModelProto:
    raise AssertionError("work was begun")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_existing_result_is_not_touched(
    kind: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "load_model", explode)
    out, kept = tmp_path / "a.eab", tmp_path / "kept"
    kept.mkdir()
    (kept / "old.txt").write_text("old")
    if kind == "folder":
        shutil.copytree(kept, out)
    elif kind == "file":
        out.write_text("old")
    else:
        out.symlink_to(kept)
    with pytest.raises(UsageError, match="exists"):
        export_run(run_folder, out, ExportOptions(("onnx",), "fp32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.eab", "kept"]
    assert (out if kind == "file" else out / "old.txt").read_text() == "old"
    assert out.is_symlink() == (kind == "link")


def test_a_missing_run_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no run"):
        export_run(tmp_path / "nothing", tmp_path / "a.eab", ExportOptions(("onnx",)))


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ArtefactError, match="is not a finished run"):
        export_run(tmp_path / "run", tmp_path / "a.eab", ExportOptions(("onnx",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_run_without_weights_is_refused(run_copy: Path, tmp_path: Path) -> None:
    (run_copy / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors does not fit the run"):
        export_run(run_copy, tmp_path / "a.eab", ExportOptions(("onnx",), "fp32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_missing_openvino_says_what_to_type(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else find_spec(name))
    with pytest.raises(MissingRequirementError, match="--target openvino needs the package openvino") as raised:
        export_run(run_folder, tmp_path / "a.eab", ExportOptions(("onnx", "openvino")))
    assert raised.value.hint == 'Run: pip install "edge-anomaly[openvino]"'
    assert raised.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_without_openvino_the_onnx_target_serves_the_other_engine(
    prepared_once: None, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembling, "is_installed", lambda engine: engine != "openvino")
    manifest = export_run(run_copy, tmp_path / "a.eab", ExportOptions(("onnx",), "fp32"))
    assert manifest.graphs == {"onnxruntime/fp32": "model.onnx"}


# Options


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Unknown target 'openvno'") as raised:
        ExportOptions(("onnx", "openvno"))
    assert raised.value.hint.startswith("Did you mean 'openvino'?")
    with pytest.raises(UsageError, match="Unknown precision 'int'") as raised:
        ExportOptions(precision="int")
    assert raised.value.hint.startswith("Did you mean 'int8'?")
    with pytest.raises(UsageError, match="No target"):
        ExportOptions(())


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_warn": 0.01, "alpha_fail": 0.05},
        {"alpha_warn": 1.0, "alpha_fail": 0.05},
        {"alpha_fail": 0.0},
        {"calibration_images": 0},
    ],
)
def test_impossible_numbers_are_refused_before_any_work(
    options: dict[str, Any], run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing and quantising a large backbone takes minutes."""
    monkeypatch.setattr(exporting, "load_model", explode)
    with pytest.raises(UsageError):
        export_run(run_folder, tmp_path / "a.eab", ExportOptions(("onnx",), "int8", **options))


# Killed while it writes


@pytest.fixture(scope="module")
def contents(bundle: Bundle) -> tuple[Manifest, dict[str, bytes]]:
    """The bundle with its models cut to 100 kB, so that a write takes milliseconds."""
    files = {name: bundle.read(name)[:100_000] for name in bundle.manifest.files}
    entries = {name: file_entry(data) for name, data in files.items()}
    return bundle.manifest.model_copy(update={"files": entries}), files


@pytest.fixture
def children() -> Iterator[list[int]]:
    """Process ids that a test has started; what is left of them is killed in any case."""
    started: list[int] = []
    yield started
    for child in started:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def write(out: Path, contents: tuple[Manifest, dict[str, bytes]]) -> None:
    with new_folder(out, force=True) as folder:
        write_bundle(folder, *contents)


def writing_child(out: Path, contents: tuple[Manifest, dict[str, bytes]]) -> int:
    """Start a process that writes the bundle over and over, and return its id when it begins."""
    began, begin = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(begin, b"x")
            while True:
                write(out, contents)
        finally:
            os._exit(1)
    assert os.read(began, 1) == b"x"
    os.close(began)
    os.close(begin)
    return child


@pytest.mark.skipif(sys.platform != "linux", reason="os.fork, and the atomic exchange of two folders")
@pytest.mark.parametrize("replaces", [False, True])
def test_a_killed_export_leaves_a_whole_bundle_or_none(
    contents: tuple[Manifest, dict[str, bytes]], children: list[int], tmp_path: Path, replaces: bool
) -> None:
    rng, out, expected = random.Random(0), tmp_path / "a.eab", {True} if replaces else {True, False}
    there: list[bool] = []
    start = time.perf_counter()
    write(out, contents)
    seconds = time.perf_counter() - start
    # On a busy machine one write takes now longer, now shorter: go on until the kills have hit before and after one.
    while len(there) < 20 or (set(there) != expected and len(there) < 200):
        if not replaces:
            shutil.rmtree(out, ignore_errors=True)
        child = writing_child(out, contents)
        children.append(child)
        time.sleep(rng.uniform(0, 2.5 * seconds))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child must not have ended by itself"
        there.append(out.exists())
        if there[-1]:
            assert read_bundle(out).manifest.name == "parts"
    assert set(there) == expected, "the kills must hit the first write and later ones"
    write(out, contents)
    assert [path.name for path in tmp_path.iterdir()] == ["a.eab"], "the next export of the same name clears up"
    assert (out / "manifest.json").read_bytes() == manifest_bytes(contents[0])
