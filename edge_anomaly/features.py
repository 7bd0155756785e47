"""What several detectors share: embeddings of images, features of several layers, blur and score of the map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .image_set import ImageSet


def embeddings_of(
    model: Any, images: ImageSet, device: torch.device, embed: Callable[[Any], torch.Tensor], what: str = "fitting"
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield what `embed` makes of the backbone's features, batch by batch; the model ends on the CPU."""
    model.to(device)
    try:
        for batch in images.batches(what):
            with torch.inference_mode():
                yield embed(model.backbone(torch.from_numpy(batch).to(device))).cpu().numpy()
    finally:
        model.to("cpu")


def joint_features(features: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """Return float32 [N, sum of C, *grid]: 3x3 means of each layer, brought to the grid bilinearly and joined.

    `features` are float32 [N, C, h, w], one per layer; the order of channels is that of the layers.
    """
    return torch.cat([on_grid(box_mean(feature), grid) for feature in features], dim=1)


def box_mean(feature: torch.Tensor) -> torch.Tensor:
    """Return the 3x3 means of feature maps [N, C, h, w]; beyond the border everything is 0."""
    return F.avg_pool2d(feature, 3, stride=1, padding=1)


def on_grid(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return maps [N, h, w] or [N, C, h, w], brought to the grid bilinearly where they have another."""
    if maps.shape[-2:] == grid:
        return maps
    if maps.dim() == 3:
        return on_grid(maps[:, None], grid)[:, 0]
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


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


def mean_of_largest(places: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean of the `count` largest values of maps [N, h*w], [N]."""
    # The maximum is the same without a TopK, which many accelerators lack.
    return places.amax(dim=1) if count == 1 else places.topk(count, dim=1).values.mean(dim=1)
