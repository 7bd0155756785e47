"""`--target tensorrt`: the files that a device needs to build its engines, checked as far as that goes without it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from PIL import Image

from edge_anomaly.prediction import Pixels
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.errors import ArtefactError, GateError
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.tensorrt_recipe import RECIPE, BuildFiles, TensorrtRecipe, recipe_bytes

from . import trt_check
from .fp16 import strongly_typed_fp16
from .golden import png_bytes
from .matrix import version_parts
from .trt_lint import findings_text, lint

# Largest relative difference of a score on the golden images, which are expected to score as a float simulation on the
# CPU does. On no device measured: FP16 keeps 11 bits, and integer kernels may round a tie the other way.
SCORE_TOLERANCE = {"fp32": 2e-3, "fp16": 3e-2, "int8": 1e-1}

STRONG_NAMES = {"fp16": "tensorrt/model.fp16.onnx", "int8": "tensorrt/model.int8.fp16.onnx"}

_MAX_NORMAL = 200
_HALF_LIMIT = 0.25

UNVERIFIED = (
    "that the device's own TensorRT builds the engine: `edge-anomaly engine build BUNDLE` there says",
    "that INT8 kernels are chosen, and how fast they are: `engine build` reads the layers' precisions back",
    "scores on the device: `engine build` compares golden images and sets the thresholds again",
)


def tensorrt_files(
    weak: Mapping[str, tuple[str, onnx.ModelProto]],
    normal: Pixels,
    samples: Pixels,
    *,
    version: str,
    opset: int,
    alpha_warn: float,
    alpha_fail: float,
    allow_drop: bool = False,
    typed_fp16: onnx.ModelProto | None = None,
) -> dict[str, bytes]:
    """Return the recipe and its files: graphs for strongly typed builds, and normal images for the thresholds there.

    `weak`: by precision, the name and graph of the file for TensorRT up to 10. `normal`: held-out model inputs, uint8
    [n, height, width, 3]; `samples`: a few of any kind, to compare the graphs for TensorRT 11 with the others on.
    `version`: the oldest TensorRT that must take the files. `typed_fp16`: what `strongly_typed_fp16` has made of the
    graph of precision fp16, where that is there already.

    Raises:
        ArtefactError: a file breaks a rule that TensorRT enforces, or NVIDIA's parser or builder refuses it.
        GateError: a graph in FP16 gives other results than the one it was made of, and `allow_drop` is not set.
    """
    files: dict[str, bytes] = {}
    graphs = {}
    for precision, (name, model) in weak.items():
        check_tensorrt(name, model, version)
        strong = name
        if precision in STRONG_NAMES:
            strong = STRONG_NAMES[precision]
            made = typed_fp16 if precision == "fp16" else None
            typed = strongly_typed_fp16(model) if made is None else made
            check_tensorrt(strong, typed, max(version, "11.0", key=version_parts))
            _check_half(strong, typed, model, samples, allow_drop=allow_drop)
            files[strong] = typed.SerializeToString()
        graphs[precision] = BuildFiles(weak=name, strong=strong)
    names = []
    for index, image in enumerate(normal[:_MAX_NORMAL]):
        names.append(f"tensorrt/normal-{index:03}.png")
        files[names[-1]] = png_bytes(Image.fromarray(image))
    recipe = TensorrtRecipe(
        opset=opset,
        graphs=graphs,
        score_tolerance={precision: SCORE_TOLERANCE[precision] for precision in graphs},
        normal_images=tuple(names),
        alpha_warn=alpha_warn,
        alpha_fail=alpha_fail,
    )
    files[RECIPE] = recipe_bytes(recipe)
    return files


def check_tensorrt(name: str, model: onnx.ModelProto, version: str) -> None:
    """Hold a file against the rules of TensorRT and, where tensorrt-rtx is installed, NVIDIA's parser and builder."""
    findings = lint(model, minimum_version=version)
    errors = [finding for finding in findings if finding.severity == "E"]
    if errors:
        say(findings_text(errors))
        raise ArtefactError(
            f"{name} breaks the rules of TensorRT {version} {len(errors)} times; first {errors[0].code} at "
            f"{errors[0].node}: {errors[0].what}.",
            errors[0].fix,
        )
    warnings = sorted({finding.code for finding in findings})
    noted = f", {len(findings)} remarks ({', '.join(warnings)})" if findings else ""
    if not trt_check.is_installed():
        say(f"{name}: our rules for TensorRT {version} met{noted}; NVIDIA's parser not tried (extra trt-check)")
        return
    checked = trt_check.check_with_nvidia(model.SerializeToString())
    if checked.timed_out:
        say(f"{name}: our rules for TensorRT {version} met{noted}; NVIDIA's builder was stopped before it had ended")
        return
    if not checked.ok:
        raise ArtefactError(f"NVIDIA's parser or builder refuses {name}: {checked}.", "Report this with the file.")
    say(
        f"{name}: our rules for TensorRT {version} met{noted}; TensorRT for RTX {checked.version} parsed and built it "
        f"in {checked.seconds:.1f} s, {checked.plan_bytes / 1e6:.1f} MB"
    )


def _check_half(
    name: str, typed: onnx.ModelProto, model: onnx.ModelProto, samples: Pixels, *, allow_drop: bool
) -> None:
    """Run a graph in FP16 and what it was made of: not how near they are is the question, but whether it is whole."""
    sessions = [
        open_onnxruntime(graph.SerializeToString(), threads=usable_cpus(), fuse=False) for graph in (typed, model)
    ]
    output = model.graph.output[0].name
    half, expected = (
        np.concatenate([session.run(image[np.newaxis])[output] for image in samples]) for session in sessions
    )
    difference = float(np.abs(half - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if difference <= _HALF_LIMIT:
        return
    what = f"{name} computes something else in FP16: {output} is off by {difference:.0%} of its largest value"
    if not allow_drop:
        raise GateError(f"{what}.", "Export with --precision fp32, or accept it with --allow-drop.")
    say(f"Accepted with --allow-drop: {what}")


def say_unverified() -> None:
    """List what this machine could not show."""
    say("Not verified here, and where it will be:")
    for line in UNVERIFIED:
        say(f"  {line}")
