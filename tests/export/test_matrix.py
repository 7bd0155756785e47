"""Every model to every target in every precision: it exports, loads, passes parity, and TensorRT's rules hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from edge_anomaly.evaluation_report import evaluate_classifier_bundle
from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_calibration.qdq_graph import quantized_share
from edge_anomaly_export.classifier import export_classifier
from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.matrix import MODELS, TARGETS, cells
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_export.trt_lint import lint
from edge_anomaly_runtime import selftest
from edge_anomaly_runtime.bundle import Bundle, Manifest, read_bundle
from edge_anomaly_runtime.cpu import int8_instructions
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.engine_openvino import openvino_core
from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.scoring import open_scorer
from edge_anomaly_runtime.selftest import run_selftest
from edge_anomaly_runtime.session import PRECISIONS, open_engine
from edge_anomaly_runtime.tensorrt_recipe import RECIPE, parse_recipe
from tests.small_models import CONFIGS

KINDS = ["classifier", *CONFIGS, "vit-knn"]
# A few dozen images decide nothing about 0.5 % of AUROC; what INT8 costs is measured in the benchmarks.
LIMITS = GuardLimits(auroc_drop=0.2, flips=0.3, distinct=0.9, accuracy_drop=0.2)


def export(kind: str, precision: str, runs: dict[str, Path], out: Path, **changes: Any) -> Manifest:
    options = ExportOptions(tuple(TARGETS), precision, calibration_images=24, limits=LIMITS, **changes)
    return (export_classifier if kind == "classifier" else export_run)(runs[kind], out, options)


@pytest.fixture(scope="module")
def runs(detector_runs: dict[str, Path], vit_run: Path, classifier_run: Path) -> dict[str, Path]:
    return {**detector_runs, "vit-knn": vit_run, "classifier": classifier_run}


@pytest.fixture(scope="module")
def int8_bundles(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Every kind for all targets in INT8."""
    folder = tmp_path_factory.mktemp("matrix")
    for kind in KINDS:
        export(kind, "int8", runs, folder / f"{kind}.eab")
    return {kind: read_bundle(folder / f"{kind}.eab") for kind in KINDS}


def picture(bundle: Bundle, index: int = 0) -> Any:
    with Image.open(bundle.path / bundle.manifest.golden[index].file) as file:
        spec = bundle.manifest.input.preprocess
        return np.asarray(file.convert("RGB").resize((spec.width, spec.height)))[np.newaxis]


def first_output(bundle: Bundle, engine: str, name: str) -> Any:
    output = bundle.manifest.outputs[0].name
    weights = bundle.read(name.removesuffix(".xml") + ".bin") if name.endswith(".xml") else None
    data = bundle.read(name)
    if engine == "tensorrt":
        session: Any = open_onnxruntime(data, threads=1, fuse=False)
    else:
        session = open_engine(engine, data, weights=weights, threads=1)
    values = np.concatenate([session.run(picture(bundle, index))[output].ravel() for index in range(8)])
    session.close()
    return values


def test_the_table_is_the_whole_product() -> None:
    table = list(cells())
    assert len(table) == len(set(table)) == len(MODELS) * len(TARGETS) * len(PRECISIONS) == 7 * 3 * 3
    assert {kind.removesuffix("-b") for kind in KINDS} == set(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_bundles_hold_a_graph_of_each_engine_that_gives_the_stored_results(
    int8_bundles: dict[str, Bundle], kind: str
) -> None:
    bundle = int8_bundles[kind]
    engines = ("openvino", "onnxruntime", "tensorrt")
    keys = {f"{engine}/{precision}" for engine in engines for precision in ("fp32", "int8")}
    assert set(bundle.manifest.graphs) == keys
    assert all(row.ok for row in bundle.manifest.parity)
    reference = first_output(bundle, "onnxruntime", "model.onnx")
    for key, name in bundle.manifest.graphs.items():
        values = first_output(bundle, key.partition("/")[0], name)
        if key.endswith("fp32"):
            np.testing.assert_allclose(values, reference, rtol=2e-3, atol=1e-3 * np.abs(reference).max())
        else:
            assert len(np.unique(values)) == len(values)
            assert np.abs(values - reference).mean() < 0.25 * np.ptp(reference)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_is_int8_in_both_files_and_of_heads_only_what_bears_it_on_cpus(
    int8_bundles: dict[str, Bundle], kind: str
) -> None:
    bears = {"patchcore": ("head/bank/",), "fastflow": ("head/flows/",)}.get(kind, ())
    for name, allowed in (("model.int8.cpu.onnx", bears), ("model.int8.trt.onnx", ())):
        model = onnx.load_from_string(int8_bundles[kind].read(name))
        assert quantized_share(model) >= 0.95
        dequantised = {
            output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output
        }
        readers = [
            node.name
            for node in model.graph.node
            if node.name.startswith("head/") and dequantised.intersection(node.input)
        ]
        lengths = ["head/Pow"] if kind == "patchcore" and allowed else []
        assert [reader for reader in readers if not reader.startswith(allowed or "none/")] == lengths
        assert bool(readers) == bool(allowed)


@pytest.mark.skipif(not int8_instructions(), reason="needs a CPU with INT8 dot products")
def test_openvino_runs_a_transformers_products_in_int8_attention_too(int8_bundles: dict[str, Bundle]) -> None:
    bundle = int8_bundles["vit-knn"]
    core = openvino_core()
    float_products = {}
    for name, weights in (("openvino/model.xml", "openvino/model.bin"), ("model.int8.cpu.onnx", None)):
        model = core.read_model(bundle.read(name), b"" if weights is None else bundle.read(weights))
        nodes = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model().get_ops()
        executed = [{key: value.value for key, value in node.get_rt_info().items()} for node in nodes]
        float_products[name] = [
            node["originalLayersNames"]
            for node in executed
            if node.get("layerType") in ("FullyConnected", "MatMul")
            and node["runtimePrecision"] == "f32"
            and "backbone/" in node["originalLayersNames"]
        ]
    assert float_products["openvino/model.xml"] == []
    # The file for ONNX Runtime is what the other one is better than; without this the test would prove nothing.
    assert float_products["model.int8.cpu.onnx"] != []


@pytest.mark.parametrize("kind", KINDS)
def test_files_for_tensorrt_break_none_of_its_rules(int8_bundles: dict[str, Bundle], kind: str) -> None:
    bundle = int8_bundles[kind]
    recipe = parse_recipe(bundle.read(RECIPE))
    assert set(recipe.graphs) == {"fp32", "int8"}
    assert recipe.graphs["int8"].weak == bundle.manifest.graphs["tensorrt/int8"] == "model.int8.trt.onnx"
    assert len(recipe.normal_images) == (0 if kind == "classifier" else 12)
    for name, version in ((recipe.graphs["int8"].weak, "10.0"), (recipe.graphs["int8"].strong, "11.0")):
        model = onnx.load_from_string(bundle.read(name))
        assert [finding for finding in lint(model, minimum_version=version) if finding.severity == "E"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_half_precision_file_scores_like_the_one_it_is_made_of(int8_bundles: dict[str, Bundle], kind: str) -> None:
    bundle = int8_bundles[kind]
    recipe = parse_recipe(bundle.read(RECIPE))
    weak, strong = (
        first_output(bundle, "tensorrt", name) for name in (recipe.graphs["int8"].weak, recipe.graphs["int8"].strong)
    )
    np.testing.assert_allclose(strong, weak, rtol=0.1, atol=0.02 * np.abs(weak).max())
    model = onnx.load_from_string(bundle.read(recipe.graphs["int8"].strong))
    halves = [value for value in model.graph.initializer if value.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) > 10
    assert not any(value.name.startswith("head.") for value in halves)


@pytest.mark.parametrize("kind", ["stpm", "classifier"])
def test_fp16_bundles_are_half_as_large_and_score_alike(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    manifest = export(kind, "fp16", runs, tmp_path / "half.eab")
    assert all(row.ok for row in manifest.parity)
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    assert 0.45 < sizes["model.fp16.onnx"] / sizes["model.onnx"] < 0.65
    assert sizes["openvino/model.bin"] < 0.65 * sizes["model.onnx"]
    assert manifest.graphs["tensorrt/fp16"] == "model.onnx"
    bundle = read_bundle(tmp_path / "half.eab")
    assert parse_recipe(bundle.read(RECIPE)).graphs["fp16"].strong == "tensorrt/model.fp16.onnx"
    values, expected = (first_output(bundle, "openvino", name) for name in ("openvino/model.xml", "model.onnx"))
    np.testing.assert_allclose(values, expected, rtol=3e-2, atol=1e-2 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_rest_of_the_matrix(kind: str, precision: str, runs: dict[str, Path], tmp_path: Path) -> None:
    manifest = export(kind, precision, runs, tmp_path / "part.eab")
    assert all(row.ok for row in manifest.parity)
    assert {key.partition("/")[0] for key in manifest.graphs if key.endswith(precision)} == {
        "openvino",
        "onnxruntime",
        "tensorrt",
    }


@pytest.mark.parametrize(("kind", "precision"), [("padim", "int8"), ("vit-knn", "fp32"), ("autoencoder", "fp16")])
def test_opset_17_serves_an_older_tensorrt(kind: str, precision: str, runs: dict[str, Path], tmp_path: Path) -> None:
    export(kind, precision, runs, tmp_path / "old.eab", trt_version="8.6")
    bundle = read_bundle(tmp_path / "old.eab")
    model = onnx.load_from_string(bundle.read("model.onnx"))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert [finding for finding in lint(model, minimum_version="8.6") if finding.severity == "E"] == []
    assert all(row.ok for row in bundle.manifest.parity)


def test_a_tensorrt_without_layer_normalisation_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"vit-knn has operators that TensorRT 8\.5 does not know") as raised:
        export("vit-knn", "fp32", runs, tmp_path / "old.eab", trt_version="8.5")
    assert "--trt-version 8.6" in raised.value.hint
    with pytest.raises(UsageError, match="Opset 18 is not possible"):
        ExportOptions(("tensorrt",), trt_version="8.6", opset=18)


def test_a_classifier_bundle_names_classes(int8_bundles: dict[str, Bundle], runs: dict[str, Path]) -> None:
    bundle = int8_bundles["classifier"]
    with open_scorer(bundle.path, engine="onnxruntime", precision="int8") as scorer:
        results = [scorer.score_pixels(picture(bundle, index)[0]) for index in range(6)]
        checks = run_selftest(scorer)
        with pytest.raises(UsageError, match="it has no alarm limits"):
            scorer.thresholds  # noqa: B018
    stored = [golden.verdicts["onnxruntime/int8"] for golden in bundle.manifest.golden]
    assert [result.label for result in results] == stored[:6]
    assert {result.verdict for result in results} == {"OK"}
    assert set(bundle.manifest.model.parameters["classes"]) == {"blue", "green", "red"}
    for result in results:
        assert result.logits is not None and result.probability is not None
        shares = np.exp(result.logits.astype(np.float64))
        assert result.probability == pytest.approx(shares.max() / shares.sum())
    assert all(check.ok for check in checks) and len(checks) == 8
    assert bundle.manifest.thresholds == {}
    figures = evaluate_classifier_bundle(
        bundle.path,
        str(runs["classifier"].parent / "data"),
        engine="onnxruntime",
        precision="int8",
        report=None,
        strict=False,
    )
    assert figures["scored_by"] == "onnxruntime int8"
    row = next(row for row in bundle.manifest.parity if row.backend == "onnxruntime int8")
    assert figures["accuracy"] == pytest.approx(row.accuracy)


def test_a_changed_logit_fails_the_self_test(int8_bundles: dict[str, Bundle]) -> None:
    bundle = int8_bundles["classifier"]
    golden = bundle.manifest.golden[0]
    maps = bundle.golden_maps()["onnxruntime/fp32"]
    with open_scorer(bundle.path, engine="onnxruntime", precision="fp32") as scorer:
        good = selftest._check(scorer, golden, maps[0], 1e-3)
        bad = selftest._check(scorer, golden, maps[0] + np.float32(0.1) * np.abs(maps[0]).max(), 1e-3)
    assert good.ok and not bad.ok
    assert bad.score_difference == pytest.approx(0.1, rel=0.2)
