"""The comparison with the trained model: which rows pass, and what the table says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edge_anomaly.prediction import Predictions
from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_export.parity import Judged, compare_graph, parity_table
from edge_anomaly_runtime.bundle import ParityRow, Threshold, Thresholds

LIMITS = GuardLimits(auroc_drop=0.01, flips=0.1)
DEFECTIVE = np.array([False] * 5 + [True] * 5)
REFERENCE = [1.0, 2.0, 3.0, 4.0, 5.0, 16.0, 17.0, 18.0, 19.0, 20.0]


def judged(scores: list[float], *, fail: float = 10.0, maps: npt.NDArray[np.float32] | None = None) -> Judged:
    limit = Threshold(value=fail, alpha=0.01, method="conformal", n=100, order=100, upper95=0.03)
    if maps is None:
        maps = np.array(scores, dtype=np.float32).reshape(-1, 1, 1).repeat(4, axis=1).repeat(4, axis=2)
    thresholds = Thresholds(warn=limit, fail=limit, pixel=limit, scores={})
    return Judged(Predictions(np.array(scores), maps), thresholds)


def row_of(
    key: str, scores: list[float], *, fail: float = 10.0, defective: npt.NDArray[np.bool_] | None = DEFECTIVE
) -> ParityRow:
    return compare_graph(key, judged(REFERENCE), judged(scores, fail=fail), defective, LIMITS)[0]


# Float graphs: the same scores


@pytest.mark.parametrize(
    ("relative", "ok"), [(0.0, True), (0.0009, True), (-0.0009, True), (0.0011, False), (-0.5, False)]
)
def test_a_float_graph_must_give_the_same_scores(relative: float, ok: bool) -> None:
    scores = [*REFERENCE[:-1], REFERENCE[-1] * (1 + relative)]
    row = row_of("onnxruntime/fp32", scores)
    assert row.score_difference == pytest.approx(abs(relative), abs=1e-12)
    assert row.ok is ok
    assert (row.backend, row.images, row.limit) == ("onnxruntime fp32", 10, "score 0.001")


def test_a_small_score_counts_as_much_as_a_large_one() -> None:
    assert not row_of("openvino/fp32", [1.002, *REFERENCE[1:]]).ok


def test_a_score_near_zero_counts_as_a_tenth_of_the_limit() -> None:
    """An autoencoder's score can be 0: 1e-5 of it is nothing, however small it is."""
    reference = judged([0.0, 1e-4, *REFERENCE[2:]])
    for difference, ok in ((0.9e-3, True), (1.1e-3, False)):  # the limit is 10
        scores = judged([difference, 1e-4, *REFERENCE[2:]])
        row, _ = compare_graph("openvino/fp32", reference, scores, DEFECTIVE, LIMITS)
        assert row.score_difference == pytest.approx(difference)
        assert row.ok is ok


def test_a_float_graph_is_not_excused_by_equal_verdicts() -> None:
    row = row_of("openvino/fp32", [score * 1.01 for score in REFERENCE])
    assert (row.flips, row.auroc, row.ok) == (0, 1.0, False)


# INT8 graphs: the same verdicts


def test_an_int8_graph_may_have_other_scores_with_its_own_limit() -> None:
    row = row_of("openvino/int8", [score * 2 for score in REFERENCE], fail=20.0)
    assert (row.score_difference, row.flips, row.auroc, row.distinct, row.ok) == (1.0, 0, 1.0, 1.0, True)
    assert row.limit == "ΔAUROC<=0.01, flips<=10%"


def test_an_int8_graph_fails_by_flips() -> None:
    row = row_of("openvino/int8", [1, 2, 3, 11, 12, 16, 17, 18, 19, 20])
    assert (row.flips, row.auroc, row.ok) == (2, 1.0, False)


def test_an_int8_graph_fails_by_auroc() -> None:
    row = row_of("openvino/int8", [1, 2, 3, 4, 7, 6, 17, 18, 19, 20], fail=5.0, defective=DEFECTIVE)
    assert row.auroc == pytest.approx(24 / 25)
    assert not row.ok


def test_an_int8_graph_fails_by_saturation() -> None:
    row = row_of("onnxruntime/int8", [3.0] * 5 + [16.0] * 5)
    assert (row.flips, row.auroc, row.distinct, row.ok) == (0, 1.0, 0.2, False)


def test_the_report_tells_why() -> None:
    _, report = compare_graph("openvino/int8", judged(REFERENCE), judged([7.0] * 10), DEFECTIVE, LIMITS)
    assert report.failures == (
        "image AUROC falls by 0.5000 (limit 0.01)",
        "5 of 10 verdicts flip (limit 10.0%)",
        "only 10% of the scores are distinct: the graph saturates",
    )


def test_without_defects_there_is_no_auroc() -> None:
    row = row_of("openvino/int8", REFERENCE, defective=None)
    assert (row.auroc, row.ok) == (None, True)


# Maps


def test_map_difference_is_the_99th_percentile_over_the_largest_reference_value() -> None:
    maps = np.zeros((10, 10, 10), dtype=np.float32)
    maps[0, 0, 0] = 8.0
    other = maps + np.float32(0.4)
    other[1, :9, 0] += 100  # nine of a thousand cells
    row, _ = compare_graph("a/fp32", judged(REFERENCE, maps=maps), judged(REFERENCE, maps=other), None, LIMITS)
    assert row.map_difference == pytest.approx(0.4 / 8)
    other[2, :9, 0] += 100
    row, _ = compare_graph("a/fp32", judged(REFERENCE, maps=maps), judged(REFERENCE, maps=other), None, LIMITS)
    assert row.map_difference == pytest.approx(100.4 / 8)


# The table


def test_the_table_shows_every_row_and_column() -> None:
    rows = [
        row_of("openvino/fp32", REFERENCE),
        row_of("openvino/int8", [1, 2, 3, 11, 12, 16, 17, 18, 19, 20]),
        row_of("onnxruntime/int8", [7.0] * 10, defective=None),
    ]
    header, *lines = parity_table(rows).splitlines()
    assert header.split() == [
        "parity",
        "backend",
        "max|Δscore|",
        "p99|Δmap|",
        "verdict",
        "flips",
        "AUROC",
        "distinct",
        "limit",
    ]
    assert [line.split() for line in lines] == [
        ["openvino", "fp32", "0.0e+00", "0.0e+00", "0/10", "1.0000", "100%", "score", "0.001", "ok"],
        ["openvino", "int8", "1.8e+00", "3.5e-01", "2/10", "1.0000", "100%", "ΔAUROC<=0.01,", "flips<=10%", "FAIL"],
        ["onnxruntime", "int8", "6.0e+00", "6.5e-01", "5/10", "-", "10%", "ΔAUROC<=0.01,", "flips<=10%", "FAIL"],
    ]


def test_the_columns_of_the_table_line_up() -> None:
    header, *lines = parity_table(
        [row_of("openvino/fp32", REFERENCE), row_of("onnxruntime/int8", [7.0] * 10)]
    ).splitlines()
    for title in ("max|Δscore|", "p99|Δmap|", "verdict flips", "AUROC", "distinct"):
        end = header.index(title) + len(title)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines), title
