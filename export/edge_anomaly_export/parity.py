"""Does each exported graph score real images like the trained model? A table, and a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_anomaly.prediction import Predictions
from edge_anomaly_calibration.guard import GuardLimits, GuardReport, auroc, compare
from edge_anomaly_runtime.bundle import ParityRow, Thresholds
from edge_anomaly_runtime.selftest import score_units

FLOAT_LIMIT = 1e-3


@dataclass(frozen=True)
class Judged:
    """What one graph says about the comparison images, and the thresholds fitted for it."""

    predictions: Predictions
    thresholds: Thresholds


def compare_graph(
    key: str, reference: Judged, judged: Judged, defective: npt.NDArray[np.bool_] | None, limits: GuardLimits
) -> tuple[ParityRow, GuardReport]:
    """Compare a graph ('engine/precision') with the trained torch model on the same images.

    A float graph must give the same scores within 1e-3 of their `score_units`; an INT8 graph, whose head was fitted
    anew, must give the same verdicts and the same AUROC within `limits`.
    """
    scores, expected = judged.predictions.scores, reference.predictions.scores
    units = score_units(expected, reference.thresholds)
    difference = float((np.abs(scores - expected) / units).max())
    report = compare(
        expected,
        scores,
        reference_thresholds=reference.thresholds,
        thresholds=judged.thresholds,
        defective=defective,
        limits=limits,
    )
    is_float = key.endswith("/fp32")
    row = ParityRow(
        backend=backend_name(key),
        images=scores.size,
        score_difference=difference,
        map_difference=_map_difference(reference.predictions.maps, judged.predictions.maps),
        flips=report.flips,
        auroc=None if defective is None else auroc(scores, defective),
        distinct=report.distinct,
        limit=f"score {FLOAT_LIMIT:g}" if is_float else str(limits),
        ok=difference <= FLOAT_LIMIT if is_float else not report.failures,
    )
    return row, report


def backend_name(key: str) -> str:
    """Return how tables name the graph of an 'engine/precision'; TensorRT is simulated here.

    >>> backend_name("tensorrt/int8")
    'tensorrt int8 simulated'
    """
    return key.replace("/", " ") + (" simulated" if key.startswith("tensorrt/") else "")


def parity_table(rows: Sequence[ParityRow]) -> str:
    """Return the table that the export prints."""
    lines = [
        f"{'parity':8}{'backend':25}{'max|Δscore|':>12}{'p99|Δmap|':>12}{'verdict flips':>15}{'AUROC':>9}"
        f"{'distinct':>10}  limit"
    ]
    for row in rows:
        area = "-" if row.auroc is None else f"{row.auroc:.4f}"
        verdict = "ok" if row.ok else "FAIL"
        lines.append(
            f"{'':8}{row.backend:25}{row.score_difference:12.1e}{row.map_difference:12.1e}"
            f"{f'{row.flips}/{row.images}':>15}{area:>9}{row.distinct:10.0%}  {row.limit:30} {verdict}"
        )
    return "\n".join(lines)


def _map_difference(expected: npt.NDArray[np.float32], maps: npt.NDArray[np.float32]) -> float:
    return float(np.percentile(np.abs(maps - expected), 99) / max(float(expected.max()), 1e-12))
