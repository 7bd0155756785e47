"""Options that several workstation commands share, and the check of their packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from edge_anomaly_runtime.errors import MissingRequirementError

DataOption = Annotated[
    str, typer.Option(help="A folder with train/good, a folder of normal images, or elpv-mono, elpv-poly.")
]
OutOption = Annotated[Path, typer.Option(help="The run folder to write.")]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
AlphaFail = Annotated[float, typer.Option(help="Share of good parts that may be NG.")]
AlphaWarn = Annotated[float, typer.Option(help="Share of good parts that may be WARN or NG.")]
WeightsOption = Annotated[str, typer.Option(help="default, a .pth or .safetensors file, or random (tests only).")]
SizeOption = Annotated[int, typer.Option(help="Side of the model's square input in pixels.")]
ResizeOption = Annotated[str, typer.Option(help="squash, crop or letterbox.")]
RoiOption = Annotated[str, typer.Option(help="left,top,right,bottom as shares of the picture.")]
HoldoutOption = Annotated[float, typer.Option(help="Share of normal images kept to set the thresholds.")]
EpochsOption = Annotated[int | None, typer.Option(help="Passes over the images. Default: the model's.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MixedOption = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16 or fp16.")]
TensorboardOption = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard files into the run.")]


def require(extra: str, *packages: str) -> None:
    """Refuse a workstation command on a lean install with the line to type."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise MissingRequirementError(
            f"This command needs packages that are not installed: {', '.join(absent)}.",
            f'Run: pip install "edge-anomaly[{extra}]"',
        )
