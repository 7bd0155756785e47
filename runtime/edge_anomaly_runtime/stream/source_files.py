"""Pictures from image files: every one of them, in sorted order."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np

from edge_anomaly_runtime.errors import ImageError
from edge_anomaly_runtime.images import list_images, load_image

from .source import EndOfFile, Picture, UnusablePicture


class FilesSource:
    """The images of a file, a folder or a glob as a source; reads the list of files when it is opened."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._paths: list[Path] = []
        self._next = 0

    def open(self) -> None:
        """List the files.

        Raises:
            UsageError: there is none.
        """
        self._paths = list_images([self._location])
        self._next = 0

    def read(self, timeout: float) -> Picture | None:
        """Return the next image, upright RGB; `timeout` is not needed, a file answers at once.

        Raises:
            EndOfFile: all have been read.
            UnusablePicture: this file is damaged; the next call goes on with the one after it.
        """
        if self._next >= len(self._paths):
            raise EndOfFile
        path = self._paths[self._next]
        self._next += 1
        start = perf_counter()
        try:
            pixels = np.array(load_image(path), dtype=np.uint8)
        except ImageError as error:
            raise UnusablePicture(error.what, error.hint) from None
        return Picture(pixels, decode_ms=(perf_counter() - start) * 1e3, path=str(path))

    def close(self) -> None:
        """Forget the list."""
        self._paths = []
