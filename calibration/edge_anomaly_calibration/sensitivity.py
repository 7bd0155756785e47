"""Which activations lose most of the signal when they are rounded to INT8.

A few tensors can cost more than all others together: on EfficientNet-Lite0 and dim grey pictures, the output of the
stem and of the first block. They are found by trying: one tensor at a time is left float, and the noise that remains
at the head's inputs is measured against what distinguishes one image from another there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx

from edge_anomaly_runtime.session import open_engine

from .onnx_graph import with_outputs
from .qdq_graph import HEAD_PREFIX, quantized_tensors, with_float_tensors

Image = npt.NDArray[np.uint8]
Taps = dict[tuple[str, int], npt.NDArray[np.float32]]


def tensor_gains(
    model: onnx.ModelProto, float_model: onnx.ModelProto, images: Sequence[Image]
) -> list[tuple[str, float]]:
    """Return every quantised activation with what leaving it float gains in dB at the head's inputs, best first."""
    expected = _taps(float_model, images)
    now = _signal_to_noise(expected, model, images)
    gains = [
        (name, _signal_to_noise(expected, with_float_tensors(model, float_model, [name]), images) - now)
        for name in quantized_tensors(model)
    ]
    return sorted(gains, key=lambda row: -row[1])


def _signal_to_noise(expected: Taps, model: onnx.ModelProto, images: Sequence[Image]) -> float:
    """Return the mean over the head's inputs of the ratio in dB: variance between images over rounding noise."""
    taps = _taps(model, images)
    ratios = [
        np.square(reference - reference.mean(axis=0), dtype=np.float64).sum()
        / (np.square(reference - taps[place], dtype=np.float64).sum() + 1e-30)
        for place, reference in expected.items()
    ]
    return float(np.mean(10 * np.log10(np.asarray(ratios) + 1e-30)))


def _taps(model: onnx.ModelProto, images: Sequence[Image]) -> Taps:
    """Return the backbone's tensors that the head reads, each [images, ...], by node of the head and its input.

    Quantising reorders nodes and renames tensors; the nodes of the head keep their names.
    """
    made = {output for node in model.graph.node if not node.name.startswith(HEAD_PREFIX) for output in node.output}
    places = {
        (node.name, position): name
        for node in model.graph.node
        if node.name.startswith(HEAD_PREFIX)
        for position, name in enumerate(node.input)
        if name in made
    }
    session = open_engine("onnxruntime", with_outputs(model, sorted(set(places.values()))))
    rows = [session.run(image[np.newaxis]) for image in images]
    session.close()
    return {place: np.concatenate([row[name] for row in rows]) for place, name in places.items()}
