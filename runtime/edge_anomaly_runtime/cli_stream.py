"""`stream`: its flags, its signals, its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import UsageError

if TYPE_CHECKING:
    from .stream.service import Stream
    from .stream.settings import StreamSettings

_CAMERA = "For the cameras given by --source"


def stream(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="A bundle folder; or --store, or a configuration.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="rtsp://, http://, a file or folder, v4l2:///dev/video0, csi://0, test://moving; repeatable. "
            "${NAME} is taken from the environment.",
        ),
    ] = None,
    sink: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SINK",
            help="stdout (default), jsonl:PATH, mqtt://HOST/TOPIC, https://..., images:DIR, video:PATH, "
            "command:[...]; repeatable.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file; flags win over it.")] = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Take the store's active bundle, and each that is activated later."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, tensorrt, openvino, onnxruntime or onnxruntime-tensorrt.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, fp16 or int8.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the engine. Default: the CPUs, less one for cameras.")] = None,
    frames: Annotated[
        str | None,
        typer.Option(help="latest (cameras), all (files), every:N, fps:F, or trigger: one per line on standard input."),
    ] = None,
    max_age: Annotated[
        float | None, typer.Option(help="Seconds; an older frame of a camera is not scored. [0.5]")
    ] = None,
    max_lag: Annotated[
        float | None, typer.Option(help="Seconds; the same where every frame of a camera counts.")
    ] = None,
    confirm: Annotated[
        str | None, typer.Option(metavar="K/N", help="WARN and NG need K of the last N frames. [1/1]")
    ] = None,
    hysteresis: Annotated[
        float | None,
        typer.Option(
            help="0 to 1: how far below its limit a score must fall to end a verdict, in shares of fail - warn."
        ),
    ] = None,
    roi: Annotated[
        str | None,
        typer.Option(metavar="L,T,R,B", help=f"{_CAMERA}: the part that is scored, in shares of the picture."),
    ] = None,
    decoder: Annotated[str | None, typer.Option(help="cpu, or nvdec for RTSP on a Jetson.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for a camera to answer. [5]")] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Serve Prometheus metrics, such as :9108.")
    ] = None,
    page: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Serve the live page, such as :8080.")] = None,
    sink_required: Annotated[
        bool, typer.Option("--sink-required", help="Wait for a slow sink instead of losing records.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End with code 5 when a camera is lost.")] = False,
    stop_after: Annotated[int | None, typer.Option(metavar="N", help="End after N scored frames.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the final counts as one JSON object on standard output.")
    ] = False,
) -> None:
    """Score cameras and files until they end or the service is stopped.

    SIGTERM drains and ends with code 0, SIGHUP reads configuration and model again.

    Example: edge-anomaly stream part.eab --source rtsp://${CAM_USER}:${CAM_PW}@10.0.0.5/live --sink jsonl:out.jsonl
    Example: edge-anomaly stream --config line1.toml --store bundles/ --metrics :9108
    """
    from .stream.service import Stream, summary_lines
    from .stream.settings import SinkSettings, settings_from

    flags = {
        "bundle": bundle,
        "store": store,
        "engine": engine,
        "precision": precision,
        "threads": threads,
        "frames": frames,
        "max_age": max_age,
        "max_lag": max_lag,
        "confirm": confirm,
        "hysteresis": hysteresis,
        "decoder": decoder,
        "timeout": timeout,
        "metrics": metrics,
        "page": page,
        "fail_fast": fail_fast or None,
        "stop_after": stop_after,
        "cameras": [{"source": text, **({"roi": _roi(roi)} if roi else {})} for text in source] if source else None,
        "sinks": [{"to": text, "required": sink_required} for text in sink] if sink else None,
    }

    def read() -> StreamSettings:
        settings = settings_from(config, flags)
        if not settings.sinks and not as_json:
            settings = settings.model_copy(update={"sinks": (SinkSettings(to="stdout"),)})
        if as_json and any(spec.to.startswith("stdout") for spec in settings.sinks):
            raise UsageError("--json and the sink stdout both want standard output.", "Leave one of them out.")
        return settings

    signals = _Signals()
    service = signals.service = Stream(read(), reload=read)
    if any(camera.waits_for_trigger for camera in service.cameras):
        threading.Thread(target=_read_triggers, args=(service,), name="triggers", daemon=True).start()
    status = service.run()
    if as_json:
        print(json.dumps(status, allow_nan=False))
    for line in summary_lines(status):
        print(line, file=sys.stderr)
    if signals.first == signal.SIGINT:
        raise typer.Exit(130)


class _Signals:
    """SIGTERM and SIGINT end in order, a second one at once; SIGHUP reloads. Without a service yet they just end."""

    def __init__(self) -> None:
        self.service: Stream | None = None
        self.first: int | None = None
        # Own handlers for both: Typer lets SIGTERM kill the process, and a shell's background job ignores SIGINT.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, self._reload)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.service is None:
            # As an exception, so that a model's trial in a child process is ended, too.
            raise SystemExit(130 if number == signal.SIGINT else 0)
        if self.first is not None:
            os._exit(128 + number)
        self.first = number
        self.service.stop()

    def _reload(self, number: int, frame: FrameType | None) -> None:
        if self.service is not None:
            self.service.request_reload()


def _read_triggers(service: Stream) -> None:
    for _ in sys.stdin:
        service.trigger()


def _roi(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4:
        raise UsageError(f"--roi {text} is not possible.", "Give left,top,right,bottom, such as 0.1,0.1,0.9,0.9.")
    return values
