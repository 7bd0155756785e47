"""The images that every graph is compared on, and what a graph says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from edge_anomaly.data import GOOD, UNSURE
from edge_anomaly.prediction import Pixels, Predictions, predict, read_pixels, session_scores, torch_scores
from edge_anomaly.runs import Run
from edge_anomaly_runtime.errors import GateError, UsageError
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.session import Session
from edge_anomaly_runtime.thresholds import fit_thresholds

from .parity import Judged

_MAX_COMPARED = 1000


@dataclass(frozen=True)
class Comparison:
    """Held-out normal images, then the labelled ones; `pixels` uint8 [n, height, width, 3] in the order of `paths`.

    `alpha_warn`, `alpha_fail`: the rates that each graph's thresholds are set for.
    """

    pixels: Pixels
    paths: list[Path]
    holdout: int
    known: npt.NDArray[np.bool_]  # not labelled `unsure`
    defective: npt.NDArray[np.bool_]
    alpha_warn: float
    alpha_fail: float

    @property
    def labels(self) -> npt.NDArray[np.bool_] | None:
        """Return which of the known images are defective, or None where none is."""
        chosen = self.defective[self.known]
        return chosen if chosen.any() else None

    def judged(self, predictions: Predictions) -> Judged:
        """Return predictions with the thresholds that their held-out images set."""
        limits = fit_thresholds(
            predictions.scores[: self.holdout],
            predictions.map_maxima()[: self.holdout],
            alpha_warn=self.alpha_warn,
            alpha_fail=self.alpha_fail,
        )
        return Judged(predictions, limits)

    def judge_torch(self, model: nn.Module) -> Judged:
        """Return what the trained model says."""
        return self.judged(predict(torch_scores(model), self.pixels, what="torch", total=len(self.pixels)))

    def judge(self, session: Session, what: str) -> Judged:
        """Return what a loaded graph says, and close it.

        Raises:
            GateError: a score or a map is not finite.
        """
        predictions = predict(session_scores(session), self.pixels, what=what, total=len(self.pixels))
        session.close()
        if not (np.isfinite(predictions.scores).all() and np.isfinite(predictions.maps).all()):
            raise GateError(f"The graph {what} gives scores that are not finite.", "Export with --precision fp32.")
        return self.judged(predictions)

    def of_known(self, judged: Judged) -> Judged:
        """Return the predictions of the images whose label is sure, and of the held-out ones."""
        scores, maps = judged.predictions.scores[self.known], judged.predictions.maps[self.known]
        return Judged(Predictions(scores, maps), judged.thresholds)


def read_comparison(run: Run, *, alpha_warn: float, alpha_fail: float) -> Comparison:
    """Read the held-out normal images and the labelled ones, as far as they are still there.

    Raises:
        UsageError: not one held-out image is left.
    """
    present = [item for item in run.test if item.path.exists()]
    if len(present) > _MAX_COMPARED:
        chosen = np.random.default_rng(run.seed).permutation(len(present))[:_MAX_COMPARED]
        present = [present[index] for index in sorted(chosen)]
    if len(present) < len(run.test):
        say(f"Comparing on {len(present)} of {len(run.test)} labelled images.")
    labels = {item.path: item.label for item in present}
    paths, pixels = read_pixels([*run.holdout, *labels], run.preprocess, strict=False, what="reading")
    held_out = set(run.holdout)
    holdout = sum(path in held_out for path in paths)
    if not holdout:
        raise UsageError(f"The held-out images of {run.path} are gone.", "Put them back, or train again.")
    of_each = [labels.get(path, GOOD) for path in paths]
    return Comparison(
        pixels,
        paths,
        holdout,
        known=np.array([label != UNSURE for label in of_each]),
        defective=np.array([label not in (GOOD, UNSURE) for label in of_each]),
        alpha_warn=alpha_warn,
        alpha_fail=alpha_fail,
    )
