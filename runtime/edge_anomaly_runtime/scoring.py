"""From one picture to a verdict, with a bundle's own preprocessing and thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from .bundle import CLASSIFIER, Bundle, Thresholds, read_bundle
from .errors import ImageError, UsageError
from .images import load_image
from .preprocess import content_area, full_size, preprocess
from .session import Session, graph_key, open_session

Verdict = Literal["OK", "WARN", "NG", "INVALID"]

# A frame outside these mean grey levels shows nothing, unless the normal images are that dark or bright themselves.
_BLACK, _WHITE = 5.0, 250.0


@dataclass(frozen=True)
class Result:
    """What is known about one picture.

    score: raw anomaly score, higher is more anomalous, or a classifier's largest logit; None if the verdict is INVALID.
    threshold: the limit that makes it NG; warn: the limit that makes it WARN; a classifier has none, and its verdict is
        OK for every picture that it could judge.
    anomaly_map: float32 [h, w] on the model's grid, in the score's unit.
    label, probability, logits: of a classifier, float32 [K]; the probability is the softmax's.
    ms: milliseconds per stage (decode, resize, infer).
    reason: why the verdict is INVALID.
    """

    verdict: Verdict
    score: float | None
    threshold: float | None
    warn: float | None
    ms: dict[str, float] = field(default_factory=dict)
    anomaly_map: npt.NDArray[np.float32] | None = None
    path: str = ""
    reason: str = ""
    label: str = ""
    probability: float | None = None
    logits: npt.NDArray[np.float32] | None = None


class Scorer:
    """A bundle loaded on an engine; use it as a context manager, from one thread.

    `thresholds` default to the bundle's own for this engine and precision; a classifier has `classes` in their place.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        *,
        engine: str,
        precision: str,
        reasons: tuple[str, ...] = (),
        thresholds: Thresholds | None = None,
    ) -> None:
        self.bundle = bundle
        self.session = session
        self.engine = engine
        self.precision = precision
        self.reasons = reasons
        self.key = graph_key(engine, precision)
        model = bundle.manifest.model
        self.classes: tuple[str, ...] = tuple(model.parameters["classes"]) if model.kind == CLASSIFIER else ()
        self._thresholds = thresholds or bundle.manifest.thresholds.get(self.key)
        self._spec = bundle.manifest.input.preprocess

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def thresholds(self) -> Thresholds:
        """The alarm limits in force.

        Raises:
            UsageError: the bundle is a classifier's.
        """
        if self._thresholds is None:
            raise UsageError(
                f"{self.bundle.path} is a classifier: it has no alarm limits.", "Give a detector's bundle."
            )
        return self._thresholds

    def close(self) -> None:
        """Free the engine."""
        self.session.close()

    def score_file(self, path: Path | str) -> Result:
        """Score one image file; an unreadable file gives an INVALID result, not an exception."""
        start = perf_counter()
        try:
            image = load_image(path, self._spec)
        except ImageError as error:
            return self.invalid(error.reason, path=str(path))
        return self._score(image, {"decode": _ms_since(start)}, str(path))

    def score_image(self, image: Image.Image | npt.NDArray[np.uint8]) -> Result:
        """Score one picture in memory: RGB, Pillow or uint8 [h, w, 3]."""
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
            return self.invalid(f"the array is {image.dtype} {list(image.shape)}, not uint8 [h, w, 3]")
        if isinstance(image, Image.Image) and image.mode != "RGB":
            return self.invalid(f"the picture's mode is {image.mode}, not RGB")
        return self._score(image, {}, "")

    def _score(self, image: Image.Image | npt.NDArray[np.uint8], ms: dict[str, float], path: str) -> Result:
        start = perf_counter()
        pixels = preprocess(image, self._spec)
        ms["resize"] = _ms_since(start)
        size = (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else full_size(image)
        _, _, height, width = content_area(size, self._spec)
        share = height * width / (self._spec.height * self._spec.width)
        return self._score_pixels(pixels, share, ms, path)

    def score_pixels(self, pixels: npt.NDArray[np.uint8]) -> Result:
        """Score a model input, uint8 [height, width, 3], that `preprocess` has made."""
        return self._score_pixels(pixels, 1.0, {}, "")

    def _score_pixels(self, pixels: npt.NDArray[np.uint8], share: float, ms: dict[str, float], path: str) -> Result:
        if reason := self._exposure_fault(pixels, share):
            return self.invalid(reason, ms, path)
        start = perf_counter()
        outputs = self.session.run(pixels[np.newaxis])
        ms["infer"] = _ms_since(start)
        if self.classes:
            return self._classified(outputs["logits"][0], ms, path)
        score, anomaly_map = float(outputs["score"][0]), outputs["anomaly_map"][0]
        if not (math.isfinite(score) and np.isfinite(anomaly_map).all()):
            return self.invalid("the model's output is not finite", ms, path)
        fail, warn = self.thresholds.fail.value, self.thresholds.warn.value
        return Result(verdict_of(score, self.thresholds), score, fail, warn, ms, anomaly_map, path)

    def _classified(self, logits: npt.NDArray[np.float32], ms: dict[str, float], path: str) -> Result:
        if not np.isfinite(logits).all():
            return self.invalid("the model's output is not finite", ms, path)
        best = int(logits.argmax())
        probability = float(1 / np.exp(logits.astype(np.float64) - float(logits[best])).sum())
        return Result(
            "OK",
            float(logits[best]),
            None,
            None,
            ms,
            path=path,
            label=self.classes[best],
            probability=probability,
            logits=logits,
        )

    def _exposure_fault(self, pixels: npt.NDArray[np.uint8], share: float) -> str:
        """Name a picture that shows nothing; all but `share` of the pixels are a letterbox's black bars."""
        black, white = exposure_limits(self.bundle.manifest.input.brightness, share)
        # Row by row in 32 bits: exact, and half the time of numpy's mean.
        mean = float(pixels.reshape(len(pixels), -1).sum(axis=1, dtype=np.uint32).sum() / pixels.size)
        if mean < black:
            return f"the picture is black (mean grey level {mean / share:.1f})"
        if mean > white:
            return f"the picture is white (mean grey level {mean / share:.1f})"
        return ""

    def invalid(self, reason: str, ms: dict[str, float] | None = None, path: str = "") -> Result:
        """Return the result for a picture that must not be judged, with the limits in force."""
        limits = self._thresholds
        fail, warn = (None, None) if limits is None else (limits.fail.value, limits.warn.value)
        return Result("INVALID", None, fail, warn, ms or {}, path=path, reason=reason)


def exposure_limits(brightness: tuple[float, float], share: float = 1.0) -> tuple[float, float]:
    """Return the mean grey levels below and above which a picture shows nothing, given the normal images' range.

    share: of the pixels that are not a letterbox's black bars; `brightness` was measured with the bars.
    """
    darkest, brightest = brightness
    return min(_BLACK * share, darkest / 2), max(_WHITE * share, (brightest + 255 * share) / 2)


def verdict_of(score: float, thresholds: Thresholds) -> Verdict:
    """Return the verdict for a finite score: NG above `fail`, WARN above `warn`, else OK."""
    if score > thresholds.fail.value:
        return "NG"
    return "WARN" if score > thresholds.warn.value else "OK"


def open_scorer(
    path: Path | str, *, engine: str = "auto", precision: str = "auto", threads: int | None = None
) -> Scorer:
    """Verify a bundle, load it on the best usable engine and return a scorer.

    >>> with open_scorer("part.eab") as scorer:  # doctest: +SKIP
    ...     print(scorer.score_file("photo.jpg").verdict)
    OK

    Raises:
        ArtefactError, UsageError, MissingRequirementError: as `read_bundle` and `open_session`.
    """
    bundle = read_bundle(path)
    return scorer_of(bundle, *open_session(bundle, engine=engine, precision=precision, threads=threads))


def scorer_of(bundle: Bundle, session: Session, engine: str, precision: str, reasons: tuple[str, ...]) -> Scorer:
    """Return a scorer for a loaded graph, as `open_session` returns it."""
    # Only a TensorRT engine has limits of its own, set on the device that built it. Others need not load its module.
    own: Thresholds | None = getattr(session, "thresholds", None)
    return Scorer(bundle, session, engine=engine, precision=precision, reasons=reasons, thresholds=own)


def _ms_since(start: float) -> float:
    return round((perf_counter() - start) * 1e3, 3)
