"""Image files in, RGB pixels out, with a defined answer for every odd file."""

from __future__ import annotations

import glob
import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from .errors import ImageError, UsageError
from .preprocess import FULL_SIZE, Preprocess, preprocess, shrinks_by

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
MAX_PIXELS = 50_000_000

# An allow-list: every format more is a parser more that an untrusted file can reach.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


def load_image(path: Path | str, spec: Preprocess | None = None) -> Image.Image:
    """Read one file as an upright RGB picture.

    With `spec`, a JPEG that is much too large for that model input is decoded at a half, a quarter or an eighth of its
    size, which takes half the time; `preprocess` makes the same of both but for some tenths of a grey level.
    EXIF rotation is applied. Grey, palette and CMYK become RGB; transparent pixels are laid over black; of 16-bit grey
    the high byte is kept; of an animation or a multi-page file the first picture is used.

    Raises:
        ImageError: the file is missing, empty, truncated, not one of PNG/JPEG/BMP/TIFF/WebP/PPM, larger than
            50 megapixels, or has 32-bit pixels.
    """
    try:
        return _decode(Path(path), spec)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(path, "there is no such file") from None
    except UnidentifiedImageError:
        raise ImageError(path, f"it is not one of the formats {', '.join(_FORMATS)}, or it is damaged") from None
    except Image.DecompressionBombError:
        raise ImageError(path, f"it has more than {MAX_PIXELS // 1_000_000} megapixels") from None
    except MemoryError:
        raise ImageError(path, "it does not fit into memory") from None
    except Exception as error:
        # On damaged data Pillow's decoders raise nearly anything: OSError, SyntaxError, TypeError, struct.error.
        raise ImageError(path, f"it is damaged or unreadable ({error})") from None


def _decode(path: Path, spec: Preprocess | None) -> Image.Image:
    if path.is_dir():
        raise ImageError(path, "it is a folder")
    if path.stat().st_size == 0:
        raise ImageError(path, "the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
        file = Image.open(path, formats=_FORMATS)
    with file:
        if file.width * file.height > MAX_PIXELS:
            raise ImageError(
                path, f"{file.width}x{file.height} pixels are more than {MAX_PIXELS // 1_000_000} megapixels"
            )
        whole = _draft(file, spec) if spec is not None and isinstance(file, JpegImageFile) else None
        file.load()
        ImageOps.exif_transpose(file, in_place=True)  # a copy of the largest picture is 200 MB
        if whole is not None:
            file.info[FULL_SIZE] = whole
        return _as_rgb(file, path)


def _draft(file: JpegImageFile, spec: Preprocess) -> tuple[int, int] | None:
    """Have a JPEG decoded smaller: its cosines of 8x8 pixels hold the smaller pictures as well.

    Returns the upright width and height of the whole picture, None if it is decoded whole.
    """
    width, height = file.size
    upright = (height, width) if file.getexif().get(ExifTags.Base.Orientation) in _TURNED else (width, height)
    factor = shrinks_by(upright, spec)
    if factor < 2:  # a half is the first step
        return None
    file.draft(None, (math.ceil(width / factor), math.ceil(height / factor)))
    return None if file.size == (width, height) else upright


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        high_byte = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode == "I" and image.format == "PPM":  # 16-bit PGM; Pillow scales its maximum to 65535
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(path, f"its pixels are 32 bits wide (mode {image.mode}); convert it to 8 or 16 bits")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def list_images(sources: Iterable[Path | str]) -> list[Path]:
    """Return the image files that `sources` name: files as given, folders searched through, globs expanded.

    Sorted within each source, so that a run is repeatable.

    Raises:
        UsageError: a source does not exist, or there is no image file at all.
    """
    roots = [Path(source) for source in sources]
    found = [path for root in roots for path in _expand(root)]
    if not found:
        raise UsageError(
            f"No image files in {', '.join(map(str, roots))}.", f"Looked for: {', '.join(sorted(SUFFIXES))}."
        )
    return found


def _expand(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if source.exists():
        return [source]
    matches = sorted(Path(match) for match in glob.glob(str(source), recursive=True))
    if not matches:
        raise UsageError(f"There is no file or folder {source}.", "Check the path; quote globs with a space in them.")
    return [path for match in matches for path in _expand(match)]


def read_images(
    paths: Iterable[Path], spec: Preprocess, *, bad: list[ImageError], strict: bool = False
) -> Iterator[tuple[Path, npt.NDArray[np.uint8]]]:
    """Yield each readable file with its model input, uint8 [height, width, 3], one at a time.

    An unreadable file is appended to `bad` and skipped; with `strict` its ImageError is raised instead.
    """
    for path in paths:
        try:
            image = load_image(path, spec)
        except ImageError as error:
            if strict:
                raise
            bad.append(error)
            continue
        yield path, preprocess(image, spec)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
