"""Heat maps that mean the same in every picture: the colours are tied to the pixel threshold, not to the picture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from .preprocess import Preprocess, content_area, source_box

# Transparent below half the pixel threshold, yellow at the threshold, dark red from twice the threshold on.
_STOPS = np.array([0.5, 1.0, 1.5, 2.0])
_COLOURS = np.array([[255, 240, 120], [255, 210, 0], [240, 90, 0], [150, 0, 20]], dtype=np.float64)
_OPACITY = np.array([0.0, 0.45, 0.6, 0.7])
_OUTLINE = (255, 0, 60)

# Both by the map's value in 255ths of the last stop: tables, because a camera's pictures are drawn many times a second.
_TABLE = np.linspace(0, _STOPS[-1], 256)
_RAMP = np.stack([np.interp(_TABLE, _STOPS, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
_PALETTE = _RAMP.round().astype(np.uint8).tobytes()
_MASK = (np.interp(_TABLE, _STOPS, _OPACITY) * 255).round().astype(int).tolist()


def draw_overlay(
    image: Image.Image, anomaly_map: npt.NDArray[np.float32], spec: Preprocess, pixel_threshold: float
) -> Image.Image:
    """Lay the anomaly map over an RGB picture and outline what is above the pixel threshold.

    `anomaly_map`: float32 [h, w], raw scores on the model's grid. Returns an RGB picture of the same size.
    """
    relative = map_to_source(anomaly_map, image.size, spec) / max(pixel_threshold, 1e-12)
    steps = Image.fromarray((np.clip(relative, 0, _STOPS[-1]) * (255 / _STOPS[-1]) + 0.5).astype(np.uint8))
    colours = steps.copy()
    colours.putpalette(_PALETTE)
    picture = image.copy()
    picture.paste(colours.convert("RGB"), mask=steps.point(_MASK))
    picture.paste(_OUTLINE, mask=_outline(relative > 1.0))
    return picture


def map_to_source(
    anomaly_map: npt.NDArray[np.float32], size: tuple[int, int], spec: Preprocess
) -> npt.NDArray[np.float32]:
    """Bring a map from the model's grid to a picture of `size` (width, height), bilinear; 0 where it saw nothing.

    Returns float32 [height, width].
    """
    grid = Image.fromarray(np.ascontiguousarray(anomaly_map, dtype=np.float32))
    rows, columns = anomaly_map.shape
    top, left, height, width = content_area(size, spec)
    scale_y, scale_x = rows / spec.height, columns / spec.width
    content = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    box = [round(value) for value in source_box(size, spec)]
    seen = grid.resize((max(1, box[2] - box[0]), max(1, box[3] - box[1])), Image.Resampling.BILINEAR, box=content)
    canvas = Image.new("F", size)
    canvas.paste(seen, (box[0], box[1]))
    return np.array(canvas)


def _outline(inside: npt.NDArray[np.bool_]) -> Image.Image:
    """Return the rim of a region as a mask, 2 pixels wide: what has a neighbour inside and one outside."""
    return Image.fromarray(_grown(inside) & _grown(~inside)).convert("L")


def _grown(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return a region with its eight neighbours; several times faster than Pillow's rank filters."""
    wide = region.copy()
    wide[:, 1:] |= region[:, :-1]
    wide[:, :-1] |= region[:, 1:]
    grown = wide.copy()
    grown[1:] |= wide[:-1]
    grown[:-1] |= wide[1:]
    return grown
