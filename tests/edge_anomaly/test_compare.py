"""Runs and bundles side by side: the figures of `evaluate`, sizes of files, times taken in turn."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_anomaly import compare
from edge_anomaly.compare import ComparedRun, compare_paths, compare_runs, load_compared, measure_latencies
from edge_anomaly.data import open_dataset
from edge_anomaly.evaluate import evaluate_items, open_judge
from edge_anomaly.runs import load_run
from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.errors import UsageError

PADIM = ComparedRun(
    name="padim-lite0",
    kind="padim",
    backbone="efficientnet_lite0",
    scored_by="torch fp32",
    data="parts",
    images=200,
    weight_bytes=12_761_524,
    parameters=700_768,
    image_auroc=0.9896,
    image_auroc_interval=(0.9762, 0.9985),
    pixel_auroc=0.9945,
    aupro=0.9566,
    false_alarms=5,
    good_images=100,
    latency_p50_ms=14.237,
    training_seconds=11.4,
)
STPM = replace(PADIM, name="stpm", kind="stpm", image_auroc=0.9931, pixel_auroc=None, aupro=None, training_seconds=95.0)
CLASSIFIER = ComparedRun(
    name="resnet18",
    kind="classifier",
    backbone="resnet18",
    scored_by="torch fp32",
    data="cifar10:data",
    images=10_000,
    weight_bytes=44_700_000,
    accuracy=0.9512,
    accuracy_interval=(0.9468, 0.9553),
)


def columns(table: str) -> list[dict[str, str]]:
    """Return the lines of a table by column, cut where the head's columns stand."""
    head, *lines = table.split("\n")
    names = [name for name in head.replace("  ", "\n").split("\n") if name]
    cells = [[cell.strip() for cell in line.replace("  ", "\n").split("\n") if cell.strip()] for line in lines]
    return [dict(zip((name.strip() for name in names), row, strict=False)) for row in cells]


def test_table_lists_the_best_first_with_its_figures() -> None:
    rows = columns(compare_runs([PADIM, replace(STPM, pixel_auroc=0.9, aupro=0.8)]).table)
    assert [row["model"] for row in rows] == ["stpm", "padim-lite0"]
    assert rows[1] == {
        "model": "padim-lite0",
        "kind": "padim",
        "backbone": "efficientnet_lite0",
        "scored by": "torch fp32",
        "image AUROC (95 %)": "0.9896 (0.976-0.999)",
        "pixel AUROC": "0.9945",
        "AUPRO": "0.9566",
        "false alarms": "5/100",
        "MB": "12.8",
        "parameters": "700,768",
        "p50 ms": "14.2",
        "training s": "11",
    }


def test_columns_stand_one_below_the_other() -> None:
    head, *lines = compare_runs([PADIM, STPM]).table.split("\n")
    for name, cell in (("AUPRO", "0.9566"), ("p50 ms", "14.2"), ("MB", "12.8")):
        line = next(line for line in lines if line.startswith("padim"))
        assert head.index(name) + len(name) == line.index(cell) + len(cell)


def test_columns_that_no_run_fills_are_left_out() -> None:
    head = compare_runs([CLASSIFIER]).table.split("\n")[0]
    assert "accuracy (95 %)" in head
    assert [name for name in ("AUROC", "AUPRO", "false alarms", "p50", "training") if name in head] == []


def test_a_run_without_a_figure_comes_last() -> None:
    unknown = replace(PADIM, name="unknown", image_auroc=None, image_auroc_interval=None)
    assert [row["name"] for row in compare_runs([unknown, PADIM]).record["runs"]] == ["padim-lite0", "unknown"]


def test_runs_that_were_judged_on_other_images_are_told() -> None:
    same, other = compare_runs([PADIM, STPM]), compare_runs([PADIM, replace(STPM, data="elpv-mono, seed 1", images=90)])
    assert same.record["same_images"] and "Not judged" not in same.table
    assert not other.record["same_images"]
    assert "Not judged on the same images:" in other.table and "stpm: elpv-mono, seed 1, 90 images" in other.table


def test_record_is_json_with_the_numbers_given() -> None:
    record = json.loads(json.dumps(compare_runs([PADIM, CLASSIFIER]).record))
    assert record["schema"] == "edge-anomaly.compare/1"
    padim, classifier = record["runs"]
    assert (padim["image_auroc"], padim["latency_p50_ms"], padim["weight_bytes"]) == (0.9896, 14.237, 12_761_524)
    assert (classifier["accuracy"], classifier["image_auroc"]) == (0.9512, None)
    assert record["environment"]["threads"] >= 1 and record["environment"]["cpu"]


def test_plot_is_a_png() -> None:
    with Image.open(io.BytesIO(compare_runs([PADIM, STPM, CLASSIFIER]).plot)) as image:
        assert (image.format, image.width) == ("PNG", 1280)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare_runs([])


# Latency


def test_models_are_called_in_turn_after_all_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    @contextlib.contextmanager
    def opened(path: Path) -> Iterator[Callable[[], object]]:
        yield lambda: called.append(path.name)

    monkeypatch.setattr(compare, "_one_image", opened)
    monkeypatch.setattr(compare, "_WARMUP_SECONDS", 0.0)
    latencies = measure_latencies([Path("a"), Path("b")], rounds=3, calls=4)
    assert called == ["a", "b", *(["a"] * 4 + ["b"] * 4) * 3]
    assert all(value is not None and value >= 0 for value in latencies)


def test_too_few_calls_give_no_median(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def opened(path: Path) -> Iterator[Callable[[], object]]:
        yield lambda: None

    monkeypatch.setattr(compare, "_one_image", opened)
    monkeypatch.setattr(compare, "_WARMUP_SECONDS", 0.0)
    assert measure_latencies([Path("a")], rounds=2, calls=5) == [None]


# Real runs


def test_run_has_the_figures_of_evaluate_and_its_sizes(run_folder: Path) -> None:
    row = load_compared(run_folder)
    with open_judge(run_folder) as judge:
        figures, items, _ = evaluate_items(judge, load_run(run_folder).test)
    assert (row.name, row.kind, row.backbone, row.scored_by) == ("parts", "padim", "efficientnet_lite0", "torch fp32")
    assert (row.data, row.images) == ("parts", len(items))
    assert row.image_auroc == figures["image"]["auroc"]
    assert list(row.image_auroc_interval or ()) == figures["image"]["auroc_interval"]
    assert (row.pixel_auroc, row.aupro) == (figures["pixel"]["auroc"], figures["pixel"]["aupro"])
    assert (row.false_alarms, row.good_images) == (figures["false_alarms"]["fail"]["alarms"], 16)
    assert row.weight_bytes == (run_folder / "model.safetensors").stat().st_size
    assert row.parameters == 700_768
    assert row.training_seconds == load_run(run_folder).seconds
    assert row.latency_p50_ms is None


def test_bundle_is_judged_on_the_engine_and_as_large_as_the_graph_there(
    run_folder: Path, bundle_folder: Path, sample_folder: Path
) -> None:
    row = load_compared(bundle_folder, str(sample_folder))
    assert (row.name, row.kind, row.backbone) == ("parts.eab", "padim", "efficientnet_lite0")
    assert row.scored_by == "openvino int8"
    assert row.images == len(open_dataset(str(sample_folder)).test)
    graph = bundle_folder / read_bundle(bundle_folder).manifest.graphs["openvino/int8"]
    assert row.weight_bytes == graph.stat().st_size + graph.with_suffix(".bin").stat().st_size
    assert (row.parameters, row.training_seconds) == (None, None)
    latencies = measure_latencies([run_folder, bundle_folder], rounds=1, calls=11)
    assert all(latency is not None and latency > 0 for latency in latencies)


def test_bundle_without_data_is_refused(bundle_folder: Path) -> None:
    with pytest.raises(UsageError, match="no test images of its own"):
        load_compared(bundle_folder)


def test_runs_of_one_name_are_told_apart_by_their_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "load_compared", lambda path, data: replace(PADIM, name=path.name))
    monkeypatch.setattr(compare, "measure_latencies", lambda paths: [1.0, 2.0, 3.0])
    rows = compare_paths([Path("x/run"), Path("y/run"), Path("other")]).record["runs"]
    assert {row["name"] for row in rows} == {"x/run", "y/run", "other"}


def test_classifier_run_has_accuracy_and_latency(tmp_path: Path) -> None:
    from edge_anomaly.classifier import ClassifierConfig
    from edge_anomaly.train_classifier import train_classifier

    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(level, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    run = train_classifier(
        str(tmp_path / "data"), tmp_path / "run", config=ClassifierConfig(image_size=16, epochs=1, batch_size=4)
    )
    row = load_compared(tmp_path / "run")
    assert run.figures is not None
    assert (row.kind, row.backbone, row.images) == ("classifier", "resnet18", 6)
    assert row.accuracy == row.quality == run.figures["accuracy"]
    assert row.accuracy_interval == run.figures["accuracy_interval"]
    assert row.parameters == 11_168_832 + 2 * 512 + 2
    latency = measure_latencies([tmp_path / "run"], rounds=1, calls=11)[0]
    assert latency is not None and latency > 0
