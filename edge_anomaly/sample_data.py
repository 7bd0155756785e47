"""Draw a small data set in MVTec AD layout, so that every command can be tried without a download.

The part is a brushed steel flange with a turned hub, a bore, a rubber gasket, six yellow screws and two laser marks.
All lengths below are fractions of the image side, so that one set of numbers serves every size; angles run clockwise
from the x axis, as y points down. Inside, a coverage or shading is float32 `[size, size]` and a picture float32
`[3, size, size]`: planes, because numpy works several times faster along them than along pixels of three.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edge_anomaly_runtime.atomic import new_folder
from edge_anomaly_runtime.errors import UsageError, did_you_mean

Pixels = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Point = tuple[float, float]
Color = tuple[float, float, float]

DEFECTS = ("scratch", "hole", "stain", "missing_part")
MIN_SIZE, MAX_SIZE = 64, 2048

_OVERSAMPLING = 3
_SCREWS = 6
_PLATE_RADIUS = 0.415
_SCALLOP_DEPTH = 0.026
_SCREW_RING = 0.322
_RECESS_RADIUS = 0.054
_SCREW_RADIUS = 0.046
_SOCKET_RADIUS = 0.023
_THREAD_RADIUS = 0.030
_GASKET_OUTER, _GASKET_INNER = 0.252, 0.222
_HUB_RADIUS = 0.212
_CHAMFER_RADIUS = 0.112
_BORE_RADIUS = 0.097

_STEEL: Color = (0.97, 1.0, 1.03)
_ZINC: Color = (1.12, 0.99, 0.64)
_RUBBER: Color = (1.0, 1.0, 1.04)
_MAT: Color = (0.86, 1.0, 1.12)
_STAINS: tuple[Color, ...] = ((0.30, 0.17, 0.06), (0.55, 0.25, 0.08), (0.12, 0.22, 0.40), (0.10, 0.09, 0.08))

# A change of this many grey levels in one channel is what a person still sees next to the undamaged picture.
_NOTICEABLE = 8.0


@dataclass(frozen=True)
class _Pose:
    """Where the part lies: centre in fractions of the image side, rotation in radians, and that side in pixels."""

    x: float
    y: float
    angle: float
    size: int

    def at(self, radius: float, angle: float) -> Point:
        """Return the image point (fractions) at polar position `radius`, `angle` of the part."""
        return self.x + radius * math.cos(angle + self.angle), self.y + radius * math.sin(angle + self.angle)

    def screw(self, index: int) -> Point:
        """Return the centre (fractions) of screw `index`."""
        return self.at(_SCREW_RING, index * math.tau / _SCREWS)


@dataclass(frozen=True)
class _Light:
    """Unit vector in the image plane that points towards the lamp."""

    x: float
    y: float


def _light_from(angle: float) -> _Light:
    return _Light(math.cos(angle), math.sin(angle))


_LAMP_ANGLE = math.radians(-130.0)
_LAMP = _light_from(_LAMP_ANGLE)


def draw_sample_data(
    out: Path,
    *,
    seed: int = 0,
    train: int = 300,
    test_good: int = 100,
    per_defect: int = 25,
    size: int = 256,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Draw a data set into the folder `out` and return the number of images by folder, such as {"train/good": 120}.

    The same arguments give the same bytes, and an image depends on `seed`, `size`, its folder and its number only.
    `on_progress` gets (images done, images in all). Raises UsageError when `out` holds something and `force` is off.
    """
    _check_arguments(seed, train, test_good, per_defect, size)
    counts = {"train/good": train, "test/good": test_good} | {f"test/{kind}": per_defect for kind in DEFECTS}
    total = sum(counts.values())
    done = 0
    with new_folder(out, force=force or _is_empty_folder(out)) as folder:
        for name, count in counts.items():
            for index in range(count):
                _write_image(folder, name, index, seed, size)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        (folder / "README.md").write_text(_readme(counts, seed, size), encoding="utf-8")
    return counts


def draw_normal(rng: np.random.Generator, size: int) -> Pixels:
    """Draw one undamaged part: RGB uint8 `[size, size, 3]`."""
    pose = _random_pose(rng, size)
    light = _light_from(_LAMP_ANGLE + math.radians(rng.uniform(-12.0, 12.0)))
    picture = _background(rng, size)
    picture = _add_plate(picture, rng, pose, light)
    picture = _add_hub(picture, rng, pose, light)
    picture = _add_gasket(picture, rng, pose, light)
    picture = _add_bore(picture, pose, light)
    picture = _add_marks(picture, rng, pose)
    picture = _add_screws(picture, rng, pose, light)
    picture = _add_dust(picture, rng)
    return _photographed(picture, rng, light)


def draw_defect(rng: np.random.Generator, image: Pixels, kind: str) -> tuple[Pixels, Pixels]:
    """Damage a picture from `draw_normal` with one of DEFECTS.

    Returns the new picture, equal to `image` outside the mask, and the mask: uint8 `[size, size]`, 0 or 255.
    """
    if kind not in _DAMAGES:
        raise did_you_mean("defect", kind, list(DEFECTS))
    pose = _pose_from_image(image)
    before = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
    after, mask = _DAMAGES[kind](before, rng, pose)
    noisy = after + 1.5 * _white_noise(rng, after.shape)
    damaged = np.where(mask[..., None], _to_bytes(noisy).transpose(1, 2, 0), image)
    return damaged, mask.astype(np.uint8) * np.uint8(255)


# Files


def _check_arguments(seed: int, train: int, test_good: int, per_defect: int, size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(f"Image size {size} is out of range.", f"Choose a size from {MIN_SIZE} to {MAX_SIZE} pixels.")
    for name, value in {"seed": seed, "train": train, "test_good": test_good, "per_defect": per_defect}.items():
        if value < 0:
            raise UsageError(f"{name} is {value}, which is negative.", f"Give {name} as 0 or more.")


def _is_empty_folder(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir() and not any(path.iterdir())
    return False


def _write_image(folder: Path, name: str, index: int, seed: int, size: int) -> None:
    split, kind = name.split("/")
    rng = _image_rng(seed, split, kind, index)
    image = draw_normal(rng, size)
    if kind != "good":
        image, mask = draw_defect(rng, image, kind)
        _save_png(mask, folder / "ground_truth" / kind / f"{index:03d}_mask.png")
    _save_png(image, folder / split / kind / f"{index:03d}.png")


def _image_rng(seed: int, split: str, kind: str, index: int) -> np.random.Generator:
    # A key for every image, instead of one stream for all: more images in one folder leave all others as they were.
    key = (("train", "test").index(split), ("good", *DEFECTS).index(kind), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _save_png(pixels: Pixels, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Sensor noise hardly compresses: level 1 takes less than half the time of the default, for files 11 % larger.
    Image.fromarray(pixels).save(path, compress_level=1)


def _readme(counts: dict[str, int], seed: int, size: int) -> str:
    listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
    return (
        "# Sample data\n\n"
        f"Drawn by `edge-anomaly sample-data` with seed {seed} at {size} x {size} pixels in MVTec AD layout: {listed}. "
        "The pictures show no real part; use them to try the commands, not to judge a method. "
        "Licence: Apache-2.0, as edge-anomaly itself.\n"
    )


# Drawing tools


def _random_pose(rng: np.random.Generator, size: int) -> _Pose:
    dx, dy = rng.uniform(-2.0, 2.0, 2) / 256.0
    return _Pose(0.5 + float(dx), 0.5 + float(dy), math.radians(rng.uniform(-1.5, 1.5)), size)


def _grid(size: int) -> tuple[Field, Field]:
    """Return x `[1, size]` and y `[size, 1]` of the pixel centres, in fractions of the image side."""
    line = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return line[None, :], line[:, None]


def _drawn(size: int, paint: Callable[[ImageDraw.ImageDraw, int], None]) -> Field:
    """Return the antialiased coverage, 0 to 1, of what `paint(draw, canvas side)` draws with fill 255."""
    side = size * _OVERSAMPLING
    canvas = Image.new("L", (side, side))
    paint(ImageDraw.Draw(canvas), side)
    return _unit_field(canvas.reduce(_OVERSAMPLING))


def _discs(size: int, centres: Sequence[Point], radius: float) -> Field:
    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        for x, y in centres:
            draw.circle((x * side, y * side), radius * side, fill=255)

    return _drawn(size, paint)


def _polygons(size: int, outlines: Sequence[Sequence[Point]]) -> Field:
    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        for outline in outlines:
            draw.polygon([(x * side, y * side) for x, y in outline], fill=255)

    return _drawn(size, paint)


def _blurred(coverage: Field, radius: float) -> Field:
    """Blur a field of 0 to 1 with a Gaussian of `radius` (fraction of the image side)."""
    image = Image.fromarray(_to_bytes(coverage * 255.0))
    return _unit_field(image.filter(ImageFilter.GaussianBlur(radius * coverage.shape[0])))


def _relief(coverage: Field, light: _Light, width: float) -> Field:
    """Return the shading, about -1 to 1, of a step up from 0 to 1 whose slope is `width` wide (fraction)."""
    height = _blurred(coverage, width)
    dy, dx = np.gradient(height)
    # The steepest slope of a blurred step is 1 / (sqrt(2 pi) radius); divided by it, shading depends on no size.
    steepest = 1.0 / (math.sqrt(math.tau) * width * coverage.shape[0])
    shading: Field = (dx * light.x + dy * light.y) / -steepest
    return shading


def _over(picture: Field, layer: Field, coverage: Field) -> Field:
    """Lay `layer` over `picture` where `coverage` is 1."""
    return picture + (layer - picture) * coverage


def _tinted(grey: Field, color: Color) -> Field:
    """Return the picture of a brightness in a material's colour."""
    return grey * _flat(color)


def _flat(color: Color) -> Field:
    """Return a colour as a picture of one pixel, `[3, 1, 1]`."""
    return np.array(color, dtype=np.float32)[:, None, None]


def _white_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Field:
    return rng.standard_normal(shape, dtype=np.float32)


def _soft_noise(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Return smooth noise `[size, size]`, mean 0 and deviation about 1, with `cells` bumps along a side."""
    coarse = _white_noise(rng, (cells, cells))
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def _brushed(rng: np.random.Generator, size: int) -> Field:
    """Return streaks along x, `[size, size]`, mean 0 and deviation about 1: long ones, and finer short ones."""
    long = _streaks(rng, size, max(2, size // 40))
    return 0.8 * long + 0.6 * _streaks(rng, size, max(4, size // 8))


def _streaks(rng: np.random.Generator, size: int, cells: int) -> Field:
    coarse = _white_noise(rng, (size, cells))
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)


def _polar(pose: _Pose) -> tuple[Field, Field]:
    """Return radius (fractions) and angle (radians, image axes) about the part's centre, each `[size, size]`."""
    x, y = _grid(pose.size)
    return np.hypot(x - pose.x, y - pose.y), np.arctan2(y - pose.y, x - pose.x)


def _unit_field(image: Image.Image) -> Field:
    """Return a grey image as a field of 0 to 1."""
    field: Field = np.asarray(image, dtype=np.float32) / np.float32(255.0)
    return field


def _to_bytes(values: Field) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# The part, from the table up; colours are 0 to 1


def _background(rng: np.random.Generator, size: int) -> Field:
    grain = _white_noise(rng, (size, size))
    grey = 0.205 + 0.010 * _soft_noise(rng, size, 6) + 0.008 * _soft_noise(rng, size, size // 3) + 0.006 * grain
    return _tinted(grey, _MAT)


def _add_plate(picture: Field, rng: np.random.Generator, pose: _Pose, light: _Light) -> Field:
    plate = _polygons(pose.size, [_plate_outline(pose)])
    x, y = _grid(pose.size)
    slope = (x - 0.5) * light.x + (y - 0.5) * light.y
    grey = 0.585 + 0.13 * slope + 0.028 * _brushed(rng, pose.size) + 0.30 * _relief(plate, light, 0.007)
    shaded = picture * (1.0 - 0.62 * _shadow(plate, light, 0.022))
    return _over(shaded, _tinted(grey, _STEEL), plate)


def _plate_outline(pose: _Pose) -> list[Point]:
    """Return the flange's outline: round at the screws, hollowed between them."""
    angles = np.linspace(0.0, math.tau, 360, endpoint=False)
    hollow = (0.5 - 0.5 * np.cos(_SCREWS * angles)) ** 2
    return [pose.at(_PLATE_RADIUS - _SCALLOP_DEPTH * float(h), float(a)) for a, h in zip(angles, hollow, strict=True)]


def _shadow(coverage: Field, light: _Light, length: float) -> Field:
    """Return the soft shadow, 0 to 1, that a body throws `length` away from the light."""
    size = coverage.shape[0]
    shift = (round(-light.y * length * size), round(-light.x * length * size))
    return _blurred(np.roll(coverage, shift, (0, 1)), 0.6 * length)


def _add_hub(picture: Field, rng: np.random.Generator, pose: _Pose, light: _Light) -> Field:
    hub = _discs(pose.size, [(pose.x, pose.y)], _HUB_RADIUS)
    radius, angle = _polar(pose)
    # Turned grooves mirror the lamp into two opposite fans, one towards it and one away from it.
    fans = np.cos(angle - np.float32(math.atan2(light.y, light.x))) ** 2
    grooves = _white_noise(rng, (pose.size,))
    turned = np.interp(radius * (2 * len(grooves)), np.arange(len(grooves)), grooves).astype(np.float32)
    grey = 0.57 + 0.17 * fans * fans + 0.030 * turned + 0.12 * _relief(hub, light, 0.004)
    return _over(picture, _tinted(grey, _STEEL), hub)


def _add_gasket(picture: Field, rng: np.random.Generator, pose: _Pose, light: _Light) -> Field:
    centre = [(pose.x, pose.y)]
    ring = _discs(pose.size, centre, _GASKET_OUTER) - _discs(pose.size, centre, _GASKET_INNER)
    gloss = np.maximum(_relief(ring, light, 0.009), 0.0)
    grey = 0.085 + 0.16 * gloss + 0.006 * _white_noise(rng, ring.shape)
    seated = picture * (1.0 - 0.35 * _shadow(ring, light, 0.006))
    return _over(seated, _tinted(grey, _RUBBER), ring)


def _add_bore(picture: Field, pose: _Pose, light: _Light) -> Field:
    centre = [(pose.x, pose.y)]
    chamfer = _discs(pose.size, centre, _CHAMFER_RADIUS)
    bore = _discs(pose.size, centre, _BORE_RADIUS)
    _, angle = _polar(pose)
    facing = np.cos(angle - np.float32(math.atan2(light.y, light.x)))
    picture = _over(picture, _tinted(0.56 - 0.30 * facing, _STEEL), chamfer)
    # The wall opposite the lamp catches light, the table far below lies in shadow.
    wall = 0.10 + 0.16 * (1.0 - _blurred(bore, 0.012)) * (1.0 - facing)
    return _over(picture, _tinted(wall, _MAT), bore)


def _add_marks(picture: Field, rng: np.random.Generator, pose: _Pose) -> Field:
    marks: Field = np.maximum(_polygons(pose.size, _matrix_cells(pose)), _lettering(pose))
    return picture * (1.0 - rng.uniform(0.55, 0.65) * marks)


def _matrix_cells(pose: _Pose, cells: int = 10, cell: float = 0.0082) -> list[list[Point]]:
    """Return the squares of the data-matrix mark between the two lower left screws."""
    dark = np.random.default_rng(4207).random((cells, cells)) < 0.5
    dark[:, 0] = dark[-1, :] = True
    dark[0, :] = dark[:, -1] = np.arange(cells) % 2 == 0
    return [
        _square(pose, 2.5 * math.tau / _SCREWS, (column - cells / 2) * cell, (row - cells / 2) * cell, cell)
        for row, column in np.argwhere(dark).tolist()
    ]


def _square(pose: _Pose, angle: float, dx: float, dy: float, side: float) -> list[Point]:
    x, y = pose.at(_SCREW_RING, angle)
    cosine, sine = math.cos(pose.angle), math.sin(pose.angle)
    corners = [(dx, dy), (dx + side, dy), (dx + side, dy + side), (dx, dy + side)]
    return [(x + cosine * u - sine * v, y + sine * u + cosine * v) for u, v in corners]


def _lettering(pose: _Pose) -> Field:
    """Return the coverage of the part number, engraved between the two lower screws."""
    x, y = pose.at(_SCREW_RING + 0.004, 1.5 * math.tau / _SCREWS)

    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        label = Image.new("L", (round(0.24 * side), round(0.07 * side)))
        middle = (label.width / 2, label.height / 2)
        font = ImageFont.load_default(0.036 * side)
        ImageDraw.Draw(label).text(middle, "EA 4207-B", fill=255, font=font, anchor="mm")
        turned = label.rotate(-math.degrees(pose.angle), Image.Resampling.BILINEAR)
        draw.bitmap((round(x * side - middle[0]), round(y * side - middle[1])), turned, fill=255)

    return _drawn(pose.size, paint)


def _add_screws(picture: Field, rng: np.random.Generator, pose: _Pose, light: _Light) -> Field:
    centres = [pose.screw(index) for index in range(_SCREWS)]
    recess = _discs(pose.size, centres, _RECESS_RADIUS)
    heads = _discs(pose.size, centres, _SCREW_RADIUS)
    sockets = _polygons(pose.size, [_hexagon(c, _SOCKET_RADIUS, rng.uniform(-0.15, 0.15)) for c in centres])
    floor = 0.33 - 0.22 * _relief(recess, light, 0.004) - 0.10 * _shadow(heads, light, 0.012)
    picture = _over(picture, _tinted(floor, _STEEL), recess)
    grey = 0.62 + 0.34 * _relief(heads, light, 0.011) + 0.008 * _white_noise(rng, heads.shape)
    picture = _over(picture, _tinted(grey, _ZINC), heads)
    inside = 0.13 - 0.16 * _relief(sockets, light, 0.006)
    return _over(picture, _tinted(inside, _ZINC), sockets)


def _hexagon(centre: Point, radius: float, turn: float) -> list[Point]:
    angles = [turn + index * math.tau / 6 for index in range(6)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def _add_dust(picture: Field, rng: np.random.Generator) -> Field:
    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        for _ in range(int(rng.integers(2, 8))):
            x, y = rng.uniform(0.02, 0.98, 2) * side
            draw.circle((x, y), rng.uniform(0.0012, 0.0030) * side, fill=int(rng.integers(60, 120)))

    return _over(picture, _flat((0.75, 0.73, 0.70)), _drawn(picture.shape[1], paint))


def _photographed(picture: Field, rng: np.random.Generator, light: _Light) -> Pixels:
    """Turn colours of 0 to 1 into bytes as a camera would: exposure, contrast, tint, uneven light, sensor noise."""
    x, y = _grid(picture.shape[1])
    lamp = 1.0 + 0.10 * ((x - 0.5) * light.x + (y - 0.5) * light.y)
    vignette = 1.0 - 0.16 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    tint = rng.uniform(0.99, 1.01, (3, 1, 1)).astype(np.float32)
    exposed = picture * (rng.uniform(0.94, 1.06) * lamp * vignette) * tint
    contrasted = 0.45 + (exposed - 0.45) * rng.uniform(0.94, 1.06)
    # Shot noise grows with the root of the light, read-out noise is always there; in grey levels.
    noise = _white_noise(rng, picture.shape) * (1.2 + 2.0 * np.sqrt(np.maximum(contrasted[1], 0.0)))
    return np.ascontiguousarray(_to_bytes(255.0 * contrasted + noise).transpose(1, 2, 0))


# Damage; colours are 0 to 255


def _pose_from_image(image: Pixels) -> _Pose:
    """Find the part in a picture from `draw_normal` by its outline.

    The steel is brighter than the table. The centre is the outline's centre of mass; the lobes at the screws give the
    rotation as the phase of the outline's sixth harmonic. Right to 0.5 pixels of 256 and, there, to 0.2 degrees.
    """
    size = image.shape[0]
    x, y = _grid(size)
    grey = image.mean(axis=2, dtype=np.float32)
    inner = np.hypot(x - 0.5, y - 0.5) < _PLATE_RADIUS - _SCALLOP_DEPTH - 0.02
    # The picture's upper and lower edges show nothing but table. The limit is low to keep the bevel that lies in shade.
    table = grey[[0, -1]].mean()
    part = inner | (grey > table + 0.22 * (grey[inner].mean() - table))
    part &= np.hypot(x - 0.5, y - 0.5) < _PLATE_RADIUS + 0.02
    mass = float(part.sum())
    centre_x, centre_y = float((part * x).sum()) / mass, float((part * y).sum()) / mass
    rows, columns = np.nonzero(part & ~inner)
    edge = (columns + 0.5) / size - centre_x + 1j * ((rows + 0.5) / size - centre_y)
    angle = float(np.angle(((edge / np.abs(edge)) ** _SCREWS).sum())) / _SCREWS
    return _Pose(centre_x, centre_y, angle, size)


def _solid(pose: _Pose) -> Field:
    """Return the coverage of what can be damaged: the plate without the bore."""
    return _polygons(pose.size, [_plate_outline(pose)]) - _discs(pose.size, [(pose.x, pose.y)], _CHAMFER_RADIUS)


def _bare_spot(rng: np.random.Generator, pose: _Pose) -> Point:
    """Return a random point on bare steel: on the hub, or on the plate between two screws."""
    if rng.random() < 0.3:
        return pose.at(rng.uniform(0.145, 0.180), rng.uniform(0.0, math.tau))
    gap = (float(rng.integers(_SCREWS)) + 0.5 + rng.uniform(-0.17, 0.17)) * math.tau / _SCREWS
    return pose.at(rng.uniform(0.285, 0.352), gap)


def _noticeable(before: Field, after: Field) -> Mask:
    """Return where two pictures differ visibly, one-pixel gaps in rows and columns closed."""
    changed = np.abs(after - before).max(axis=0) >= _NOTICEABLE
    closed: Mask = changed.copy()
    closed[1:-1] |= changed[:-2] & changed[2:]
    closed[:, 1:-1] |= changed[:, :-2] & changed[:, 2:]
    return closed


def _scratched(before: Field, rng: np.random.Generator, pose: _Pose) -> tuple[Field, Mask]:
    course, widths = _scratch_course(rng, pose)
    strength = rng.uniform(0.40, 0.95) * np.clip(0.8 + 0.35 * _soft_noise(rng, pose.size, 12), 0.4, 1.0)
    strength *= _solid(pose)
    groove = _polygons(pose.size, [_ribbon(course, widths)]) * strength
    # A groove has two flanks: the one beside the main line is lit the other way round.
    flank = _polygons(pose.size, [_ribbon(course + 0.8 * widths[:, None] + 0.001, 0.6 * widths)]) * strength
    lit, unlit = _flat((248.0, 248.0, 248.0)), _flat((44.0, 44.0, 44.0))
    main, other = (lit, unlit) if rng.random() < 0.6 else (unlit, lit)
    after = _over(_over(before, other, 0.4 * flank), main, groove)
    return after, _noticeable(before, after)


def _scratch_course(rng: np.random.Generator, pose: _Pose) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the points `[K, 2]` of a curved line over the part and its width `[K]` there, both in fractions."""
    middle = np.array(_bare_spot(rng, pose))
    direction = rng.uniform(0.0, math.tau)
    along = np.array([math.cos(direction), math.sin(direction)])
    across = np.array([-along[1], along[0]])
    length = rng.uniform(0.09, 0.34)
    t = np.linspace(-0.5, 0.5, 60)
    bend = rng.uniform(-0.25, 0.25) * (0.25 - t**2) + rng.uniform(-0.02, 0.02) * np.sin(t * rng.uniform(6.0, 14.0))
    course = middle + length * (t[:, None] * along + bend[:, None] * across)
    uneven = np.interp(t, np.linspace(-0.5, 0.5, 9), rng.uniform(0.6, 1.2, 9))
    # Thinner than a pixel, a faint scratch of a small picture could not be seen.
    width = max(rng.uniform(0.0035, 0.0085), 1.0 / pose.size)
    return course, width * uneven * np.sqrt(np.cos(math.pi * t * 0.98))


def _ribbon(course: npt.NDArray[np.float64], widths: npt.NDArray[np.float64]) -> list[Point]:
    """Return the outline of a line along `course` with the given width at each point."""
    tangent = np.gradient(course, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) / np.hypot(tangent[:, 0], tangent[:, 1])[:, None]
    half = 0.5 * widths[:, None] * normal
    outline = np.concatenate([course + half, (course - half)[::-1]])
    return [(float(x), float(y)) for x, y in outline]


def _pitted(before: Field, rng: np.random.Generator, pose: _Pose) -> tuple[Field, Mask]:
    outline = _pit_outline(rng, _bare_spot(rng, pose), rng.uniform(0.010, 0.030))
    pit = _polygons(pose.size, [outline])
    depth = rng.uniform(0.70, 0.97)
    far_wall = np.maximum(-_relief(pit, _LAMP, 0.008), 0.0)
    inside = 24.0 + 45.0 * far_wall + 8.0 * _soft_noise(rng, pose.size, pose.size // 4)
    # The burr round the pit lies just outside it and shines where it faces the lamp.
    rim = np.clip(_blurred(pit, 0.005) * 2.2, 0.0, 1.0) * (1.0 - pit)
    rim *= 0.30 + 0.55 * np.clip(-2.0 * _relief(pit, _LAMP, 0.009), 0.0, 1.0)
    solid = _solid(pose)
    after = _over(before, _flat((232.0, 238.0, 242.0)), rim * solid)
    after = _over(after, _tinted(inside, (1.0, 0.95, 0.9)), pit * solid * depth)
    return after, _noticeable(before, after)


def _pit_outline(rng: np.random.Generator, centre: Point, radius: float) -> list[Point]:
    angles = np.linspace(0.0, math.tau, 72, endpoint=False)
    radii = np.full_like(angles, radius)
    for wave in range(2, 8):
        radii += radius * rng.normal(0.0, 0.22 / wave) * np.cos(wave * angles + rng.uniform(0.0, math.tau))
    return [
        (centre[0] + float(r) * math.cos(a), centre[1] + float(r) * math.sin(a))
        for a, r in zip(angles, np.maximum(radii, 0.4 * radius), strict=True)
    ]


def _stained(before: Field, rng: np.random.Generator, pose: _Pose) -> tuple[Field, Mask]:
    x, y = _grid(pose.size)
    centre_x, centre_y = _bare_spot(rng, pose)
    radius, stretch, turn = rng.uniform(0.030, 0.085), rng.uniform(1.0, 1.6), rng.uniform(0.0, math.pi)
    u = (x - centre_x) * math.cos(turn) + (y - centre_y) * math.sin(turn)
    v = (y - centre_y) * math.cos(turn) - (x - centre_x) * math.sin(turn)
    distance = np.hypot(u / stretch, v * stretch) / radius
    shape = np.clip(1.45 - distance + 0.22 * _soft_noise(rng, pose.size, 14), 0.0, 1.0)
    opacity = rng.uniform(0.25, 0.75) * np.clip(0.9 + 0.12 * _soft_noise(rng, pose.size, 24), 0.5, 1.1)
    color = _STAINS[int(rng.integers(len(_STAINS)))]
    film = before * (0.35 + _flat(color))
    after = _over(before, film, shape * shape * (3.0 - 2.0 * shape) * opacity * _solid(pose))
    return after, _noticeable(before, after)


def _without_screw(before: Field, rng: np.random.Generator, pose: _Pose) -> tuple[Field, Mask]:
    x, y = pose.screw(int(rng.integers(_SCREWS)))
    radius, angle = _polar(_Pose(x, y, 0.0, pose.size))
    facing = np.cos(angle - math.atan2(_LAMP.y, _LAMP.x))
    head = _discs(pose.size, [(x, y)], _SCREW_RADIUS + 0.002)
    bore = _discs(pose.size, [(x, y)], _THREAD_RADIUS)
    floor = rng.uniform(84.0, 108.0) + 9.0 * facing + 4.0 * _soft_noise(rng, pose.size, pose.size // 4)
    # Seen from above, the turns of the thread are rings that fade towards the dark bottom of the hole.
    turns = (0.5 + 0.5 * np.cos(radius * (math.tau / 0.0085))) * np.clip(radius / _THREAD_RADIUS, 0.0, 1.0) ** 3
    threaded = 20.0 + turns * (40.0 - 40.0 * facing)
    return _over(before, _tinted(floor + (threaded - floor) * bore, _STEEL), head), head >= 0.5


_DAMAGES: dict[str, Callable[[Field, np.random.Generator, _Pose], tuple[Field, Mask]]] = {
    "scratch": _scratched,
    "hole": _pitted,
    "stain": _stained,
    "missing_part": _without_screw,
}
