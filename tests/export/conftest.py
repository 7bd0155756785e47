"""Small PaDiM detectors on a ResNet-18 with random weights, traced once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import pytest
import torch

from edge_anomaly.backbones import RANDOM_WEIGHTS, build_backbone
from edge_anomaly.padim import CovarianceKind, Padim, PadimConfig, ReductionKind, refit
from edge_anomaly_export.graph import onnx_from_detector

HEIGHT, WIDTH = 50, 64  # 50 is no multiple of the strides, and height and width must not be mixed up

Trace = Callable[[CovarianceKind, ReductionKind, float], tuple[Padim, onnx.ModelProto]]


@pytest.fixture(scope="session")
def trace() -> Trace:
    """Return the function that fits and traces a detector: grid 13 x 16, 8 of 192 channels."""

    @cache
    def traced(covariance: CovarianceKind, reduction: ReductionKind, smoothing: float) -> tuple[Padim, onnx.ModelProto]:
        layers = ("layer1", "layer2")
        config = PadimConfig("resnet18", layers, 8, reduction, covariance, smoothing=smoothing)
        backbone = build_backbone("resnet18", layers=layers, weights=RANDOM_WEIGHTS)
        generator = torch.Generator().manual_seed(0)
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # a fresh one would fold into nothing
                module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
                module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
        model = Padim(config, backbone, HEIGHT, WIDTH)
        pixels = np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), dtype=np.uint8)
        with torch.inference_mode():
            embeddings = model.head.embed(model.backbone(torch.from_numpy(pixels))).numpy()
        fitted = {name: torch.from_numpy(value) for name, value in refit(config, [embeddings]).items()}
        model.head.load_state_dict(fitted, strict=False)
        return model, onnx_from_detector(model, HEIGHT, WIDTH)

    return traced
