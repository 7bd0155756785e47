"""What detectors on patch features share: joint features of several layers, and the blur of the anomaly map."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def joint_features(features: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """Return float32 [N, sum of C, *grid]: 3x3 means of each layer, brought to the grid bilinearly and joined.

    `features` are float32 [N, C, h, w], one per layer; the order of channels is that of the layers.
    """
    pooled = [F.avg_pool2d(feature, 3, stride=1, padding=1) for feature in features]
    same_grid = [
        feature
        if feature.shape[-2:] == grid
        else F.interpolate(feature, size=grid, mode="bilinear", align_corners=False)
        for feature in pooled
    ]
    return torch.cat(same_grid, dim=1)


def gaussian_kernel(sigma: float) -> torch.Tensor:
    """Return a normalised blur kernel float32 [1, 1, k, k] that reaches three standard deviations, in cells."""
    reach = int(np.ceil(3 * sigma))
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-9)) ** 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    return torch.from_numpy(kernel.astype(np.float32))[None, None]


def blurred(anomaly_map: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Return the maps [N, h, w] blurred with a kernel [1, 1, k, k]; cells beyond the border repeat those at it."""
    reach = kernel.shape[-1] // 2
    if not reach:
        return anomaly_map
    padded = F.pad(anomaly_map[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(padded, kernel)[:, 0]
