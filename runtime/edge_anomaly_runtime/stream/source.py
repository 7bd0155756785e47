"""The seam between a camera and its reader: three calls, and what can come of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_anomaly_runtime.errors import SourceError


@dataclass(frozen=True)
class Picture:
    """One decoded picture.

    pixels: uint8 [h, w, 3], RGB, contiguous. pts: the stream's own time in seconds, None where it has none.
    corrupt: why it may be damaged ('' if nothing was noticed). decode_ms: time spent decoding and converting.
    path: the image file that it came from.
    """

    pixels: npt.NDArray[np.uint8]
    pts: float | None = None
    is_keyframe: bool = True
    corrupt: str = ""
    decode_ms: float = 0.0
    path: str = ""


class FrameSource(Protocol):
    """One connection to one source, used by one thread; a lost one is closed and a new one is made.

    No call blocks for ever: `open` and `read` end within the source's own time limits.
    """

    def open(self) -> None:
        """Connect.

        Raises:
            SourceLost: not reachable now; another try may succeed.
            SourceRefused: wrong credentials or no such stream; trying often would be hammering.
            SourceUnsupported: it answers, but with something that is never decoded.
        """

    def read(self, timeout: float) -> Picture | None:
        """Return the next picture, or None when none came within about `timeout` seconds.

        Raises:
            EndOfFile: a file or folder has been read to its end.
            SourceLost: the connection ended, failed or timed out.
            UnusablePicture: this picture cannot be read, the next one may be.
        """

    def close(self) -> None:
        """Free the connection; more than once is fine."""


class EndOfFile(Exception):
    """A file or folder has been read to its end: not an error."""


class SourceLost(SourceError):
    """The source is not there, or not any more; worth another try soon."""


class SourceSilent(SourceLost):
    """The source did not answer within its time limit."""


class SourceRefused(SourceError):
    """The source is there and refuses: wrong credentials, no such stream, no permission."""


class SourceUnsupported(SourceError):
    """The source sends what is never decoded: a codec, container or protocol outside the allow-lists."""


class UnusablePicture(SourceError):
    """One picture of a file source cannot be read."""
