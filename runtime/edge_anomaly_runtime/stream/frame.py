"""What travels from a camera to the sinks."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_anomaly_runtime.scoring import Result


@dataclass(frozen=True)
class Frame:
    """One picture of one source.

    seq: counts the frames of a source from 0 on, gaps show what was dropped; never used twice. pixels: uint8
    [h, w, 3], RGB, contiguous. pts: the stream's own time in seconds. captured_ns: monotonic clock, for ages and
    intervals; captured_utc: for people. distrust: why the picture may be damaged although it was decoded ('' if not).
    invalid: why it must not be scored, such as 'frozen' ('' if it may). path: the image file it came from.
    """

    camera: str
    seq: int
    pixels: npt.NDArray[np.uint8]
    captured_ns: int
    captured_utc: datetime
    pts: float | None = None
    decode_ms: float = 0.0
    is_keyframe: bool = False
    distrust: str = ""
    invalid: str = ""
    path: str = ""


@dataclass(frozen=True)
class Scored:
    """A frame with what was made of it, as every sink gets it.

    record: the JSON line (schema edge-anomaly.stream/1), finite numbers only. changed: the camera's verdict is another
    than that of its previous frame.
    """

    frame: Frame
    result: Result
    record: dict[str, Any] = field(default_factory=dict)
    changed: bool = False
