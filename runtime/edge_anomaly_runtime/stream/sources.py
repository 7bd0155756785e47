"""From a source URI to its reader; each back-end is imported by the branch that chose it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from edge_anomaly_runtime.errors import UsageError

from .health import HealthLimits
from .probe import answers
from .reader import Reader, ReaderOptions
from .source import FrameSource
from .uri import SourceUri

Decoder = Literal["cpu", "nvdec"]

# Share of the time limit in which a connection has to be there. A camera that comes back right after the beginning of
# an attempt waits for its end, for the next one's beginning and for its own connection: all three within `timeout`.
_OPEN_SHARE = 0.55


def source_maker(uri: SourceUri, *, decoder: Decoder = "cpu", timeout: float = 5.0) -> Callable[[], FrameSource]:
    """Return what makes a new, unopened connection to a source; `timeout` is the limit in seconds of a read.

    To connect there are 55 % of it.

    Raises:
        MissingRequirementError: the back-end's package, program or driver is not there.
        UsageError: an option of the URI is wrong, or the decoder does not fit the source.
    """
    if decoder == "nvdec" and uri.kind != "rtsp":
        raise UsageError(f"--decoder nvdec is for RTSP cameras, not for {uri.shown}.", "Leave it out for this source.")
    if uri.kind == "images":
        from .source_files import FilesSource

        return lambda: FilesSource(uri.location)
    if uri.kind == "test":
        from .source_test import TestSource, pattern_from_options

        source = TestSource(pattern_from_options(uri.location, uri.options))
        return lambda: source  # a new connection goes on where the last one ended
    if uri.kind == "csi":
        from .source_gst import CSI_ELEMENTS, CsiSource, csi_options, require_gstreamer

        require_gstreamer("csi://", CSI_ELEMENTS)
        csi_options(uri.options)
        return lambda: CsiSource(uri, start_timeout=2 * timeout)
    from .source_av import AvOptions, AvSource

    options = AvOptions(open_timeout=_OPEN_SHARE * timeout, read_timeout=timeout)
    if decoder == "nvdec":
        from .source_gst import NVDEC_ELEMENTS, NvdecSource, require_gstreamer

        require_gstreamer("--decoder nvdec", NVDEC_ELEMENTS)
        return lambda: NvdecSource(AvSource(uri, options))
    return lambda: AvSource(uri, options)


def reader_for(
    uri: SourceUri,
    *,
    camera: str = "",
    decoder: Decoder = "cpu",
    timeout: float = 5.0,
    options: ReaderOptions | None = None,
    health: HealthLimits | None = None,
    on_frame: Callable[[], None] | None = None,
) -> Reader:
    """Return the reader of a source, not yet started; `camera` overrides the name that the URI gives.

    With `options` of its own, `hung_s` has to be well above `timeout`.

    >>> from edge_anomaly_runtime.stream.uri import parse_source
    >>> with reader_for(parse_source("test://moving?fps=0&count=3")) as reader:
    ...     [reader.take(5.0).seq for _ in range(3)]
    [0, 1, 2]

    Raises:
        MissingRequirementError, UsageError: as `source_maker`.
    """
    return Reader(
        camera or uri.camera,
        source_maker(uri, decoder=decoder, timeout=timeout),
        live=uri.live,
        options=options or ReaderOptions(reconnect_s=timeout, hung_s=3 * timeout),
        health=health,
        probe=_probe_of(uri),
        on_frame=on_frame,
    )


def _probe_of(uri: SourceUri) -> Callable[[], bool] | None:
    if uri.address is not None:
        return lambda: answers(uri)
    if uri.kind == "v4l2":
        return lambda: os.path.exists(uri.location)
    return None
