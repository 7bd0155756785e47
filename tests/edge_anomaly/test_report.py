"""The HTML pages: well formed, self-contained, escaped, and with the right figures in them."""

from __future__ import annotations

import base64
import copy
import doctest
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly import gallery, histogram, html
from edge_anomaly.histogram import bin_counts, bin_edges, score_histogram_svg
from edge_anomaly.report import Example, bundle_report, demo_report
from edge_anomaly_runtime.bundle import (
    SCHEMA,
    Calibration,
    FileEntry,
    InputContract,
    Manifest,
    ModelInfo,
    OutputInfo,
    ParityRow,
    Threshold,
    Thresholds,
)
from edge_anomaly_runtime.preprocess import Preprocess

from .pages import read, row_of, words

Scores = npt.NDArray[np.float64]

KEYS = ("onnxruntime/fp32", "onnxruntime/int8", "openvino/fp32", "openvino/int8")
LABELS = ["good"] * 60 + [kind for kind in ("hole", "missing_part", "scratch", "stain") for _ in range(20)]


# A plausible bundle


def limit(value: float, alpha: float, method: str = "conformal", n: int = 70, order: int = 67) -> Threshold:
    bound = {"pareto": 0.0419, "maximum": 0.0951}.get(method, 0.0928)
    return Threshold.model_validate(
        {"value": value, "alpha": alpha, "method": method, "n": n, "order": order, "upper95": bound}
    )


def thresholds(scale: float = 1.0) -> Thresholds:
    return Thresholds(
        warn=limit(12.31 * scale, 0.05),
        fail=limit(14.72 * scale, 0.01, "pareto", order=70),
        pixel=limit(9.84 * scale, 0.05),
        scores={"n": 70.0, "mean": 10.1},
    )


def parity_row(key: str) -> ParityRow:
    int8 = key.endswith("int8")
    return ParityRow(
        backend=key.replace("/", " "),
        images=210,
        score_difference=0.0412 if int8 else 2.1e-6,
        map_difference=0.0173 if int8 else 8.3e-7,
        flips=2 if int8 else 0,
        auroc=0.9871 if int8 else 0.9884,
        distinct=1.0,
        limit="ΔAUROC<=0.005, flips<=2%" if int8 else "score 0.001",
        ok=True,
    )


def manifest(**changes: Any) -> Manifest:
    sizes = {"model.onnx": 22_400_000, "openvino/model.xml": 412_000, "openvino/model.bin": 19_288_000}
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "name": "sample",
        "seq": 1760000000,
        "created_utc": "2025-10-09T08:53:20Z",
        "precision": "int8",
        "model": ModelInfo(
            kind="padim",
            parameters={
                "backbone": "efficientnet_lite0",
                "layers": ["layer2", "layer3"],
                "dims": 64,
                "reduction": "semi-orthogonal",
                "covariance": "location",
                "shrinkage": 0.0,
                "epsilon": 0.01,
                "smoothing": 0.5,
                "seed": 0,
                "head_bytes": 9_838_592,
                "opset": 18,
                "images": 96,
            },
        ),
        "input": InputContract(shape=(1, 224, 224, 3), preprocess=Preprocess(224, 224), brightness=(90.0, 130.0)),
        "outputs": (
            OutputInfo(name="score", role="score", shape=(1,)),
            OutputInfo(name="anomaly_map", role="map", shape=(1, 28, 28)),
        ),
        "graphs": {key: "openvino/model.xml" if key == "openvino/int8" else "model.onnx" for key in KEYS},
        "thresholds": {key: thresholds(1.03 if key.endswith("int8") else 1.0) for key in KEYS},
        "parity": tuple(parity_row(key) for key in KEYS),
        "calibration": Calibration(
            method="minmax", images=128, synthetic=32, seed=0, images_sha256="a" * 64, float_model_sha256="b" * 64
        ),
        "golden": (),
        "golden_tolerance": {"fp32": 1e-3, "int8": 5e-2},
        "training": {
            "name": "data",
            "train": 120,
            "test": {"good": 60, "scratch": 20},
            "note": "",
            "fitted": 96,
            "held_out": 70,
            "skipped": 0,
            "weights": "default",
        },
        "versions": {"python": "3.12.3", "torch": "2.13.0", "openvino": "2026.1.0"},
        "seed": 0,
        "files": {name: FileEntry(sha256="0" * 64, size=size) for name, size in sizes.items()},
    }
    return Manifest.model_validate({**values, **changes})


def normal_scores() -> dict[str, Scores]:
    rng = np.random.default_rng(1)
    return {key: rng.normal(10.1, 1.4, 70) for key in KEYS}


def test_scores(seed: int = 2) -> Scores:
    rng = np.random.default_rng(seed)
    defective = [rng.lognormal(np.log(center), 0.45, 20) for center in (32.0, 95.0, 27.0, 44.0)]
    return np.concatenate([rng.normal(10.1, 1.4, 60), *defective])


test_scores.__test__ = False  # type: ignore[attr-defined]  # it makes scores of test images


def figures(auroc: float = 0.9871) -> dict[str, Any]:
    alarms = {"images": 60, "alarms": 1, "rate": 1 / 60, "rate_interval": [0.0004, 0.0894], "inside_bound": True}
    kinds = {"hole": (0.9917, 1.0), "missing_part": (1.0, 1.0), "scratch": (0.9642, 0.9), "stain": (0.9925, 0.95)}
    return {
        "images": {"good": 60, **dict.fromkeys(kinds, 20)},
        "false_alarms": {
            "fail": {**alarms, "promised": 0.01, "bound": 0.0419},
            "warn": {**alarms, "alarms": 4, "rate": 4 / 60, "promised": 0.05, "bound": 0.0928},
        },
        "image": {"auroc": auroc, "auroc_interval": [0.9721, 0.9968], "found": 77 / 80},
        "defects": {name: defect(20, area, found) for name, (area, found) in kinds.items()},
        "pixel": {"auroc": 0.9736, "aupro": 0.9052},
    }


def defect(images: int, auroc: float, found: float) -> dict[str, Any]:
    interval = [auroc - 0.02, min(1.0, auroc + 0.01)]
    return {"images": images, "auroc": auroc, "auroc_interval": interval, "average_precision": 0.98, "found": found}


def bench(p50: float, p99: float | None) -> dict[str, Any]:
    infer = {"min": p50 - 0.5, "p50": p50, "p90": p50 + 0.8, "p99": p99, "max": p50 + 9, "mean": p50 + 0.2}
    return {
        "runs": 700,
        "latency_ms": {"infer": infer, "total": {**infer, "p50": p50 + 1.7}},
        "cpu_ms_per_image": p50 * 1.9,
        "environment": {
            "cpu": "Intel(R) Xeon(R) Platinum 8488C",
            "int8_instructions": ["amx_int8", "avx512_vnni"],
            "threads": 2,
            "engine_version": "2026.1.0",
            "device": "CPU",
            "float_precision": "f32",
        },
    }


def example(name: str = "scratch/003.png", label: str = "scratch", verdict: str = "NG", score: float = 47.0) -> Example:
    picture = Image.new("RGB", (400, 300), (120, 130, 140))
    overlay = Image.new("RGB", (400, 300), (240, 90, 0))
    mask = Image.new("L", (400, 300))
    mask.paste(255, (100, 100, 140, 120))
    return Example(name, label, verdict, score, picture, overlay, None if label == "good" else mask)


def demo(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": "PaDiM on sample parts",
        "manifest": manifest(),
        "figures": {"openvino/fp32": figures(0.9884), "openvino/int8": figures(0.9871)},
        "scores": {"openvino/fp32": test_scores(), "openvino/int8": test_scores() * 1.03},
        "labels": LABELS,
        "examples": [example(), example("good/000.png", "good", "OK", 9.9)],
        "bench": {"openvino/fp32": bench(7.914, 9.43), "openvino/int8": bench(3.212, 4.87)},
        "commands": ["edge-anomaly sample-data data", "edge-anomaly train padim --data data --out run"],
        "note": "Pictures drawn by edge-anomaly.",
    }
    return demo_report(**{**arguments, **changes})


def bare_demo() -> str:
    """Return a page without defects, masks, pictures, and benchmarks."""
    nothing = {"images": 60, "alarms": 1, "rate": 1 / 60, "rate_interval": [0.0, 0.09], "inside_bound": True}
    alarms = {name: {**nothing, "promised": 0.01, "bound": 0.0419} for name in ("fail", "warn")}
    key = "onnxruntime/fp32"
    return demo(
        manifest=manifest(precision="fp32", calibration=None, parity=(), files={}),
        figures={key: {"images": {"good": 60}, "false_alarms": alarms}},
        scores={key: test_scores()[:60]},
        labels=["good"] * 60,
        examples=[],
        bench={},
        commands=[],
        note="",
    )


PAGES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "bare demo": bare_demo,
    "bundle": lambda: bundle_report(manifest(), normal_scores()),
}


# Every page


@pytest.mark.parametrize("name", PAGES)
def test_page_is_well_formed_and_fetches_nothing(name: str) -> None:
    page = PAGES[name]()
    reader = read(page)
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    sources = [value for _, attribute, value in reader.attributes if attribute in ("src", "href", "srcset")]
    assert all(value.startswith("data:image/") for value in sources)
    pictures = [tag for tag, attribute, value in reader.attributes if attribute == "alt" and value]
    assert len(pictures) == len(sources)


@pytest.mark.parametrize("name", PAGES)
def test_page_has_light_dark_print_and_phone_styles(name: str) -> None:
    page = PAGES[name]()
    assert "@media screen and (prefers-color-scheme:dark)" in page
    assert '<meta name="color-scheme" content="light dark">' in page
    assert "@media print" in page
    assert "width=device-width" in page


@pytest.mark.parametrize("name", PAGES)
def test_the_same_input_gives_the_same_bytes(name: str) -> None:
    assert PAGES[name]() == PAGES[name]()


# Demo


def test_demo_headline_has_the_figures_of_the_bundles_precision() -> None:
    text = words(demo())
    for expected in (
        "Image AUROC 0.987 95 % interval 0.972 to 0.997",
        "Pixel AUROC 0.974",
        "AUPRO 0.905",
        "Good parts stopped 1 of 60 1.7 %; promised 10 of 1000, bound 42 of 1000 within the bound",
        "Defects found 77 of 80 96.2 % of the defective images are NG",
        "Latency p50 3.21 ms inference of one image; 2.5 × as fast as FP32 (7.91 ms)",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("", ["openvino/fp32", "openvino/int8", "Change"]),
        ("Image AUROC", ["0.9884", "0.9871", "−0.0013"]),
        ("Pixel AUROC", ["0.9736", "0.9736", "none"]),
        ("AUPRO", ["0.9052", "0.9052", "none"]),
        ("Good parts stopped", ["1 of 60", "1 of 60", "none"]),
        ("Defects found", ["77 of 80", "77 of 80", "none"]),
        ("Verdicts unlike the trained model", ["0 of 210", "2 of 210", "+2"]),
        ("Inference p50", ["7.91 ms", "3.21 ms", "−59 %"]),
        ("Inference p90", ["8.71 ms", "4.01 ms", "−54 %"]),
        ("Inference p99", ["9.43 ms", "4.87 ms", "−48 %"]),
        ("Decoding to verdict p50", ["9.61 ms", "4.91 ms", "−49 %"]),
        ("CPU time per image", ["15.0 ms", "6.10 ms", "−59 %"]),
        ("Model file", ["22.4 MB", "19.7 MB", "−12 %"]),
    ],
)
def test_demo_compares_fp32_with_int8(name: str, cells: list[str]) -> None:
    assert row_of(demo(), name) == cells


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("hole", ["20", "0.9917", "0.972 to 1.000", "0.9800", "20 of 20 (100 %) "]),
        ("scratch", ["20", "0.9642", "0.944 to 0.974", "0.9800", "18 of 20 (90 %) "]),
        ("stain", ["20", "0.9925", "0.973 to 1.000", "0.9800", "19 of 20 (95 %) "]),
    ],
)
def test_demo_lists_every_kind_of_defect(kind: str, cells: list[str]) -> None:
    assert row_of(demo(), kind) == cells


def test_percentile_with_too_few_runs_is_not_available() -> None:
    page = demo(bench={"openvino/fp32": bench(7.9, 9.4), "openvino/int8": bench(3.2, None)})
    assert row_of(page, "Inference p99") == ["9.40 ms", "n/a", ""]
    none = demo(bench={"openvino/int8": bench(3.2, None)})
    assert row_of(none, "Inference p99") == ["n/a", "n/a", ""]
    assert "Latency p50 3.20 ms inference of one image" in words(none)


def test_slower_int8_is_called_slower() -> None:
    page = demo(bench={"openvino/fp32": bench(3.0, 4.0), "openvino/int8": bench(4.5, 5.0)})
    assert "takes 1.5 × as long as FP32 (3.00 ms)" in words(page)


def test_false_alarms_above_the_bound_are_said_so() -> None:
    bad = copy.deepcopy(figures())
    bad["false_alarms"]["fail"] |= {"alarms": 9, "rate": 0.15, "inside_bound": False}
    assert "9 of 60 15.0 %; promised 10 of 1000, bound 42 of 1000 ABOVE the bound" in words(
        demo(figures={"openvino/int8": bad})
    )


def test_limits_are_said_in_counts_with_their_method() -> None:
    text = words(demo())
    assert (
        "About 10 of 1000 good parts would be stopped; with 95 % confidence not more than 42 of 1000 "
        "(pareto, n = 70, order statistic 70). Measured: 1 of 60 , 1.7 % (95 % interval 0.0 % to 8.9 %)."
    ) in text
    assert "About 50 of 1000 good parts would be WARN or NG; with 95 % confidence not more than 93 of 1000" in text
    assert "conformal : the limit is" in text and "pareto : n images" in text and "maximum :" not in text


def test_gallery_shows_picture_heat_map_and_mask_small() -> None:
    page = demo()
    alts = [value for _, attribute, value in read(page).attributes if attribute == "alt"]
    assert alts == [
        "Picture of scratch/003.png",
        "Heat map of scratch/003.png",
        "Marked defect of scratch/003.png",
        "Picture of good/000.png",
        "Heat map of good/000.png",
        "Colour scale from transparent over yellow to dark red",
    ]
    encoded = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in encoded] == [(320, 240)] * 5
    text = words(page)
    assert "NG scratch 3.1 × the limit scratch/003.png" in text
    assert "OK good 0.7 × the limit good/000.png" in text


@pytest.mark.parametrize(
    ("label", "verdict", "remark"),
    [
        ("good", "NG", "false alarm"),
        ("scratch", "OK", "missed"),
        ("scratch", "WARN", "warned only"),
        ("scratch", "NG", ""),
        ("good", "WARN", ""),
        ("unsure", "NG", ""),
        ("scratch", "INVALID", ""),
    ],
)
def test_gallery_names_wrong_verdicts(label: str, verdict: str, remark: str) -> None:
    text = words(demo(examples=[example("x.png", label, verdict, 14.72 * 1.03)]))
    found = [word for word in ("false alarm", "missed", "warned only") if f"the limit {word} x.png" in text]
    assert found == ([remark] if remark else [])


def test_gallery_without_masks_shows_pairs() -> None:
    page = demo(examples=[example(label="good"), example(label="good")])
    assert "Picture and heat map. The limit" in words(page) and "nothing marked" not in words(page)
    assert "nothing marked" in words(demo())


def test_invalid_example_has_no_score() -> None:
    assert "INVALID scratch no score x.png" in words(demo(examples=[example("x.png", "scratch", "INVALID", np.nan)]))


def test_mask_is_outlined_and_not_covered() -> None:
    picture, mask = Image.new("RGB", (100, 100)), Image.new("L", (100, 100))
    mask.paste(255, (40, 40, 60, 60))
    drawn = np.asarray(gallery.marked(picture, mask)).max(axis=2) > 0
    assert not drawn[40:60, 40:60].any()
    assert drawn[38, 50] and drawn[61, 50] and not drawn[30, 50]


def test_colour_scale_has_the_colours_of_the_overlay() -> None:
    data = re.search(r"data:image/png;base64,([^\"]+)", demo())
    assert data is not None
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGB")).astype(int)[14]
    assert np.ptp(strip[: int(0.19 * len(strip))]) <= 8  # grey below half the limit
    red, green, blue = strip[int(0.38 * len(strip))]  # just below the limit
    assert red > blue + 60 and green > blue + 60
    red, green, blue = strip[-5]
    assert red > green + 60 and red > blue + 60


def test_twelve_examples_stay_below_three_megabytes() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((640, 640))
    mask = Image.new("L", (640, 640), 255)
    assert len(demo(examples=[Example(f"a/{i}.png", "a", "NG", 20.0, noise, noise, mask) for i in range(12)])) < 3e6


@pytest.mark.parametrize("field", ["title", "label", "name", "note", "commands", "key"])
def test_text_from_outside_is_escaped(field: str) -> None:
    evil = '<b onload="x">&'
    changes: dict[str, dict[str, Any]] = {
        "title": {"title": evil},
        "label": {
            "labels": [evil, *LABELS[1:]],
            "examples": [example(label=evil)],
            "figures": {"openvino/int8": {**figures(), "defects": {evil: defect(1, 1.0, 1.0)}}},
        },
        "name": {"examples": [example(name=evil)]},
        "note": {"note": evil},
        "commands": {"commands": [evil]},
        "key": {"manifest": manifest(versions={evil: evil}, model=ModelInfo(kind=evil, parameters={evil: evil}))},
    }
    page = demo(**changes[field])
    assert evil not in page
    assert evil in "".join(read(page).text)


def test_page_without_defects_masks_and_bench() -> None:
    text = words(bare_demo())
    assert "There are no defective test images" in text
    assert "Good parts stopped 1 of 60" in text
    assert "Scores of the test images Bars right of the NG line are false alarms." in text
    absent = ("Pixel AUROC", "AUPRO", "Latency", "Examples", "Environment", "How it was made", "FP32 against INT8")
    assert [title for title in absent if title in text] == []


def test_unsure_images_are_told_apart() -> None:
    page = demo(figures={"openvino/int8": {**figures(), "unsure": {"images": 6, "flagged": 0.5}}})
    assert "6 images are labelled unsure; 50.0 % of them are NG. They count in no figure above." in words(page)


def test_no_good_test_images() -> None:
    alarms = {"images": 0, "alarms": 0, "promised": 0.01, "bound": 0.0419}
    page = demo(figures={"openvino/int8": {**figures(), "false_alarms": {"fail": alarms, "warn": alarms}}})
    assert "Good parts stopped n/a no good test images" in words(page)


# Bundle


def test_bundle_page_shows_parity_in_words() -> None:
    page = bundle_report(manifest(), normal_scores())
    expected = ["pass", "2 of 210", "0.9871", "4.1e-02", "1.7e-02", "100 %", "ΔAUROC<=0.005, flips<=2%"]
    assert row_of(page, "openvino int8") == expected
    assert "Graphs at parity 4 of 4 all pass" in words(page)


def test_bundle_page_shows_failed_parity() -> None:
    failed = parity_row("openvino/int8").model_copy(update={"ok": False, "auroc": None})
    info = ModelInfo(kind="padim", parameters={"allow_drop": True})
    page = bundle_report(manifest(parity=(failed,), model=info), {})
    assert row_of(page, "openvino int8")[0] == "FAIL"
    assert row_of(page, "openvino int8")[2] == "–"
    assert "0 of 1 not all pass" in words(page)
    assert "Exported with --allow-drop" in words(page)


def test_bundle_page_says_what_the_model_is() -> None:
    text = words(bundle_report(manifest(), normal_scores()))
    for expected in (
        "Backbone efficientnet_lite0",
        "Layers layer2, layer3",
        "Channels kept 64",
        "Head size 9.8 MB",
        "Input 224 × 224 pixels, squash",
        "Map 28 × 28",
        "Fitted on 96",
        "Held out for the limits 70",
        "Labelled test images 60 good, 20 scratch",
        "openvino 2026.1.0",
        "128 images, 32 of them with a synthetic anomaly",
    ):
        assert expected in text


def test_bundle_page_has_a_histogram_for_every_key_main_first() -> None:
    page = bundle_report(manifest(), normal_scores())
    labels = [value for tag, attribute, value in read(page).attributes if (tag, attribute) == ("svg", "aria-label")]
    assert [label.split(".")[0] for label in labels] == [
        f"Held-out normal scores, {key}" for key in ("openvino/int8", *KEYS[:3])
    ]


def test_bundle_page_without_int8() -> None:
    assert "No INT8" in words(bundle_report(manifest(precision="fp32", calibration=None), normal_scores()))


def test_a_limit_without_a_tail_promises_only_what_the_images_allow() -> None:
    few = thresholds().model_copy(update={"fail": limit(14.0, 0.01, "maximum", n=30, order=30)})
    text = words(bundle_report(manifest(thresholds={"openvino/int8": few}, parity=()), {}))
    assert "Wanted: 10 of 1000. 30 images allow: about 33 of 1000 good parts would be stopped" in text
    assert "not more than 96 of 1000 (maximum, n = 30, order statistic 30)" in text


@pytest.mark.parametrize(
    ("rate", "like", "expected"),
    [
        (0.01, None, "10 of 1000"),
        (0.001, None, "1 of 1000"),
        (0.0001, None, "1 of 10000"),
        (0.025, None, "25 of 1000"),
        (0.0419, 0.01, "42 of 1000"),
        (0.0413, 0.0001, "413 of 10000"),
        (0.0361, 0.01, "37 of 1000"),
        (0.05, 0.05, "50 of 1000"),
    ],
)
def test_rates_are_counts_and_bounds_are_rounded_up(rate: float, like: float | None, expected: str) -> None:
    assert html.per_many(rate, like) == expected


# Histogram


def bars(svg: str) -> list[int]:
    return [int(count) for count in re.findall(r"<title>(\d+) from", svg)]


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 4.0], [4.0], [0.5, 4.0, 700.0], list(np.geomspace(0.01, 50, 333))],
    ids=["around", "all at the limit", "one", "wide", "many"],
)
def test_bin_counts_sum_to_n_and_the_limit_is_an_edge(values: Sequence[float], logarithmic: bool) -> None:
    scores = np.array(values)
    edges = bin_edges(scores, 4.0, bins=11, logarithmic=logarithmic)
    counts = bin_counts(scores, edges)
    assert 4.0 in edges
    assert (np.diff(edges) > 0).all()
    assert counts.sum() == scores.size
    assert counts.size == edges.size - 1
    assert counts[edges[1:] > 4.0].sum() == (scores > 4.0).sum()


def test_score_equal_to_the_limit_is_left_of_it() -> None:
    assert bin_counts(np.array([1.0, 1.5, 2.0, 2.5, 3.0]), np.array([0.0, 1.0, 2.0, 3.0])).tolist() == [1, 2, 2]


def test_histogram_rows_count_every_image_once() -> None:
    svg = score_histogram_svg(test_scores(), LABELS, thresholds(), title="T")
    assert sum(bars(svg)) == 140
    text = words(svg)
    assert text.index("good 60 images") < text.index("hole 20 images") < text.index("stain 20 images")
    assert "NG above 14.72" in text and "WARN above 12.31" in text
    alarms = int((test_scores()[60:80] > 14.72).sum())
    assert f"hole 20 images {alarms} of 20 NG" in text


def test_histogram_is_small_and_styled_by_the_page() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([f"kind_{index}" for index in range(8)], 400).tolist()
    svg = score_histogram_svg(rng.lognormal(2, 1, 3200), labels, thresholds(), title="T")
    assert len(svg) < 60_000
    assert 'fill="currentColor"' in svg
    assert sum(bars(svg)) == 3200


def test_histogram_axis_is_logarithmic_only_for_wide_ranges() -> None:
    wide = score_histogram_svg(np.array([5.0, 9.0, 300.0]), ["good", "good", "hole"], thresholds(), title="T")
    narrow = score_histogram_svg(np.array([8.0, 9.0, 13.0]), ["good"] * 3, thresholds(), title="T")
    assert "logarithmic scale" in wide and "logarithmic scale" not in narrow


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([], []), ([9.0], ["good"]), ([14.72, 14.72], ["good", "hole"]), ([-3.0, 20.0], ["good", "hole"])],
    ids=["none", "one", "at the limit", "negative"],
)
def test_histogram_of_few_scores(scores: list[float], labels: list[str]) -> None:
    svg = score_histogram_svg(np.array(scores), labels, thresholds(), title="T")
    read(svg)
    assert sum(bars(svg)) == len(scores)


def test_histogram_leaves_out_scores_that_are_not_finite() -> None:
    svg = score_histogram_svg(np.array([9.0, np.nan, np.inf]), ["good"] * 3, thresholds(), title="T")
    assert sum(bars(svg)) == 1


def test_doctests() -> None:
    assert doctest.testmod(histogram).failed == 0
