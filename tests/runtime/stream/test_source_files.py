"""Folders and globs: every image, in order, and a damaged one is left out, not made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.source import EndOfFile, UnusablePicture
from edge_anomaly_runtime.stream.source_files import FilesSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("b.png", "a.png", "c.jpg")):
        Image.new("RGB", (20 + number, 10), (number * 50, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def names(source: FilesSource) -> list[str]:
    source.open()
    found: list[str] = []
    while True:
        try:
            picture = source.read(0.0)
        except EndOfFile:
            return found
        except UnusablePicture as error:
            found.append(error.what)
            continue
        assert picture is not None
        found.append(Path(picture.path).name)


def test_a_folder_gives_its_images_sorted(folder: Path) -> None:
    assert names(FilesSource(str(folder))) == ["a.png", "b.png", "c.jpg"]


def test_a_glob_gives_what_it_matches(folder: Path) -> None:
    assert names(FilesSource(f"{folder}/*.png")) == ["a.png", "b.png"]


def test_pictures_are_rgb_uint8_contiguous(folder: Path) -> None:
    source = FilesSource(str(folder / "a.png"))
    source.open()
    picture = source.read(0.0)

    assert picture is not None
    assert picture.pixels.shape == (10, 21, 3) and picture.pixels.dtype == np.uint8
    assert picture.pixels.flags.c_contiguous and picture.pixels[0, 0].tolist() == [50, 0, 0]
    assert picture.is_keyframe and picture.pts is None


def test_a_damaged_image_is_reported_and_the_next_one_follows(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])

    found = names(FilesSource(str(folder)))

    assert (found[0], found[2]) == ("a.png", "c.jpg")
    assert "b.png" in found[1] and "Cannot use image" in found[1]


def test_a_second_opening_starts_over_and_sees_new_files(folder: Path) -> None:
    source = FilesSource(str(folder))
    names(source)
    Image.new("RGB", (20, 10)).save(folder / "0.png")

    assert names(source)[0] == "0.png"


def test_an_empty_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No image files"):
        FilesSource(str(tmp_path)).open()
