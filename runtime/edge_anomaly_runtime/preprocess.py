"""The one resize of the project: training, calibration, evaluation and the device all call `preprocess`.

A large JPEG may come to it decoded smaller already (`images.load_image`), by the same rule everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import UsageError

Policy = Literal["squash", "crop", "letterbox"]
Roi = tuple[float, float, float, float]
Box = tuple[float, float, float, float]

WHOLE_IMAGE: Roi = (0.0, 0.0, 1.0, 1.0)

# A picture so many times too large, twice over, is first averaged over whole squares of pixels, or decoded smaller at
# once, if it is a JPEG: half the time at 1080p, and some tenths of a grey level of difference.
_GAP = 2.0

# In a picture's `info`: its upright (width, height), where it was decoded smaller.
FULL_SIZE = "full size"


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the model's input; stored in every run and bundle and read back from there.

    height, width: size of the model's input in pixels.
    policy: `squash` ignores the aspect ratio (nothing is lost), `crop` keeps it and cuts the longer side,
        `letterbox` keeps it and pads with black.
    roi: (left, top, right, bottom) as shares of the picture's width and height, 0 to 1.
    version: grows whenever the same picture would give other pixels. Since 2, pictures that are much too large are
        reduced in two steps.
    """

    # Read from a manifest, an unknown field is refused: it may change pixels.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    height: int
    width: int
    policy: Policy = "squash"
    roi: Roi = WHOLE_IMAGE
    version: int = 2

    def __post_init__(self) -> None:
        if not (16 <= self.height <= 4096 and 16 <= self.width <= 4096):
            raise UsageError(f"Image size {self.height}x{self.width} is out of range.", "Use 16 to 4096 pixels a side.")
        if self.policy not in get_args(Policy):
            raise UsageError(
                f"Unknown resize policy {self.policy!r}.", f"Choose one of: {', '.join(get_args(Policy))}."
            )
        left, top, right, bottom = self.roi
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UsageError(
                f"Region of interest {self.roi} is not inside the picture.",
                "Give left,top,right,bottom as shares from 0 to 1, for instance 0.1,0.1,0.9,0.9.",
            )
        if self.version not in (1, 2):
            raise UsageError(f"Preprocessing version {self.version} is unknown.", "Install a newer edge-anomaly.")


def preprocess(
    image: Image.Image | npt.NDArray[np.uint8],
    spec: Preprocess,
    *,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> npt.NDArray[np.uint8]:
    """Cut and resize one picture to the model's input, antialiased.

    `image` is an RGB picture or uint8 [h, w, 3] (a mask: mode L or uint8 [h, w], with `resample` NEAREST).
    Returns uint8 [height, width, 3] (a mask: [height, width]), a copy that the caller owns.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    box = source_box(picture.size, spec)
    top, left, height, width = content_area(full_size(picture), spec)
    gap = None if spec.version == 1 else _GAP
    resized = picture.resize((width, height), resample, box=box, reducing_gap=gap)
    if (height, width) == (spec.height, spec.width):
        return np.array(resized)
    canvas = Image.new(picture.mode, (spec.width, spec.height))
    canvas.paste(resized, (left, top))
    return np.array(canvas)


def shrinks_by(size: tuple[int, int], spec: Preprocess) -> float:
    """Return how many times smaller a picture of `size` (width, height) may be decoded; below 2 it is decoded whole."""
    if spec.version == 1:
        return 1.0
    left, top, right, bottom = source_box(size, spec)
    _, _, height, width = content_area(size, spec)
    return min((right - left) / width, (bottom - top) / height) / _GAP


def full_size(picture: Image.Image) -> tuple[int, int]:
    """Return the width and height of a picture as it is in its file, upright."""
    width, height = picture.info.get(FULL_SIZE, picture.size)
    return width, height


def source_box(size: tuple[int, int], spec: Preprocess) -> Box:
    """Return what the model sees of a picture of `size` (width, height): left, top, right, bottom in pixels."""
    width, height = size
    left, top = spec.roi[0] * width, spec.roi[1] * height
    right, bottom = spec.roi[2] * width, spec.roi[3] * height
    if spec.policy != "crop":
        return left, top, right, bottom
    scale = min((right - left) / spec.width, (bottom - top) / spec.height)
    half_width, half_height = scale * spec.width / 2, scale * spec.height / 2
    centre_x, centre_y = (left + right) / 2, (top + bottom) / 2
    # max/min: rounding may step out of the picture by 1e-13, which Pillow refuses.
    return (
        max(left, centre_x - half_width),
        max(top, centre_y - half_height),
        min(right, centre_x + half_width),
        min(bottom, centre_y + half_height),
    )


def content_area(size: tuple[int, int], spec: Preprocess) -> tuple[int, int, int, int]:
    """Return where the picture lies inside the model's input: top, left, height, width in pixels."""
    if spec.policy != "letterbox":
        return 0, 0, spec.height, spec.width
    left, top, right, bottom = source_box(size, spec)
    scale = min(spec.width / (right - left), spec.height / (bottom - top))
    width = min(spec.width, max(1, round((right - left) * scale)))
    height = min(spec.height, max(1, round((bottom - top) * scale)))
    return (spec.height - height) // 2, (spec.width - width) // 2, height, width
