"""Damaged image files: a verdict or INVALID with a reason, within seconds and little memory, and the process lives.

Run as a program it is the child that scores them: `python -m tests.runtime.test_image_fuzz BUNDLE FOLDER`.
"""

from __future__ import annotations

import io
import math
import random
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from edge_anomaly_runtime import open_scorer

from .fuzzing import Watch, damaged, no_hang, number, outcomes_of, tell

SEED, COUNT = 11, 500
LIMIT_S, LIMIT_MB = 5.0, 300.0
WIDTH, HEIGHT = 96, 64

# A picture at the limit of 50 megapixels takes more memory than this test allows even when nothing is wrong with it.
_SIZES = ((4000, 4000), (16_000, 16_000), (65_535, 65_535), (1, 65_535), (65_535, 1), (0, 0), (2**31 - 1, 2**31 - 1))


def test_damaged_images_are_judged_or_refused_and_nothing_else(tiny_bundle: Path, tmp_path: Path) -> None:
    outcomes = outcomes_of("tests.runtime.test_image_fuzz", tiny_bundle, tmp_path, seconds=120)
    assert [outcome["index"] for outcome in outcomes] == list(range(COUNT))
    for outcome in outcomes:
        if outcome["verdict"] == "INVALID":
            assert outcome["reason"] and outcome["score"] is None, outcome
        else:
            assert outcome["verdict"] in ("OK", "WARN", "NG") and math.isfinite(outcome["score"]), outcome
    refused = sum(outcome["verdict"] == "INVALID" for outcome in outcomes)
    assert COUNT / 4 < refused < COUNT, "the damage is neither nothing nor everything"
    worst = max(outcomes, key=lambda outcome: float(outcome["peak_mb"]))
    assert worst["peak_mb"] < LIMIT_MB, next(o for o in outcomes if o["peak_mb"] == worst["peak_mb"])


def originals() -> dict[str, bytes]:
    """Return one small file per format and coding, by its name."""
    rng = np.random.default_rng(SEED)
    smooth = np.linspace(40, 200, WIDTH * HEIGHT * 3).reshape(HEIGHT, WIDTH, 3)
    rgb = Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "rgb.png": _file(rgb, "PNG"),
        "deep.png": _file(deep, "PNG"),
        "palette.png": _file(rgb.quantize(32), "PNG", transparency=0),
        "baseline.jpg": _file(rgb, "JPEG", exif=rotated),
        "progressive.jpeg": _file(rgb, "JPEG", progressive=True),
        "rgb.bmp": _file(rgb, "BMP"),
        "palette.bmp": _file(rgb.quantize(32), "BMP"),
        "raw.tif": _file(rgb, "TIFF"),
        "lzw.tiff": _file(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": _file(rgb, "TIFF", compression="jpeg"),
        "lossy.webp": _file(rgb, "WEBP"),
        "lossless.webp": _file(rgb.convert("RGBA"), "WEBP", lossless=True),
        "rgb.ppm": _file(rgb, "PPM"),
        "deep.pgm": _file(deep, "PPM"),
    }


def mutations() -> Iterator[tuple[str, bytes]]:
    """Yield file names and their damaged content, the same every time."""
    files = list(originals().items())
    for index in range(COUNT):
        name, data = files[index % len(files)]
        chance = random.Random(SEED * 1_000_003 + index)
        kind = chance.choice(["anything", "anything", "length", "size"])
        if kind == "size":
            data = with_size(data, *chance.choice(_SIZES))
        elif kind == "length" and (found := fields(data)):
            place, size = chance.choice(found)
            data = data[:place] + number(chance, size) + data[place + size :]
        else:
            data = damaged(data, chance)
        yield name, data


def fields(data: bytes) -> list[tuple[int, int]]:
    """Return place and size in bytes of the lengths, counts and offsets that steer a format's parser."""
    if data.startswith(b"\x89PNG"):
        found, place = [], 8
        while place + 8 <= len(data):
            found.append((place, 4))
            place += 12 + int.from_bytes(data[place : place + 4], "big")
        return found
    if data.startswith(b"\xff\xd8"):
        return [(match.end(), 2) for match in re.finditer(rb"\xff[\xc0-\xc4\xda-\xe1]", data)]
    if data.startswith(b"BM"):
        return [(place, 4) for place in (2, 10, 14, 30, 34, 46)] + [(28, 2)]
    if data.startswith(b"II"):
        return [(4, 4), *((place + part, 4) for place in _tiff_entries(data) for part in (0, 4, 8))]
    if data.startswith(b"RIFF"):
        return [(4, 4), (16, 4)]
    return []


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Return a file that says it is `width` x `height`, as far as its format can hold that; the rest is as it was."""
    changed = bytearray(data)
    short = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    if data.startswith(b"\x89PNG"):
        changed[16:24] = struct.pack(">II", width, height)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    elif data.startswith(b"\xff\xd8"):
        frame = re.search(rb"\xff[\xc0\xc2]", data)
        assert frame is not None
        changed[frame.end() + 3 : frame.end() + 7] = short
    elif data.startswith(b"BM"):
        changed[18:26] = struct.pack("<II", width, height)
    elif data.startswith(b"II"):
        for place in _tiff_entries(data):
            tag = int.from_bytes(data[place : place + 2], "little")
            if tag in (256, 257):
                changed[place + 2 : place + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    elif data.startswith(b"RIFF") and data[12:16] == b"VP8L":
        changed[21:25] = struct.pack("<I", (width - 1 & 0x3FFF) | (height - 1 & 0x3FFF) << 14 | data[24] >> 4 << 28)
    elif data.startswith(b"RIFF"):
        changed[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    else:
        return data.replace(f"{WIDTH} {HEIGHT}".encode(), f"{width} {height}".encode(), 1)
    return bytes(changed)


def _tiff_entries(data: bytes) -> list[int]:
    """Return where the entries of the first directory begin."""
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    return [start + 2 + 12 * index for index in range(count)]


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def main(bundle: Path, folder: Path) -> None:
    with open_scorer(bundle, engine="onnxruntime", precision="fp32", threads=1) as scorer:
        for name, data in originals().items():
            (folder / name).write_bytes(data)
            assert scorer.score_file(folder / name).verdict != "INVALID", name
        watch = Watch()
        for index, (name, data) in enumerate(mutations()):
            (folder / name).write_bytes(data)
            with no_hang(LIMIT_S):
                result = scorer.score_file(folder / name)
            tell(
                index=index,
                name=name,
                verdict=result.verdict,
                score=result.score,
                reason=result.reason,
                peak_mb=watch.peak_mb(),
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
