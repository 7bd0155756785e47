"""Golden images: real pictures stored with what every graph said about them, for the device's self-test."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_anomaly.prediction import Pixels, predict, session_scores
from edge_anomaly_calibration.selection import synthetic_anomaly
from edge_anomaly_runtime.bundle import GOLDEN_MAPS, GoldenImage, Thresholds
from edge_anomaly_runtime.images import load_image
from edge_anomaly_runtime.preprocess import Preprocess, preprocess
from edge_anomaly_runtime.scoring import verdict_of
from edge_anomaly_runtime.session import Session

_NORMAL, _SYNTHETIC = 5, 3
_MAX_PIXELS = 2_000_000


def golden_from_images(
    paths: Sequence[Path],
    pixels: Pixels,
    sessions: Mapping[str, Callable[[], Session]],
    thresholds: Mapping[str, Thresholds],
    *,
    spec: Preprocess,
    seed: int,
) -> tuple[list[GoldenImage], dict[str, bytes]]:
    """Store up to five held-out normal images and three damaged ones with the results of each 'engine/precision'.

    `pixels`: the model inputs of `paths`, uint8 [n, height, width, 3]. Returns the manifest's entries and the files.
    """
    stored = _choose(paths, pixels, spec, seed)
    scores: dict[str, list[float]] = {}
    maps: dict[str, npt.NDArray[np.float32]] = {}
    for key, open_session in sessions.items():
        session = open_session()
        inputs = [model_input for _, model_input, _ in stored]
        result = predict(session_scores(session), inputs, what=key, total=len(inputs))
        session.close()
        scores[key], maps[key] = result.scores.tolist(), result.maps
    pictures = [(picture, preprocessed) for picture, _, preprocessed in stored]
    verdicts = {key: [verdict_of(score, thresholds[key]) for score in own] for key, own in scores.items()}
    return store_golden(pictures, scores=scores, verdicts=verdicts, arrays=maps)


def store_golden(
    pictures: Sequence[tuple[Image.Image, bool]],
    *,
    scores: Mapping[str, Sequence[float]],
    verdicts: Mapping[str, Sequence[str]],
    arrays: Mapping[str, npt.NDArray[np.float32]],
) -> tuple[list[GoldenImage], dict[str, bytes]]:
    """Return the manifest's entries and the files of pictures, each with whether it is the model input itself.

    `scores`, `verdicts`, `arrays` (maps or logits): by 'engine/precision', one for each picture.
    """
    entries, files = [], {}
    for index, (picture, preprocessed) in enumerate(pictures):
        name = f"golden/{index:03}.png"
        files[name] = png_bytes(picture)
        entries.append(
            GoldenImage(
                file=name,
                preprocessed=preprocessed,
                scores={key: values[index] for key, values in scores.items()},
                verdicts={key: values[index] for key, values in verdicts.items()},
            )
        )
    buffer = io.BytesIO()
    np.savez(buffer, **{key.replace("/", "-"): values for key, values in arrays.items()})  # type: ignore[arg-type]
    return entries, {**files, GOLDEN_MAPS: buffer.getvalue()}


def png_bytes(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _choose(
    paths: Sequence[Path], pixels: Pixels, spec: Preprocess, seed: int
) -> list[tuple[Image.Image, Pixels, bool]]:
    """Return (picture, model input, whether the picture is the model input) per golden image.

    Pictures below two megapixels are stored whole, so that the self-test covers the resize too.
    """
    chosen = []
    for index in range(min(len(paths), _NORMAL)):
        source = load_image(paths[index])
        if source.width * source.height <= _MAX_PIXELS:
            chosen.append((source, preprocess(source, spec), False))  # a JPEG's `pixels` may be from a smaller picture
        else:
            chosen.append((Image.fromarray(pixels[index]), pixels[index], True))
    for index in range(_NORMAL, _NORMAL + _SYNTHETIC):
        damaged = synthetic_anomaly(pixels[index % len(paths)], np.random.default_rng([seed, index]))
        chosen.append((Image.fromarray(damaged), damaged, True))
    return chosen
