"""Golden images: stored pictures must give their stored scores again on this machine."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from .bundle import GoldenImage, Thresholds
from .scoring import Result, Scorer, verdict_of
from .tensorrt_recipe import read_recipe, score_tolerance

# How far a TensorRT engine's map may be off, in score tolerances. Its FP16 parts round otherwise than the simulation on
# a CPU that the stored maps are from, and single cells stray further than the largest one: with the FP16 graph of a
# small PaDiM run on a CPU, scores were off by up to 8 %, single cells by up to 19 %.
_MAP_FACTOR = 3.0

_LEAST_UNIT = 0.1


@dataclass(frozen=True)
class GoldenCheck:
    """One golden image: differences are relative to the expected value (the map's to its largest value).

    They are None where the picture could not be judged. A classifier's verdicts are classes, its differences those of
    the logits.
    """

    file: str
    expected: float
    score: float | None
    score_difference: float | None
    map_difference: float | None
    verdict: str
    expected_verdict: str
    ok: bool


def run_selftest(scorer: Scorer, *, tolerance: float | None = None) -> list[GoldenCheck]:
    """Score every golden image of the scorer's bundle and compare score, map and verdict with what was stored.

    A verdict may differ only where the expected score is nearer to a threshold than the tolerance, which defaults to
    `golden_tolerance`. Maps of TensorRT engines may be off by three times as much.
    """
    limit = golden_tolerance(scorer) if tolerance is None else tolerance
    maps = scorer.bundle.golden_maps()[scorer.key]
    return [_check(scorer, golden, maps[index], limit) for index, golden in enumerate(scorer.bundle.manifest.golden)]


def score_units(expected: npt.NDArray[np.float64], thresholds: Thresholds) -> npt.NDArray[np.float64]:
    """Return what differences of scores are relative to: the score, or a tenth of the NG limit where that is more.

    An autoencoder's score, an error less the usual error, can be 0; relative to itself nothing would be near it.
    """
    return np.maximum(np.abs(expected), max(_LEAST_UNIT * abs(thresholds.fail.value), 1e-12))


def golden_tolerance(scorer: Scorer) -> float:
    """Return how far scores may be off, in `score_units`; for TensorRT the recipe says it."""
    if scorer.key.startswith("tensorrt/"):
        return score_tolerance(read_recipe(scorer.bundle), scorer.precision)
    return scorer.bundle.manifest.golden_tolerance[scorer.precision]


def _check(scorer: Scorer, golden: GoldenImage, expected_map: npt.NDArray[np.float32], tolerance: float) -> GoldenCheck:
    with Image.open(io.BytesIO(scorer.bundle.read(golden.file))) as file:
        picture = np.asarray(file.convert("RGB"))
    result = scorer.score_pixels(picture) if golden.preprocessed else scorer.score_image(picture)
    if scorer.classes:
        return _check_class(scorer, golden, result, expected_map, tolerance)
    expected = golden.scores[scorer.key]
    unit = float(score_units(np.array(expected), scorer.bundle.manifest.thresholds[scorer.key]))
    score_difference = map_difference = None
    if result.score is not None and result.anomaly_map is not None:
        score_difference = abs(result.score - expected) / unit
        map_difference = float(np.abs(result.anomaly_map - expected_map).max() / max(np.abs(expected_map).max(), 1e-12))
    map_limit = tolerance * (_MAP_FACTOR if scorer.key.startswith("tensorrt/") else 1.0)
    expected_verdict = _expected_verdict(scorer, golden)
    same_verdict = result.verdict == expected_verdict or _is_near_threshold(scorer, expected, tolerance * unit)
    return GoldenCheck(
        file=golden.file,
        expected=expected,
        score=result.score,
        score_difference=score_difference,
        map_difference=map_difference,
        verdict=result.verdict,
        expected_verdict=expected_verdict,
        ok=_is_within(score_difference, tolerance) and _is_within(map_difference, map_limit) and same_verdict,
    )


def _check_class(
    scorer: Scorer, golden: GoldenImage, result: Result, expected: npt.NDArray[np.float32], tolerance: float
) -> GoldenCheck:
    """Compare logits, float32 [K], relative to the largest; the class may differ where two are that near."""
    scale = max(float(np.abs(expected).max()), 1e-12)
    difference = None if result.logits is None else float(np.abs(result.logits - expected).max()) / scale
    first, second = np.sort(expected)[::-1][:2]
    same = result.label == golden.verdicts[scorer.key] or float(first - second) <= 2 * tolerance * scale
    return GoldenCheck(
        file=golden.file,
        expected=golden.scores[scorer.key],
        score=result.score,
        score_difference=difference,
        map_difference=difference,
        verdict=result.label or result.verdict,
        expected_verdict=golden.verdicts[scorer.key],
        ok=_is_within(difference, tolerance) and same,
    )


def _expected_verdict(scorer: Scorer, golden: GoldenImage) -> str:
    """Return the stored verdict, or what the stored score means where the device has set limits of its own."""
    stored = golden.verdicts[scorer.key]
    if stored == "INVALID" or scorer.thresholds == scorer.bundle.manifest.thresholds[scorer.key]:
        return stored
    return verdict_of(golden.scores[scorer.key], scorer.thresholds)


def _is_within(difference: float | None, tolerance: float) -> bool:
    return difference is not None and difference <= tolerance


def _is_near_threshold(scorer: Scorer, expected: float, margin: float) -> bool:
    limits = (scorer.thresholds.warn.value, scorer.thresholds.fail.value)
    return any(abs(expected - limit) <= margin for limit in limits)
