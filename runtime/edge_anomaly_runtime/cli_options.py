"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder NAME.eab.")]
EngineOption = Annotated[str, typer.Option(help="auto, tensorrt, openvino, onnxruntime or onnxruntime-tensorrt.")]
PrecisionOption = Annotated[
    str, typer.Option(help="auto, fp32, fp16 or int8. auto: the bundle's own where the machine can.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Default: the CPUs that the machine or container grants.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
