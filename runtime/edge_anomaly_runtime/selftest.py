"""Golden images: stored pictures must give their stored scores again on this machine."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from .bundle import GoldenImage
from .scoring import Scorer


@dataclass(frozen=True)
class GoldenCheck:
    """One golden image: differences are relative to the expected value (the map's to its largest value).

    They are None where the picture could not be judged.
    """

    file: str
    expected: float
    score: float | None
    score_difference: float | None
    map_difference: float | None
    verdict: str
    expected_verdict: str
    ok: bool


def run_selftest(scorer: Scorer) -> list[GoldenCheck]:
    """Score every golden image of the scorer's bundle and compare score, map and verdict with what was stored.

    A verdict may differ only where the expected score is nearer to a threshold than the tolerance.
    """
    key = f"{scorer.engine}/{scorer.precision}"
    maps = scorer.bundle.golden_maps()[key]
    tolerance = scorer.bundle.manifest.golden_tolerance[scorer.precision]
    return [
        _check(scorer, golden, maps[index], key, tolerance)
        for index, golden in enumerate(scorer.bundle.manifest.golden)
    ]


def _check(
    scorer: Scorer, golden: GoldenImage, expected_map: npt.NDArray[np.float32], key: str, tolerance: float
) -> GoldenCheck:
    with Image.open(io.BytesIO(scorer.bundle.read(golden.file))) as file:
        picture = np.asarray(file.convert("RGB"))
    result = scorer.score_pixels(picture) if golden.preprocessed else scorer.score_image(picture)
    expected = golden.scores[key]
    score_difference = map_difference = None
    if result.score is not None and result.anomaly_map is not None:
        score_difference = abs(result.score - expected) / max(abs(expected), 1e-12)
        map_difference = float(np.abs(result.anomaly_map - expected_map).max() / max(np.abs(expected_map).max(), 1e-12))
    same_verdict = result.verdict == golden.verdicts[key] or _is_near_threshold(scorer, expected, tolerance)
    return GoldenCheck(
        file=golden.file,
        expected=expected,
        score=result.score,
        score_difference=score_difference,
        map_difference=map_difference,
        verdict=result.verdict,
        expected_verdict=golden.verdicts[key],
        ok=_is_within(score_difference, tolerance) and _is_within(map_difference, tolerance) and same_verdict,
    )


def _is_within(difference: float | None, tolerance: float) -> bool:
    return difference is not None and difference <= tolerance


def _is_near_threshold(scorer: Scorer, expected: float, tolerance: float) -> bool:
    limits = (scorer.thresholds.warn.value, scorer.thresholds.fail.value)
    return any(abs(expected - limit) <= tolerance * abs(expected) for limit in limits)
