"""Every odd image file has a defined answer: RGB pixels, or an ImageError that names it."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_runtime.errors import ImageError, UsageError
from edge_anomaly_runtime.images import file_sha256, list_images, load_image, read_images
from edge_anomaly_runtime.preprocess import FULL_SIZE, Preprocess, full_size, preprocess

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _file(folder: Path, data: bytes, name: str = "x.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _pixels(path: Path) -> list[list[list[int]]]:
    image = load_image(path)
    assert image.mode == "RGB"
    pixels: list[list[list[int]]] = np.asarray(image).tolist()
    return pixels


def _noise(side: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


# Large JPEGs


def _photo(width: int, height: int) -> Image.Image:
    grain = np.random.default_rng(1).integers(0, 256, (height // 9, width // 9), dtype=np.uint8)
    return Image.fromarray(grain).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_for_a_small_input(tmp_path: Path) -> None:
    path = _file(tmp_path, _encoded(_photo(1920, 1080), "JPEG", quality=90), "x.jpg")
    spec = Preprocess(224, 224)
    small, whole = load_image(path, spec), load_image(path)
    assert (small.size, whole.size) == ((960, 540), (1920, 1080))
    assert (small.info[FULL_SIZE], whole.info.get(FULL_SIZE)) == ((1920, 1080), None)
    difference = np.abs(preprocess(small, spec).astype(int) - preprocess(whole, spec))
    assert difference.mean() < 0.7
    assert difference.max() <= 8


@pytest.mark.parametrize(
    ("spec", "decoded"),
    [
        (Preprocess(224, 224), (1000, 600)),  # already near
        (Preprocess(64, 64), (250, 150)),
        (Preprocess(16, 16), (125, 75)),  # an eighth is the smallest that there is
        (Preprocess(64, 64, roi=(0.0, 0.0, 0.2, 0.2)), (1000, 600)),
        (Preprocess(64, 64, version=1), (1000, 600)),
    ],
)
def test_a_jpeg_stays_twice_as_large_as_the_input(tmp_path: Path, spec: Preprocess, decoded: tuple[int, int]) -> None:
    path = _file(tmp_path, _encoded(_photo(1000, 600), "JPEG"), "x.jpg")
    assert load_image(path, spec).size == decoded


def test_a_turned_jpeg_is_decoded_smaller_by_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: 1000x600 in the file, 600x1000 upright
    path = _file(tmp_path, _encoded(_photo(1000, 600), "JPEG", exif=exif), "x.jpg")
    turned = load_image(path, Preprocess(250, 32))
    assert (turned.size, full_size(turned)) == ((300, 500), (600, 1000))
    assert load_image(path, Preprocess(32, 250)).size == (600, 1000)


@pytest.mark.parametrize(("kind", "value"), [(1, b"\x06"), (7, b"\x06"), (2, b"6\x00")])
def test_an_orientation_of_another_type_is_no_damage(tmp_path: Path, kind: int, value: bytes) -> None:
    """Some devices write the tag as bytes or text (TIFF types 1, 7, 2) where a SHORT belongs."""
    entry = struct.pack("<HHI", 0x0112, kind, len(value)) + value.ljust(4, b"\x00")
    exif = b"Exif\x00\x00II*\x00" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    path = _file(tmp_path, _encoded(_photo(1000, 600), "JPEG", exif=exif), "x.jpg")
    assert load_image(path, Preprocess(64, 64)).size[0] < 600


def test_a_letterbox_is_the_same_for_a_picture_decoded_smaller(tmp_path: Path) -> None:
    # Half of 1213 is rounded up: by the smaller picture's own ratio the content would be one row higher.
    path = _file(tmp_path, _encoded(_photo(4087, 1213), "JPEG"), "x.jpg")
    spec = Preprocess(224, 224, "letterbox")
    small, whole = preprocess(load_image(path, spec), spec), preprocess(load_image(path), spec)
    assert load_image(path, spec).size[0] < 4087
    assert np.array_equal(small.any(axis=(1, 2)), whole.any(axis=(1, 2)))
    assert np.abs(small.astype(int) - whole).mean() < 1.5  # a row of content too much or too few makes it twice that


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    path = _file(tmp_path, _encoded(_photo(1000, 600), "PNG"))
    assert load_image(path, Preprocess(64, 64)).size == (1000, 600)


# Modes: each becomes RGB


def test_rgb_is_kept_as_it_is(tmp_path: Path) -> None:
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        path = _file(tmp_path, _encoded(_noise(), kind))
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(_noise()))


def test_webp_and_jpeg_are_read(tmp_path: Path) -> None:
    flat = Image.new("RGB", (20, 10), (200, 100, 50))
    for kind in ("WEBP", "JPEG"):
        image = load_image(_file(tmp_path, _encoded(flat, kind)))
        assert (image.size, image.mode) == ((20, 10), "RGB")
        assert np.abs(np.asarray(image).astype(int) - [200, 100, 50]).max() <= 4


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[7, 200]], dtype=np.uint8))
    assert _pixels(_file(tmp_path, _encoded(image, "PNG"))) == [[[7, 7, 7], [200, 200, 200]]]


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert _pixels(_file(tmp_path, _encoded(image, kind))) == [[[0, 0, 0], [255, 255, 255]]]


def _palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return image


def test_palette_becomes_its_colours(tmp_path: Path) -> None:
    assert _pixels(_file(tmp_path, _encoded(_palette(), "PNG"))) == [[[10, 20, 30], [200, 100, 50]]]


def test_transparent_palette_entries_become_black(tmp_path: Path) -> None:
    path = _file(tmp_path, _encoded(_palette(), "PNG", transparency=1))
    assert _pixels(path) == [[[10, 20, 30], [0, 0, 0]]]


def test_rgba_is_laid_over_black(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (200, 100, 50, 0))
    image.putpixel((2, 0), (200, 100, 50, 51))  # a fifth
    assert _pixels(_file(tmp_path, _encoded(image, "PNG"))) == [[[200, 100, 50], [0, 0, 0], [40, 20, 10]]]


def test_grey_with_alpha_and_a_transparent_grey_level_are_laid_over_black(tmp_path: Path) -> None:
    image = Image.new("LA", (1, 1), (200, 51))
    assert _pixels(_file(tmp_path, _encoded(image, "PNG"))) == [[[40, 40, 40]]]
    grey = Image.fromarray(np.array([[7, 200]], dtype=np.uint8))
    assert _pixels(_file(tmp_path, _encoded(grey, "PNG", transparency=200))) == [[[7, 7, 7], [0, 0, 0]]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 255, 255, 0))
    assert _pixels(_file(tmp_path, _encoded(image, "TIFF"))) == [[[255, 255, 255], [255, 0, 0]]]
    jpeg = load_image(_file(tmp_path, _encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(np.asarray(jpeg).astype(int) - [255, 0, 0]).max() <= 4


SIXTEEN_BIT = np.array([[0x0000, 0x12FF, 0xFF00]], dtype=np.uint16)
HIGH_BYTES = [[[0, 0, 0], [0x12, 0x12, 0x12], [0xFF, 0xFF, 0xFF]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_high_byte_is_kept(tmp_path: Path, kind: str) -> None:
    assert _pixels(_file(tmp_path, _encoded(Image.fromarray(SIXTEEN_BIT), kind))) == HIGH_BYTES


def test_of_big_endian_sixteen_bit_tiff_the_high_byte_is_kept(tmp_path: Path) -> None:
    entries = {256: 3, 257: 1, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    fields = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items())
    pixels = SIXTEEN_BIT.astype(">u2").tobytes()
    data = b"MM\0*" + struct.pack(">I", 14) + pixels + struct.pack(">H", len(entries)) + fields + bytes(4)
    assert _pixels(_file(tmp_path, data)) == HIGH_BYTES


def test_of_sixteen_bit_pgm_the_high_byte_is_kept(tmp_path: Path) -> None:
    data = b"P5 3 1 65535\n" + SIXTEEN_BIT.astype(">u2").tobytes()
    assert _pixels(_file(tmp_path, data, "x.pgm")) == HIGH_BYTES


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_are_refused(tmp_path: Path, dtype: type[np.generic]) -> None:
    image = Image.fromarray(np.zeros((2, 2), dtype=dtype))
    with pytest.raises(ImageError, match="32 bits") as caught:
        load_image(_file(tmp_path, _encoded(image, "TIFF"), "x.tif"))
    assert "convert it to 8 or 16 bits" in caught.value.reason


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_6_is_turned_upright(tmp_path: Path, kind: str) -> None:
    lying = np.zeros((32, 64, 3), dtype=np.uint8)
    lying[:, :32] = 250  # the left half is the upper half of the upright picture
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    image = load_image(_file(tmp_path, _encoded(Image.fromarray(lying), kind, exif=_exif(6), **options)))
    assert image.size == (32, 64)
    pixels = np.asarray(image).astype(int)
    assert pixels[:28].min() > 240
    assert pixels[36:].max() < 10


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_used(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (200, 100, 50)), Image.new("RGB", (8, 8), (0, 0, 0))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = _encoded(first, kind, save_all=True, append_images=[second], **options)
    assert _pixels(_file(tmp_path, data))[0][0] == [200, 100, 50]


def test_of_several_pages_the_first_is_used(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (9, 90)]
    assert _pixels(_file(tmp_path, _encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])))[0][0][0] == 9


# Files that are not pictures


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_truncated_anywhere_is_refused(tmp_path: Path, progressive: bool) -> None:
    data = _encoded(_noise(), "JPEG", progressive=progressive)
    lengths = np.linspace(1, len(data) - 1, 100).astype(int).tolist()
    assert len(set(lengths)) == 100
    for length in lengths:
        with pytest.raises(ImageError) as caught:
            load_image(_file(tmp_path, data[:length], "cut.jpg"))
        assert caught.value.path == str(tmp_path / "cut.jpg")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_with_truncated_pixels_is_refused(tmp_path: Path, kind: str) -> None:
    data = _encoded(_noise(), kind)
    # 32: behind its pixels a PNG has a checksum and an end mark of 20 bytes, whose loss harms nobody.
    for length in np.linspace(1, len(data) - 32, 50).astype(int).tolist():
        with pytest.raises(ImageError):
            load_image(_file(tmp_path, data[:length], "cut.png"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "the file is empty", id="zero bytes"),
        pytest.param(b"not a picture\n" * 50, "not one of the formats PNG, JPEG", id="text"),
        pytest.param(bytes(5000), "not one of the formats", id="zeros"),
        pytest.param(_encoded(Image.new("P", (4, 4)), "GIF"), "not one of the formats", id="GIF"),
        pytest.param(_encoded(Image.new("RGB", (16, 16)), "ICO"), "not one of the formats", id="ICO"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of the formats", id="EPS"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "", id="nothing but a PNG signature"),
        pytest.param(b"\xff\xd8\xff\xd9", "", id="nothing but JPEG markers"),
    ],
)
def test_what_is_not_a_picture_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = _file(tmp_path, data)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert reason in caught.value.reason
    assert str(path) in caught.value.what
    assert caught.value.hint


def test_folders_missing_files_and_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "folder.png": "it is a folder",
        "absent.png": "there is no such file",
        "dangling.png": "there is no such file",
        "pipe.png": "the file is empty",
        "x" * 300: "too long",
        "a\0b.png": "null byte",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=reason):
            load_image(tmp_path / name)


def test_the_contents_decide_and_not_the_suffix(tmp_path: Path) -> None:
    path = _file(tmp_path, _encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "BMP"), "photo.jpg")
    assert _pixels(path)[0][0] == [1, 2, 3]
    assert load_image(str(path)).size == (4, 4)


# Sizes


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(5000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _webp_claiming(width: int, height: int) -> bytes:
    """Return a lossless WebP of 34 bytes, one colour."""
    data = bytearray(_encoded(Image.new("RGB", (16, 16), (9, 9, 9)), "WEBP", lossless=True))
    assert data[12:16] == b"VP8L"
    bits = struct.unpack("<I", data[21:25])[0] & 0xF0000000
    data[21:25] = struct.pack("<I", bits | (height - 1) << 14 | (width - 1))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(_png_claiming(20_000, 20_000), "it has more than 50 megapixels", id="PNG bomb"),
        pytest.param(_png_claiming(8000, 6251), "8000x6251 pixels are more than 50 megapixels", id="PNG over 50 MP"),
        pytest.param(_webp_claiming(16_383, 16_383), "it has more than 50 megapixels", id="WebP bomb"),
        pytest.param(_webp_claiming(10_000, 6000), "10000x6000 pixels are more than", id="WebP over 50 MP"),
        pytest.param(b"P5 60000 60000 255\n", "more than 50 megapixels", id="PGM bomb"),
    ],
)
def test_huge_pictures_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = _file(tmp_path, data)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert reason in caught.value.reason
    assert caught.value.path == str(path)


def test_fifty_megapixels_are_not_too_many(tmp_path: Path) -> None:
    # The header passes; then the pixels turn out to be missing.
    with pytest.raises(ImageError, match="damaged"):
        load_image(_file(tmp_path, _png_claiming(8000, 6250)))


_MEMORY = """
import resource, sys
from edge_anomaly_runtime.errors import ImageError
from edge_anomaly_runtime.images import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_image(path)
    except ImageError:
        continue
    sys.exit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_huge_pictures_cost_little_memory(tmp_path: Path) -> None:
    bombs = [
        _file(tmp_path, _png_claiming(20_000, 20_000), "a.png"),
        _file(tmp_path, _png_claiming(8000, 8000), "b.png"),
        _file(tmp_path, _webp_claiming(16_383, 16_383), "c.webp"),
        _file(tmp_path, _webp_claiming(10_000, 6000), "d.webp"),
    ]
    command = [sys.executable, "-c", _MEMORY, *map(str, bombs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000, "kilobytes"


# Damage


def _mutated(rng: np.random.Generator, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        reach = len(damaged) if rng.random() < 0.5 else min(len(damaged), 200)  # headers are where parsers break
        place = int(rng.integers(0, reach))
        match int(rng.integers(0, 4)):
            case 0:
                damaged[place] = int(rng.integers(0, 256))
            case 1:
                del damaged[place : place + int(rng.integers(1, 20))]
            case 2:
                damaged[place:place] = rng.bytes(int(rng.integers(1, 20)))
            case 3:
                damaged[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(damaged)


def _damage(folder: Path, trials: int) -> int:
    """Read `trials` damaged files and return how many were refused; anything but an ImageError ends the test."""
    exif = _exif(6)
    exif[0x010E] = "a description"
    exif[0x011A] = 72.0
    sources = [
        _encoded(_noise(24), "PNG", exif=exif),
        _encoded(_noise(24), "JPEG", exif=exif),
        _encoded(_noise(24), "BMP"),
        _encoded(_noise(24), "TIFF", exif=exif),
    ]
    refused = 0
    for seed in range(trials):
        path = _file(folder, _mutated(np.random.default_rng(seed), sources[seed % len(sources)]))
        try:
            assert load_image(path).mode == "RGB"
        except ImageError as error:
            assert error.path == str(path)
            refused += 1
    return refused


def test_damaged_files_give_a_picture_or_an_image_error(tmp_path: Path) -> None:
    assert 50 < _damage(tmp_path, 200) < 200


@pytest.mark.slow
def test_many_damaged_files_give_a_picture_or_an_image_error(tmp_path: Path) -> None:
    assert _damage(tmp_path, 20_000) > 5000


def test_a_tiff_with_fractions_for_offsets_is_refused(tmp_path: Path) -> None:
    data = bytearray(_encoded(_noise(24), "TIFF"))
    entry = data.index(struct.pack("<HHI", 273, 4, 1))  # StripOffsets, one LONG
    data[entry + 2] = 5  # RATIONAL
    with pytest.raises(ImageError, match="damaged"):
        load_image(_file(tmp_path, bytes(data)))


def test_damaged_exif_gives_a_picture_or_an_image_error(tmp_path: Path) -> None:
    # Tag 280 is a number; here it holds text, which Pillow notices when it writes the tags back.
    tags = struct.pack(">HHI4s", 280, 2, 4, b"abc\0") + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + bytes(4)
    path = _file(tmp_path, _encoded(Image.new("RGB", (8, 16)), "JPEG", exif=exif))
    try:
        assert load_image(path).size == (16, 8)
    except ImageError as error:
        assert error.path == str(path)


# Lists of files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five pictures in two folders, and two files that are none."""
    for name in ("b.png", "a.JPG", "c.tiff", "sub/deep/z.webp", "sub/y.bmp", "notes.txt", "sub/data.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def _names(folder: Path, *sources: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_images(folder / source for source in sources)]


def test_a_folder_is_searched_through_and_sorted(tree: Path) -> None:
    assert _names(tree, ".") == ["a.JPG", "b.png", "c.tiff", "sub/deep/z.webp", "sub/y.bmp"]


def test_a_file_is_taken_as_given_whatever_its_suffix(tree: Path) -> None:
    assert _names(tree, "notes.txt", "b.png") == ["notes.txt", "b.png"]


def test_globs_are_expanded_and_sorted(tree: Path) -> None:
    assert _names(tree, "*.[pt]*g") == ["b.png"]
    assert _names(tree, "**/*.bmp", "c.*") == ["sub/y.bmp", "c.tiff"]
    assert _names(tree, "s?b") == ["sub/deep/z.webp", "sub/y.bmp"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tree: Path) -> None:
    (tree / "part[1].png").write_bytes(b"x")
    (tree / "part1.png").write_bytes(b"x")
    assert _names(tree, "part[1].png") == ["part[1].png"]


def test_sources_keep_their_order(tree: Path) -> None:
    assert _names(tree, "sub", "a.JPG") == ["sub/deep/z.webp", "sub/y.bmp", "a.JPG"]


@pytest.mark.parametrize("absent", ["absent.png", "absent/", "*.xyz"])
def test_a_source_that_is_not_there_is_named(tree: Path, absent: str) -> None:
    with pytest.raises(UsageError, match="There is no file or folder") as caught:
        list_images([tree / "b.png", tree / absent])
    assert str(tree / absent) in caught.value.what


def test_no_images_at_all_is_a_usage_error_that_says_what_was_looked_for(tree: Path) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(UsageError, match=r"No image files in .*empty") as caught:
        list_images([tree / "empty"])
    assert ".png" in caught.value.hint


# Reading many


@pytest.fixture
def three_files(tmp_path: Path) -> list[Path]:
    """A good file, an unreadable one, another good one."""
    return [
        _file(tmp_path, _encoded(Image.new("RGB", (32, 32), (10, 20, 30)), "PNG"), "a.png"),
        _file(tmp_path, b"rubbish", "b.png"),
        _file(tmp_path, _encoded(Image.new("L", (50, 20), 77), "PNG"), "c.png"),
    ]


def test_read_images_skips_and_counts_what_it_cannot_read(three_files: list[Path]) -> None:
    bad: list[ImageError] = []
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for path, pixels in read_images(three_files, Preprocess(16, 24), bad=bad):
        found[path.name] = pixels
    assert list(found) == ["a.png", "c.png"]
    assert {pixels.shape for pixels in found.values()} == {(16, 24, 3)}
    assert found["a.png"][0, 0].tolist() == [10, 20, 30]
    assert found["c.png"][0, 0].tolist() == [77, 77, 77]
    assert [error.path for error in bad] == [str(three_files[1])]


def test_read_images_with_strict_stops_at_the_first_unreadable_file(three_files: list[Path]) -> None:
    bad: list[ImageError] = []
    images = read_images(three_files, Preprocess(16, 16), bad=bad, strict=True)
    assert next(images)[0] == three_files[0]
    with pytest.raises(ImageError, match=r"b\.png"):
        next(images)
    assert bad == []


def test_read_images_reads_one_at_a_time(three_files: list[Path]) -> None:
    images = read_images(three_files, Preprocess(16, 16), bad=[])
    next(images)
    three_files[2].unlink()
    with pytest.raises(StopIteration):
        next(images)


def test_file_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    assert file_sha256(_file(tmp_path, b"abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    long = np.random.default_rng(0).bytes(3_000_001)
    assert file_sha256(_file(tmp_path, long)) == hashlib.sha256(long).hexdigest()
