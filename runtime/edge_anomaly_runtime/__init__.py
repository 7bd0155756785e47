"""The lean part that goes on the device: reads a bundle, scores images, never imports torch.

>>> from edge_anomaly_runtime import open_scorer
>>> with open_scorer("part.eab") as scorer:  # doctest: +SKIP
...     result = scorer.score_file("photo.jpg")
...     print(result.score, result.verdict)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scoring import Result, Scorer, open_scorer

__all__ = ["Result", "Scorer", "open_scorer"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `edge-anomaly --help` pays for none of it."""
    if name in __all__:
        from . import scoring

        return getattr(scoring, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
